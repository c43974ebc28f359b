"""What tests share: small networks, a small zoo, and a pipeline trained on it."""

import os
import tempfile


# The clients read these when they are imported.
os.environ["HF_HOME"] = os.environ["XDG_CONFIG_HOME"] = tempfile.mkdtemp(prefix="pdiff-hf-test-")
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_UPDATE_CHECK"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
# One thread, in subprocesses too: results do not depend on the machine, and tests can run side by side.
os.environ["OMP_NUM_THREADS"] = "1"

import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn

from pdiff_hf import CollectConfig, ParameterLayout, TrainConfig, WeightZoo, run_collect, run_train


torch.set_num_threads(1)
# A shell that runs tests in the background has them, and what they start, ignore interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
ROOT = Path(__file__).parents[1]
SMALL_TRAINING = {"autoencoder": "linear", "unet_steps": 120, "block_out_channels": (16, 16)}


def small_network() -> nn.Module:
    """Linear layers and a batch norm: floating-point and integer tensors, statistics too."""
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def random_network(seed: int) -> nn.Module:
    """A small network whose parameters and statistics are all random."""
    generator = torch.Generator().manual_seed(seed)
    network = small_network()
    with torch.no_grad():
        for tensor in network.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)
    return network


def run(*command: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    """Runs a Python module or script in a process of its own."""
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


def assert_same_networks(one: torch.Tensor, other: torch.Tensor) -> None:
    """Bit by bit on a CPU; an accelerator sums in any order, and training amplifies it."""
    if torch.accelerator.is_available():
        torch.testing.assert_close(one, other, atol=1e-2, rtol=1e-2)
    else:
        assert torch.equal(one, other)


def launch_command(processes: int, *command: str) -> list[str]:
    """Accelerate's way to several processes on one CPU."""
    options = ["--multi_gpu", "--num_processes", str(processes), "--num_machines", "1", "--main_process_port", "0"]
    options += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    return ["-m", "accelerate.commands.launch", *options, *command]


def launch(processes: int, *command: str) -> None:
    """Runs a module in several processes, or in one, which have to succeed."""
    done = run(*command) if processes == 1 else run(*launch_command(processes, *command), ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr


def kill_one_process(command: list[str], ready: Callable[[], bool], rank: int = 1) -> None:
    """Starts two processes and kills one of them as soon as something is there; the launcher ends the other."""
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    launcher = subprocess.Popen(
        [sys.executable, *launch_command(2, *command)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not ready():
        assert launcher.poll() is None, "It ended too early to be killed."
        time.sleep(0.01)
    workers = psutil.Process(launcher.pid).children(recursive=True)
    chosen = [worker for worker in workers if worker.environ().get("RANK") == str(rank)]
    assert chosen
    chosen[0].kill()
    assert launcher.wait(timeout=120) != 0


def site_without_this_package(folder: Path) -> Path:
    """A folder for `sys.path` with everything that is installed here, but for this package."""
    site = folder / "site"
    site.mkdir()
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not entry.name.startswith(("pdiff_hf", "__editable__")):
            (site / entry.name).symlink_to(entry)
    return site


@pytest.fixture
def layout() -> ParameterLayout:
    """The layout of the whole small network."""
    return ParameterLayout.from_state_dict(random_network(0).state_dict())


@pytest.fixture
def zoo(tmp_path: Path, layout: ParameterLayout) -> WeightZoo:
    """Ten random networks in shards of four."""
    zoo = WeightZoo.create(tmp_path / "zoo", layout, task="none", networks_per_shard=4)
    with zoo:
        for seed in range(10):
            zoo.append(random_network(seed).state_dict(), seed=seed)
    return zoo


@pytest.fixture(scope="session")
def digits_zoo(tmp_path_factory: pytest.TempPathFactory) -> WeightZoo:
    """A short trajectory of the digits ConvNet."""
    folder = tmp_path_factory.mktemp("digits") / "zoo"
    return run_collect(CollectConfig(output_dir=str(folder), num_networks=40, epochs=5))


@pytest.fixture(scope="session")
def digits_pipeline(digits_zoo: WeightZoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a pipeline that was trained, too briefly, on that trajectory."""
    folder = tmp_path_factory.mktemp("digits") / "pipeline"
    run_train(TrainConfig(zoo=str(digits_zoo.folder), output_dir=str(folder), **SMALL_TRAINING))
    return folder
