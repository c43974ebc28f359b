"""A task that does not do what a task does is told so before anything is trained or scored."""

import textwrap

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pdiff_hf import CollectConfig, Task, WeightZoo, ZooError, evaluate, run_collect
from pdiff_hf.collect import FAR
from pdiff_hf.errors import TaskError
from pdiff_hf.tasks import check_family, check_task, load_family
from pdiff_hf.tasks.task import BUILT_IN


class Blobs(Task):
    """Four features, the largest of the first three of which is the class."""

    epochs = 1
    examples = 40

    def build_network(self):
        return nn.Linear(4, 3)

    def data(self, split):
        draw = torch.Generator().manual_seed(len(split))
        inputs = torch.randn(self.examples, 4, generator=draw)
        return inputs, inputs[:, :3].argmax(1)


class Hidden(nn.Module):
    """A function that is not all in the state dict."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("projection", torch.randn(4, 4), persistent=False)

    def forward(self, inputs):
        return self.linear(inputs @ self.projection)


class HiddenInAttribute(Hidden):
    def __init__(self):
        super().__init__()
        self.projection, self.shift = None, torch.randn(4)

    def forward(self, inputs):
        return self.linear(inputs + self.shift)


class Random(nn.Linear):
    def forward(self, inputs):
        return F.dropout(super().forward(inputs), 0.5, training=True)


class Differentiating(nn.Linear):
    """Predicts from the gradient of an energy."""

    careful = True

    def forward(self, inputs):
        with torch.set_grad_enabled(self.careful or torch.is_grad_enabled()):
            inputs = inputs.detach().requires_grad_(self.careful or torch.is_grad_enabled())
            energy = super().forward(inputs).square().sum()
            (gradient,) = torch.autograd.grad(energy, inputs, create_graph=True)
        return gradient[:, :3]


class Careless(Differentiating):
    careful = False


def network(build):
    return type("Task1", (Blobs,), {"build_network": lambda self: build()})


def data(change):
    return type("Task1", (Blobs,), {"data": lambda self, split: change(*Blobs.data(self, split), split)})


def method(**methods):
    return type("Task1", (Blobs,), methods)


WRONG = [
    (network(Hidden), "does not hold all of its function"),
    (
        network(HiddenInAttribute),
        # An accelerator comes first: the tensor is left behind.
        "all tensors to be on the same device"
        if torch.accelerator.is_available()
        else "does not hold all of its function",
    ),
    (network(lambda: Random(4, 3)), "predicts differently from call to call"),
    (network(lambda: Careless(4, 3)), r"does not require grad.*torch\.enable_grad"),
    (network(lambda: nn.LazyLinear(3)), "weight is built lazily"),
    (
        network(lambda: nn.Linear(4, int(torch.randint(1, 2**30, ()) % 97 + 1))),
        "varies from call to call: bias, weight",
    ),
    (network(lambda: nn.Linear(5, 3)), r"on float32 \[8, 4\] inputs: RuntimeError"),
    (network(lambda: "network"), r"torch\.nn\.Module; found str"),
    (network(lambda: 1 / 0), r"build_network\(\): ZeroDivisionError: division by zero \(.*test_task_checks\.py, line"),
    (data(lambda x, y, split: x), "pair of tensors, inputs and targets; found Tensor"),
    (data(lambda x, y, split: (x.numpy(), y)), "pair of tensors"),
    (data(lambda x, y, split: (x, y[:-1])), "the first sizes differ"),
    (data(lambda x, y, split: (x[:0], y[:0]) if split == "validation" else (x, y)), r"data\('validation'\) is empty"),
    (data(lambda x, y, split: (torch.randn(40, 4), y)), "differs from call to call"),
    (
        data(lambda x, y, split: (x[:, :3], y) if split == "test" else (x, y)),
        r"data\('test'\) has inputs of float32 \[3\]",
    ),
    (method(batch_size=0), "batch_size is 0; it has to be a positive integer"),
    (method(correct=lambda self, p, t: p == t[:, None]), r"boolean for each of 8 predictions; found bool \[8, 3\]"),
    (method(correct=lambda self, p, t: (p.argmax(-1) == t).float()), r"boolean for each of 8 .*found float32 \[8\]"),
    (method(predict=lambda self, n, x: n(x).softmax(-1).mean(0)), r"a row for each of 8 inputs; found float32 \[3\]"),
]
WRONG_IN_TRAINING = [
    (method(epochs=0.5), r"epochs is 0\.5; it has to be an integer, 0 or more"),
    (method(augment=lambda self, x, generator: x / 0 + undefined), r"augment\(\): NameError: name 'undefined'"),  # noqa: F821
    (method(loss=lambda self, o, t: F.cross_entropy(o, t, reduction="none")), r"a scalar; found float32 \[40\]"),
    (method(loss=lambda self, o, t: torch.tensor(1.0)), "does not require grad"),
    (
        type(
            "Task1",
            (Blobs,),
            {"examples": 51, "build_network": lambda self: nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3))},
        ),
        r"a batch of 1, which the last one of an epoch is \(51 examples, batch_size 50\).*more than 1 value",
    ),
]


@pytest.mark.parametrize(("task", "message"), [*WRONG, *WRONG_IN_TRAINING])
def test_what_a_task_does_wrong_is_said(task, message):
    with pytest.raises(TaskError, match=message):
        check_task(task())


@pytest.mark.parametrize(("task", "message"), WRONG)
def test_it_is_said_before_networks_are_scored(task, message):
    networks = [nn.Linear(4, 3).state_dict() for _ in range(3)]
    with pytest.raises(TaskError, match=message):
        evaluate(task(), trained=networks, generated=networks)


@pytest.mark.parametrize("name", [name for name in BUILT_IN if name.startswith(("digits", "wine", "breast"))])
def test_the_tasks_that_are_built_in_pass(name):
    check_family(load_family(name))


def test_a_check_leaves_the_randomness_of_the_caller_and_the_task_alone():
    task = Blobs()
    before = torch.get_rng_state()
    check_task(task)
    assert torch.equal(torch.get_rng_state(), before)
    assert vars(task) == {}


def test_networks_that_differentiate_themselves_are_collected_and_scored(tmp_path):
    task = network(lambda: Differentiating(4, 3))()
    networks = [task.build_network().state_dict() for _ in range(3)]
    report = evaluate(task, trained=networks, generated=networks[:2], networks_per_point=2)
    assert report["groups"]["trained"]["not_finite"] == 0


def written(folder, text):
    (folder / "task.py").write_text(
        "import torch\nfrom torch import nn\nfrom tests.test_task_checks import Blobs\n" + textwrap.dedent(text)
    )
    return f"{folder}/task.py:T"


def test_a_task_is_checked_before_a_folder_is_made(tmp_path):
    task = written(
        tmp_path,
        "from tests.test_task_checks import Hidden\nclass T(Blobs):\n    build_network = lambda self: Hidden()\n",
    )
    for protocol in ("trajectory", "independent"):
        with pytest.raises(TaskError, match="does not hold all of its function"):
            run_collect(CollectConfig(task=task, output_dir=str(tmp_path / "zoo"), protocol=protocol))
        assert not (tmp_path / "zoo").exists()


# ---- what is frozen, after training


FLAG = """
class Normalized(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.scale = nn.Linear(4, 3), nn.Parameter(torch.ones(4))
        self.register_buffer("initialized", torch.tensor(0))
    def forward(self, inputs):
        if self.training and not self.initialized:
            self.scale.data.copy_(1 / inputs.std(0))
            self.initialized.fill_(1)
        return self.linear(inputs * self.scale)
class T(Blobs):
    build_network = lambda self: Normalized()
"""


@pytest.mark.parametrize("protocol", ["trajectory", "independent"])
def test_flags_are_as_they_are_after_training(tmp_path, protocol):
    task = written(tmp_path, FLAG)
    zoo = run_collect(CollectConfig(task=task, output_dir=str(tmp_path / "zoo"), protocol=protocol, num_networks=3))
    assert [zoo.state_dict(i)["initialized"].item() for i in range(3)] == [1, 1, 1]


PERMUTED = """
class Permuted(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("order", torch.randperm(4))
    def forward(self, inputs):
        return self.linear(inputs[:, self.order])
class T(Blobs):
    build_network = lambda self: Permuted()
"""


def test_buffers_that_each_seed_draws_are_refused_by_name_or_accepted(tmp_path):
    arguments = {"task": written(tmp_path, PERMUTED), "protocol": "independent", "num_networks": 4}
    with pytest.raises(ZooError, match=r"Seed \d: `order` is not generated, and differs.*--may-differ"):
        run_collect(CollectConfig(output_dir=str(tmp_path / "zoo"), **arguments))
    zoo = run_collect(CollectConfig(output_dir=str(tmp_path / "other"), may_differ=("order",), **arguments))
    assert zoo.may_differ == ("order",)
    assert len(zoo) == 4


# ---- seeds that diverge


DIVERGING = """
class T(Blobs):
    bad = {bad}
    def loss(self, outputs, targets):
        # A network is known by its first outputs.
        return super().loss(outputs, targets)
    def build_network(self):
        network = nn.Linear(4, 3)
        if torch.initial_seed() in self.bad:
            network.weight.data.fill_(1e38)
        return network
    def optimizer(self, parameters):
        return torch.optim.SGD(parameters, lr=1e3 if parameters[0].abs().max() > 1e37 else 0.1)
"""


def test_a_seed_that_diverges_is_named_and_replaced_and_the_others_finish(tmp_path, capsys):
    task = written(tmp_path, DIVERGING.format(bad=f"{{8, 8 + {FAR}}}"))
    config = {"task": task, "protocol": "independent", "seed": 6}
    zoo = run_collect(CollectConfig(output_dir=str(tmp_path / "zoo"), num_networks=5, **config))
    assert [row["seed"] for row in zoo.metadata] == [6, 7, 8 + 2 * FAR, 9, 10]
    assert "The network of seed 8 diverged" in capsys.readouterr().err
    assert torch.isfinite(zoo.vectors()).all()


def test_when_all_seeds_diverge_it_stops_and_says_so(tmp_path):
    task = written(tmp_path, DIVERGING.format(bad="type('All', (), {'__contains__': lambda self, seed: True})()"))
    with pytest.raises(ZooError, match=r"seed 0 diverged, and so did 3 others in its place.*learning rate"):
        run_collect(CollectConfig(task=task, protocol="independent", output_dir=str(tmp_path / "zoo")))
    assert len(WeightZoo(tmp_path / "zoo")) == 0
