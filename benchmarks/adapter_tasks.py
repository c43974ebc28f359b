"""Base networks of transformers, and families of tasks that adapters of them are trained for.

A ViT that knows scikit-learn's digits, and a LoRA and a head for each subset of the ten digits; a GPT-2 of characters
that has read Python's help, and a LoRA for each module of its standard library, which is described by how often it has
each character.
"""

import importlib
import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import fit
from pdiff_hf import AdaptedNetwork, Task, lora
from pdiff_hf.extras import require
from pdiff_hf.tasks import TaskFamily, half_cosine
from pdiff_hf.tasks.digits import TwoDigitsMLP, digits
from pdiff_hf.tasks.subsets import Subset, Subsets


FOLDER = Path("runs/adapters")
PRETRAINING, RANK = 3000, 2


def _kept(name: str, pretrain: Callable[[Any], Any], kind: str) -> nn.Module:
    """A base network of transformers, of a folder, or pretrained and put there."""
    transformers = require("transformers", "adapters")
    folder = FOLDER / name
    if not (folder / "model.safetensors").exists():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            pretrained = pretrain(transformers)
        pretrained.save_pretrained(folder)
    network: nn.Module = getattr(transformers, kind).from_pretrained(folder, attn_implementation="eager")
    return network.eval()


# ---- a vision transformer


def _pretrained_vit(transformers: Any) -> Any:
    """18,218 parameters, trained on ten digits, shifted and with noise; then a head of two classes, untrained."""
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
    inputs, targets = (part[:1000] for part in digits())

    def loss() -> torch.Tensor:
        some = torch.randint(len(inputs), (64,))
        images = torch.roll(inputs[some], torch.randint(-1, 2, (2,)).tolist(), (-2, -1))
        return F.cross_entropy(network(images + 0.1 * torch.randn_like(images)).logits, targets[some])

    fit(network, PRETRAINING, 3e-3, 0.05, loss)
    network.num_labels = network.config.num_labels = 2
    network.classifier = nn.Linear(32, 2)
    return network


@cache
def vit() -> nn.Module:
    """The vision transformer."""
    return _kept("vit-base", _pretrained_vit, "ViTForImageClassification")


class AdapterOfSubset(Subset, TwoDigitsMLP):
    """An adapter and a head, 578 numbers, that say whether a digit is in a subset; 300 steps."""

    epochs = 15
    learning_rate = 1e-2

    def build_network(self) -> nn.Module:
        return AdaptedNetwork(vit(), lora(vit(), ["q_proj", "v_proj"], RANK, ["classifier"]))


class AdaptersOfSubsets(Subsets):
    """Adapters for subsets of digits."""

    subset = AdapterOfSubset


# ---- a language model of characters

CHARACTERS = "\n !\"#'()*+,-./0123456789:=<>[]_abcdefghijklmnopqrstuvwxyz{}@%\\|"
CONTEXT, EXAMPLES = 16, {"train": 3000, "validation": 300, "test": 600}
# Of modules of the standard library, in alphabetical order.
SPLITS = {"train": slice(0, 100), "validation": slice(100, 116), "test": slice(116, 148)}


class NextCharacter(nn.Module):
    """A language model as one that predicts the character after a window of others."""

    def __init__(self, model: Any):
        super().__init__()
        self.model, self.name_or_path = model, str(FOLDER / "gpt2-base")

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        """Of windows `[B, 16]`: logits `[B, characters]`."""
        logits: torch.Tensor = self.model(windows).logits
        return logits[:, -1]


def numbers(text: str) -> torch.Tensor:
    """Those of characters, of unknown ones that of a space."""
    places = {character: place for place, character in enumerate(CHARACTERS)}
    return torch.tensor([places.get(character, 1) for character in text.lower()])


@cache
def modules() -> dict[str, torch.Tensor]:
    """Modules of the standard library that are long enough, as numbers of their characters."""
    found = {}
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        codes = numbers(file.read_text(encoding="utf-8", errors="ignore"))
        if len(codes) > sum(EXAMPLES.values()) + 3 * CONTEXT:
            found[file.stem] = codes
    if len(found) < SPLITS["test"].stop:
        raise SystemExit(f"Too few modules of this Python's standard library are long enough: {len(found)}.")
    return found


def _pretrained_gpt2(transformers: Any) -> Any:
    config = transformers.GPT2Config(
        vocab_size=len(CHARACTERS),
        n_positions=CONTEXT,
        n_embd=32,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="eager",
    )
    model = transformers.GPT2LMHeadModel(config)
    text = torch.cat([numbers(topic) for topic in importlib.import_module("pydoc_data.topics").topics.values()])

    def loss() -> torch.Tensor:
        starts = torch.randint(len(text) - CONTEXT - 1, (64, 1))
        windows = text[starts + torch.arange(CONTEXT + 1)]
        return F.cross_entropy(model(windows[:, :-1]).logits.flatten(0, 1), windows[:, 1:].flatten())

    fit(model, PRETRAINING, 3e-3, 0.05, loss)
    return model


@cache
def gpt2() -> nn.Module:
    """The language model."""
    return NextCharacter(_kept("gpt2-base", _pretrained_gpt2, "GPT2LMHeadModel")).eval()


class AdapterOfModule(Task):
    """An adapter that continues the text of one module."""

    epochs = 4
    batch_size = 30
    learning_rate = 1e-2

    def __init__(self, name: str):
        self.name = name

    def build_network(self) -> nn.Module:
        return AdaptedNetwork(gpt2(), lora(gpt2(), ["c_attn", "c_proj", "c_fc"], RANK))

    def data(self, split: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Windows of 16 characters, and the characters after them: of the module's end for the test."""
        codes, size = modules()[self.name], EXAMPLES[split]
        # Training before validation before test, a window apart.
        part = {"train": (0.0, 0.6), "validation": (0.6, 0.75), "test": (0.75, 1.0)}[split]
        first, last = int(part[0] * len(codes)), int(part[1] * len(codes)) - 2 * CONTEXT
        starts = torch.linspace(first, last, size).long()
        windows = codes[starts[:, None] + torch.arange(CONTEXT + 1)]
        return windows[:, :-1], windows[:, -1]

    def learning_rate_factor(self, progress: float) -> float:
        return half_cosine(progress)


class AdaptersOfModules(TaskFamily):
    """Modules of the standard library: `{"frequencies": [one a character]}` of their first 60 %."""

    def conditions(self, split: str) -> list[dict[str, Any]]:
        names = list(modules())
        return [{"frequencies": self.frequencies(name)} for name in names[SPLITS[split]]]

    @staticmethod
    @cache
    def frequencies(name: str) -> list[float]:
        """How often a module has each character, times the number of characters."""
        codes = modules()[name]
        counts = torch.bincount(codes[: int(0.6 * len(codes))], minlength=len(CHARACTERS)).float()
        return [round(value, 4) for value in (counts / counts.sum() * len(CHARACTERS)).tolist()]

    def task(self, condition: dict[str, Any]) -> Task:
        names = {tuple(self.frequencies(name)): name for name in modules()}
        return AdapterOfModule(names[tuple(condition["frequencies"])])
