"""The paper's small settings: ConvNet-3 and MLP-3, whole networks, on MNIST, Fashion-MNIST and CIFAR-10;
and a larger MLP. Data: see `pdiff_hf/tasks/images.py`.
"""

from functools import cache

import numpy as np
import torch
from torch import nn

from pdiff_hf import Task
from pdiff_hf.tasks.images import VALIDATION, load


class Images(Task):
    """A task of these data sets: 2,000 images of the training set are for validation, 2,000 of the test set for the
    test."""

    dataset: str
    shape: tuple[int, int, int]
    epochs = 4
    batch_size = 128
    learning_rate = 1e-3
    test_examples = 2000

    def data(self, split: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Standardized pixels `[N, C, H, W]` and classes `[N]`."""
        return _prepared(self.dataset, split, self.test_examples)


@cache
def _prepared(dataset: str, split: str, test_examples: int) -> tuple[torch.Tensor, torch.Tensor]:
    pixels, targets = load(dataset, "test" if split == "test" else "train")
    part = {
        "train": slice(VALIDATION, None),
        "validation": slice(0, VALIDATION),
        "test": slice(0, test_examples),
    }[split]
    return (pixels[part].float() - 127.5) / 63.75, targets[part]


class _ConvNet3(Images):
    """Three convolutions and a linear layer, 29,066 parameters (33,834 for CIFAR-10)."""

    epochs = 2

    def build_network(self) -> nn.Module:
        channels, size, _ = self.shape
        return nn.Sequential(
            *(nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(64 * (size // 8) ** 2, 10)),
        )


class _MLP3(Images):
    """Three linear layers, 55,050 parameters (62,090 for CIFAR-10)."""

    width = 64
    test_examples = 10_000

    def build_network(self) -> nn.Module:
        inputs = int(np.prod(self.shape))
        return nn.Sequential(
            *(nn.Flatten(), nn.Linear(inputs, self.width), nn.ReLU()),
            *(nn.Linear(self.width, self.width), nn.ReLU(), nn.Linear(self.width, 10)),
        )


class MNISTConvNet3(_ConvNet3):
    dataset, shape = "mnist", (1, 28, 28)


class MNISTMLP3(_MLP3):
    dataset, shape = "mnist", (1, 28, 28)


class MNISTMLP1M(Images):
    """Three linear layers, 952,410 parameters."""

    dataset, shape = "mnist", (1, 28, 28)
    epochs = 2

    def build_network(self) -> nn.Module:
        return nn.Sequential(
            *(nn.Flatten(), nn.Linear(784, 800), nn.ReLU()),
            *(nn.Linear(800, 400), nn.ReLU(), nn.Linear(400, 10)),
        )


class FashionConvNet3(_ConvNet3):
    dataset, shape = "fashion-mnist", (1, 28, 28)


class FashionMLP3(_MLP3):
    dataset, shape = "fashion-mnist", (1, 28, 28)


class CIFAR10ConvNet3(_ConvNet3):
    dataset, shape = "cifar10", (3, 32, 32)
    epochs = 4


class CIFAR10MLP3(_MLP3):
    dataset, shape = "cifar10", (3, 32, 32)
    width = 20
    epochs = 8
