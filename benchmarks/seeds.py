"""Tasks of zoos of independent networks: each network has an initialization and an order of data of its own.

The data are those of `benchmarks.images`; images are averaged down, and each pixel is standardized over the training
images.
"""

import itertools
import math
from functools import cache

import torch
from torch import nn
from torch.nn import functional as F

from pdiff_hf import Task

from .images import VALIDATION, load


TEST = 10_000


@cache
def _prepared(dataset: str, size: int, examples: int, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    def pixels(part: str, place: slice) -> tuple[torch.Tensor, torch.Tensor]:
        images, targets = load(dataset, part)
        return F.adaptive_avg_pool2d(images[place].float(), size), targets[place]

    train, targets = pixels("train", slice(VALIDATION, None))
    mean, std = train.mean(0), train.std(0).clamp_min(1.0)
    if split == "train":
        train, targets = train[:examples], targets[:examples]
    elif split == "validation":
        train, targets = pixels("train", slice(0, VALIDATION))
    else:
        train, targets = pixels("test", slice(0, TEST))
    return (train - mean) / std, targets


class Seeds(Task):
    """One pass in steps of 64 examples, at a learning rate that falls to 0 by a cosine."""

    dataset: str
    size = 7
    steps = 600
    epochs = 1
    batch_size = 64
    learning_rate = 5e-3

    def data(self, split: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels `[N, 1, size, size]` and classes `[N]`."""
        return _prepared(self.dataset, self.size, self.steps * self.batch_size, split)

    def learning_rate_factor(self, progress: float) -> float:
        """Half a cosine."""
        return (1 + math.cos(math.pi * progress)) / 2


def _mlp(*sizes: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class FashionMLP(Seeds):
    """One hidden layer: 970 parameters."""

    dataset = "fashion-mnist"

    def build_network(self) -> nn.Module:
        return _mlp(49, 16, 10)


class FashionMLP2(Seeds):
    """Two hidden layers: 1,242 parameters."""

    dataset = "fashion-mnist"

    def build_network(self) -> nn.Module:
        return _mlp(49, 16, 16, 10)


class FashionConvNet(Seeds):
    """Two convolutions and a linear layer: 4,906 parameters."""

    dataset = "fashion-mnist"
    size = 14

    def build_network(self) -> nn.Module:
        return nn.Sequential(
            *(nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(12, 24, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(24 * 3 * 3, 10)),
        )


class MNISTMLP32(Seeds):
    """784-32-32-10, 26,506 parameters: the setting of DeepWeightFlow."""

    dataset = "mnist"
    size = 28
    steps = 900
    epochs = 5

    def build_network(self) -> nn.Module:
        return _mlp(784, 32, 32, 10)
