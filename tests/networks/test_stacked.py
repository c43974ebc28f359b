# Over 400 lines: all of it shares one table of architectures.
"""Many networks at once predict what each of them predicts by itself."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pdiff_hf import ParameterLayout, Task, load_task
from pdiff_hf.evaluation.equal_time import train_as_long
from pdiff_hf.networks.predictor import Predictor
from pdiff_hf.networks.stacked import NotStackableError, StackedNetwork, stack
from pdiff_hf.tasks.digits import DigitsMLP


CPU = torch.device("cpu")
# float32 sums in another order: of a few hundred terms of size 1.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def random_states(build, count: int = 5) -> list[dict]:
    """Networks with random weights, and random statistics of batch norms."""
    states = []
    for seed in range(count):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = build()
            state = network.state_dict()
            for name, value in state.items():
                if name.endswith("running_var"):
                    value.uniform_(0.5, 2)
                elif name.endswith("running_mean"):
                    value.normal_()
        states.append(state)
    return states


def in_a_loop(build, states: list[dict], inputs: torch.Tensor) -> torch.Tensor:
    outputs = []
    for state in states:
        network = build().eval()
        network.load_state_dict(state)
        with torch.no_grad():
            outputs.append(network(inputs.clone()))
    return torch.stack(outputs)


def at_once(build, states: list[dict], inputs: torch.Tensor) -> torch.Tensor:
    """By `StackedNetwork` itself, whether or not that is faster."""
    layout = ParameterLayout.from_state_dict(states[0])
    weights = stack(layout, torch.stack([layout.flatten(state) for state in states]))
    with torch.inference_mode():
        return StackedNetwork(build().eval())(weights, inputs[None])


class TaskOf(Task):
    """A task of any network and inputs."""

    def __init__(self, build, inputs):
        self.build, self.inputs = build, inputs

    def build_network(self):
        return self.build()

    def data(self, split):
        return self.inputs, torch.zeros(len(self.inputs), dtype=torch.long)


def predictor(build, states, inputs, task_class=TaskOf) -> tuple[Predictor, torch.Tensor]:
    layout = ParameterLayout.from_state_dict(states[0])
    return (
        Predictor(task_class(build, inputs), layout, CPU),
        torch.stack([layout.flatten(state) for state in states]),
    )


def assert_predictor_is_right(build, inputs, states=None, stacked: bool | None = None) -> None:
    """Whichever way it goes, and with all its tricks: blocks of examples, several chunks of networks."""
    states = random_states(build) if states is None else states
    predict, vectors = predictor(build, states, inputs)
    expected = in_a_loop(build, states, inputs).softmax(-1)
    for _ in range(2):
        torch.testing.assert_close(predict(vectors, inputs), expected, **TOLERANCE)
    if stacked is not None:
        assert (predict.plan is not None) is stacked


IMAGES = torch.randn(7, 3, 11, 9, generator=torch.Generator().manual_seed(0))
FEATURES = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))


class Residual(nn.Module):
    """Sums and functions of the forward's own code."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.head = nn.Linear(4, 5)

    def forward(self, images):
        hidden = F.relu(self.bn(self.stem(images)))
        hidden = torch.add(hidden, self.conv(hidden), alpha=0.5) * 2
        hidden += self.conv(hidden).tanh()
        return self.head(hidden.mean((-2, -1)))


class ReluInPlace(nn.Module):
    """The branch that is added is the one before the activation by its name, and the one after it in memory."""

    def __init__(self, inplace: bool):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 8)
        self.relu, self.head = nn.ReLU(inplace=inplace), nn.Linear(8, 3)

    def forward(self, features):
        hidden = self.first(features)
        branch = self.second(self.relu(hidden))
        return self.head(self.relu(hidden + branch))


class Tied(nn.Module):
    """Two layers share one weight."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.second.weight = self.first.weight

    def forward(self, features):
        return self.head(torch.relu(self.second(torch.relu(self.first(features)))))


class CalledTwice(nn.Module):
    """One layer, used twice."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, features):
        return self.head(torch.relu(self.layer(torch.relu(self.layer(features)))))


KNOWN = {
    "stride": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.Flatten(), nn.Linear(80, 5)), IMAGES),
    "dilation": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, dilation=2), nn.Flatten(), nn.Linear(140, 5)), IMAGES),
    "padding": (lambda: nn.Sequential(nn.Conv2d(3, 2, 3, padding=(2, 0)), nn.Flatten(), nn.Linear(182, 5)), IMAGES),
    "asymmetric kernel": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, (5, 2), stride=(2, 3), padding=(1, 2), dilation=(2, 1), bias=False),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(48, 5),
        ),
        IMAGES,
    ),
    "one by one kernel": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1, stride=3), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(48, 5)
        ),
        IMAGES,
    ),
    "average pool": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.AvgPool2d((3, 2)), nn.Flatten(), nn.Linear(36, 5)),
        IMAGES,
    ),
    "overlapping average pool": (
        lambda: nn.Sequential(nn.AvgPool2d(3, stride=2), nn.Flatten(), nn.Linear(60, 5)),
        IMAGES,
    ),
    "adaptive pool": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)),
        IMAGES,
    ),
    "max pool with another stride": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d((3, 2), stride=(2, 3)), nn.Flatten(), nn.Linear(32, 5)),
        IMAGES,
    ),
    "dropout": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.ReLU(inplace=True), nn.Linear(8, 3)),
        FEATURES,
    ),
    "batch norm": (
        lambda: nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 8), nn.BatchNorm1d(8, affine=False), nn.Linear(8, 3)),
        FEATURES,
    ),
    "residual sums": (Residual, IMAGES),
    "branch reused": (lambda: ReluInPlace(inplace=False), FEATURES),
    "branch reused after an in-place relu": (lambda: ReluInPlace(inplace=True), FEATURES),
    "tied weights": (Tied, FEATURES),
    "layer called twice": (CalledTwice, FEATURES),
    "pointwise modules": (
        lambda: nn.Sequential(
            *(nn.LeakyReLU(0.2), nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6), nn.SiLU(), nn.Linear(6, 6), nn.ELU()),
            *(nn.Linear(6, 6), nn.Softplus(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Identity()),
            *(nn.Sigmoid(), nn.Linear(6, 3), nn.Hardswish()),
        ),
        FEATURES,
    ),
}


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("count", [1, 5])
def test_stacked_networks_give_what_each_gives(name, count):
    build, inputs = KNOWN[name]
    states = random_states(build, count)
    torch.testing.assert_close(
        at_once(build, states, inputs), in_a_loop(build, states, inputs), **TOLERANCE, check_stride=False
    )
    assert_predictor_is_right(build, inputs, states)


def test_stacked_networks_leave_their_inputs_as_they_are():
    build, inputs = KNOWN["branch reused after an in-place relu"]
    before = inputs.clone()
    assert_predictor_is_right(build, inputs)
    at_once(build, random_states(build), inputs[:1])
    assert torch.equal(inputs, before)


@pytest.mark.parametrize("name", ["digits-convnet", "digits-mlp", "digits-resnet"])
def test_built_in_tasks_have_a_stacked_form(name):
    task = load_task(name)
    states = random_states(task.build_network)
    inputs = task.data("test")[0][:50]
    torch.testing.assert_close(
        at_once(task.build_network, states, inputs),
        in_a_loop(task.build_network, states, inputs),
        **TOLERANCE,
        check_stride=False,
    )


@pytest.mark.parametrize("name", ["digits-convnet", "digits-mlp", "digits-resnet"])
def test_the_predictor_agrees_on_a_whole_split(name):
    """597 examples are several blocks and a rest; the generated part of the ResNet is two of its layers."""
    task = load_task(name)
    states = random_states(task.build_network, 3)
    layout = ParameterLayout.from_state_dict(states[0], task.patterns)
    inputs = task.data("test")[0]
    vectors = torch.stack([layout.flatten(state) for state in states])
    frozen = layout.frozen_state_dict()
    states = [{**state, **frozen} for state in states]
    expected = in_a_loop(task.build_network, states, inputs).softmax(-1)
    torch.testing.assert_close(Predictor(task, layout, CPU)(vectors, inputs), expected, **TOLERANCE)


def test_small_networks_run_at_once():
    task = load_task("digits-mlp")
    states = random_states(task.build_network, 8)
    layout = ParameterLayout.from_state_dict(states[0])
    predict = Predictor(task, layout, CPU)
    predict(torch.stack([layout.flatten(state) for state in states]), task.data("test")[0])
    assert predict.plan is not None


def test_frozen_tensors_are_the_layouts():
    build, inputs = KNOWN["batch norm"]
    states = random_states(build)
    layout = ParameterLayout.from_state_dict(states[0], ("1.weight", "0.running_mean"))
    vectors = torch.stack([layout.flatten(state) for state in states])
    mixed = [{**states[0], **{name: state[name] for name in ("1.weight", "0.running_mean")}} for state in states]
    expected = in_a_loop(build, mixed, inputs)
    with torch.inference_mode():
        outputs = StackedNetwork(build().eval())(stack(layout, vectors), inputs[None])
    torch.testing.assert_close(outputs, expected, **TOLERANCE, check_stride=False)
    predictions = Predictor(TaskOf(build, inputs), layout, CPU)(vectors, inputs)
    torch.testing.assert_close(predictions, expected.softmax(-1), **TOLERANCE)


@pytest.mark.parametrize("pattern", ["*weight", "*bias"])
def test_weights_may_be_generated_without_biases_and_biases_without_weights(pattern):
    for build in (
        lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)),
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.Flatten()),
    ):
        inputs = torch.randn(5, 8) if "Linear" in str(build()[0]) else torch.randn(5, 1, 6, 6)
        states = random_states(build)
        layout = ParameterLayout.from_state_dict(states[0], (pattern,))
        vectors = torch.stack([layout.flatten(state) for state in states])
        expected = in_a_loop(build, layout.unflatten(vectors), inputs)
        outputs = StackedNetwork(build().eval())(stack(layout, vectors), inputs[None])
        torch.testing.assert_close(outputs, expected, **TOLERANCE, check_stride=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_of_half_precision_are_rounded_as_the_network_rounds_them(dtype):
    def build():
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype)

    inputs = FEATURES.to(dtype)
    states = random_states(build)
    predict, vectors = predictor(build, states, inputs)
    assert vectors.dtype == torch.float32
    expected = in_a_loop(build, states, inputs).softmax(-1)
    # A few units in the last place, since sums are rounded in another order.
    torch.testing.assert_close(predict(vectors, inputs), expected, rtol=2e-2, atol=2e-2)
    weights = stack(predict.layout, vectors)
    assert torch.equal(weights["0.weight"], torch.stack([state["0.weight"] for state in states]))


class Recurrent(nn.Module):
    """An LSTM over the features."""

    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(1, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, features):
        return self.head(self.lstm(features[..., None])[0][:, -1])


class Branching(nn.Module):
    """What it does depends on the values."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, features):
        hidden = self.layer(features)
        return hidden if hidden.sum() > 0 else hidden * 2


class Scaled(nn.Module):
    """A parameter and buffers of its own, named as functions are."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(6))
        self.register_buffer("mean", torch.rand(6))
        self.layer = nn.Linear(6, 3)

    def forward(self, features):
        return self.layer((features - self.mean) * self.scale)


class SumInPlace(nn.Module):
    """The sum is written into what does not depend on the weights."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, features):
        hidden = F.relu(features)
        hidden += self.layer(hidden)
        return self.head(hidden)


class ByKeyword(nn.Module):
    """Arguments by their names."""

    def __init__(self):
        super().__init__()
        self.layer, self.relu, self.head = nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)

    def forward(self, features):
        return self.head(self.relu(input=self.layer(features)))


class OtherMean(nn.Module):
    """The dimensions by NumPy's name for them."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 5)

    def forward(self, images):
        return self.head(images.mean(axis=(2, 3)))


def with_hook() -> nn.Module:
    network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    network[1].register_forward_hook(lambda module, args, output: 2 * output)
    return network


def with_hook_on_the_whole() -> nn.Module:
    network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    network.register_forward_hook(lambda module, args, output: 2 * output)
    return network


UNKNOWN = {
    "LSTM": (Recurrent, FEATURES),
    "grouped convolution": (
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.Flatten(), nn.Linear(378, 5)),
        IMAGES,
    ),
    "reflected padding": (
        lambda: nn.Sequential(nn.Conv2d(3, 2, 3, padding=1, padding_mode="reflect"), nn.Flatten(), nn.Linear(198, 5)),
        IMAGES,
    ),
    "padding by name": (
        lambda: nn.Sequential(nn.Conv2d(3, 2, 3, padding="same"), nn.Flatten(), nn.Linear(198, 5)),
        IMAGES,
    ),
    "padded pool": (lambda: nn.Sequential(nn.MaxPool2d(3, padding=1), nn.Flatten(), nn.Linear(36, 5)), IMAGES),
    "pool to several places": (
        lambda: nn.Sequential(nn.AdaptiveAvgPool2d((2, 1)), nn.Flatten(), nn.Linear(6, 5)),
        IMAGES,
    ),
    "layer norm": (lambda: nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 3)), FEATURES),
    "linear layer over images": (lambda: nn.Sequential(nn.Linear(9, 2), nn.Flatten(), nn.Linear(66, 5)), IMAGES),
    "softmax within": (lambda: nn.Sequential(nn.Linear(6, 3), nn.Softmax(-1)), FEATURES),
    "control flow": (Branching, FEATURES),
    "hook": (with_hook, FEATURES),
    "hook on the whole network": (with_hook_on_the_whole, FEATURES),
    "buffer named mean": (Scaled, FEATURES),
    "sum into the inputs' branch": (SumInPlace, FEATURES),
    "arguments by name": (ByKeyword, FEATURES),
    "mean by axis": (OtherMean, IMAGES),
    "a single linear layer": (lambda: nn.Linear(6, 3), FEATURES),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_has_no_stacked_form_runs_one_by_one(name):
    build, inputs = UNKNOWN[name]
    assert_predictor_is_right(build, inputs)


@pytest.mark.parametrize("name", ["LSTM", "control flow", "hook", "layer norm"])
def test_a_part_without_a_stacked_form_is_named(name):
    build, _ = UNKNOWN[name]
    with pytest.raises(NotStackableError, match=r"has no stacked form|cannot be traced"):
        StackedNetwork(build().eval())


def test_a_prediction_of_the_tasks_own_is_taken():
    class Own(TaskOf):
        def predict(self, network, inputs, batch_size=1000):
            return super().predict(network, inputs + 1, batch_size)

    build, inputs = KNOWN["tied weights"]
    states = random_states(build)
    predict, vectors = predictor(build, states, inputs, Own)
    torch.testing.assert_close(predict(vectors, inputs), in_a_loop(build, states, inputs + 1).softmax(-1), **TOLERANCE)
    assert predict.plan is None


def test_probabilities_of_the_tasks_own_are_taken():
    class Own(TaskOf):
        def probabilities(self, outputs):
            return torch.cat([outputs[:, :1].sigmoid(), 1 - outputs[:, :1].sigmoid()], 1)

    build, inputs = KNOWN["tied weights"]
    states = random_states(build)
    predict, vectors = predictor(build, states, inputs, Own)
    right = in_a_loop(build, states, inputs)[..., :1].sigmoid()
    torch.testing.assert_close(predict(vectors, inputs), torch.cat([right, 1 - right], -1), **TOLERANCE)


def test_networks_with_several_outputs_have_the_one_that_the_task_takes():
    class TwoHeads(Tied):
        def forward(self, features):
            hidden = torch.relu(self.first(features))
            return self.head(hidden), self.second(hidden)

    class Own(TaskOf):
        def probabilities(self, outputs):
            return outputs[0].softmax(-1)

    states = random_states(TwoHeads)
    predict, vectors = predictor(TwoHeads, states, FEATURES, Own)
    layout = predict.layout
    expected = []
    for vector in vectors:
        network = TwoHeads()
        network.load_state_dict(layout.unflatten(vector[None])[0])
        expected.append(network(FEATURES)[0].softmax(-1).detach())
    torch.testing.assert_close(predict(vectors, FEATURES), torch.stack(expected), **TOLERANCE)


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_threads_change_nothing_and_are_as_many_afterwards(three_threads):
    task = load_task("digits-convnet")
    states = random_states(task.build_network, 40)
    layout = ParameterLayout.from_state_dict(states[0])
    vectors = torch.stack([layout.flatten(state) for state in states])
    predict = Predictor(task, layout, CPU)
    inputs = task.data("test")[0]
    several = predict(vectors, inputs)
    assert predict.plan is not None
    assert torch.get_num_threads() == 3
    torch.set_num_threads(1)
    torch.testing.assert_close(several, predict(vectors, inputs), rtol=0, atol=0)


def test_an_error_leaves_the_number_of_threads(three_threads):
    class Late(TaskOf):
        fails = False

        def probabilities(self, outputs):
            if self.fails:
                raise ArithmeticError("no probabilities today")
            return outputs.softmax(-1)

    task = load_task("digits-convnet")
    states = random_states(task.build_network, 40)
    inputs = task.data("test")[0]
    predict, vectors = predictor(task.build_network, states, inputs, Late)
    predict(vectors, inputs)
    predict.task.fails = True
    with pytest.raises(ArithmeticError, match="no probabilities today"):
        predict(vectors, inputs)
    assert torch.get_num_threads() == 3
    assert predict.network(inputs[:2]).shape == (2, 10)


def test_outputs_that_are_no_numbers_stay_with_their_network():
    build, inputs = KNOWN["tied weights"]
    states = random_states(build)
    predict, vectors = predictor(build, states, inputs)
    vectors[2] = 3e38
    predictions = predict(vectors, inputs)
    assert predictions[2].isnan().any()
    others = [0, 1, 3, 4]
    expected = in_a_loop(build, [states[i] for i in others], inputs).softmax(-1)
    torch.testing.assert_close(predictions[others], expected, **TOLERANCE)


class Dropping(DigitsMLP):
    def build_network(self):
        return nn.Sequential(nn.Dropout(0.1), *super().build_network())


def test_networks_that_do_not_train_side_by_side_are_not_trained_as_long():
    layout = ParameterLayout.from_state_dict(Dropping().build_network().state_dict())
    assert train_as_long([Dropping()] * 2, layout, lambda count: pytest.fail("generated"), {}) is None
