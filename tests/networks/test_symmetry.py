# Over 400 lines: one subject, whose architectures all tests share.
"""Hidden units can be put in another order and another scale: the same function, far away in parameters."""

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.nn import functional as F

import pdiff_hf
from pdiff_hf import ParameterLayout, Task, load_task
from pdiff_hf.networks.canonical import aligned_distances
from pdiff_hf.networks.predictor import Predictor
from pdiff_hf.networks.symmetry import Symmetry, UnknownSymmetryError, _matched
from pdiff_hf.tasks.digits import DigitsResNet
from pdiff_hf.tasks.resnet import ResNet

from .test_stacked import CalledTwice, Tied


class Residual(nn.Module):
    """A residual stream of linear layers, with layer norm or without."""

    def __init__(self, width=6, norm=False):
        super().__init__()
        self.stem, self.head = nn.Linear(5, width), nn.Linear(width, 3)
        self.inner, self.outer = nn.Linear(width, 9), nn.Linear(9, width)
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()

    def forward(self, inputs):
        stream = self.stem(inputs)
        stream = stream + self.outer(F.relu(self.inner(self.norm(stream))))
        return self.head(stream)


class Skipping(nn.Module):
    """Both sides of the middle layer are the same units."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, features):
        hidden = torch.tanh(self.first(features))
        return self.third(hidden + torch.tanh(self.second(hidden)))


class Functional(nn.Module):
    """Flattens and pools in the forward pass."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc, self.out = nn.Conv2d(1, 3, 3), nn.Linear(12, 4), nn.Linear(4, 2)

    def forward(self, images):
        hidden = F.max_pool2d(F.relu(self.conv(images)), 2)
        return self.out(torch.relu(self.fc(hidden.view(hidden.size(0), -1))))


def sequential(*layers):
    return lambda: nn.Sequential(*(layer() for layer in layers))


MLP3 = sequential(
    lambda: nn.Linear(5, 7),
    nn.ReLU,
    lambda: nn.Linear(7, 6),
    nn.ReLU,
    lambda: nn.Linear(6, 4),
    nn.ReLU,
    lambda: nn.Linear(4, 3),
)
NORMED = sequential(lambda: nn.Linear(5, 7, bias=False), lambda: nn.BatchNorm1d(7), nn.ReLU, lambda: nn.Linear(7, 3))
NORM_AFTER = sequential(lambda: nn.Linear(5, 7), nn.ReLU, lambda: nn.BatchNorm1d(7), lambda: nn.Linear(7, 3))
SMOOTH = sequential(lambda: nn.Linear(5, 7), nn.GELU, lambda: nn.Linear(7, 6), nn.ReLU, lambda: nn.Linear(6, 3))
FLAT_NORM = sequential(
    lambda: nn.Conv2d(1, 3, 3), nn.ReLU, nn.Flatten, lambda: nn.BatchNorm1d(48), lambda: nn.Linear(48, 4), nn.ReLU,
    lambda: nn.Linear(4, 2),
)  # fmt: skip
FEATURES, IMAGES = (9, 5), (4, 1, 6, 6)
# How to build it, the shape of its inputs, the units of its groups, and which of these can be scaled.
ARCHITECTURES = {
    "one hidden layer": (sequential(lambda: nn.Linear(5, 7), nn.ReLU, lambda: nn.Linear(7, 3)), FEATURES, [7], [True]),
    "three hidden layers": (MLP3, FEATURES, [7, 6, 4], [True] * 3),
    "batch norm": (NORMED, FEATURES, [7], [True]),
    "batch norm after ReLU": (NORM_AFTER, FEATURES, [7], [False]),
    "GELU, then ReLU": (SMOOTH, FEATURES, [7, 6], [False, True]),
    "residual stream": (Residual, FEATURES, [6, 9], [True, True]),
    "residual stream, layer norm": (lambda: Residual(norm=True), FEATURES, [6, 9], [False, True]),
    "both sides the same": (Skipping, FEATURES, [6], [False]),
    "functional": (Functional, IMAGES, [3, 4], [True, True]),
    "batch norm of flattened channels": (FLAT_NORM, IMAGES, [3, 4], [False, True]),
    "ResNet": (lambda: ResNet(1, (4, 6), 3), (3, 1, 8, 8), [4, 4, 4, 6, 6, 6], [True] * 6),
    "digits-convnet": (lambda: load_task("digits-convnet").build_network(), (9, 1, 8, 8), [8, 16], [True, True]),
    "digits-mlp": (lambda: load_task("digits-mlp").build_network(), (9, 1, 8, 8), [32], [True]),
}
every = pytest.mark.parametrize("name", ARCHITECTURES)


def random_network(name: str, seed: int) -> nn.Module:
    """One whose normalizations are random too."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = ARCHITECTURES[name][0]().double().eval()
        for key, value in network.state_dict().items():
            if value.ndim == 1 and value.is_floating_point():
                value.uniform_(0.5, 2) if "bias" not in key else value.normal_()
    return network


def example(name: str) -> torch.Tensor:
    return torch.randn(ARCHITECTURES[name][1], generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def of(name: str, count: int) -> tuple[Symmetry, ParameterLayout, torch.Tensor]:
    """The symmetry of an architecture, its layout, and vectors of random networks in double precision."""
    networks = [random_network(name, seed) for seed in range(count)]
    layout = ParameterLayout.from_state_dict(networks[0].float().state_dict())
    rows = [
        torch.cat([random_network(name, seed).state_dict()[key].flatten() for key in layout.slices])
        for seed in range(count)
    ]
    symmetry = Symmetry(random_network(name, 0), layout, example(name))
    return symmetry, layout, torch.stack(rows)


def outputs(name: str, layout: ParameterLayout, vector: torch.Tensor) -> torch.Tensor:
    """By the network itself, in double precision."""
    network = random_network(name, 0)
    state_dict = network.state_dict()
    for key, place in layout.slices.items():
        state_dict[key].copy_(vector[place].view(state_dict[key].shape))
    with torch.no_grad():
        return network(example(name))


def shuffled(symmetry: Symmetry, vectors: torch.Tensor, seed: int) -> torch.Tensor:
    """The same functions, with the units of every group in random orders."""
    generator = torch.Generator().manual_seed(seed)
    for group in symmetry.groups:
        orders = torch.stack([torch.randperm(group.units, generator=generator) for _ in vectors])
        vectors = symmetry.permute(vectors, group, orders)
    return vectors


def rescaled(symmetry: Symmetry, vectors: torch.Tensor, seed: int) -> torch.Tensor:
    """The same functions, with the units of every group that can be scaled in random scales."""
    from pdiff_hf.networks.symmetry import _put, _units

    generator, vectors = torch.Generator().manual_seed(seed), vectors.clone()
    for group in symmetry.groups:
        scales = 10 ** (torch.rand(len(vectors), group.units, generator=generator, dtype=torch.float64) - 0.5)
        for members, factor in ((group.producers, scales), (group.consumers, 1 / scales)):
            for member in members:
                _put(vectors, member, _units(vectors, member) * factor[:, :, None])
    return vectors


@every
def test_hidden_units_are_found(name):
    symmetry, _, _ = of(name, 1)
    assert [group.units for group in symmetry.groups] == ARCHITECTURES[name][2]
    assert [bool(group.producers) for group in symmetry.groups] == ARCHITECTURES[name][3]


@every
def test_order_and_scale_leave_what_the_network_says(name):
    symmetry, layout, vectors = of(name, 1)
    before = vectors.clone()
    for changed in (
        shuffled(symmetry, vectors, 0),
        symmetry.balance(vectors),
        rescaled(symmetry, vectors, 1),
        symmetry.canonical(shuffled(symmetry, vectors, 1), vectors[0]),
    ):
        torch.testing.assert_close(
            outputs(name, layout, changed[0]), outputs(name, layout, vectors[0]), rtol=1e-9, atol=1e-11
        )
    assert torch.equal(vectors, before)
    permuted = shuffled(symmetry, vectors, 0)
    assert not torch.equal(permuted, vectors)
    assert torch.equal(permuted.sort().values, vectors.sort().values)


@every
def test_the_canonical_form_undoes_order_and_scale(name):
    if name == "both sides the same":
        pytest.skip("matching is a guess there")
    symmetry, _, vectors = of(name, 3)
    changed = rescaled(symmetry, shuffled(symmetry, vectors, 3), 4)
    for vector, other in zip(vectors, changed, strict=True):
        expected = symmetry.balance(vector[None])
        found = symmetry.canonical(other[None], expected[0])
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


@every
def test_as_many_networks_are_aligned_at_a_time_as_memory_holds(name, monkeypatch):
    symmetry, _, vectors = of(name, 5)
    expected = symmetry.align(vectors, vectors[0])
    monkeypatch.setattr("pdiff_hf.networks.symmetry.MATCHED_VALUES", 1)
    torch.testing.assert_close(symmetry.align(vectors, vectors[0]), expected)


@every
def test_aligning_never_moves_away(name):
    symmetry, _, vectors = of(name, 6)
    reference = symmetry.reference(vectors)
    balanced = symmetry.balance(shuffled(symmetry, vectors, 0))
    aligned = symmetry.align(balanced, reference)
    assert ((aligned - reference).norm(dim=1) <= (balanced - reference).norm(dim=1) + 1e-9).all()
    assert (aligned - reference).norm() < (balanced - reference).norm()
    # Each by itself, whatever else is aligned beside it.
    torch.testing.assert_close(symmetry.align(balanced[3:4], reference)[0], aligned[3])


@pytest.mark.parametrize("noise", [0.01, 3.0])
def test_units_are_matched_as_the_search_over_all_orders_does(noise):
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(20, 8, generator=generator) * torch.rand(20, 1, generator=generator)
    orders = torch.stack([torch.randperm(20, generator=generator) for _ in range(10)])
    units = reference[orders] + noise * torch.randn(10, 20, 8, generator=generator)
    products = reference @ units.mT
    found = _matched(products - units.square().sum(2)[:, None] / 2)
    for one, order in zip(products, found, strict=True):
        rows, best = linear_sum_assignment(one.numpy(), maximize=True)
        assert one[range(20), order].sum().item() == pytest.approx(one.numpy()[rows, best].sum(), rel=1e-5)
    assert torch.equal(found, orders.argsort(1)) == (noise < 1)


def test_networks_that_are_near_are_aligned_without_a_search(monkeypatch):
    """The search takes minutes for ten thousand units."""
    network = nn.Sequential(nn.Linear(16, 3000), nn.ReLU(), nn.Linear(3000, 2))
    layout = ParameterLayout.from_state_dict(network.state_dict())
    vector = layout.flatten(network.state_dict())
    symmetry = Symmetry(network, layout, torch.randn(1, 16))
    shuffled = symmetry.shuffled(vector, torch.Generator().manual_seed(0))
    monkeypatch.setattr("scipy.optimize.linear_sum_assignment", None)
    torch.testing.assert_close(symmetry.align(shuffled[None], vector)[0], vector)


def test_balanced_units_have_incoming_and_outgoing_weights_of_one_norm():
    symmetry, layout, vectors = of("three hidden layers", 2)
    balanced = symmetry.balance(rescaled(symmetry, vectors, 0))
    torch.testing.assert_close(balanced, symmetry.balance(vectors), rtol=1e-5, atol=1e-7)
    weights = {key: balanced[0][place] for key, place in layout.slices.items()}
    incoming = weights["0.weight"].view(7, 5).square().sum(1) + weights["0.bias"].square()
    outgoing = weights["2.weight"].view(6, 7).square().sum(0)
    torch.testing.assert_close(incoming, outgoing, rtol=1e-5, atol=0)
    assert (balanced.square().sum(1) <= vectors.square().sum(1) + 1e-9).all()


def test_a_permutation_does_what_is_done_by_hand():
    symmetry, layout, vectors = of("digits-mlp", 1)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    permuted = symmetry.permute(vectors, symmetry.groups[0], order)
    before, after = layout.unflatten(torch.cat([vectors, permuted]))
    assert torch.equal(after["1.weight"], before["1.weight"][order])
    assert torch.equal(after["1.bias"], before["1.bias"][order])
    assert torch.equal(after["3.weight"], before["3.weight"][:, order])
    assert torch.equal(after["3.bias"], before["3.bias"])


def test_units_without_weights_stay():
    symmetry, layout, vectors = of("one hidden layer", 1)
    vectors[0, layout.slices["2.weight"]] = 0
    assert torch.equal(symmetry.balance(vectors), vectors)


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.out = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, inputs):
        return self.out(torch.matmul(self.query(inputs), inputs.T @ inputs))


class Branching(nn.Linear):
    def forward(self, inputs):
        return super().forward(inputs) if inputs.sum() > 0 else -super().forward(inputs)


@pytest.mark.parametrize(
    ("build", "shape", "message"),
    [
        (Attending, FEATURES, "getattr is not known to leave hidden units apart"),
        (lambda: Branching(5, 3), FEATURES, "cannot be traced"),
        (sequential(lambda: nn.Linear(5, 3)), FEATURES, "no hidden units"),
        (sequential(lambda: nn.Linear(5, 6), lambda: nn.Softmax(-1), lambda: nn.Linear(6, 3)), FEATURES, "Softmax"),
        (
            sequential(lambda: nn.Linear(5, 6), lambda: nn.GroupNorm(2, 6), lambda: nn.Linear(6, 3)),
            FEATURES,
            "GroupNorm",
        ),
        (
            sequential(
                lambda: nn.Conv2d(1, 4, 3), lambda: nn.Conv2d(4, 4, 3, groups=4), nn.Flatten, lambda: nn.Linear(16, 2)
            ),
            IMAGES,
            "a convolution of 4 groups",
        ),
        (sequential(lambda: nn.Linear(6, 4), nn.ReLU, nn.Flatten, lambda: nn.Linear(24, 2)), IMAGES, "several places"),
        (CalledTwice, (9, 6), "no hidden units"),
        (Tied, (9, 6), "no hidden units"),
    ],
)
def test_what_is_not_recognized_is_refused_with_the_reason(build, shape, message):
    network = build()
    layout = ParameterLayout.from_state_dict(network.state_dict())
    with pytest.raises(UnknownSymmetryError, match=message):
        Symmetry(network, layout, torch.randn(shape))


def test_units_of_frozen_tensors_stay():
    network = MLP3()
    layout = ParameterLayout.from_state_dict(network.state_dict(), ["0.*", "2.*"])
    assert [group.units for group in Symmetry(network, layout, torch.randn(FEATURES)).groups] == [7]
    layout = ParameterLayout.from_state_dict(network.state_dict(), ["2.*"])
    with pytest.raises(UnknownSymmetryError, match="no hidden units whose tensors are all generated"):
        Symmetry(network, layout, torch.randn(FEATURES))


# ---- in an evaluation


def test_aligned_distances_of_shuffled_copies_are_zero():
    symmetry, _, vectors = of("digits-convnet", 4)
    copies = shuffled(symmetry, vectors, 0)
    candidates = torch.tensor([[1, 0], [1, 3], [2, 0], [0, 3]])
    assert (copies - vectors).norm(dim=1).min() > 1
    assert aligned_distances(symmetry, copies, vectors, candidates)[0].max() < 1e-6


class SkippingTask(Task):
    """Whether the sum of the features is positive, of networks whose forward pass draws units by place."""

    def build_network(self):
        return Skipping()

    def data(self, split):
        inputs = torch.randn(60, 5, generator=torch.Generator().manual_seed(len(split)))
        return inputs, (inputs.sum(1) > 0).long()


class ByPlace(nn.Module):
    """Its second layer is written into the first one's buffers: no trace shows that units have places."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 3)
        self.first.register_forward_hook(lambda module, args, output: output * torch.arange(1, 7).to(output))

    def forward(self, features):
        return self.second(self.first(features).relu())


def random_states(task: Task, count: int, seed: int) -> list[dict]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return [task.build_network().state_dict() for _ in range(count)]


def test_what_the_forward_pass_hides_is_found_by_its_predictions():
    task = type("ByPlaceTask", (SkippingTask,), {"build_network": lambda self: ByPlace()})()
    network = task.build_network()
    layout = ParameterLayout.from_state_dict(network.state_dict())
    inputs = task.data("test")[0]
    symmetry = Symmetry(network, layout, inputs[:1])
    predict = Predictor(task, layout, torch.device("cpu"))
    assert not symmetry.holds(predict, layout.flatten(network.state_dict()), inputs)
    report = pdiff_hf.evaluate(task, trained=random_states(task, 3, 0), generated=random_states(task, 2, 1))
    assert report["nearest_l2"]["aligned"] is None


class SmallResNet(DigitsResNet):
    """A narrow one, tested on little."""

    patterns = ("layer1.1.bn*",)

    def build_network(self):
        return ResNet(in_channels=1, channels=(2,), num_classes=10)

    def data(self, split):
        return tuple(tensor[:40] for tensor in super().data(split))


def test_a_report_on_residual_networks_has_an_aligned_distance():
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
    nearest = report["nearest_l2"]
    assert 0 < nearest["aligned"]["generated"]["mean"] <= nearest["generated"]["mean"]


def test_permuted_copies_of_training_networks_are_found_to_be_copies(digits_zoo):
    task = load_task("digits-convnet")
    symmetry = Symmetry(task.build_network(), digits_zoo.layout, task.data("test")[0][:1])
    permuted = shuffled(symmetry, digits_zoo.vectors(range(0, 40, 3)), 0)
    report = pdiff_hf.evaluate(trained=digits_zoo, generated=digits_zoo.layout.unflatten(permuted))
    nearest = report["nearest_l2"]
    assert nearest["generated"]["min"] > 10 * nearest["trained"]["max"]
    assert nearest["aligned"]["generated"]["max"] < 1e-6
    # Matching neighbours of one trajectory changes nothing: they are aligned as they are, but for the scale of units.
    balanced = symmetry.balance(digits_zoo.vectors()).double()
    expected = torch.cdist(balanced, balanced).fill_diagonal_(torch.inf).amin(1).mean().item()
    assert nearest["aligned"]["trained"]["mean"] == pytest.approx(expected, rel=1e-3)
    assert report["groups"]["generated"]["maximum_similarity"]["mean"] == pytest.approx(1, abs=0.005)
    assert report["verdict"]["copied"] == 1
    assert report["verdict"]["label"] == "memorized"
