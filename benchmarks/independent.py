"""New networks of zoos of independent seeds: does the transformer over hidden units lie above the front?

For each zoo: `pdiff-hf collect --protocol independent` for the training networks and for fresh ones, `train --family
neuron` with each seed, 300 generated networks, and `evaluate` with all baselines on the canonical form. Prints the
verdict; accuracy (mean, minimum) and similarity of the generated networks and of fresh ones; the gain of both over the
front, points, with the 99 % interval; the share of the way from the front to fresh networks; accuracy of ensembles of
64 networks; minutes of the training; what generating a network costs, in steps of training from the same
initialization, and what so many steps come to.

A killed benchmark goes on where it was; a training or an audit that was killed begins anew.
Data for MNIST and Fashion-MNIST: see `pdiff_hf/tasks/images.py`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import tyro

from benchmarks import minutes_of, table
from pdiff_hf import (
    CollectConfig,
    EvaluateConfig,
    GenerateConfig,
    NeuronTrainConfig,
    run_collect,
    run_evaluate,
    run_generate,
)


class Row(NamedTuple):
    """A zoo: its task, its networks, settings of the training, denoising steps."""

    task: str
    networks: int
    settings: dict[str, Any]
    steps: int = 20


ROWS = {
    "fashion-mlp": Row("fashion-mlp", 12_000, {"hidden_size": 160, "transformer_steps": 5000}),
    "digits-mlp": Row("digits-mlp", 4000, {"transformer_steps": 2500}),
    "fashion-mlp2": Row("benchmarks.seeds:FashionMLP2", 20_000, {"transformer_steps": 8000}),
    "fashion-convnet": Row("benchmarks.seeds:FashionConvNet", 8000, {"transformer_steps": 4000}, steps=80),
    "mnist-mlp32": Row("benchmarks.seeds:MNISTMLP32", 100, {"transformer_steps": 2000, "batch_size": 32}),
}
FRESH, FRESH_SEED = 300, 10**6
ENSEMBLE = 64


@dataclass(frozen=True)
class Config:
    """Generates networks of independent seeds, and evaluates them."""

    rows: tuple[str, ...] = tuple(ROWS)
    """Zoos."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the generators."""
    num_networks: int = 300
    """Generated networks."""
    networks_per_point: int = 300
    """Of each baseline, at each strength."""
    mixed_precision: str = "bf16"
    """Of training and sampling."""
    threads: int = 2
    """Of torch."""
    work_dir: str = "runs/independent"
    """Folder of zoos, pipelines and reports."""
    output: str | None = None
    """Where the figures go: a JSON file."""


def collected(config: Config, name: str) -> tuple[Path, Path]:
    """The training networks and fresh ones."""
    row = ROWS[name]
    folder = Path(config.work_dir, name)
    for zoo, networks, seed in (("zoo", row.networks, 0), ("fresh", FRESH, FRESH_SEED)):
        run_collect(
            CollectConfig(
                task=row.task,
                output_dir=str(folder / zoo),
                num_networks=networks,
                protocol="independent",
                seed=seed,
            )
        )
    return folder / "zoo", folder / "fresh"


def measure(config: Config, name: str, seed: int) -> dict[str, Any]:
    """The figures of one generator."""
    zoo, fresh = collected(config, name)
    row = ROWS[name]
    folder = zoo.parent / f"seed-{seed}"
    minutes = minutes_of(
        NeuronTrainConfig(
            zoo=str(zoo),
            output_dir=str(folder / "pipeline"),
            task=row.task,
            seed=seed,
            mixed_precision=config.mixed_precision,  # type: ignore[arg-type]
            checkpointing_steps=10**9,
            **row.settings,
        )
    )
    run_generate(
        GenerateConfig(
            pipeline=str(folder / "pipeline"),
            output_dir=str(folder / "generated"),
            num_networks=config.num_networks,
            num_inference_steps=row.steps,
            mixed_precision=config.mixed_precision,  # type: ignore[arg-type]
            task=row.task,
        )
    )
    report = run_evaluate(
        EvaluateConfig(
            task=row.task,
            trained=str(zoo),
            generated=str(folder / "generated"),
            fresh=str(fresh),
            pipeline=str(folder / "pipeline"),
            output_dir=str(folder / "report"),
            networks_per_point=config.networks_per_point,
        )
    )
    groups, verdict = report["groups"], report["verdict"]
    ensembles = {
        group: next(one["accuracy"] for one in sizes if one["size"] == ENSEMBLE)
        for group, sizes in report["ensembles"].items()
    }
    return {
        "networks": row.networks,
        "verdict": verdict["label"],
        "accuracy": groups["generated"]["accuracy"]["mean"],
        "minimum": groups["generated"]["accuracy"]["min"],
        "similarity": groups["generated"]["maximum_similarity"]["mean"],
        "fresh_accuracy": groups["fresh"]["accuracy"]["mean"],
        "fresh_minimum": groups["fresh"]["accuracy"]["min"],
        "fresh_similarity": groups["fresh"]["maximum_similarity"]["mean"],
        "gain": verdict["accuracy_gain"],
        "interval": verdict["interval"],
        "fresh_gain": verdict["fresh_accuracy_gain"],
        "gain_at_fresh": verdict["gain_at_fresh"],
        "gain_at_fresh_interval": verdict["gain_at_fresh_interval"],
        "share_at_fresh": verdict["share_at_fresh"],
        "share_of_gap": verdict["share_of_gap"],
        "share_of_gap_interval": verdict["share_of_gap_interval"],
        "ensembles": ensembles,
        "minutes": minutes,
        "training": report["training"],
        "settings": row.settings,
        "steps": row.steps,
    }


def cells(row: dict[str, Any]) -> list[str]:
    """A line of the table."""

    def percent(*values: float | None) -> str:
        return ", ".join("-" if value is None else f"{100 * value:.2f}" for value in values)

    training = row["training"]
    return [
        row["verdict"],
        f"{percent(row['accuracy'], row['minimum'])}, {row['similarity']:.3f}",
        f"{percent(row['fresh_accuracy'], row['fresh_minimum'])}, {row['fresh_similarity']:.3f}",
        f"{percent(row['gain'])} ({percent(*row['interval'])})",
        f"{percent(row['gain_at_fresh'])} ({percent(*row['gain_at_fresh_interval'])})",
        percent(row["fresh_gain"]),
        percent(row["share_of_gap"]),
        percent(*(row["ensembles"][name] for name in ("trained", "generated", "fresh"))),
        f"{row['minutes']:.1f}",
        f"{training['steps']}, {percent(training['accuracy']['mean'])}" if training else "-",
    ]


def main(config: Config) -> None:
    """Prints a line a generator."""
    torch.set_num_threads(config.threads)
    header = (
        "zoo | seed | verdict | generated: mean, min, similarity | fresh | gain | gain at that of fresh | fresh"
        " | share | ensembles: trained, generated, fresh | minutes | steps of training, their accuracy"
    )
    table(config, header, measure, cells)


if __name__ == "__main__":
    main(tyro.cli(Config))
