"""Networks a second against the number of processes, and whether the networks are the same.

Each stage runs under `accelerate launch` on this machine, one thread a process; the time that starting up takes,
measured with next to no work, is taken off.
"""

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
from pdiff_hf import CollectConfig, TrainConfig, WeightZoo, run_collect, run_train


@dataclass(frozen=True)
class Config:
    """Measures collect and generate."""

    processes: tuple[int, ...] = (1, 2, 4)
    num_collected: int = 512
    """Networks of different seeds, 10 epochs each."""
    num_generated: int = 4000
    output: str | None = None
    """A JSON file for the figures."""


def main(config: Config) -> None:
    """Measures and prints."""
    rows: list[dict[str, Any]] = []
    print("stage | processes | networks a second | ratio to one process | same networks")
    with tempfile.TemporaryDirectory() as scratch:
        pipeline = str(Path(scratch, "pipeline"))
        zoo = run_collect(CollectConfig(output_dir=str(Path(scratch, "zoo")), num_networks=50, epochs=5))
        run_train(TrainConfig(zoo=str(zoo.folder), output_dir=pipeline, unet_steps=50))
        stages = {
            "collect": (
                config.num_collected,
                ["--task", "digits-convnet", "--protocol", "independent", "--epochs", "10"],
            ),
            "generate": (config.num_generated, ["--pipeline", pipeline]),
        }
        for stage, (count, arguments) in stages.items():
            expected, base = None, 0.0
            for processes in config.processes:
                command = [f"pdiff_hf.{stage}", *arguments, "--output-dir", str(Path(scratch, f"{stage}-{processes}"))]
                # A first run of a few networks, which the second goes on from: its time is that of starting up.
                few = timed(processes, [*command, "--num-networks", "1"])
                seconds = timed(processes, [*command, "--num-networks", str(count)]) - few
                vectors = WeightZoo(Path(scratch, f"{stage}-{processes}")).vectors()
                expected = vectors if expected is None else expected
                rate = (count - 1) / seconds
                base = base or rate
                row = {
                    "stage": stage,
                    "processes": processes,
                    "networks": count,
                    "networks_a_second": rate,
                    "ratio": rate / base,
                    "same_networks": torch.equal(vectors, expected),
                }
                rows.append(row)
                print(f"{stage} | {processes} | {rate:.1f} | {rate / base:.2f} | {row['same_networks']}", flush=True)
    write(config, rows=rows)


def timed(processes: int, command: list[str]) -> float:
    """Seconds of a module in so many processes."""
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
    launch += ["--num_machines", "1", "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"]
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, *(launch if processes > 1 else []), "-m", *command],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        check=True,
        capture_output=True,
    )
    return time.perf_counter() - start


if __name__ == "__main__":
    main(tyro.cli(Config))
