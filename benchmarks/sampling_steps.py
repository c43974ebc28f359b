"""Quality of generated networks against denoising steps and scheduler.

Prints a row for each scheduler and number of steps: mean and minimum accuracy on the test split, spread (mean L2
distance of two networks of one pipeline), and seconds for all networks. A number of steps is as good as 1000 steps of
the pipeline's own scheduler where its mean accuracy is at most two standard errors below, its minimum at most half a
point below, and its spread at most a tenth smaller: few steps can look good by sampling near the mean only.
"""

import json
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import tyro

from pdiff_hf import load_pipeline, load_task
from pdiff_hf.config import versions


@dataclass(frozen=True)
class Config:
    """Samples with every scheduler and number of steps."""

    pipelines: tuple[str, ...]
    """Folders of pipelines; the figures are taken over the networks of all of them."""
    task: str = "digits-convnet"
    schedulers: tuple[str, ...] = (
        "DDPMScheduler",
        "DDIMScheduler",
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
    )
    steps: tuple[int, ...] = (1000, 200, 100, 50, 20, 10, 5)
    num_networks: int = 100
    """Of each pipeline."""
    threads: int = 1
    output: str | None = None
    """A JSON file for the figures."""


def main(config: Config) -> None:
    """Measures and prints."""
    torch.set_num_threads(config.threads)
    task = load_task(config.task)
    network = task.build_network()
    inputs, targets = task.data("test")
    rows: list[dict[str, Any]] = []
    print("scheduler | steps | mean | min | spread | seconds | as good as 1000")
    for scheduler in config.schedulers:
        for steps in config.steps if scheduler == "DDPMScheduler" else [s for s in config.steps if s <= 100]:
            accuracies, spreads, seconds = [], [], 0.0
            for folder in config.pipelines:
                pipe = load_pipeline(folder)
                pipe.set_progress_bar_config(disable=True)
                pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
                start = time.perf_counter()
                generator = torch.Generator().manual_seed(0)
                vectors = pipe(
                    config.num_networks, num_inference_steps=steps, generator=generator, output_type="pt"
                ).state_dicts
                seconds += time.perf_counter() - start
                spreads.append(torch.pdist(vectors).mean().item())
                for state_dict in pipe.layout.unflatten(vectors):
                    network.load_state_dict(state_dict)
                    accuracies.append(task.correct(task.predict(network, inputs), targets).double().mean())
            accuracy = torch.stack(accuracies)
            row = {
                "scheduler": scheduler,
                "steps": steps,
                "mean": accuracy.mean().item(),
                "standard_error": accuracy.std().item() / len(accuracy) ** 0.5,
                "min": accuracy.min().item(),
                "spread": sum(spreads) / len(spreads),
                "seconds": seconds,
            }
            rows.append(row)
            row["as_good_as_1000"] = (
                row["mean"]
                >= rows[0]["mean"] - 2 * (row["standard_error"] ** 2 + rows[0]["standard_error"] ** 2) ** 0.5
                and row["min"] >= rows[0]["min"] - 0.005
                and row["spread"] >= 0.9 * rows[0]["spread"]
            )
            print(
                f"{scheduler} | {steps} | {100 * row['mean']:.2f} ±{100 * row['standard_error']:.2f} "
                f"| {100 * row['min']:.2f} | {row['spread']:.2f} | {seconds:.2f} | {row['as_good_as_1000']}",
                flush=True,
            )
    if config.output:
        facts = {
            "networks": config.num_networks * len(config.pipelines),
            "threads": config.threads,
            "machine": f"{platform.system()} {platform.machine()}",
            "versions": versions(),
        }
        Path(config.output).write_text(json.dumps({"facts": facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Config))
