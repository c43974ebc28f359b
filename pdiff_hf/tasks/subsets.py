"""Families of two-class tasks: which of ten classes count as positive."""

import itertools
from typing import Any, ClassVar

import torch
from torch import nn

from .digits import TwoDigitsMLP
from .family import StateDict, TaskFamily
from .images import PooledImages
from .task import Task


# Pairs of a subset and its complement, of 511: swapping two outputs of a network of the one solves the other.
PAIRS = {"train": slice(0, 389), "validation": slice(389, 409), "test": slice(409, 511)}


class Subset(Task):
    """Whether an example's class is in a subset of the ten of another task: 1 where it is."""

    def __init__(self, classes: list[int]):
        self.classes = torch.tensor(classes)

    def data(self, split: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs of the other task, and two classes."""
        inputs, classes = super().data(split)
        return inputs, self.classes[classes]


class Subsets(TaskFamily):
    """The 1,022 subsets of ten classes that are neither empty nor all: `{"classes": [0, 1, ...]}`, one a class."""

    subset: ClassVar[type[Subset]]

    def conditions(self, split: str) -> list[dict[str, Any]]:
        """778, 40 and 204 subsets; a subset and its complement are on the same side."""
        halves = [subset for subset in itertools.product((0, 1), repeat=10) if subset[0] == 0 and any(subset)]
        order = torch.randperm(len(halves), generator=torch.Generator().manual_seed(0)).tolist()
        pairs = [halves[place] for place in order[PAIRS[split]]]
        return [{"classes": [one ^ flip for one in subset]} for subset in pairs for flip in (0, 1)]

    def task(self, condition: dict[str, Any]) -> Task:
        return self.subset(condition["classes"])

    def equivalents(self, condition: dict[str, Any], state_dict: StateDict) -> list[tuple[dict[str, Any], StateDict]]:
        """The complement, with the two outputs swapped."""
        outputs = list(state_dict)[-2:]  # weights and biases of the last layer
        swapped = {name: values.flip(0) if name in outputs else values for name, values in state_dict.items()}
        return [({"classes": [1 - one for one in condition["classes"]]}, swapped)]


class DigitsSubset(Subset, TwoDigitsMLP):
    """Whether a digit is in a subset of the ten."""


class DigitsSubsets(Subsets):
    """Subsets of scikit-learn's digits; two linear layers."""

    subset = DigitsSubset


class FashionSubset(Subset, PooledImages):
    """Whether a piece of clothing, at 7x7 pixels, is in a subset of the ten kinds: two convolutions and a linear
    layer, 1,902 parameters, trained in 300 steps."""

    dataset = "fashion-mnist"
    steps = 300

    def build_network(self) -> nn.Module:
        return nn.Sequential(
            *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(8, 20, 3, padding=1), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(20 * 3 * 3, 2)),
        )


class FashionSubsets(Subsets):
    """Subsets of the ten kinds of clothes of Fashion-MNIST; convolutional networks."""

    subset = FashionSubset
