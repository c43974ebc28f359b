"""A family of tasks on scikit-learn's digits whose classes are described by their mean image."""

import itertools
from functools import cache
from typing import Any

import torch

from .digits import TwoDigitsMLP, digits
from .family import StateDict, TaskFamily
from .task import Task


# Digits, each turned and mirrored in eight ways: those of a digit are of one split.
DIGITS_OF = {"train": (0, 1, 2, 4, 6), "validation": (5, 7), "test": (3, 8, 9)}
PAIRS_OF = {"train": 800, "validation": 40, "test": 128}
# Examples of each class, since tasks of one size are trained at once.
EXAMPLES_OF = {"train": 75, "validation": 12, "test": 48}


def turned(images: torch.Tensor, way: int) -> torch.Tensor:
    """Images, turned or mirrored in one of eight ways."""
    rotated = torch.rot90(images, way % 4, (-2, -1))
    return rotated.flip(-1) if way >= 4 else rotated


@cache
def examples(digit: int, split: str) -> torch.Tensor:
    """Images of a digit, `[n, 1, 8, 8]`."""
    inputs, classes = digits()
    start, end = {"train": (0, 1000), "validation": (1000, 1200), "test": (1200, 1797)}[split]
    return inputs[start:end][classes[start:end] == digit][: EXAMPLES_OF[split]]


@cache
def mean_image(digit: int, way: int) -> tuple[float, ...]:
    """Of the training examples of a class, 64 pixels."""
    return tuple(round(pixel, 4) for pixel in turned(examples(digit, "train"), way).mean(0).flatten().tolist())


class DigitsPair(TwoDigitsMLP):
    """Which of two classes an image is of; a class is a digit, turned or mirrored in one of eight ways."""

    def __init__(self, classes: tuple[tuple[int, int], tuple[int, int]]):
        self.classes = classes

    def data(self, split: str) -> tuple[torch.Tensor, torch.Tensor]:
        """150, 24 and 96 examples."""
        images = [turned(examples(digit, split), way) for digit, way in self.classes]
        return torch.cat(images), torch.tensor([0, 1]).repeat_interleave(EXAMPLES_OF[split])


class DigitsPrototypes(TaskFamily):
    """
    Pairs of classes of digits that no network has seen, described by their mean images: `{"first": [64 pixels],
    "second": [64 pixels]}`. A class is a digit, turned or mirrored in one of eight ways.
    """

    def conditions(self, split: str) -> list[dict[str, Any]]:
        """800, 40 and 128 pairs, both orders of each."""
        classes = list(itertools.product(DIGITS_OF[split], range(8)))
        pairs = [(one, other) for one, other in itertools.combinations(classes, 2) if one[0] != other[0]]
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
        both = [pair for place in order for pair in (pairs[place], pairs[place][::-1])]
        return [
            {"first": list(mean_image(*one)), "second": list(mean_image(*other))}
            for one, other in both[: PAIRS_OF[split]]
        ]

    def task(self, condition: dict[str, Any]) -> Task:
        known = {mean_image(digit, way): (digit, way) for digit in range(10) for way in range(8)}
        first, second = (known[tuple(condition[name])] for name in ("first", "second"))
        return DigitsPair((first, second))

    def equivalents(self, condition: dict[str, Any], state_dict: StateDict) -> list[tuple[dict[str, Any], StateDict]]:
        """Both classes turned or mirrored together, as the weights of the pixels are; and in the other order, with
        the outputs swapped."""
        pixels, _, *outputs = state_dict
        found = []
        for way, swap in itertools.product(range(8), (False, True)):
            order = turned(torch.arange(64).view(8, 8), way).flatten()
            names = ("second", "first") if swap else ("first", "second")
            first, second = ([condition[name][place] for place in order] for name in names)
            moved = {**state_dict, pixels: state_dict[pixels][:, order]}
            if swap:
                moved |= {name: state_dict[name].flip(0) for name in outputs}
            found.append(({"first": first, "second": second}, moved))
        return found[1:]  # the first is as it was

    def rivals(self, condition: dict[str, Any], inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """The class of the nearer mean image."""
        means = torch.tensor([condition["first"], condition["second"]])
        return {"nearer mean image": (-torch.cdist(inputs.flatten(1), means)).softmax(1)}
