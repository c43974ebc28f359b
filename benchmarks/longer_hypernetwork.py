"""Whether a generator for unseen tasks is above a hypernetwork that is trained for longer than the audit's.

The audit of a condition trains its hypernetwork on as many networks as the generator was trained on; its steps are
cheaper, so that it takes less time. For generators that `benchmarks.conditional` trained, prints a line for each
length of the hypernetwork's training: its minutes, with those of the choice of its weight and of other baselines, its
accuracy, that of the generator, and points between both with a 99 % interval over held-out tasks and the images that
they share.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks import write
from benchmarks.conditional import ROWS
from pdiff_hf import WeightZoo
from pdiff_hf.evaluation.conditions import NETWORKS, ConditionAudit
from pdiff_hf.evaluation.measures import interval, resampled_means
from pdiff_hf.evaluation.regression import BATCH, STEPS
from pdiff_hf.evaluation.stage import seen_in_training
from pdiff_hf.evaluation.verdict import CONFIDENCE
from pdiff_hf.hub.pipelines import load_pipeline
from pdiff_hf.tasks import load_family


HEADER = "steps | minutes | hypernetwork | generator | over the hypernetwork"


@dataclass(frozen=True)
class Config:
    """Trains hypernetworks for longer and longer."""

    row: str = "fashion-subsets"
    """Of `benchmarks.conditional`."""
    seed: int = 0
    """Of the generator, which is there."""
    steps: tuple[int, ...] = (2500, 10000)
    """Of the hypernetworks, 2,000 at least."""
    guidance_scale: float = 1.0
    """Of the generator: see its report."""
    threads: int = 2
    """Of torch."""
    work_dir: str = "runs/conditional"
    """Folder of zoos and pipelines."""
    output: str | None = None
    """Where the figures go: a JSON file."""


def main(config: Config) -> None:
    """Prints a line a hypernetwork."""
    if min(config.steps) < STEPS:
        raise SystemExit(f"The audit's hypernetwork is trained for {STEPS} steps or more.")
    torch.set_num_threads(config.threads)
    folder = Path(config.work_dir, config.row)
    family, zoo = load_family(ROWS[config.row].family), WeightZoo(folder / "zoo")
    place = folder / f"seed-{config.seed}" / "pipeline"
    pipeline, seen = load_pipeline(place), seen_in_training(place)
    found: list[dict[str, Any]] = []
    generated = None
    print(HEADER)
    for steps in config.steps:
        longer = seen._replace(networks=steps * BATCH)
        audit = ConditionAudit(family, zoo, pipeline, seed=config.seed, seen=longer)
        if generated is None:
            made = audit._generate(audit.asked, NETWORKS, config.guidance_scale)
            generated = audit._score(made)["single"]
        started = time.perf_counter()
        vectors = dict(audit._answers())["hypernetwork"]
        minutes = (time.perf_counter() - started) / 60
        theirs = audit._score(vectors[:, None])["single"]
        difference = generated - theirs
        one = {
            "steps": steps,
            "minutes": minutes,
            "hypernetwork": theirs.mean().item(),
            "generator": generated.mean().item(),
            "over": difference.mean().item(),
            "interval": interval(resampled_means(difference, 0, audit.alike), CONFIDENCE),
        }
        found.append(one)
        points = "{:.2f} ({:.2f} to {:.2f})".format(*(100 * value for value in (one["over"], *one["interval"])))
        print(
            f"{steps} | {minutes:.1f} | {100 * one['hypernetwork']:.2f} | {100 * one['generator']:.2f} | {points}",
            flush=True,
        )
    write(config, rows=found)


if __name__ == "__main__":
    main(tyro.cli(Config))
