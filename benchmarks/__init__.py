"""Scripts that measure what the README claims. Run them as `python -m benchmarks.<name>`."""

import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import nn

from pdiff_hf import WeightZoo
from pdiff_hf.configs import AnyTrainConfig, TrainConfig
from pdiff_hf.errors import ConfigError
from pdiff_hf.files import is_pipeline, whole
from pdiff_hf.runs import check_same_facts, check_same_run, versions
from pdiff_hf.train import DenoiserObjective, TrainingLoop, run_train
from pdiff_hf.train.loop import RUN_SETTINGS, with_environment


# Folders of one machine say nothing to anyone else.
PLACES = ("output", "picture", "work_dir", "data_dir", "peer", "only")


def facts(config: Any) -> dict[str, Any]:
    """What has to be known of figures: the command that prints them, its settings, and what it ran on."""
    command, settings = [f"python -m benchmarks.{Path(sys.argv[0]).stem}"], {}
    for field in fields(config):
        value, option = getattr(config, field.name), f"--{field.name.replace('_', '-')}"
        if field.name not in PLACES:
            settings[field.name] = value
            if value != field.default:
                values = value if isinstance(value, tuple) else (value,)
                command += [f"--no-{option[2:]}"] if value is False else [option, *map(str, values)]
        elif field.default is MISSING or (value is not None and field.name in ("peer", "data_dir")):
            command += [option, field.name.upper()]
    return {
        "command": " ".join(command),
        "date": time.strftime("%Y-%m-%d"),
        "commit": COMMIT,
        "machine": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        **settings,
        "versions": versions(),
    }


def _commit() -> str | None:
    """The state of the project; None outside a clone."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    with suppress(OSError):  # no git
        return (
            subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip() or None
        )
    return None


# When its code is read, and not when figures are written, hours later.
COMMIT = _commit()


def write(config: Any, **figures: Any) -> None:
    """Writes figures and what has to be known of them, where the configuration names a file."""
    if config.output:
        file = Path(config.output).with_suffix(".json")
        file.write_text(json.dumps({"facts": facts(config), **figures}, indent=1) + "\n", encoding="utf-8")


def table(config: Any, header: str, measure: Callable[..., dict[str, Any]], cells: Callable[..., list[str]]) -> None:
    """Prints a line for each of the configuration's rows and seeds, and writes each as soon as it is measured.

    A file of figures keeps what other runs of the benchmark wrote there: its rows take hours, and may be measured one
    by one. Each therefore carries the facts of its own run.
    """
    print(header)
    for name in config.rows:
        for seed in config.seeds:
            row = measure(config, name, seed)
            print(" | ".join([name, str(seed), *cells(row)]), flush=True)
            if config.output:
                file = Path(config.output).with_suffix(".json")
                with FileLock(f"{file}.lock"), whole(file) as temporary:
                    rows = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
                    rows = [one for one in rows if (one["row"], one["seed"]) != (name, seed)]
                    rows.append({"row": name, "seed": seed, **row, "facts": facts(config)})
                    rows.sort(key=lambda one: (one["row"], one["seed"]))
                    temporary.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")


def minutes_of(config: AnyTrainConfig) -> float:
    r"""
    Trains a pipeline, where there is none yet, and tells how long that took. A training that was killed begins anew.

    Raises:
        [`ConfigError`]: there is one that was trained with other settings, or on another zoo.
    """
    folder = Path(config.output_dir)
    clock = folder.with_name(f"{folder.name}.minutes.json")
    if clock.exists():
        check_same_run(folder, "train", with_environment(config), but_for=RUN_SETTINGS)
        check_same_facts(folder, "train", {"zoo_sha256": WeightZoo(config.zoo).sha256()})
    elif is_pipeline(folder):
        raise ConfigError(f"How long {folder} took to train is not known: remove it, or write the minutes to {clock}.")
    else:
        shutil.rmtree(folder, ignore_errors=True)
        started = time.perf_counter()
        run_train(config)
        clock.write_text(json.dumps((time.perf_counter() - started) / 60))
    minutes: float = json.loads(clock.read_text())
    return minutes


def fit(network: nn.Module, steps: int, rate: float, decay: float, loss: Callable[[], torch.Tensor]) -> None:
    """Minimizes a loss by AdamW with a one-cycle learning rate of this peak."""
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        schedule.step()


def fit_denoiser(objective: DenoiserObjective, latents: torch.Tensor, config: TrainConfig) -> None:
    """Trains a denoiser on latents `[N, C, L]` as `pdiff-hf train` does."""
    with TrainingLoop(config, config.unet_steps) as loop:
        loop.fit(
            "unet",
            objective,
            lambda indices: {"latents": latents[indices]},
            len(latents),
            config.unet_steps,
            config.unet_learning_rate,
        )


def peak_memory_gb() -> float:
    """The largest resident set of this process so far, pages of memory-mapped files included."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
