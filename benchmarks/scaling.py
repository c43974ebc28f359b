"""Seconds and peak memory of the stages against the number of parameters of a network, and against that of networks.

Each zoo has a process of its own and is made up: points of a smooth random curve with noise, which has the numerics of
a trajectory. As many networks are generated for all zoos. The denoiser works on latents, whose size is the same for
all, so a few of its steps stand for many. Prints a row for each zoo, and writes figures and a picture.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from benchmarks import peak_memory_gb, write
from pdiff_hf import GenerateConfig, ParameterLayout, TrainConfig, WeightZoo, run_generate, run_train


@dataclass(frozen=True)
class Config:
    """Measures the stages over sizes."""

    sizes: tuple[int, ...] = (10**3, 10**4, 10**5, 10**6, 10**7)
    """Parameters of a network."""
    num_networks: int = 50
    """In the zoos of all sizes, and generated."""
    counts: tuple[int, ...] = (10**2, 10**3, 10**4, 10**5, 10**6)
    """Networks in the zoos of one size."""
    size_of_counts: int = 10**3
    """Parameters of a network in these."""
    training_steps: int = 100
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
    print("parameters | networks | zoo, GB | make the zoo, s | train, s | generate, s | one, s | peak memory, GB")
    sizes = [(size, config.num_networks) for size in config.sizes]
    for size, count in [*sizes, *((config.size_of_counts, count) for count in config.counts)]:
        arguments = ["--only", str(size), str(count), "--num-networks", str(config.num_networks)]
        arguments += ["--training-steps", str(config.training_steps), "--threads", str(config.threads)]
        arguments += [] if config.work_dir is None else ["--work-dir", config.work_dir]
        command = [sys.executable, "-m", "benchmarks.scaling", *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        row = json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        print(
            " | ".join(f"{value:,}" if isinstance(value, int) else f"{value:.3f}" for value in row.values()),
            flush=True,
        )
    write(config, rows=rows)
    if config.output:
        draw(rows[: len(sizes)], rows[len(sizes) :], f"{config.output}.png")


def make_zoo(folder: str | Path, size: int, num_networks: int) -> None:
    """Points of a smooth random curve, with noise."""
    generator = torch.Generator().manual_seed(0)
    layout = ParameterLayout.from_state_dict({"weight": torch.zeros(size)})
    directions = 0.05 * torch.randn(4, size, generator=generator)
    base = torch.randn(size, generator=generator)
    with WeightZoo.create(folder, layout) as zoo:
        for index in range(num_networks):
            angle = torch.arange(1, 5) * (3 * index / num_networks)
            noise = 0.005 * torch.randn(size, generator=generator)
            zoo.append(base + angle.sin() @ directions + noise)


def measure(config: Config, size: int, count: int) -> dict[str, float]:
    """All stages for one zoo."""
    torch.set_num_threads(config.threads)
    with tempfile.TemporaryDirectory(dir=config.work_dir) as folder:
        zoo_folder, pipeline, generated = (str(Path(folder, name)) for name in ("zoo", "pipeline", "generated"))
        start = time.perf_counter()
        make_zoo(zoo_folder, size, count)
        made = time.perf_counter()
        steps = config.training_steps
        run_train(
            TrainConfig(
                zoo=zoo_folder, output_dir=pipeline, autoencoder="linear", unet_steps=steps, checkpointing_steps=10**9
            )
        )
        trained = time.perf_counter()
        zoo = run_generate(GenerateConfig(pipeline=pipeline, output_dir=generated, num_networks=config.num_networks))
        sampled = time.perf_counter()
        gigabytes = sum(file.stat().st_size for file in Path(zoo_folder).glob("*.safetensors")) / 1e9
        assert len(zoo) == config.num_networks
        return {
            "parameters": size,
            "networks": count,
            "zoo_gb": gigabytes,
            "zoo_s": made - start,
            "train_s": trained - made,
            "generate_s": sampled - trained,
            "generate_one_s": (sampled - trained) / config.num_networks,
            "peak_memory_gb": peak_memory_gb(),
        }


def draw(by_size: list[dict[str, float]], by_count: list[dict[str, float]], file: str) -> None:
    """Seconds and memory against parameters and against networks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 5.4), layout="constrained")
    panels = figure.subplots(2, 2)
    curves = (
        (("train_s", "train", "#0072B2", "o"), ("generate_s", "generate", "#D55E00", "^")),
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
                axes.plot([r[key] for r in rows], [r[name] for r in rows], color=colour, marker=marker, label=text)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xlabel(label)
            axes.set_ylabel(unit)
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    main(tyro.cli(Config))
