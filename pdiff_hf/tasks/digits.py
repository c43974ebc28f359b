"""Networks for scikit-learn's digits: 1797 images of 8x8 pixels (UCI, CC BY 4.0), in ten classes."""

import itertools
import math
from functools import cache
from typing import Any

import torch
from torch import nn

from ..extras import require
from .family import TaskFamily
from .resnet import ResNet
from .task import Task


SPLITS = {"train": slice(0, 1000), "validation": slice(1000, 1200), "test": slice(1200, 1797)}


@cache
def _digits() -> tuple[torch.Tensor, torch.Tensor]:
    digits = require("sklearn.datasets", "digits").load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    inputs = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    return inputs[order], torch.tensor(digits.target, dtype=torch.long)[order]


class DigitsConvNet(Task):
    """Two convolutions and a linear layer, 1,898 parameters; the whole network is generated."""

    def build_network(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64, 10),
        )

    def data(self, split: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels between -1 and 1, `[N, 1, 8, 8]`, and classes `[N]`; 1000, 200 and 597 examples."""
        inputs, targets = _digits()
        return inputs[SPLITS[split]], targets[SPLITS[split]]


class DigitsMLP(DigitsConvNet):
    """Two linear layers, 2,410 parameters; the whole network is generated."""

    def build_network(self) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


class DigitsResNet(DigitsConvNet):
    """A batch-norm ResNet; its last two batch-norm layers are generated, statistics included (the p-diff protocol)."""

    patterns = ("layer2.1.bn*",)
    epochs = 10

    def build_network(self) -> nn.Module:
        return ResNet(in_channels=1, channels=(16, 32), num_classes=10)


# Pairs of a subset and its complement, of 511: swapping two outputs of a network of the one solves the other.
SUBSETS = {"train": slice(0, 389), "validation": slice(389, 409), "test": slice(409, 511)}


class DigitsSubset(DigitsConvNet):
    """Whether a digit is in a subset of the ten: two linear layers, 1,074 parameters, 600 steps."""

    learning_rate = 5e-3

    def __init__(self, classes: list[int]):
        self.classes = torch.tensor(classes)

    def build_network(self) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 2))

    def data(self, split: str) -> tuple[torch.Tensor, torch.Tensor]:
        """As those of [`DigitsConvNet`], with two classes: 1 for digits of the subset."""
        inputs, digits = super().data(split)
        return inputs, self.classes[digits]

    def learning_rate_factor(self, progress: float) -> float:
        """Half a cosine."""
        return (1 + math.cos(math.pi * progress)) / 2


class DigitsSubsets(TaskFamily):
    """The 1,022 subsets of ten digits that are neither empty nor all: `{"classes": [0, 1, ...]}`, a number a digit."""

    def conditions(self, split: str) -> list[dict[str, Any]]:
        """778, 40 and 204 subsets; a subset and its complement are on the same side."""
        halves = [subset for subset in itertools.product((0, 1), repeat=10) if subset[0] == 0 and any(subset)]
        order = torch.randperm(len(halves), generator=torch.Generator().manual_seed(0)).tolist()
        pairs = [halves[place] for place in order[SUBSETS[split]]]
        return [{"classes": [one ^ flip for one in subset]} for subset in pairs for flip in (0, 1)]

    def task(self, condition: dict[str, Any]) -> Task:
        return DigitsSubset(condition["classes"])
