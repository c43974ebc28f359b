import dataclasses
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from pdiff_hf import CollectConfig, ParameterLayout, WeightZoo, ZooError, collect, load_task, run_collect
from pdiff_hf.collect import FAR, RETRIES
from pdiff_hf.errors import ConfigError
from pdiff_hf.networks.predictor import in_float32
from pdiff_hf.networks.trainer import NetworkTrainer, StackedTrainer, is_stackable
from pdiff_hf.tasks.digits import DigitsMLP
from pdiff_hf.zoo import networks_per_batch

from .conftest import ROOT, assert_same_networks, run


def config(folder, **changes) -> CollectConfig:
    return CollectConfig(**{"output_dir": str(folder), "num_networks": 6, "epochs": 1, **changes})


def accuracy_of(task_name: str, state_dict: dict) -> float:
    """Of a stored network, loaded anew, on the validation split."""
    task = load_task(task_name)
    network = task.build_network()
    network.load_state_dict(state_dict)
    inputs, targets = task.data("validation")
    return task.correct(task.predict(network, inputs), targets).float().mean().item()


def test_a_trajectory_holds_consecutive_steps_of_one_run(tmp_path):
    zoo = run_collect(config(tmp_path / "zoo", save_every=2))
    assert [row["step"] for row in zoo.metadata] == [22, 24, 26, 28, 30, 32]
    assert {row["seed"] for row in zoo.metadata} == {0}
    assert all(0 < row["validation_accuracy"] < 1 for row in zoo.metadata)
    steps = zoo.vectors().diff(dim=0).norm(dim=1)
    assert (steps > 0).all()
    assert steps.max() < zoo[0].norm()


def test_the_same_seed_gives_the_same_zoo_and_another_seed_another(tmp_path):
    first, again, other = (
        run_collect(config(tmp_path / name, seed=seed)).vectors() for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert_same_networks(first, again)
    assert (first - other).abs().mean() > 0.05


def test_the_recorded_accuracy_is_that_of_the_stored_network(tmp_path):
    zoo = run_collect(config(tmp_path / "zoo"))
    accuracy = accuracy_of("digits-convnet", zoo.state_dict(5))
    assert zoo.metadata[5]["validation_accuracy"] == pytest.approx(accuracy)


def test_only_the_chosen_batch_norms_move_and_all_else_stays_frozen(tmp_path):
    zoo = run_collect(config(tmp_path / "zoo", task="digits-resnet"))
    names = {tensor["name"].rpartition(".")[0] for tensor in zoo.layout.tensors("generated")}
    assert names == {"layer2.1.bn1", "layer2.1.bn2"}
    assert zoo.vectors().std(0).min() > 0
    # The frozen tensors are those of the trained network: with them the recorded accuracy is reached.
    accuracy = accuracy_of("digits-resnet", zoo.state_dict(0))
    assert zoo.metadata[0]["validation_accuracy"] == pytest.approx(accuracy)
    assert accuracy > 0.5


def test_an_independent_zoo_has_a_network_a_seed(tmp_path):
    zoo = run_collect(config(tmp_path / "zoo", protocol="independent", num_networks=3, seed=7, task="digits-mlp"))
    assert [row["seed"] for row in zoo.metadata] == [7, 8, 9]
    assert torch.pdist(zoo.vectors()).min() > 1


def test_an_independent_zoo_of_a_part_of_the_network_is_refused(tmp_path):
    with pytest.raises(ZooError, match=r"Pass --patterns '\*', or collect a trajectory"):
        run_collect(config(tmp_path / "zoo", protocol="independent", task="digits-resnet"))


@pytest.mark.slow
def test_the_folder_says_how_to_repeat_the_run(tmp_path):
    first = run_collect(config(tmp_path / "a"))
    done = run(
        "-m",
        "pdiff_hf",
        "collect",
        "--config",
        str(first.folder / "collect.yaml"),
        "--output-dir",
        str(tmp_path / "b"),
    )
    assert done.returncode == 0, done.stderr
    assert_same_networks(WeightZoo(tmp_path / "b").vectors(), first.vectors())
    assert '"torch"' in (first.folder / "collect.facts.json").read_text()
    assert "6 networks of 1898" in (first.folder / "README.md").read_text()


def test_a_zoo_can_grow(tmp_path):
    run_collect(config(tmp_path / "zoo", num_networks=3))
    grown = run_collect(config(tmp_path / "zoo"))
    assert_same_networks(grown.vectors(), run_collect(config(tmp_path / "other")).vectors())


def test_networks_of_another_training_do_not_go_into_a_zoo_that_grows(tmp_path, monkeypatch):
    run_collect(config(tmp_path / "zoo", num_networks=3))
    monkeypatch.setattr(type(load_task("digits-convnet")), "learning_rate", 0.01)  # as versions that work differently
    with pytest.raises(ConfigError, match="has another result on this machine"):
        run_collect(config(tmp_path / "zoo"))
    assert len(WeightZoo(tmp_path / "zoo")) == 3


def test_another_run_does_not_go_into_the_same_folder(tmp_path):
    run_collect(config(tmp_path / "zoo"))
    with pytest.raises(ConfigError, match="holds a run with seed 0, not 1"):
        run_collect(config(tmp_path / "zoo", seed=1))
    assert len(WeightZoo(tmp_path / "zoo")) == 6


def test_networks_of_a_task_that_was_changed_meanwhile_do_not_go_into_the_same_folder(tmp_path):
    file = tmp_path / "task.py"
    file.write_text("from pdiff_hf.tasks.digits import DigitsMLP\nclass T(DigitsMLP):\n    learning_rate = 1e-3\n")
    task = f"{file}:T"
    run_collect(config(tmp_path / "zoo", task=task, num_networks=3))
    file.write_text(f"# a note\n{file.read_text()}\nOTHER = 1\n")
    run_collect(config(tmp_path / "zoo", task=task, num_networks=4))
    file.write_text(file.read_text().replace("1e-3", "1e-2"))
    with pytest.raises(ConfigError, match=r"The task of the run in .* changed meanwhile"):
        run_collect(config(tmp_path / "zoo", task=task, num_networks=6))
    assert len(WeightZoo(tmp_path / "zoo")) == 4


def test_what_the_task_froze_stays_frozen(tmp_path):
    (tmp_path / "task.py").write_text(
        textwrap.dedent("""
            from pdiff_hf.tasks.digits import DigitsMLP
            class Frozen(DigitsMLP):
                def build_network(self):
                    network = super().build_network()
                    network[1].weight.requires_grad_(False)
                    return network
        """)
    )
    zoo = run_collect(config(tmp_path / "zoo", task=f"{tmp_path}/task.py:Frozen"))
    networks = [zoo.state_dict(index) for index in (0, 5)]
    assert torch.equal(networks[0]["1.weight"], networks[1]["1.weight"])
    assert not torch.equal(networks[0]["3.weight"], networks[1]["3.weight"])


def test_a_number_of_networks_below_one_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="num_networks has to be at least 1, and is 0"):
        run_collect(config(tmp_path / "zoo", num_networks=0))


def test_a_training_that_diverges_keeps_the_networks_before(tmp_path):
    (tmp_path / "task.py").write_text(
        textwrap.dedent("""
            from pdiff_hf.tasks.digits import DigitsMLP
            class Diverging(DigitsMLP):
                steps = 0
                def loss(self, outputs, targets):
                    self.steps += 1
                    return super().loss(outputs, targets) * (float("nan") if self.steps > 23 else 1)
        """)
    )
    with pytest.raises(ZooError, match=r"task\.py:Diverging: `1\.weight` holds NaN or infinite values"):
        run_collect(config(tmp_path / "zoo", task=f"{tmp_path}/task.py:Diverging"))
    assert len(WeightZoo(tmp_path / "zoo")) == 3


def test_a_trajectory_whose_learning_rate_ends_at_zero_is_refused(tmp_path):
    (tmp_path / "task.py").write_text(
        textwrap.dedent("""
            from pdiff_hf.tasks import half_cosine
            from pdiff_hf.tasks.digits import DigitsMLP
            class Ending(DigitsMLP):
                def learning_rate_factor(self, progress):
                    return half_cosine(progress)
        """)
    )
    task = f"{tmp_path}/task.py:Ending"
    with pytest.raises(ConfigError, match=r"Ending ends at 0, so that all checkpoints .* --protocol independent"):
        run_collect(config(tmp_path / "zoo", task=task))
    assert not (tmp_path / "zoo").exists()
    assert len(run_collect(config(tmp_path / "zoo", task=task, protocol="independent"))) == 6


class RandomFeatures(DigitsMLP):
    """Each seed has a first layer of its own, which is not trained."""

    def build_network(self):
        network = super().build_network()
        network[1].requires_grad_(False)
        return network


def test_frozen_layers_that_differ_between_seeds_are_refused_where_networks_are_trained_at_once(tmp_path):
    layout = ParameterLayout.from_state_dict(RandomFeatures().build_network().state_dict(), ("3.*",))
    layout.load_frozen(NetworkTrainer(RandomFeatures(), 0, 0).network.state_dict())
    together = StackedTrainer([RandomFeatures()] * 2, [0, 1], 1)
    with pytest.raises(ZooError, match=r"Seed 1: `1\.weight` is not generated, and differs"):
        together.train(layout)
    accepted = StackedTrainer([RandomFeatures()] * 2, [0, 1], 1).train(layout, ["1.*"])
    assert len(accepted) == 2


class Anew(DigitsMLP):
    """Reads its examples anew each time."""

    def data(self, split):
        return tuple(part.clone() for part in super().data(split))


@pytest.mark.parametrize(("task", "held"), [(f"{__name__}:Anew", False), ("tests.families:OwnInputs", True)])
def test_examples_are_counted_where_each_network_has_its_own(tmp_path, monkeypatch, task, held):
    sizes = []

    def counted(size, *most):
        sizes.append(size)
        return networks_per_batch(size, *most)

    monkeypatch.setattr(collect, "networks_per_batch", counted)
    settings = {"num_networks": 1, "networks_per_task": 1, "protocol": "independent", "epochs": 1}
    zoo = run_collect(config(tmp_path / "zoo", task=task, **settings))
    assert (sizes[0] > zoo.vector_size) == held


def test_the_last_replacement_of_a_network_that_diverges_counts(tmp_path):
    (tmp_path / "task.py").write_text(
        textwrap.dedent("""
            import torch
            from pdiff_hf.collect import FAR, RETRIES
            from pdiff_hf.tasks.digits import DigitsMLP
            class Unlucky(DigitsMLP):
                def build_network(self):
                    network = super().build_network()
                    if torch.initial_seed() in [10 + attempt * FAR for attempt in range(RETRIES)]:
                        torch.nn.init.constant_(network[1].weight, 1e38)  # which overflows
                    return network
        """)
    )
    settings = {"task": f"{tmp_path}/task.py:Unlucky", "num_networks": 1, "protocol": "independent"}
    zoo = run_collect(config(tmp_path / "zoo", seed=10, **settings))
    assert zoo.metadata[0]["seed"] == 10 + RETRIES * FAR
    assert zoo[0].isfinite().all()


@pytest.mark.slow
def test_a_full_disk_ends_in_one_line_and_a_zoo_that_goes_on(tmp_path):
    script = textwrap.dedent("""
        import resource, sys
        from pdiff_hf import cli, parallel
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
        parallel.SECONDS_BETWEEN_SAVES, parallel.MOST_SAVING = 0, float("inf")
        cli.main(["collect", *sys.argv[1:]])
    """)
    arguments = ["--task", "digits-mlp", "--num-networks", "6", "--epochs", "0"]
    done = run("-c", script, *arguments, "--output-dir", str(tmp_path / "zoo"))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "pdiff-hf collect: Cannot write" in done.stderr
    assert 1 <= len(WeightZoo(tmp_path / "zoo")) < 6
    assert len(run_collect(config(tmp_path / "zoo", task="digits-mlp", epochs=0))) == 6


# Independent networks are made 64 at a time.
@pytest.mark.slow
@pytest.mark.parametrize(("protocol", "count"), [("trajectory", 600), ("independent", 150)])
def test_a_killed_collection_leaves_a_zoo_and_goes_on_as_if_nothing_had_happened(tmp_path, protocol, count):
    script = textwrap.dedent("""
        import sys
        from pdiff_hf import cli, parallel
        parallel.SECONDS_BETWEEN_SAVES = 0.05
        cli.main(["collect", *sys.argv[1:]])
    """)
    wanted = config(tmp_path / "killed", num_networks=count, protocol=protocol, task="digits-mlp")
    arguments = ["--task", "digits-mlp", "--protocol", protocol, "--num-networks", str(count), "--epochs", "1"]
    process = subprocess.Popen(
        [sys.executable, "-c", script, *arguments, "--output-dir", wanted.output_dir],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    shards = tmp_path / "killed"
    while not list(shards.glob("networks-*.safetensors")) and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 1 <= len(WeightZoo(wanted.output_dir)) < count

    finished = run_collect(wanted)
    uninterrupted = run_collect(dataclasses.replace(wanted, output_dir=str(tmp_path / "other")))
    assert torch.equal(finished.vectors(), uninterrupted.vectors())
    assert finished.metadata == uninterrupted.metadata
    assert not list(finished.folder.glob("*.pt"))


@in_float32()
@pytest.mark.parametrize("name", ["digits-mlp", "digits-convnet"])
def test_networks_trained_at_once_are_those_trained_one_by_one(name):
    task = load_task(name)
    layout = ParameterLayout.from_state_dict(task.build_network().state_dict())
    stacked = StackedTrainer([task] * 3, [3, 4, 5], 1).train(layout)
    for seed, (vector, row) in zip([3, 4, 5], stacked, strict=True):
        ((expected, expected_row),) = NetworkTrainer(task, seed, 1).train(layout)
        torch.testing.assert_close(vector, expected, atol=1e-4, rtol=1e-3)
        assert row == pytest.approx(expected_row, abs=0.006)


class Cooling(DigitsMLP):
    def learning_rate_factor(self, progress):
        return 1 - progress


def test_learning_rates_follow_the_task_at_once_and_one_by_one():
    task, plain = Cooling(), DigitsMLP()
    layout = ParameterLayout.from_state_dict(task.build_network().state_dict())
    stacked = StackedTrainer([task] * 2, [3, 4], 2).train(layout)
    for seed, (vector, _) in zip([3, 4], stacked, strict=True):
        trainer = NetworkTrainer(task, seed, 2)
        ((expected, _),) = trainer.train(layout)
        torch.testing.assert_close(vector, expected, atol=1e-4, rtol=1e-3)
        assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(task.learning_rate / trainer.steps)
        ((constant, _),) = NetworkTrainer(plain, seed, 2).train(layout)
        assert (constant - expected).norm() > 0.01 * constant.norm()
    for _ in range(2):  # what comes after the epochs, as the checkpoints of a trajectory
        trainer.train_step()
    assert trainer.optimizer.param_groups[0]["lr"] == 0


class WithEmptyBuffer(DigitsMLP):
    def build_network(self):
        network = super().build_network()
        network.register_buffer("where_am_i", torch.empty(0))
        return network


def test_buffers_without_numbers_do_not_keep_networks_from_being_trained_at_once(tmp_path):
    task = WithEmptyBuffer()
    assert is_stackable([task] * 2, ParameterLayout.from_state_dict(task.build_network().state_dict()))
    again = {"num_networks": 2, "protocol": "independent", "epochs": 1}
    zoo = run_collect(CollectConfig(f"{__name__}:WithEmptyBuffer", str(tmp_path / "a"), **again))
    assert zoo.state_dict(0)["where_am_i"].shape == (0,)
    assert torch.equal(zoo.vectors(), run_collect(CollectConfig("digits-mlp", str(tmp_path / "b"), **again)).vectors())


class OwnLoss(DigitsMLP):
    def loss(self, outputs, targets):
        return super().loss(outputs, targets) * 2


class WithDropout(DigitsMLP):
    def build_network(self):
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10), torch.nn.Dropout(0.5))


class WithBatchNorm(DigitsMLP):
    def build_network(self):
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10), torch.nn.BatchNorm1d(10))


class WithTiedWeights(DigitsMLP):
    def build_network(self):
        first, second = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)
        second.weight = first.weight
        return torch.nn.Sequential(torch.nn.Flatten(), first, second, torch.nn.Linear(64, 10))


class WithHook(DigitsMLP):
    def build_network(self):
        network = super().build_network()
        network.register_forward_hook(lambda module, inputs, outputs: 3 * outputs)
        return network


class WithOwnCalls(DigitsMLP):
    def build_network(self):
        return Halves()


class Halves(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(64, 10)

    def forward(self, x):
        return self.head(torch.nn.functional.relu(input=x.flatten(start_dim=1) / 2))


@pytest.mark.parametrize("task_class", [OwnLoss, WithDropout, WithBatchNorm, WithTiedWeights, WithHook, WithOwnCalls])
def test_what_cannot_be_trained_at_once_is_trained_one_by_one(task_class, tmp_path):
    name = f"{__name__}:{task_class.__name__}"
    zoo = run_collect(CollectConfig(name, str(tmp_path), num_networks=2, protocol="independent", epochs=1))
    task = task_class()
    ((expected, _),) = NetworkTrainer(task, 1, 1).train(zoo.layout)
    assert torch.equal(zoo[1], expected)
