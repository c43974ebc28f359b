"""Tasks and families as users write them: plain classes, frozen ones, objects, tasks that train or read outputs in
ways of their own."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from pdiff_hf import (
    CollectConfig,
    NeuronTrainConfig,
    Task,
    TaskFamily,
    WeightZoo,
    evaluate,
    load_task,
    run_collect,
    run_train,
)
from pdiff_hf.errors import ConfigError, TaskError
from pdiff_hf.evaluation import conditions
from pdiff_hf.networks.predictor import Predictor
from pdiff_hf.networks.trainer import NetworkTrainer
from pdiff_hf.playground import Playground
from pdiff_hf.tasks import check_family, load_family


SPLITS = ("train", "validation", "test")


def points(split: str) -> torch.Tensor:
    return torch.randn(120, 2, generator=torch.Generator().manual_seed(SPLITS.index(split)))


class Corners(Task):
    """On which side of both axes together a point lies."""

    batch_size, learning_rate = 30, 1e-2

    def build_network(self):
        return nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2))

    def data(self, split):
        return points(split), (points(split).prod(1) > 0).long()


class Settings(TaskFamily):
    """How networks are trained is the condition; of the first and the last condition it is the same."""

    def conditions(self, split):
        train = [(1, 1e-2, 0), (4, 1e-2, 0), (1, 3e-2, 0), (1, 1e-2, 1)]
        rows = {"train": train, "validation": [(2, 1e-2, 0)], "test": [(3, 1e-2, 0)]}[split]
        return [dict(zip(("epochs", "rate", "other"), row, strict=True)) for row in rows]

    def task(self, condition):
        task = Corners()
        task.epochs, task.learning_rate = condition["epochs"], condition["rate"]
        return task


class Wave(Task):
    """A regression whose targets have the height of the condition, and whose outputs are multiplied by it."""

    batch_size, learning_rate, epochs = 30, 1e-2, 20

    def __init__(self, height):
        self.height = height

    def build_network(self):
        return nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 1))

    def data(self, split):
        return points(split), self.height * points(split)[:, :1].sin()

    def loss(self, outputs, targets):
        return (outputs - targets / self.height).square().mean()

    def probabilities(self, outputs):
        return self.height * outputs

    def correct(self, predictions, targets):
        return ((predictions - targets).abs() < 0.2 * self.height)[:, 0]


class Waves(TaskFamily):
    def conditions(self, split):
        return [
            {"height": height} for height in {"train": [1.0, 20.0], "validation": [5.0], "test": [2.0, 9.0]}[split]
        ]

    def task(self, condition):
        return Wave(condition["height"])


def test_networks_that_train_otherwise_are_trained_as_their_tasks_say(tmp_path):
    zoo = run_collect(CollectConfig(f"{__name__}:Settings", str(tmp_path / "zoo"), networks_per_task=2))
    assert [row["step"] for row in zoo.rows()] == [4, 16, 4, 4] * 2
    for row in zoo.rows():
        vector, own = NetworkTrainer(Settings().task(row), row["seed"]).train(zoo.layout)[0]
        torch.testing.assert_close(zoo[row["index"]], vector, rtol=1e-4, atol=1e-5)
        assert row["validation_accuracy"] == pytest.approx(own["validation_accuracy"], abs=0.02)


def test_the_page_asks_each_task_what_outputs_mean(tmp_path):
    zoo = run_collect(CollectConfig(f"{__name__}:Waves", str(tmp_path / "zoo"), networks_per_task=2))
    settings = {"transformer_steps": 2, "hidden_size": 32, "num_layers": 1, "condition": ("height",)}
    run_train(NeuronTrainConfig(zoo=str(zoo.folder), output_dir=str(tmp_path / "pipeline"), **settings, task=zoo.task))
    ground = Playground(str(tmp_path / "pipeline"), zoo.task)
    for index, row in enumerate(zoo.rows()):
        task, network = Waves().task(row), Waves().task(row).build_network()
        network.load_state_dict(zoo.state_dict(index))
        inputs, targets = task.data("test")
        expected = task.correct(task.predict(network, inputs), targets).float().mean().item()
        (found,) = ground.places(zoo[index][None], {"height": row["height"]})
        assert found["accuracy, %"] == pytest.approx(100 * expected, abs=0.1)
        said = ground.classify(zoo[index][None], inputs[0], {"height": row["height"]})
        torch.testing.assert_close(said, task.predict(network, inputs[:1]))


def test_what_outputs_mean_is_said_by_each_task(tmp_path):
    zoo = run_collect(CollectConfig(f"{__name__}:Waves", str(tmp_path / "zoo"), networks_per_task=2))
    tasks = [Waves().task(row) for row in zoo.rows()]

    def accuracy(split):
        found = []
        for index, task in enumerate(tasks):
            network = task.build_network()
            network.load_state_dict(zoo.state_dict(index))
            inputs, targets = task.data(split)
            found.append(task.correct(task.predict(network, inputs), targets).float().mean().item())
        return found

    assert min(accuracy("validation")) > 0.5
    assert [row["validation_accuracy"] for row in zoo.rows()] == pytest.approx(accuracy("validation"), abs=1e-6)
    predict = Predictor(tasks[0], zoo.layout, torch.device("cpu"))
    audited = conditions._scored(tasks, zoo.vectors()[:, None], predict, "test")
    assert [one.mean().item() for one in audited["single"]] == pytest.approx(accuracy("test"), abs=1e-6)


class Plain:
    """The two methods."""

    def build_network(self):
        return Corners().build_network()

    def data(self, split):
        return Corners().data(split)


@dataclass(frozen=True)
class Frozen(Plain):
    sides: int = 2


@dataclass(frozen=True)
class PlainFamily:
    """Tasks that lack all but the two methods, of a family that lacks all but its two."""

    def conditions(self, split):
        return [{"number": SPLITS.index(split)}]

    def task(self, condition):
        return Frozen()


@pytest.mark.parametrize("kind", [Plain, Frozen])
def test_an_object_with_the_two_methods_is_a_task_and_stays_what_it_is(kind):
    own = kind()
    task = load_task(own)
    assert isinstance(task, Task)
    assert task.batch_size == Task.batch_size
    assert type(own) is kind
    networks = [NetworkTrainer(task, seed, epochs=1).trained().state_dict() for seed in range(6)]
    assert evaluate(own, trained=networks, generated=networks)["verdict"]["label"] == "memorized"
    assert type(own) is kind
    check_family(load_family(f"{__name__}:{kind.__name__}"))


@pytest.mark.parametrize("family", [PlainFamily(), f"{__name__}:PlainFamily"])
def test_a_family_with_the_two_methods_is_one_by_name_and_as_an_object(family):
    found = load_family(family)
    check_family(found)
    assert isinstance(found, TaskFamily)
    assert isinstance(found.task({"number": 1}), Task)
    assert isinstance(load_family(found).task({"number": 1}), Task)
    assert not isinstance(family, TaskFamily)


def test_an_object_without_the_methods_is_named():
    with pytest.raises(TaskError, match="Linear is no task: it lacks build_network and data"):
        load_task(nn.Linear(2, 2))


def test_networks_of_a_family_whose_tasks_were_changed_do_not_go_into_the_same_folder(tmp_path):
    file = tmp_path / "family.py"
    file.write_text(
        "from pdiff_hf.tasks.digits import DigitsMLP\nfrom pdiff_hf.tasks import TaskFamily\n"
        "class T(DigitsMLP):\n    learning_rate, epochs = 1e-3, 1\n"
        "class F(TaskFamily):\n    def conditions(self, split):\n"
        "        return [{'number': {'train': 1.0, 'validation': 2.0, 'test': 3.0}[split]}]\n"
        "    def task(self, condition):\n        return T()\n"
    )
    run_collect(CollectConfig(f"{file}:F", str(tmp_path / "zoo"), networks_per_task=1))
    file.write_text(file.read_text().replace("1e-3", "1e-2"))
    with pytest.raises(ConfigError, match=r"The task of the run in .* changed meanwhile"):
        run_collect(CollectConfig(f"{file}:F", str(tmp_path / "zoo"), networks_per_task=2))
    assert len(WeightZoo(tmp_path / "zoo")) == 1


def test_one_task_has_no_splits_of_tasks(tmp_path):
    with pytest.raises(ConfigError, match="digits-mlp is one task, without a split test: --seed gives other networks"):
        run_collect(CollectConfig("digits-mlp", str(tmp_path / "zoo"), split="test"))
    assert not (tmp_path / "zoo").exists() or not list((tmp_path / "zoo").iterdir())
