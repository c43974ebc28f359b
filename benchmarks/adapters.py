"""Adapters for tasks that nobody trained: of a vision transformer and of a language model.

For each family of `benchmarks.adapter_tasks`: `pdiff-hf collect` of adapters of its training tasks, many at once, and
of held-out ones, `align`, `train --family neuron`, `generate --export`, and `evaluate`, which asks for adapters of
held-out tasks. Prints what `benchmarks.conditional` prints, and the largest difference of outputs between PEFT's model
of an exported folder and ours.

A killed benchmark goes on where it was: every stage resumes.
"""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import tyro

from benchmarks import minutes_of, table
from benchmarks.adapter_tasks import FOLDER, gpt2, vit
from benchmarks.conditional import FRESH_EACH, FRESH_SEED, HEADER, cells
from pdiff_hf import (
    CollectConfig,
    EvaluateConfig,
    GenerateConfig,
    NeuronTrainConfig,
    WeightZoo,
    run_collect,
    run_evaluate,
    run_generate,
)
from pdiff_hf.align import AlignConfig, run_align
from pdiff_hf.extras import require
from pdiff_hf.files import is_zoo
from pdiff_hf.tasks import load_family


class Row(NamedTuple):
    """A family of tasks, what its tasks differ by, adapters of each, the base network."""

    family: str
    condition: str
    each: int
    base: Any


ROWS = {
    "vit": Row("benchmarks.adapter_tasks:AdaptersOfSubsets", "classes", 1, vit),
    "gpt2": Row("benchmarks.adapter_tasks:AdaptersOfModules", "frequencies", 4, gpt2),
}


@dataclass(frozen=True)
class Config:
    """Generates adapters for held-out tasks, and evaluates them."""

    rows: tuple[str, ...] = tuple(ROWS)
    """Base networks."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the generators."""
    transformer_steps: int = 2000
    """Of the generator's training."""
    threads: int = 2
    """Of torch."""
    output: str | None = None
    """Where the figures go: a JSON file."""


def measure(config: Config, name: str, seed: int) -> dict[str, Any]:
    """The figures of one generator."""
    (family, condition, each, _), folder = ROWS[name], FOLDER / name
    zoo, fresh, pipeline = folder / "zoo", folder / "fresh", folder / f"seed-{seed}" / "pipeline"
    run_collect(CollectConfig(family, output_dir=str(zoo), networks_per_task=each))
    run_collect(
        CollectConfig(family, output_dir=str(fresh), networks_per_task=FRESH_EACH, split="test", seed=FRESH_SEED)
    )
    aligned = folder / "aligned"
    if not is_zoo(aligned):
        run_align(AlignConfig(str(zoo), str(aligned), task=family))
    minutes = minutes_of(
        NeuronTrainConfig(
            zoo=str(aligned),
            output_dir=str(pipeline),
            task=family,
            condition=(condition,),
            seed=seed,
            batch_size=64,
            initial=False,
            mixed_precision="bf16",
            transformer_steps=config.transformer_steps,
            checkpointing_steps=10**9,
        )
    )
    report = run_evaluate(
        EvaluateConfig(
            family,
            str(aligned),
            str(pipeline),
            fresh=str(fresh),
            output_dir=str(pipeline.parent / "report"),
            seed=seed,
        )
    )
    return {
        "family": name,
        "networks": each,
        "seed": seed,
        "minutes": minutes,
        "difference_to_peft": difference_to_peft(name, pipeline),
        **{key: report[key] for key in ("conditions", "verdict", "groups", "training")},
    }


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
        ours, inputs = task.build_network(), task.data("test")[0]
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
