"""The README's own commands and programs, run as they stand."""

import ast
import re
import sys
from pathlib import Path

import pytest

from pdiff_hf.tasks import load_family

from .conftest import ROOT
from .documents import Document, run_here


README = Document("README.md")
SMALL = {
    "collect": ["--num-networks", "20", "--epochs", "2"],
    "train": ["--autoencoder-steps", "20", "--unet-steps", "30"],
    "generate": ["--num-networks", "5", "--num-inference-steps", "5"],
    "evaluate": [],
}


@pytest.fixture(scope="module")
def own_task(tmp_path_factory) -> Path:
    """A folder with the README's own task in its file."""
    folder = tmp_path_factory.mktemp("readme")
    text = README.containing("python", "# my_task.py")
    assert len(text.splitlines()) <= 20
    (folder / "my_task.py").write_text(text)
    return folder


@pytest.mark.slow
@pytest.mark.long
def test_ones_own_network_goes_through_all_stages(own_task):
    stages = README.commands("my_task.py:")
    assert [arguments[1] for arguments in stages] == ["collect", "train", "generate", "evaluate"]
    for arguments in stages:
        done = run_here(own_task, *arguments, *SMALL[arguments[1]])
    assert "generated" in done.stdout
    assert (own_task / "runs" / "mine" / "report" / "plane.png").exists()


def test_ones_own_checkpoints_become_a_zoo(digits_zoo, tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "checkpoints").mkdir()
    for index in range(3):
        save_file(digits_zoo.state_dict(index), tmp_path / "checkpoints" / f"{index}.safetensors")
    command, _ = README.commands("--checkpoints")
    train = "pdiff-hf train --zoo runs/my-zoo"
    said = run_here(tmp_path, *command).stdout
    assert said.startswith("3 networks of 1,898 parameters are in runs/my-zoo (")
    following = (
        f"of checkpoints of one run: {train}; of different seeds: {train} --family neuron --no-initial --task TASK"
    )
    assert said.endswith(f" s). Next, {following}\n")


def test_the_python_example_samples_networks(digits_pipeline, tmp_path):
    program = README.containing("python", "trust_remote_code=True")
    assert "runs/quickstart/pipeline" in program
    assert len(program.strip().splitlines()) <= 8
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    (tmp_path / "runs" / "quickstart" / "pipeline").symlink_to(digits_pipeline)
    done = run_here(tmp_path, sys.executable, "-c", program + "\nprint(len(state_dicts), state_dicts[0].keys())")
    assert done.stdout.startswith("8 dict_keys(['0.weight', '0.bias'")


@pytest.mark.slow
def test_a_network_is_asked_for_of_a_task_that_nobody_trained(tmp_path):
    """The audit alone is left out: it takes minutes, and `tests/test_conditions.py` has smaller ones."""
    collect, train, fresh, evaluate = README.commands("runs/subsets/zoo")
    assert evaluate[:2] == ["pdiff-hf", "evaluate"]
    run_here(tmp_path, *collect, "--networks-per-task", "1", "--epochs", "1")
    run_here(tmp_path, *train, "--transformer-steps", "5", "--hidden-size", "32", "--num-layers", "1")
    assert "204 networks" in run_here(tmp_path, *fresh, "--networks-per-task", "1", "--epochs", "1").stdout
    program = README.containing("python", "condition=threes") + "\nprint(len(state_dicts), threes)"
    count, condition = run_here(tmp_path, sys.executable, "-c", program).stdout.split(maxsplit=1)
    assert count == "8"
    assert ast.literal_eval(condition) in load_family("digits-subsets").conditions("test")


def test_the_tour_names_every_stage():
    stages = {arguments[1] for arguments in README.commands() if arguments[0] == "pdiff-hf"}
    assert stages >= {"collect", "train", "generate", "evaluate", "import", "push", "pull"}


def test_every_file_that_the_readme_names_is_there():
    for name in re.findall(r"\]\(([^):#]+)\)", README.text):
        assert (ROOT / name).exists(), name
