"""A zoo in canonical form holds the same networks, nearer to each other."""

import re
from pathlib import Path

import pytest
import torch

from pdiff_hf import CollectConfig, WeightZoo, load_task, run_collect
from pdiff_hf.align import run_align
from pdiff_hf.cli import main
from pdiff_hf.configs import AlignConfig
from pdiff_hf.errors import ConfigError, TaskError
from pdiff_hf.files import UNFINISHED, is_zoo
from pdiff_hf.networks.predictor import Predictor

from .test_cli import line_of


@pytest.fixture(scope="module")
def independent(tmp_path_factory) -> WeightZoo:
    """Networks of a hundred seeds."""
    folder = tmp_path_factory.mktemp("independent") / "zoo"
    return run_collect(
        CollectConfig(
            task="digits-mlp", protocol="independent", num_networks=100, epochs=2, output_dir=str(folder), seed=3
        )
    )


def test_an_aligned_zoo_predicts_the_same_and_lies_nearer_together(independent, tmp_path):
    said = run_align(AlignConfig(zoo=str(independent.folder), output_dir=str(tmp_path / "aligned")))
    aligned = WeightZoo(tmp_path / "aligned")
    rows = [{key: value for key, value in row.items() if key != "initial_norm"} for row in independent.metadata]
    assert aligned.metadata == rows  # the units of the initialization are in their old order
    assert aligned.task == independent.task
    task = load_task("digits-mlp")
    predict, inputs = Predictor(task, aligned.layout, torch.device("cpu")), task.data("test")[0]
    before, after = predict(independent.vectors(), inputs), predict(aligned.vectors(), inputs)
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-4)
    spread = [(zoo.vectors() - zoo.vectors().mean(0)).norm(dim=1).mean().item() for zoo in (independent, aligned)]
    assert spread[1] < 0.85 * spread[0]
    assert "groups of 32 hidden units" in said
    assert f"was {spread[0]:.4g} and is" in said
    assert float(re.search(r"and is ([\d.]+)\. ", said)[1]) == pytest.approx(spread[1], rel=0.1)


def test_what_is_said_of_predictions_is_true_of_what_is_stored(tmp_path):
    settings = {"task": "digits-mlp", "protocol": "independent", "num_networks": 5, "epochs": 2}
    zoo = run_collect(CollectConfig(**settings, output_dir=str(tmp_path / "zoo"), dtype="bfloat16"))
    said = run_align(AlignConfig(zoo=str(zoo.folder), output_dir=str(tmp_path / "aligned")))
    task = load_task("digits-mlp")
    predict, inputs = Predictor(task, zoo.layout, torch.device("cpu")), task.data("train")[0][:100]
    before, after = (predict(one.vectors(), inputs) for one in (zoo, WeightZoo(tmp_path / "aligned")))
    stored = (before - after).abs().max() / before.max()
    assert stored > 1e-4
    assert f"differ by {stored:.2g} of the largest at most" in said


def test_aligning_again_changes_nothing_much(independent, tmp_path):
    for number, source in enumerate((independent.folder, tmp_path / "0")):
        run_align(AlignConfig(zoo=str(source), output_dir=str(tmp_path / str(number))))
    once, twice = (WeightZoo(tmp_path / str(number)).vectors() for number in range(2))
    distances = [(zoo - zoo.mean(0)).norm(dim=1).mean() for zoo in (once, twice)]
    torch.testing.assert_close(distances[0], distances[1], rtol=0.02, atol=0)


def test_what_cannot_be_aligned_is_refused_and_leaves_nothing(independent, digits_pipeline, tmp_path):
    arguments = ["align", "--zoo", str(independent.folder), "--output-dir"]
    assert "holds a pipeline. Choose another" in line_of(*arguments, str(digits_pipeline))
    main([*arguments, str(tmp_path / "aligned")])
    assert "holds a zoo already" in line_of(*arguments, str(tmp_path / "aligned"))
    with pytest.raises(ConfigError, match="tolerance"):
        AlignConfig(tolerance=float("nan"))


def test_a_part_of_an_aligned_zoo_does_not_pass_for_the_whole(independent, tmp_path, monkeypatch):
    append, seen = WeightZoo.append, set()

    def appending(zoo: WeightZoo, *network, **row) -> None:
        seen.add(is_zoo(tmp_path / "aligned"))
        append(zoo, *network, **row)

    monkeypatch.setattr(WeightZoo, "append", appending)
    run_align(AlignConfig(zoo=str(independent.folder), output_dir=str(tmp_path / "aligned")))
    assert seen == {False}
    assert not list((tmp_path / "aligned").glob(f"{UNFINISHED}*"))


def test_an_unknown_architecture_is_named(tmp_path):
    (tmp_path / "task.py").write_text(
        "from pdiff_hf.tasks.digits import DigitsMLP\nfrom torch import nn\n"
        "class T(DigitsMLP):\n    def build_network(self):\n"
        "        return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Softmax(-1), nn.Linear(8, 10))\n"
    )
    task = f"{tmp_path}/task.py:T"
    zoo = run_collect(CollectConfig(task=task, num_networks=2, epochs=0, output_dir=str(tmp_path / "zoo")))
    with pytest.raises(TaskError, match="cannot be aligned: Softmax"):
        run_align(AlignConfig(zoo=str(zoo.folder), task=task, output_dir=str(tmp_path / "aligned")))
    assert not (tmp_path / "aligned").exists()


def test_what_comes_next_names_code_of_ones_own_and_what_tasks_differ_by(tmp_path, monkeypatch):
    (tmp_path / "tasks.py").write_text(
        "from pdiff_hf.tasks.digits import DigitsMLP\nclass T(DigitsMLP):\n    pass\n"
        "class F:\n    def conditions(self, split):\n"
        "        return [{'number': len(split) + k / 10} for k in range(2)]\n"
        "    def task(self, condition):\n        return T()\n"
    )
    monkeypatch.chdir(tmp_path)
    for name, options in (("T", ""), ("F", " --condition number")):
        of = {"num_networks": 2} if name == "T" else {"networks_per_task": 1}
        run_collect(CollectConfig(f"tasks.py:{name}", name, protocol="independent", epochs=1, **of))
        said = run_align(AlignConfig(zoo=name, task=f"tasks.py:{name}", output_dir=f"aligned-{name}"))
        assert f"Next: pdiff-hf train --task tasks.py:{name}{options} --zoo aligned-{name}" in said
        assert f"The networks of `{name}` in canonical form." in Path(f"aligned-{name}", "README.md").read_text()


def test_networks_that_are_changed_by_it_are_refused(tmp_path):
    (tmp_path / "task.py").write_text(
        "import torch\nfrom pdiff_hf.tasks.digits import DigitsMLP\nfrom torch import nn\n"
        "class T(DigitsMLP):\n    def build_network(self):\n"
        "        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))\n"
        "        network[1].register_forward_hook(lambda m, a, output: output * torch.arange(1, 9).to(output))\n"
        "        return network\n"
    )
    task = f"{tmp_path}/task.py:T"
    zoo = run_collect(
        CollectConfig(task=task, num_networks=5, epochs=1, protocol="independent", output_dir=str(tmp_path / "zoo"))
    )
    line = line_of("align", "--zoo", str(zoo.folder), "--task", task, "--output-dir", str(tmp_path / "aligned"))
    assert "more than the tolerance of 0.001: these networks have other symmetries" in line
    assert not (tmp_path / "aligned").exists()
