"""The README's own commands and programs, run as they stand."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import ROOT


README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALL = {
    "collect": ["--num-networks", "20", "--epochs", "2"],
    "train": ["--autoencoder-steps", "20", "--unet-steps", "30"],
    "generate": ["--num-networks", "5", "--num-inference-steps", "5"],
    "evaluate": [],
}


def blocks(language: str) -> list[str]:
    """The code blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def containing(language: str, text: str) -> str:
    """The only code block that holds a text."""
    (block,) = [block for block in blocks(language) if text in block]
    return block


def run_here(folder: Path, *command: str) -> subprocess.CompletedProcess:
    """Runs in a folder, with `pdiff-hf` meaning that of this interpreter."""
    arguments = list(command)
    if arguments[0] == "pdiff-hf":
        arguments[:1] = [sys.executable, "-m", "pdiff_hf"]
    done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


def commands(block: str) -> list[list[str]]:
    """The command lines of a shell block."""
    lines = block.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip() and not line.startswith("#")]


@pytest.fixture(scope="module")
def own_task(tmp_path_factory) -> Path:
    """A folder with the README's own task in its file."""
    folder = tmp_path_factory.mktemp("readme")
    text = containing("python", "# my_task.py")
    assert len(text.splitlines()) <= 20
    (folder / "my_task.py").write_text(text)
    return folder


@pytest.mark.slow
def test_ones_own_network_goes_through_all_stages(own_task):
    stages = commands(containing("bash", "my_task.py:"))
    assert [arguments[1] for arguments in stages] == ["collect", "train", "generate", "evaluate"]
    for arguments in stages:
        done = run_here(own_task, *arguments, *SMALL[arguments[1]])
    assert "generated" in done.stdout
    assert (own_task / "runs" / "mine" / "report" / "plane.png").exists()


def test_ones_own_checkpoints_become_a_zoo(own_task, digits_zoo, tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "checkpoints").mkdir()
    for index in range(3):
        save_file(digits_zoo.state_dict(index), tmp_path / "checkpoints" / f"{index}.safetensors")
    run_here(tmp_path, sys.executable, "-c", containing("python", "from_checkpoints") + "\nassert len(zoo) == 3")


def test_the_python_example_samples_networks(digits_pipeline, tmp_path):
    program = containing("python", "trust_remote_code=True")
    assert "runs/quickstart/pipeline" in program
    assert len(program.strip().splitlines()) <= 8
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    (tmp_path / "runs" / "quickstart" / "pipeline").symlink_to(digits_pipeline)
    done = run_here(tmp_path, sys.executable, "-c", program + "\nprint(len(state_dicts), state_dicts[0].keys())")
    assert done.stdout.startswith("8 dict_keys(['0.weight', '0.bias'")


def test_the_tour_names_every_stage_with_arguments_that_exist():
    from pdiff_hf import CollectConfig, EvaluateConfig, GenerateConfig, NeuronTrainConfig, TrainConfig
    from pdiff_hf.config import parse

    train = TrainConfig | NeuronTrainConfig
    configs = {"collect": CollectConfig, "train": train, "generate": GenerateConfig, "evaluate": EvaluateConfig}
    tour = [arguments for block in blocks("bash") for arguments in commands(block) if "pdiff-hf" in arguments[0]]
    assert {arguments[1] for arguments in tour} >= set(configs)
    for _, stage, *arguments in tour:
        if stage in configs:
            assert isinstance(parse(configs[stage], stage, arguments), configs[stage])


def test_every_file_that_the_readme_names_is_there():
    for name in re.findall(r"\]\(([^):#]+)\)", README):
        assert (ROOT / name).exists(), name
