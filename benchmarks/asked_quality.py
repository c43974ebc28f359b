"""Whether networks have the validation accuracy that they are asked for.

Collects checkpoints of a trajectory from early on, learns them with their validation accuracy as the condition, and
asks for levels of it in few and in many denoising steps (`evaluate`). Prints a line a seed of the generator: what was
asked for, and for either number of steps what was measured, and the slope, 1 where both agree, with its 95 % interval
over networks.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks import minutes_of, table
from pdiff_hf import (
    CollectConfig,
    EvaluateConfig,
    GenerateConfig,
    TrainConfig,
    run_collect,
    run_evaluate,
    run_generate,
)


# Denoising steps: as many as by default, and more.
STEPS = (50, 400)
HEADER = "task | seed | asked for" + "".join(f" | measured, {steps} steps | slope | interval" for steps in STEPS)


@dataclass(frozen=True)
class Config:
    """Asks for levels of an accuracy, and measures them."""

    rows: tuple[str, ...] = ("digits-convnet",)
    """Tasks."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the generators."""
    checkpoints: int = 400
    """Consecutive ones, from the second epoch on."""
    unet_steps: int = TrainConfig.unet_steps
    """Of the generator's training."""
    threads: int = 2
    """Of torch."""
    work_dir: str = "runs/asked-quality"
    """Folder of zoos and pipelines."""
    output: str | None = None
    """Where the figures go: a JSON file."""


def measure(config: Config, task: str, seed: int) -> dict[str, Any]:
    """The figures of one generator."""
    folder = Path(config.work_dir, task)
    zoo, pipeline = str(folder / "zoo"), str(folder / f"seed-{seed}" / "pipeline")
    run_collect(CollectConfig(task, output_dir=zoo, num_networks=config.checkpoints, epochs=1))
    settings: dict[str, Any] = {"autoencoder": "linear", "unet_steps": config.unet_steps, "seed": seed}
    minutes_of(TrainConfig(zoo=zoo, output_dir=pipeline, condition=("validation_accuracy",), **settings))
    reports = []
    for steps in STEPS:
        generated, report = (str(Path(pipeline).with_name(f"{name}-{steps}")) for name in ("generated", "report"))
        run_generate(GenerateConfig(pipeline=pipeline, output_dir=generated, num_inference_steps=steps))
        reports.append(run_evaluate(EvaluateConfig(task, zoo, generated, pipeline=pipeline, output_dir=report)))
    return {"quality": [one["quality"] for one in reports], "verdict": [one["verdict"]["label"] for one in reports]}


def cells(row: dict[str, Any]) -> list[str]:
    """A line of the table."""

    def percent(values: list[float]) -> str:
        return " ".join(f"{100 * value:.1f}" for value in values)

    found = [percent(row["quality"][0]["asked"])]
    for one in row["quality"]:
        found += [percent(one["measured"]), f"{one['slope']:.2f}", "{:.2f} to {:.2f}".format(*one["interval"])]
    return found


def main(config: Config) -> None:
    """Prints a line a generator."""
    torch.set_num_threads(config.threads)
    table(config, HEADER, measure, cells)


if __name__ == "__main__":
    main(tyro.cli(Config))
