"""Seconds and peak memory of the stages against the number of parameters of a network.

Each size runs in a process of its own, on a zoo that is made up: 50 points of a smooth random curve with noise, which
has the numerics of a trajectory. The denoiser works on latents, whose size is the same for all, so a few of its steps
stand for many. Prints a row for each size, and writes figures and a picture.
"""

import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from pdiff_hf import GenerateConfig, ParameterLayout, TrainConfig, WeightZoo, run_generate, run_train
from pdiff_hf.config import versions


@dataclass(frozen=True)
class Config:
    """Measures the stages over sizes."""

    sizes: tuple[int, ...] = (10**3, 10**4, 10**5, 10**6, 10**7)
    """Parameters of a network."""
    num_networks: int = 50
    """In the zoo, and generated."""
    training_steps: int = 100
    threads: int = 1
    work_dir: str | None = None
    """Where zoos and pipelines go; a temporary folder otherwise."""
    output: str | None = None
    """Path, without suffix, of the figures (.json) and the picture (.png)."""
    only: int | None = None
    """Measure one size in this process, and print its figures."""


def main(config: Config) -> None:
    """Measures each size in a process of its own."""
    if config.only is not None:
        print(json.dumps(measure(config, config.only)))
        return
    rows = []
    print("parameters | zoo, GB | make the zoo, s | train, s | generate, s | of that a network, s | peak memory, GB")
    for size in config.sizes:
        arguments = ["--only", str(size), "--num-networks", str(config.num_networks)]
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
    if config.output:
        facts = {
            "networks": config.num_networks,
            "training_steps": config.training_steps,
            "threads": config.threads,
            "machine": f"{platform.system()} {platform.machine()}",
            "versions": versions(),
        }
        Path(f"{config.output}.json").write_text(json.dumps({"facts": facts, "rows": rows}, indent=1) + "\n")
        draw(rows, f"{config.output}.png")


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


def measure(config: Config, size: int) -> dict[str, float]:
    """All stages for one size."""
    torch.set_num_threads(config.threads)
    with tempfile.TemporaryDirectory(dir=config.work_dir) as folder:
        zoo_folder, pipeline, generated = (str(Path(folder, name)) for name in ("zoo", "pipeline", "generated"))
        start = time.perf_counter()
        make_zoo(zoo_folder, size, config.num_networks)
        made = time.perf_counter()
        steps = config.training_steps
        run_train(TrainConfig(zoo=zoo_folder, output_dir=pipeline, unet_steps=steps, checkpointing_steps=10**9))
        trained = time.perf_counter()
        zoo = run_generate(GenerateConfig(pipeline=pipeline, output_dir=generated, num_networks=config.num_networks))
        sampled = time.perf_counter()
        gigabytes = sum(file.stat().st_size for file in Path(zoo_folder).glob("*.safetensors")) / 1e9
        assert len(zoo) == config.num_networks
        return {
            "parameters": size,
            "zoo_gb": gigabytes,
            "zoo_s": made - start,
            "train_s": trained - made,
            "generate_s": sampled - trained,
            "generate_one_s": (sampled - trained) / config.num_networks,
            # In kilobytes on Linux. Memory-mapped files count where they were read.
            "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        }


def draw(rows: list[dict[str, float]], file: str) -> None:
    """Seconds and memory against parameters."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.8, 3.2), layout="constrained")
    seconds, memory = figure.subplots(ncols=2)
    sizes = [row["parameters"] for row in rows]
    for key, label, colour, marker in (
        ("train_s", "train", "#0072B2", "o"),
        ("generate_s", "generate", "#D55E00", "^"),
    ):
        seconds.plot(sizes, [row[key] for row in rows], color=colour, marker=marker, label=label)
    memory.plot(sizes, [row["peak_memory_gb"] for row in rows], color="#0072B2", marker="o", label="peak memory")
    memory.plot(sizes, [row["zoo_gb"] for row in rows], color="#E69F00", marker="s", label="zoo on disk")
    for axes, label in ((seconds, "seconds"), (memory, "GB")):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("parameters of a network")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    main(tyro.cli(Config))
