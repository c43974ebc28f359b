"""Seconds and peak memory of the stages against the number of parameters of a network, and against that of networks.

Each zoo has a process of its own: consecutive steps of an MLP on scikit-learn's digits, whose hidden layer is as wide
as the size asks for. As many networks are generated for all zoos. The denoiser works on latents, whose size is the
same for all, so a few of its steps stand for many. Prints a row for each zoo, and writes figures and a picture.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import nn

from benchmarks import peak_memory_gb, write
from pdiff_hf import CollectConfig, EvaluateConfig, GenerateConfig, TrainConfig
from pdiff_hf.cli import stage_function
from pdiff_hf.tasks.digits import DigitsMLP
from pdiff_hf.tasks.images import mlp


STAGES = {
    "collect": ("#009E73", "D"),
    "train": ("#0072B2", "o"),
    "generate": ("#D55E00", "^"),
    "evaluate": ("black", "s"),
}


@dataclass(frozen=True)
class Config:
    """Measures the stages over sizes."""

    sizes: tuple[int, ...] = (10**3, 10**4, 10**5, 10**6, 10**7)
    """Parameters of a network."""
    num_networks: int = 50
    """In the zoos of all sizes, and generated."""
    counts: tuple[int, ...] = (10**2, 10**3, 10**4, 10**5)
    """Networks in the zoos of one size."""
    size_of_counts: int = 10**3
    """Parameters of a network in these."""
    training_steps: int = 100
    """Of the denoiser."""
    networks_per_point: int = 5
    """Of each baseline, at each strength."""
    most_evaluated: int = 10**6
    """Parameters of the largest networks that are evaluated, which takes minutes for each million."""
    threads: int = 1
    work_dir: str | None = None
    """Where zoos and pipelines go; a temporary folder otherwise."""
    output: str | None = None
    """Path, without suffix, of the figures (.json) and the picture (.png)."""
    only: tuple[int, int] | None = None
    """Measure one zoo of this size and number in this process, and print its figures."""


def main(config: Config) -> None:
    """Measures each size in a process of its own."""
    if config.only is not None:
        print(json.dumps(measure(config, *config.only)))
        return
    if config.work_dir is not None:
        Path(config.work_dir).mkdir(parents=True, exist_ok=True)
    rows = []
    print("parameters | networks | zoo, GB | collect, s | train, s | generate, s | evaluate, s | one, s | memory, GB")
    sizes = [(size, config.num_networks) for size in config.sizes]
    for size, count in [*sizes, *((config.size_of_counts, count) for count in config.counts)]:
        arguments = ["--only", str(size), str(count), "--num-networks", str(config.num_networks)]
        arguments += ["--training-steps", str(config.training_steps), "--threads", str(config.threads)]
        arguments += ["--networks-per-point", str(config.networks_per_point)]
        arguments += ["--most-evaluated", str(config.most_evaluated)]
        arguments += [] if config.work_dir is None else ["--work-dir", config.work_dir]
        command = [sys.executable, "-m", "benchmarks.scaling", *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        row = json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        print(
            " | ".join(shown(value) for value in row.values()),
            flush=True,
        )
    write(config, rows=rows)
    if config.output:
        draw(rows[: len(sizes)], rows[len(sizes) :], f"{config.output}.png")


def shown(value: float | None) -> str:
    """A figure of the table."""
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


class Wide(DigitsMLP):
    """One hidden layer, which is so wide that there are about `size` parameters."""

    epochs = 1
    size = 10**3

    def build_network(self) -> nn.Module:
        return mlp(64, (self.size - 10) // (64 + 1 + 10), 10)


def measure(config: Config, size: int, count: int) -> dict[str, float | None]:
    """All stages for one zoo."""
    from benchmarks.scaling import Wide  # by the name that the zoo has for it

    Wide.size = size
    task = "benchmarks.scaling:Wide"
    torch.set_num_threads(config.threads)
    with tempfile.TemporaryDirectory(dir=config.work_dir) as folder:
        zoo, pipeline, generated, report = (str(Path(folder, stage)) for stage in STAGES)
        configs = {
            "collect": CollectConfig(task, zoo, num_networks=count),
            "train": TrainConfig(
                zoo=zoo,
                output_dir=pipeline,
                autoencoder="linear",
                unet_steps=config.training_steps,
                checkpointing_steps=10**9,
            ),
            "generate": GenerateConfig(pipeline=pipeline, output_dir=generated, num_networks=config.num_networks),
            "evaluate": EvaluateConfig(
                task, zoo, generated, output_dir=report, networks_per_point=config.networks_per_point
            ),
        }
        seconds = {}
        for stage in STAGES if size <= config.most_evaluated else list(STAGES)[:-1]:
            started = time.perf_counter()
            stage_function(stage)(configs[stage])
            seconds[f"{stage}_s"] = time.perf_counter() - started
        gigabytes = sum(file.stat().st_size for file in Path(zoo).glob("*.safetensors")) / 1e9
        return {
            "parameters": size,
            "networks": count,
            "zoo_gb": gigabytes,
            **{f"{stage}_s": seconds.get(f"{stage}_s") for stage in STAGES},
            "generate_one_s": seconds["generate_s"] / config.num_networks,
            "peak_memory_gb": peak_memory_gb(),
        }


def draw(by_size: list[dict[str, Any]], by_count: list[dict[str, Any]], file: str) -> None:
    """Seconds and memory against parameters and against networks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 5.4), layout="constrained")
    panels = figure.subplots(2, 2)
    curves = (
        tuple((f"{stage}_s", stage, *style) for stage, style in STAGES.items()),
        (("peak_memory_gb", "peak memory", "#0072B2", "o"), ("zoo_gb", "zoo on disk", "#E69F00", "s")),
    )
    settings = (
        (by_size, "parameters", f"parameters of a network, {by_size[0]['networks']} networks"),
        (by_count, "networks", f"networks in the zoo, {by_count[0]['parameters']} parameters"),
    )
    for column, (rows, key, label) in enumerate(settings):
        for row, (lines, unit) in enumerate(zip(curves, ("seconds", "GB"), strict=True)):
            axes = panels[row][column]
            for name, text, colour, marker in lines:
                there = [r for r in rows if r[name] is not None]
                axes.plot([r[key] for r in there], [r[name] for r in there], color=colour, marker=marker, label=text)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xlabel(label)
            axes.set_ylabel(unit)
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    main(tyro.cli(Config))
