"""Scripts that measure what the README claims. Run them as `python -m benchmarks.<name>`."""

import json
import os
import platform
import resource
import sys
import time
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch

from pdiff_hf.runs import versions
from pdiff_hf.train import DenoiserObjective, TrainConfig, TrainingLoop


# Folders of one machine say nothing to anyone else.
PLACES = ("output", "work_dir", "data_dir", "peer", "only")


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
        elif field.default is MISSING:
            command += [option, field.name.upper()]
    return {
        "command": " ".join(command),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        **settings,
        "versions": versions(),
    }


def write(config: Any, **figures: Any) -> None:
    """Writes figures and what has to be known of them, where the configuration names a file."""
    if config.output:
        file = Path(config.output).with_suffix(".json")
        file.write_text(json.dumps({"facts": facts(config), **figures}, indent=1) + "\n", encoding="utf-8")


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
