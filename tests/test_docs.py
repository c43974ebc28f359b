"""The documentation builds without a warning, and what it tells people to run runs."""

import importlib
import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
import tyro

from pdiff_hf import cli, config

from .conftest import ROOT, run
from .documents import Document, run_here


PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(file.relative_to(ROOT)) for file in (ROOT / "docs").glob("*.md"))]


def test_the_site_builds_without_a_warning(tmp_path):
    done = run("-m", "mkdocs", "build", "--config-file", str(ROOT / "mkdocs.yml"), "--site-dir", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING -" not in done.stderr
    api = (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
    for name in ("WeightZoo.from_checkpoints", "NeuronTrainConfig.hidden_size", "NeuralNetworkDiffusionPipeline"):
        assert name in api
    assert '<a href="#pdiff_hf.evaluation.baselines.Baseline"><code>Baseline</code></a>' in api
    assert "[<code>" not in api


@pytest.mark.parametrize("page", PAGES)
def test_every_command_has_arguments_that_exist(page):
    document = Document(page)
    for program, *arguments in document.commands() + document.inline():
        if program == "pdiff-hf" and not arguments[0].startswith("-"):
            stage = arguments[0]
            assert stage in cli.STAGES
            assert config.parse(cli.config_class(stage), stage, arguments[1:]) is not None


def test_readme_and_tour_have_commands():
    assert min(len(Document(page).commands()) for page in ("README.md", "docs/tour.md")) > 5


@pytest.mark.parametrize("name", sorted({name for name, *_ in Document("docs/figures.md").benchmarks()}))
def test_every_benchmark_has_arguments_that_exist(name):
    module = importlib.import_module(f"benchmarks.{name}")
    for own, *arguments in Document("docs/figures.md").benchmarks():
        if own == name:
            assert tyro.cli(module.Config, args=arguments) is not None


def written(folder: Path, name: str) -> None:
    """Puts the program of a page that names its file there."""
    (folder / name).write_text(Document("docs/tasks.md").containing("python", f"# {name}"))


@pytest.mark.slow
@pytest.mark.long
def test_a_task_of_ones_own_is_learned_and_audited(tmp_path):
    written(tmp_path, "two_moons.py")
    collect, train, evaluate = Document("docs/tasks.md").commands("two_moons.py:")
    run_here(tmp_path, *collect, "--num-networks", "20", "--epochs", "2")
    run_here(tmp_path, *train, "--transformer-steps", "10", "--hidden-size", "32", "--num-layers", "1")
    done = run_here(tmp_path, *evaluate, "--num-networks", "5", "--networks-per-point", "5")
    assert "the front of the baselines" in done.stdout.replace("\n", " ") or "do not work" in done.stdout.replace(
        "\n", " "
    )


def stages_of(page: str) -> list[list[str]]:
    return [one for one in Document(page).commands("pdiff-hf") if {"runs/zoo", "runs/pipeline"} & set(one)]


def test_the_readme_leads_through_the_stages_of_the_tour():
    ours, theirs = (
        [one for one in stages_of(page) if one[1] in ("collect", "train", "generate", "evaluate")]
        for page in ("README.md", "docs/tour.md")
    )
    assert ours == theirs
    assert len(ours) == 4


@pytest.mark.slow
def test_the_tour_leads_from_a_zoo_to_a_verdict(tmp_path):
    small = {
        "collect": ["--num-networks", "20", "--epochs", "2"],
        "train": ["--autoencoder-steps", "20", "--unet-steps", "30"],
        "generate": ["--num-networks", "5", "--num-inference-steps", "5"],
        "evaluate": ["--networks-per-point", "5"],
    }
    told = [one for one in stages_of("docs/tour.md") if one[1] in small or one[1] == "info"]
    done = {one[1]: run_here(tmp_path, *one, *small.get(one[1], [])) for one in told}
    assert "Next: pdiff-hf train --zoo runs/zoo" in done["collect"].stdout
    assert "the baselines" in done["evaluate"].stdout or "do not work" in done["evaluate"].stdout
    assert "A pipeline that samples networks of 1,898 generated parameters" in done["info"].stdout


@pytest.mark.slow
def test_checkpoints_of_another_generator_are_audited(tmp_path):
    written(tmp_path, "two_moons.py")
    (tmp_path / "two_moons.py").rename(tmp_path / "my_task.py")
    spec = importlib.util.spec_from_file_location("my_task", tmp_path / "my_task.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for group, count in (("train", 6), ("generated", 3), ("fresh", 3)):
        (tmp_path / "theirs" / group).mkdir(parents=True)
        for index in range(count):
            torch.save(module.TwoMoons().build_network().state_dict(), tmp_path / "theirs" / group / f"{index}.pt")
    (command,) = Document("docs/audit.md").commands("theirs/generated")
    done = run_here(tmp_path, *(argument.replace("MyTask", "TwoMoons") for argument in command))
    assert re.search(r"│ fresh +│ +3 │", done.stdout)
    assert (tmp_path / "runs" / "audit" / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.long
def test_a_family_of_ones_own_is_learned(tmp_path):
    written(tmp_path, "angles.py")
    (tmp_path / "turned.py").write_text(Document("docs/tasks.md").containing("python", "class TurnedAngles"))
    collect, train = Document("docs/tasks.md").commands("angles.py:")
    assert "124 networks" in run_here(tmp_path, *collect, "--networks-per-task", "2").stdout
    done = run_here(tmp_path, *train, "--transformer-steps", "10", "--hidden-size", "32", "--num-layers", "1")
    assert "is in runs/angles/pipeline" in done.stdout
    forms = [arg.replace("angles.py:", "turned.py:Turned").replace("angles/pip", "angles/turned") for arg in train]
    done = run_here(tmp_path, *forms, "--transformer-steps", "10", "--hidden-size", "32", "--num-layers", "1")
    assert "is in runs/angles/turned" in done.stdout


@pytest.mark.slow
def test_a_generator_of_ones_own_is_audited(tmp_path, digits_zoo):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "zoo").symlink_to(digits_zoo.folder)
    done = run_here(tmp_path, sys.executable, "-c", Document("docs/audit.md").containing("python", "class Jitter"))
    assert "the front of the baselines" in done.stdout
    assert (tmp_path / "runs" / "audit" / "report.html").is_file()
