"""Adapters for tasks that nobody trained: of a vision transformer and of a language model.

For each family of `benchmarks.adapter_tasks`: `pdiff-hf collect` of adapters of its training tasks, many at once, and
of held-out ones, `align`, `train --family neuron`, `generate --export`, and `evaluate`, which asks for adapters of
held-out tasks. Prints what `benchmarks.conditional` prints, and the largest difference of outputs between PEFT's model
of an exported folder and ours.

A killed benchmark goes on where it was; a training or an audit that was killed begins anew.
"""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import tyro

from benchmarks import table
from benchmarks.adapter_tasks import FOLDER, gpt2, vit
from benchmarks.conditional import HEADER, cells, generalization
from pdiff_hf import GenerateConfig, WeightZoo, run_generate
from pdiff_hf.extras import require
from pdiff_hf.tasks import load_family


class Row(NamedTuple):
    """A family of tasks, adapters of each, the base network; of the generator's training, steps, and how much outputs
    count, which was chosen on validation tasks: what adapters do can be learned, and their numbers cannot."""

    family: str
    each: int
    base: Any
    steps: int
    weight: float


ROWS = {
    "vit": Row("benchmarks.adapter_tasks:AdaptersOfSubsets", 1, vit, 2500, 1024.0),
    "gpt2": Row("benchmarks.adapter_tasks:AdaptersOfModules", 4, gpt2, 1500, 256.0),
}


@dataclass(frozen=True)
class Config:
    """Generates adapters for held-out tasks, and evaluates them."""

    rows: tuple[str, ...] = tuple(ROWS)
    """Base networks."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the generators."""
    threads: int = 2
    """Of torch."""
    output: str | None = None
    """Where the figures go: a JSON file."""


def measure(config: Config, name: str, seed: int) -> dict[str, Any]:
    """The figures of one generator."""
    row, folder = ROWS[name], FOLDER / name
    settings = {
        "batch_size": 64,
        "initial": False,
        "behaviour_weight": row.weight,
        "last_sigma": 0.9,
        "min_sigma": 0.9,
        "mixed_precision": "bf16",
        "transformer_steps": row.steps,
    }
    figures = generalization(folder, row.family, row.each, seed, settings, align=True)
    difference = difference_to_peft(name, folder / f"seed-{seed}" / "pipeline")
    return {"networks": row.each, "settings": settings, "difference_to_peft": difference, **figures}


def difference_to_peft(name: str, pipeline: Path) -> float:
    """The largest difference of outputs between PEFT's model of generated adapters and ours."""
    peft = require("peft", "adapters")
    family = load_family(ROWS[name].family)
    asked = family.conditions("test")[:4]
    folder = pipeline.parent
    (folder / "asked.jsonl").write_text("".join(json.dumps(one) + "\n" for one in asked))
    exported = folder / "exported"
    run_generate(
        GenerateConfig(
            pipeline=str(pipeline),
            output_dir=str(folder / "generated"),
            num_networks=len(asked),
            conditions=str(folder / "asked.jsonl"),
            export=None if exported.exists() else str(exported),
        )
    )
    zoo, largest = WeightZoo(folder / "generated"), 0.0
    for index, condition in enumerate(asked):
        task = family.task(condition)
        # The base network is where it was evaluated.
        ours, inputs = task.build_network().to("cpu"), task.data("test")[0]
        ours.load_state_dict(zoo.state_dict(index))
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(ROWS[name].base()), exported / f"{index:05d}")
        with torch.no_grad():
            outputs = theirs(inputs)
            largest = max(largest, (getattr(outputs, "logits", outputs) - ours(inputs)).abs().max().item())
    return largest


def main(config: Config) -> None:
    """Prints a line a generator."""
    torch.set_num_threads(config.threads)
    table(
        config,
        f"{HEADER} | largest difference to PEFT",
        measure,
        lambda row: [*cells(row), f"{row['difference_to_peft']:.1g}"],
    )


if __name__ == "__main__":
    main(tyro.cli(Config))
