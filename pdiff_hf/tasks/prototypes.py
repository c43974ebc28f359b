"""A family of tasks on scikit-learn's digits whose classes are described by their mean image."""

import itertools
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from ..errors import TaskError
from .digits import TwoDigitsMLP, digits
from .family import StateDict, TaskFamily
from .task import Task


# Digits, each distorted, turned and mirrored: those of a digit are of one split.
DIGITS_OF = {"train": (0, 1, 2, 4, 6), "validation": (5, 7), "test": (3, 8, 9)}
# What is learned about few digits is about these digits, so that many distortions of them are classes of their own.
WARPS_OF = {"train": 40, "validation": 40, "test": 1}
PAIRS_OF = {"train": 8000, "validation": 96, "test": 128}
# Examples of each class, since tasks of one size are trained at once.
EXAMPLES_OF = {"train": 75, "validation": 12, "test": 48}
# Of mean images that are one: processors round them differently.
TOLERANCE = 1e-2


class DigitClass(NamedTuple):
    """A digit, distorted in one of 40 ways (0: not at all), then turned or mirrored in one of eight."""

    digit: int
    warp: int
    way: int


def turned(images: torch.Tensor, way: int) -> torch.Tensor:
    """Images, turned or mirrored in one of eight ways."""
    rotated = torch.rot90(images, way % 4, (-2, -1))
    return rotated.flip(-1) if way >= 4 else rotated


def warped(images: torch.Tensor, warp: int) -> torch.Tensor:
    """Images `[n, 1, 8, 8]`, turned by up to half a radian, stretched, sheared and moved: each warp in its own way."""
    if warp == 0:
        return images
    draws = 2 * torch.rand(6, generator=torch.Generator().manual_seed(warp)) - 1  # from -1 to 1
    angle, shear = 0.5 * draws[0], 0.35 * draws[1]
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).view(2, 2)
    stretch = torch.diag(1.25 ** draws[2:4]) + torch.tensor([[0.0, 1.0], [0.0, 0.0]]) * shear
    transform = torch.cat([turn @ stretch, 0.2 * draws[4:, None]], dim=1)  # the shift in half widths
    grid = F.affine_grid(transform.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


@cache
def examples(digit: int, split: str) -> torch.Tensor:
    """Images of a digit, `[n, 1, 8, 8]`."""
    inputs, classes = digits()
    start, end = {"train": (0, 1000), "validation": (1000, 1200), "test": (1200, 1797)}[split]
    return inputs[start:end][classes[start:end] == digit][: EXAMPLES_OF[split]]


def images_of(one: DigitClass, split: str) -> torch.Tensor:
    """The images of a class, `[n, 1, 8, 8]`."""
    return turned(warped(examples(one.digit, split), one.warp), one.way)


@cache
def mean_image(one: DigitClass) -> tuple[float, ...]:
    """Of the training examples of a class, 64 pixels."""
    return tuple(round(pixel, 4) for pixel in images_of(one, "train").mean(0).flatten().tolist())


def classes_of(split: str) -> list[DigitClass]:
    """All that its pairs are drawn from."""
    return [DigitClass(*one) for one in itertools.product(DIGITS_OF[split], range(WARPS_OF[split]), range(8))]


@cache
def all_classes() -> tuple[list[DigitClass], torch.Tensor]:
    """Of all splits, and their mean images `[classes, 64]`."""
    classes = [one for split in DIGITS_OF for one in classes_of(split)]
    return classes, torch.tensor([mean_image(one) for one in classes])


def class_of(mean: list[float]) -> DigitClass:
    r"""
    The class with this mean image, of 64 pixels.

    Raises:
        [`TaskError`]: there is none.
    """
    classes, means = all_classes()
    differences = (means - torch.tensor(mean)).abs().amax(1)
    nearest = int(differences.argmin())
    if not differences[nearest] <= TOLERANCE:
        raise TaskError(f"No class of digits has this mean image: the nearest differs by {differences[nearest]:.2g}.")
    return classes[nearest]


@cache
def pairs_of(split: str) -> list[tuple[DigitClass, DigitClass]]:
    """Drawn from all pairs of classes of different digits, each in one order."""
    classes = classes_of(split)
    generator = torch.Generator().manual_seed(0)
    pairs: dict[frozenset[DigitClass], tuple[DigitClass, DigitClass]] = {}
    while len(pairs) < PAIRS_OF[split]:
        one, other = (classes[place] for place in torch.randint(len(classes), (2,), generator=generator).tolist())
        if one.digit != other.digit:
            pairs.setdefault(frozenset((one, other)), (one, other))
    return list(pairs.values())


class DigitsPair(TwoDigitsMLP):
    """Which of two classes an image is of."""

    def __init__(self, first: DigitClass, second: DigitClass):
        self.classes = (first, second)

    def data(self, split: str) -> tuple[torch.Tensor, torch.Tensor]:
        """150, 24 and 96 examples."""
        images = [images_of(one, split) for one in self.classes]
        return torch.cat(images), torch.tensor([0, 1]).repeat_interleave(EXAMPLES_OF[split])


class DigitsPrototypes(TaskFamily):
    """
    Pairs of classes of digits that no network has seen, described by their mean images: `{"first": [64 pixels],
    "second": [64 pixels]}`. A class is a digit, turned or mirrored in one of eight ways; those of training and
    validation are distorted, too, each in one of 40 ways.
    """

    def conditions(self, split: str) -> list[dict[str, Any]]:
        """8,000, 96 and 128 pairs of different digits."""
        return [{"first": list(mean_image(one)), "second": list(mean_image(other))} for one, other in pairs_of(split)]

    def task(self, condition: dict[str, Any]) -> Task:
        return DigitsPair(class_of(condition["first"]), class_of(condition["second"]))

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
