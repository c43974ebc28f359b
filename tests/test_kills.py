"""Stages that are killed, at any moment, and that meet another one of them in their folder."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pdiff_hf import TrainConfig, WeightZoo, load_pipeline, run_train
from pdiff_hf.cli import main as cli
from pdiff_hf.evaluation.study import PARTS as SCORES
from pdiff_hf.files import LOCK

from .conftest import SMALL_TRAINING
from .hub_server import HubServer, client_environment


pytestmark = pytest.mark.slow
BUSY = "Another process writes"


def start(*arguments: str, **environment: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "pdiff_hf", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env={**os.environ, **environment}, text=True, **pipes)


def meet(folder: Path, *arguments: str) -> tuple[list[int], str]:
    """Exit codes of a process that writes a folder and of another one that meets it there, and what both said."""
    arguments = (*arguments, "--output-dir", str(folder))
    first = start(*arguments)
    try:
        while not (folder / LOCK).exists():
            assert first.poll() is None, first.communicate()
            time.sleep(0.001)
        time.sleep(0.1)  # from the lock's file to the lock
        first.send_signal(signal.SIGSTOP)  # it holds the folder for as long as the other one takes to start
        second = start(*arguments)
        said = second.communicate(timeout=300)[1]
        first.send_signal(signal.SIGCONT)
        said += first.communicate(timeout=300)[1]
    finally:
        first.kill()
    return [first.returncode, second.returncode], said


@pytest.fixture(scope="module")
def commands(digits_zoo, digits_pipeline) -> dict[str, list[str]]:
    """Each stage, as it is called."""
    zoo, pipeline = str(digits_zoo.folder), str(digits_pipeline)
    return {
        "trajectory": ["collect", "--task", "digits-mlp", "--epochs", "2", "--num-networks", "20"],
        "independent": [
            *("collect", "--task", "digits-mlp", "--epochs", "2", "--num-networks", "20"),
            *("--protocol", "independent"),
        ],
        "train": ["train", "--zoo", zoo, "--autoencoder", "linear", "--unet-steps", "20"],
        "generate": ["generate", "--pipeline", pipeline, "--num-networks", "40", "--batch-size", "20"],
        "evaluate": ["evaluate", "--trained", zoo, "--generated", pipeline, "--networks-per-point", "20"],
    }


LONG = [pytest.param(name, marks=pytest.mark.long) for name in ("trajectory", "independent", "generate", "evaluate")]


@pytest.mark.parametrize("name", ["train", *LONG])
def test_of_two_at_once_the_second_stops_in_one_line_and_the_first_finishes(commands, tmp_path, name):
    folder = tmp_path / "folder"
    codes, said = meet(folder, *commands[name])
    assert codes == [0, 1], said
    lines = [line for line in said.splitlines() if BUSY in line]
    assert len(lines) == 1
    assert "Traceback" not in said
    if name == "train":
        load_pipeline(folder)
    elif name == "evaluate":
        assert json.loads((folder / "report.json").read_text())["groups"]
    else:
        zoo = WeightZoo(folder)
        assert len(zoo) == len(zoo.metadata) == int(commands[name][commands[name].index("--num-networks") + 1])
        assert torch.isfinite(zoo.vectors()).all()


def figures(folder: Path) -> dict:
    report = json.loads((folder / "report.json").read_text())
    return {name: report[name] for name in ("verdict", "groups", "baselines", "nearest_l2", "similarity")}


@pytest.mark.long
def test_an_evaluation_that_is_killed_goes_on_to_the_same_report(commands, tmp_path):
    draw = random.Random(0)
    cli([*commands["evaluate"], "--output-dir", str(tmp_path / "expected")])
    folder = tmp_path / "killed"
    arguments = [*commands["evaluate"], "--output-dir", str(folder)]
    seen, kills = 0, 0
    for _ in range(5):
        process = start(*arguments)
        while process.poll() is None and len(list((folder / SCORES).glob("*.pt"))) <= seen:
            time.sleep(0.02)
        time.sleep(draw.random() / 4)
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            break
        kills += 1
        assert not (folder / "report.json").exists()
        seen = len(list((folder / SCORES).glob("*.pt")))
        assert seen  # each goes on where the one before was
    assert kills >= 3
    cli(arguments)
    assert figures(folder) == figures(tmp_path / "expected")
    assert not (folder / SCORES).exists()


def end_after(seconds: float, process: subprocess.Popen) -> int:
    """The exit code of a process that is killed after some seconds, if it is not done."""
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return process.returncode


@pytest.mark.long
def test_a_push_that_is_killed_leaves_the_old_pipeline_or_the_new_one(digits_zoo, tmp_path):
    settings = {**SMALL_TRAINING, "unet_steps": 5}
    folders = []
    for seed in (0, 1):
        folders.append(tmp_path / str(seed))
        run_train(TrainConfig(zoo=str(digits_zoo.folder), output_dir=str(folders[-1]), seed=seed, **settings))
    weights = [(folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() for folder in folders]
    with HubServer(tmp_path / "hub", lfs_threshold=10_000) as server:
        environment = client_environment(server.url, tmp_path / "alice", xet=False)

        def push(folder: Path, seconds: float = 300) -> int:
            return end_after(seconds, start("push", "--folder", str(folder), "--repo", "alice/killed", **environment))

        assert push(folders[0]) == 0
        begin = time.monotonic()
        assert push(folders[1]) == 0
        whole = time.monotonic() - begin
        outcomes, current = [], 1
        for attempt in range(3):
            wanted, target = 1 - current, tmp_path / f"pulled-{attempt}"
            code = push(folders[wanted], whole * (0.45 + 0.2 * attempt))
            arguments = ["pull", "--repo", "alice/killed", "--output-dir", str(target)]
            assert end_after(300, start(*arguments, **environment)) == 0
            load_pipeline(target)
            found = (target / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
            assert found in ([weights[wanted]] if code == 0 else weights)
            current = weights.index(found)
            outcomes.append(code)
        assert push(folders[1 - current]) == 0
        assert -signal.SIGKILL in outcomes
