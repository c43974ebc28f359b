"""Hidden units can be put in another order: the same function, far away in parameters."""

import pytest
import torch
from torch import nn

import pdiff_hf
from pdiff_hf import ParameterLayout, Task, load_task
from pdiff_hf.networks.predictor import Predictor
from pdiff_hf.networks.symmetry import Alignment, aligned_distances
from pdiff_hf.tasks.digits import DigitsResNet
from pdiff_hf.tasks.resnet import ResNet


CHAINS = {"digits-convnet": [8, 16], "digits-mlp": [32]}
EVERY_CHAIN = pytest.mark.parametrize("name", CHAINS)


def random_vectors(name: str, count: int) -> tuple[ParameterLayout, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        states = [load_task(name).build_network().state_dict() for _ in range(count)]
    layout = ParameterLayout.from_state_dict(states[0])
    return layout, torch.stack([layout.flatten(state) for state in states])


def shuffled(alignment: Alignment, vector: torch.Tensor, seed: int) -> torch.Tensor:
    """The same function with the units of every hidden layer in a random order."""
    generator = torch.Generator().manual_seed(seed)
    for layer, width in enumerate(alignment.widths):
        vector = alignment.permute(vector, layer, torch.randperm(width, generator=generator))
    return vector


def outputs(name: str, layout: ParameterLayout, vector: torch.Tensor) -> torch.Tensor:
    """By the network itself."""
    task = load_task(name)
    network = task.build_network().double()
    network.load_state_dict({key: value.double() for key, value in layout.unflatten(vector[None])[0].items()})
    with torch.no_grad():
        return network(task.data("test")[0][:100].double())


@EVERY_CHAIN
def test_permuting_units_leaves_what_the_network_says(name):
    layout, (vector,) = random_vectors(name, 1)
    alignment = Alignment(layout)
    assert alignment.widths == CHAINS[name]
    before = vector.clone()
    permuted = shuffled(alignment, vector, 0)
    assert torch.equal(vector, before)
    assert (permuted != vector).float().mean() > 0.5
    assert torch.equal(permuted.sort().values, vector.sort().values)
    # Sums in another order, in double precision.
    torch.testing.assert_close(outputs(name, layout, permuted), outputs(name, layout, vector), rtol=1e-10, atol=1e-12)


def test_a_permutation_does_what_is_done_by_hand():
    layout, (vector,) = random_vectors("digits-mlp", 1)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    before, after = layout.unflatten(torch.stack([vector, Alignment(layout).permute(vector, 0, order)]))
    assert torch.equal(after["1.weight"], before["1.weight"][order])
    assert torch.equal(after["1.bias"], before["1.bias"][order])
    assert torch.equal(after["3.weight"], before["3.weight"][:, order])
    assert torch.equal(after["3.bias"], before["3.bias"])


@EVERY_CHAIN
@pytest.mark.parametrize("seed", range(5))
def test_aligning_undoes_a_permutation_exactly(name, seed):
    layout, (vector, reference) = random_vectors(name, 2)
    alignment = Alignment(layout)
    assert torch.equal(alignment.align(shuffled(alignment, vector, seed), vector), vector)
    assert torch.equal(alignment.align(vector, vector), vector)
    # Never farther than it was, and the same whichever order the units had.
    aligned = alignment.align(vector, reference)
    assert (aligned - reference).norm() < (vector - reference).norm()


@EVERY_CHAIN
def test_aligned_distances_of_shuffled_copies_are_zero(name):
    layout, vectors = random_vectors(name, 4)
    alignment, vectors = Alignment(layout), vectors.double()
    copies = torch.stack([shuffled(alignment, vector, i) for i, vector in enumerate(vectors)])
    candidates = torch.tensor([[1, 0], [1, 3], [2, 0], [0, 3]])
    assert (copies - vectors).norm(dim=1).min() > 1
    assert aligned_distances(alignment, copies, vectors, candidates)[0].max() < 1e-6


@EVERY_CHAIN
def test_a_chain_is_proved_by_its_predictions(name):
    layout, (vector,) = random_vectors(name, 1)
    predict = Predictor(load_task(name), layout, torch.device("cpu"))
    assert Alignment(layout).holds(predict, vector, load_task(name).data("test")[0][:50])


def test_batch_norms_move_with_their_layer():
    def build():
        return nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build()
        for value in network.state_dict().values():
            if value.is_floating_point():
                value.uniform_(0.5, 2)
        layout = ParameterLayout.from_state_dict(network.state_dict())
    vector = layout.flatten(network.state_dict())
    permuted = shuffled(Alignment(layout), vector, 0)
    assert not torch.equal(permuted, vector)
    other = build()
    other.load_state_dict(layout.unflatten(permuted[None])[0])
    inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(other.eval()(inputs), network.eval()(inputs))


@pytest.mark.parametrize("patterns", [("*",), ("layer2.1.bn*",)], ids=["whole network", "two layers"])
def test_a_residual_network_is_no_chain(patterns):
    task = load_task("digits-resnet")
    layout = ParameterLayout.from_state_dict(task.build_network().state_dict(), patterns)
    with pytest.raises(ValueError, match=r"belongs to no layer|does not take the outputs|no hidden units"):
        Alignment(layout)


class Skipping(nn.Module):
    """Its tensors look like a chain, but a sum goes around the middle layer, so that units cannot move freely."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, features):
        hidden = torch.tanh(self.first(features))
        return self.third(hidden + torch.tanh(self.second(hidden)))


class SkippingTask(Task):
    """Whether the sum of the features is positive."""

    def build_network(self):
        return Skipping()

    def data(self, split):
        inputs = torch.randn(60, 4, generator=torch.Generator().manual_seed(len(split)))
        return inputs, (inputs.sum(1) > 0).long()


def random_states(task: Task, count: int, seed: int) -> list[dict]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return [task.build_network().state_dict() for _ in range(count)]


def test_what_only_looks_like_a_chain_is_not_aligned():
    task = SkippingTask()
    layout = ParameterLayout.from_state_dict(task.build_network().state_dict())
    vector = layout.flatten(task.build_network().state_dict())
    alignment = Alignment(layout)
    assert not alignment.holds(Predictor(task, layout, torch.device("cpu")), vector, task.data("test")[0])
    report = pdiff_hf.evaluate(task, trained=random_states(task, 3, 0), generated=random_states(task, 2, 1))
    assert report["nearest_l2"]["aligned"] is None


class SmallResNet(DigitsResNet):
    """A narrow one, tested on little."""

    patterns = ("layer1.1.bn*",)

    def build_network(self):
        return ResNet(in_channels=1, channels=(2,), num_classes=10)

    def data(self, split):
        return tuple(tensor[:40] for tensor in super().data(split))


def test_a_report_on_residual_networks_has_no_aligned_distance():
    task = SmallResNet()
    (base,) = random_states(task, 1, 0)

    def zoo(seed):
        noise = torch.Generator().manual_seed(seed)
        own = [name for name in base if name.startswith("layer1.1.bn") and base[name].is_floating_point()]
        return [
            {**base, **{name: base[name] + 0.1 * torch.rand(base[name].shape, generator=noise) for name in own}}
            for _ in range(3)
        ]

    report = pdiff_hf.evaluate(task, trained=zoo(0), generated=zoo(1))
    assert report["nearest_l2"]["aligned"] is None
    assert report["nearest_l2"]["generated"]["mean"] > 0


def test_permuted_copies_of_training_networks_are_found_to_be_copies(digits_zoo):
    alignment = Alignment(digits_zoo.layout)
    permuted = [shuffled(alignment, digits_zoo[i], i) for i in range(0, 40, 3)]
    report = pdiff_hf.evaluate(trained=digits_zoo, generated=digits_zoo.layout.unflatten(torch.stack(permuted)))
    nearest = report["nearest_l2"]
    assert nearest["generated"]["min"] > 10 * nearest["trained"]["max"]
    assert nearest["aligned"]["generated"]["max"] < 1e-6
    # Matching neighbours of one trajectory changes nothing: they are aligned as they are.
    assert nearest["aligned"]["trained"]["mean"] == pytest.approx(nearest["trained"]["mean"], rel=1e-3)
    assert report["groups"]["generated"]["maximum_similarity"]["mean"] == pytest.approx(1, abs=0.005)
    assert report["verdict"]["copied"] == 1
    assert report["verdict"]["label"] == "memorized"
