"""Seconds of each stage against the number of processes, and whether they make the same.

Each stage runs under `accelerate launch` on this machine, one thread a process. The time that starting up takes,
measured with next to no work, is taken off; for evaluate, it is the time that the report says. What is compared with
one process: networks, losses of the training, and accuracies of all groups and baselines of the report.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks import write
from pdiff_hf import CollectConfig, GenerateConfig, TrainConfig, WeightZoo, run_collect, run_generate, run_train
from pdiff_hf.train import LOSSES


@dataclass(frozen=True)
class Config:
    """Measures the four stages."""

    processes: tuple[int, ...] = (1, 2, 4)
    num_collected: int = 512
    """Networks of different seeds, 10 epochs each."""
    unet_steps: int = 1500
    """Of the training."""
    num_generated: int = 4000
    num_evaluated: int = 500
    """Generated networks that are evaluated, with 200 training networks and all baselines."""
    output: str | None = None
    """A JSON file for the figures."""


def main(config: Config) -> None:
    """Measures and prints."""
    rows: list[dict[str, Any]] = []
    print("stage | work | processes | seconds | ratio to one process | largest difference")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        zoo, pipeline, generated = (str(folder / name) for name in ("zoo", "pipeline", "generated"))
        run_collect(CollectConfig(output_dir=zoo))
        run_train(TrainConfig(zoo=zoo, output_dir=pipeline, autoencoder="linear", unet_steps=50))
        run_generate(GenerateConfig(pipeline=pipeline, output_dir=generated, num_networks=config.num_evaluated))

        def networks(stage: str, count: int, *arguments: str) -> Any:
            def measure(processes: int) -> tuple[float, torch.Tensor]:
                target = folder / f"{stage}-{processes}"
                command = [*arguments, "--output-dir", str(target), "--num-networks"]
                # A first run of a single network, which the second goes on from: its time is that of starting up.
                few = timed(processes, stage, *command, "1")
                return timed(processes, stage, *command, str(count)) - few, WeightZoo(target).vectors()

            return measure

        def train(processes: int) -> tuple[float, torch.Tensor]:
            seconds = []
            for steps in (1, config.unet_steps):
                target = folder / f"train-{processes}-{steps}"
                command = ["--zoo", zoo, "--output-dir", str(target), "--unet-steps", str(steps)]
                command += ["--autoencoder", "linear"]
                seconds.append(timed(processes, "train", *command))
            losses = [json.loads(line)["loss"] for line in (target / LOSSES).read_text().splitlines()]
            return seconds[1] - seconds[0], torch.tensor(losses)

        def evaluate(processes: int) -> tuple[float, torch.Tensor]:
            target = folder / f"report-{processes}"
            timed(processes, "evaluate", "--trained", zoo, "--generated", generated, "--output-dir", str(target))
            report = json.loads((target / "report.json").read_text())
            scored = [*report["groups"].values(), *report["baselines"]]
            return report["seconds"], torch.tensor([row["accuracy"]["mean"] for row in scored])

        seeds = ("--task", "digits-convnet", "--protocol", "independent", "--epochs", "10")
        stages = {
            "collect": (f"{config.num_collected} networks", networks("collect", config.num_collected, *seeds)),
            "train": (f"{config.unet_steps} steps", train),
            "generate": (
                f"{config.num_generated} networks",
                networks("generate", config.num_generated, "--pipeline", pipeline),
            ),
            "evaluate": (f"{config.num_evaluated} networks and the baselines", evaluate),
        }
        for stage, (work, measure) in stages.items():
            for processes in config.processes:
                seconds, made = measure(processes)
                if processes == config.processes[0]:
                    base, expected = seconds, made
                row = {
                    "stage": stage,
                    "work": work,
                    "processes": processes,
                    "seconds": seconds,
                    "ratio": base / seconds,
                    "largest_difference": (made - expected).abs().max().item(),
                }
                rows.append(row)
                print(
                    f"{stage} | {work} | {processes} | {seconds:.1f} | {row['ratio']:.2f} "
                    f"| {row['largest_difference']:.1e}",
                    flush=True,
                )
    write(config, rows=rows)


def timed(processes: int, stage: str, *arguments: str) -> float:
    """Seconds of a stage in so many processes."""
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
    launch += ["--num_machines", "1", "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"]
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, *(launch if processes > 1 else []), "-m", f"pdiff_hf.{stage}", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        check=True,
        capture_output=True,
    )
    return time.perf_counter() - start


if __name__ == "__main__":
    main(tyro.cli(Config))
