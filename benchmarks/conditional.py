"""Networks for tasks that nobody trained: what a condition is worth, against what needs no generator.

For each family of tasks: `pdiff-hf collect` of its training conditions and of held-out ones, `train --family neuron`
with each seed, and `evaluate`, which asks for 16 networks of each held-out condition. Prints the verdict; accuracy of
single networks and of ensembles of 16; of the best that needs no generator; of networks trained on the held-out tasks;
points over shuffled conditions and over the best, with 99 % intervals over conditions; minutes of the training.

A killed benchmark goes on where it was; a training or an audit that was killed begins anew.
Data for Fashion-MNIST: see `pdiff_hf/tasks/images.py`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import tyro
from filelock import FileLock
from torch import nn

from benchmarks import minutes_of, table
from pdiff_hf import CollectConfig, EvaluateConfig, NeuronTrainConfig, Task, run_collect, run_evaluate
from pdiff_hf.align import run_align
from pdiff_hf.configs import AlignConfig
from pdiff_hf.files import is_zoo
from pdiff_hf.tasks import load_family
from pdiff_hf.tasks.subsets import DigitsSubset, DigitsSubsets


FRESH_EACH, FRESH_SEED = 4, 10**6
HEADER = (
    "family | seed | verdict | generated: mean, min | ensembles of 16 | best without a generator | trained"
    " | over shuffled | over the best | minutes | steps of training that take as long"
)


class OneStart(DigitsSubset):
    """All networks of all tasks from the same initialization."""

    def build_network(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return super().build_network()


class SubsetsOfOneStart(DigitsSubsets):
    """Subsets of digits, from the same initialization."""

    def task(self, condition: dict[str, Any]) -> Task:
        return OneStart(condition["classes"])


class Row(NamedTuple):
    """A family of tasks, networks of each of its conditions, settings of the training."""

    family: str
    each: int
    settings: dict[str, Any]


ROWS = {
    "digits-subsets": Row(
        "digits-subsets",
        24,
        {"transformer_steps": 7000, "behaviour_inputs": 256, "behaviour_weight": 256.0},
    ),
    "one-start": Row(
        "benchmarks.conditional:SubsetsOfOneStart",
        12,
        {"transformer_steps": 5000, "behaviour_inputs": 256, "behaviour_weight": 256.0, "initial": False},
    ),
    "fashion-subsets": Row(
        "fashion-subsets",
        12,
        {
            "transformer_steps": 2500,
            "behaviour_inputs": 256,
            "behaviour_weight": 256.0,
            "initial": False,
            "ordered": True,
            "last_sigma": 0.9,
            "min_sigma": 0.9,
        },
    ),
    "digits-prototypes": Row("digits-prototypes", 1, {"transformer_steps": 3000, "last_sigma": 0.9}),
}


@dataclass(frozen=True)
class Config:
    """Generates networks for held-out tasks, and evaluates them."""

    rows: tuple[str, ...] = tuple(ROWS)
    """Families."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the generators."""
    mixed_precision: str = "bf16"
    """Of the training."""
    threads: int = 2
    """Of torch."""
    work_dir: str = "runs/conditional"
    """Folder of zoos, pipelines and reports."""
    output: str | None = None
    """Where the figures go: a JSON file."""


def measure(config: Config, name: str, seed: int) -> dict[str, Any]:
    """The figures of one generator."""
    row = ROWS[name]
    settings = {"mixed_precision": config.mixed_precision, **row.settings}
    figures = generalization(Path(config.work_dir, name), row.family, row.each, seed, settings)
    return {"networks": row.each, "settings": row.settings, **figures}


def generalization(
    folder: Path, family: str, each: int, seed: int, settings: dict[str, Any], align: bool = False
) -> dict[str, Any]:
    """Collects so many networks of each task, in canonical form where it is asked for; trains a generator in
    `seed-<seed>` of the folder, and evaluates it on the held-out tasks."""
    zoo, fresh, pipeline = folder / "zoo", folder / "fresh", folder / f"seed-{seed}" / "pipeline"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "zoos.lock"):  # seeds may be measured side by side
        run_collect(CollectConfig(family, output_dir=str(zoo), networks_per_task=each))
        run_collect(
            CollectConfig(family, output_dir=str(fresh), networks_per_task=FRESH_EACH, split="test", seed=FRESH_SEED)
        )
        if align:
            raw, zoo = zoo, folder / "aligned"
            if not is_zoo(zoo):
                run_align(AlignConfig(str(raw), str(zoo), task=family))
    minutes = minutes_of(
        NeuronTrainConfig(
            zoo=str(zoo),
            output_dir=str(pipeline),
            task=family,
            condition=tuple(load_family(family).conditions("train")[0]),
            seed=seed,
            checkpointing_steps=10**9,
            **settings,
        )
    )
    report = run_evaluate(
        EvaluateConfig(
            family,
            str(zoo),
            str(pipeline),
            fresh=str(fresh),
            output_dir=str(pipeline.parent / "report"),
            seed=seed,
        )
    )
    return {"minutes": minutes, **{key: report[key] for key in ("conditions", "verdict", "groups", "training")}}


def cells(row: dict[str, Any]) -> list[str]:
    """A line of the table."""

    def percent(*values: float) -> str:
        return ", ".join(f"{100 * value:.2f}" for value in values)

    groups, gains = row["groups"], row["verdict"]["gains"]
    best = max((gains["retrieval"], gains["regression"]), key=lambda gain: -gain["mean"])
    gold = groups["trained on the task"]
    return [
        row["verdict"]["label"],
        percent(groups["generated"]["single"]["mean"], groups["generated"]["min"]),
        percent(groups["generated"]["ensemble of 16"]["mean"]),
        f"{best['over']}: {percent(groups[best['over']]['single']['mean'])}",
        percent(gold["single"]["mean"]),
        f"{percent(gains['shuffled']['mean'])} ({percent(*gains['shuffled']['interval'])})",
        f"{percent(best['mean'])} ({percent(*best['interval'])})",
        f"{row['minutes']:.1f}",
        "-" if row["training"] is None else str(row["training"]["steps"]),
    ]


def main(config: Config) -> None:
    """Prints a line a generator."""
    torch.set_num_threads(config.threads)
    table(config, HEADER, measure, cells)


if __name__ == "__main__":
    main(tyro.cli(Config))
