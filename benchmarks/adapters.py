"""Adapters for tasks that nobody trained: of a vision transformer, made for subsets of digits.

A ViT of transformers is pretrained on scikit-learn's digits, shifted and with noise. For each subset of the ten
digits, a LoRA of rank 2 on queries and values, and the head, is trained (578 numbers): `pdiff-hf collect`, many at
once, of 778 subsets and of held-out ones. Then `train --family neuron`, `generate --export`, and `evaluate`, which
asks for adapters of held-out subsets. Prints what `benchmarks.conditional` prints, and the largest difference of
outputs between PEFT's model of an exported folder and ours.

A killed benchmark goes on where it was: every stage resumes.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import nn
from torch.nn import functional as F

from benchmarks import minutes_of, table
from benchmarks.conditional import FRESH_EACH, FRESH_SEED, HEADER, cells
from pdiff_hf import (
    AdaptedNetwork,
    CollectConfig,
    EvaluateConfig,
    GenerateConfig,
    NeuronTrainConfig,
    WeightZoo,
    lora,
    run_collect,
    run_evaluate,
    run_generate,
)
from pdiff_hf.extras import require
from pdiff_hf.tasks.digits import TwoDigitsMLP
from pdiff_hf.tasks.subsets import Subset, Subsets


FOLDER = Path("runs/adapters")
PRETRAINING = 3000
RANK, TARGETS, TRAINED = 2, ["q_proj", "v_proj"], ["classifier"]


@cache
def base() -> nn.Module:
    """The pretrained network, with a head of two classes that is not trained."""
    transformers = require("transformers", "adapters")
    folder = FOLDER / "base"
    if not (folder / "model.safetensors").exists():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            pretrained = _pretrained(transformers)
            pretrained.num_labels = pretrained.config.num_labels = 2
            pretrained.classifier = nn.Linear(32, 2)
        pretrained.save_pretrained(folder)
    network: nn.Module = transformers.ViTForImageClassification.from_pretrained(folder, attn_implementation="eager")
    return network.eval()


def _pretrained(transformers: Any) -> Any:
    """18,218 parameters, trained on ten digits."""
    config = transformers.ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        num_labels=10,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="eager",
    )
    network = transformers.ViTForImageClassification(config)
    inputs, targets = super(TwoDigitsMLP, TwoDigitsMLP()).data("train")
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, PRETRAINING)
    for _ in range(PRETRAINING):
        some = torch.randint(len(inputs), (64,))
        images = torch.roll(inputs[some], torch.randint(-1, 2, (2,)).tolist(), (-2, -1))
        outputs = network(images + 0.1 * torch.randn_like(images)).logits
        optimizer.zero_grad()
        F.cross_entropy(outputs, targets[some]).backward()
        optimizer.step()
        schedule.step()
    return network


class AdapterOfSubset(Subset, TwoDigitsMLP):
    """An adapter that says whether a digit is in a subset; 300 steps."""

    epochs = 15
    learning_rate = 1e-2

    def build_network(self) -> nn.Module:
        return AdaptedNetwork(base(), lora(base(), TARGETS, RANK, TRAINED))


class AdaptersOfSubsets(Subsets):
    """Adapters for subsets of digits."""

    subset = AdapterOfSubset


@dataclass(frozen=True)
class Config:
    """Generates adapters for held-out tasks, and evaluates them."""

    rows: tuple[str, ...] = ("vit",)
    """Base networks."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the generators."""
    networks_per_task: int = 1
    """Adapters of each training task."""
    transformer_steps: int = 2000
    """Of the generator's training."""
    threads: int = 2
    """Of torch."""
    output: str | None = None
    """Where the figures go: a JSON file."""


def measure(config: Config, name: str, seed: int) -> dict[str, Any]:
    """The figures of one generator."""
    torch.set_num_threads(config.threads)
    family, folder = "benchmarks.adapters:AdaptersOfSubsets", FOLDER / name
    zoo, fresh, pipeline = folder / "zoo", folder / "fresh", folder / f"seed-{seed}" / "pipeline"
    run_collect(CollectConfig(family, output_dir=str(zoo), networks_per_task=config.networks_per_task))
    run_collect(
        CollectConfig(family, output_dir=str(fresh), networks_per_task=FRESH_EACH, split="test", seed=FRESH_SEED)
    )
    minutes = minutes_of(
        NeuronTrainConfig(
            zoo=str(zoo),
            output_dir=str(pipeline),
            task=family,
            condition=("classes",),
            seed=seed,
            batch_size=64,
            mixed_precision="bf16",
            transformer_steps=config.transformer_steps,
            checkpointing_steps=10**9,
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
    return {
        "family": name,
        "networks": config.networks_per_task,
        "seed": seed,
        "minutes": minutes,
        "difference_to_peft": difference_to_peft(pipeline),
        **{key: report[key] for key in ("conditions", "verdict", "groups", "training")},
    }


def difference_to_peft(pipeline: Path) -> float:
    """The largest difference of outputs between PEFT's model of generated adapters and ours."""
    peft = require("peft", "adapters")
    family, asked = AdaptersOfSubsets(), AdaptersOfSubsets().conditions("test")[:4]
    exported = pipeline.parent / "exported"
    (pipeline.parent / "asked.jsonl").write_text("".join(json.dumps(one) + "\n" for one in asked))
    generated = pipeline.parent / "generated"
    run_generate(
        GenerateConfig(
            pipeline=str(pipeline),
            output_dir=str(generated),
            num_networks=len(asked),
            conditions=str(pipeline.parent / "asked.jsonl"),
            export=None if exported.exists() else str(exported),
        )
    )
    zoo, inputs = WeightZoo(generated), family.task(asked[0]).data("test")[0]
    largest = 0.0
    for index in range(len(zoo)):
        ours = family.task(asked[index]).build_network()
        ours.load_state_dict(zoo.state_dict(index))
        own = base()
        before = own.state_dict()
        theirs = peft.PeftModel.from_pretrained(own, exported / f"{index:05d}")
        with torch.no_grad():
            largest = max(largest, (theirs(inputs).logits - ours(inputs)).abs().max().item())
        theirs.unload().load_state_dict(before)
        base.cache_clear()
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
