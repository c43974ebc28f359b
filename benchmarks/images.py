"""The paper's small settings: ConvNet-3 and MLP-3, whole networks, on MNIST, Fashion-MNIST and CIFAR-10;
and a larger MLP.

The data are read from the folder that the environment variable `PDIFF_HF_DATA` names, and come from the Hub otherwise
(`ylecun/mnist`, `zalando-datasets/fashion_mnist`, `uoft-cs/cifar10`). Local files: `mnist.npz` (`train_images`,
`train_labels`, `test_images`, `test_labels`), the four idx files of Fashion-MNIST in `fashion-mnist/`, and
`cifar10-jpeg.npz` (`train_jpeg`, `train_offsets`, `train_labels`, and the same of `test`).
"""

import gzip
import io
import itertools
import os
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import nn

from pdiff_hf import Task
from pdiff_hf.extras import require


REPOSITORIES = {
    "mnist": ("ylecun/mnist", "image", "label"),
    "fashion-mnist": ("zalando-datasets/fashion_mnist", "image", "label"),
    "cifar10": ("uoft-cs/cifar10", "img", "label"),
}
VALIDATION = 2000


@cache
def load(name: str, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels uint8 `[N, C, H, W]` and classes `[N]` of `"train"` or `"test"`, shuffled once."""
    folder = os.environ.get("PDIFF_HF_DATA")
    if folder is None:
        repository, image, label = REPOSITORIES[name]
        rows = require("datasets", "datasets").load_dataset(repository, split=split)
        pixels, targets = np.stack([np.asarray(picture) for picture in rows[image]]), np.array(rows[label])
    elif name == "mnist":
        with np.load(Path(folder, "mnist.npz")) as arrays:
            pixels, targets = arrays[f"{split}_images"], arrays[f"{split}_labels"]
    elif name == "fashion-mnist":
        prefix = "train" if split == "train" else "t10k"
        pixels = _idx(folder, f"{prefix}-images-idx3-ubyte", 16).reshape(-1, 28, 28)
        targets = _idx(folder, f"{prefix}-labels-idx1-ubyte", 8)
    else:
        with np.load(Path(folder, "cifar10-jpeg.npz")) as arrays:
            content, offsets = arrays[f"{split}_jpeg"].tobytes(), arrays[f"{split}_offsets"]
            targets = arrays[f"{split}_labels"]
        image_module = require("PIL.Image", "datasets")
        files = [content[a:b] for a, b in itertools.pairwise(offsets)]
        pixels = np.stack([np.asarray(image_module.open(io.BytesIO(file))) for file in files])
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)
    order = np.random.default_rng(0).permutation(len(targets))
    return torch.from_numpy(np.ascontiguousarray(pixels[order])), torch.from_numpy(targets[order].astype(np.int64))


def _idx(folder: str, name: str, header: int) -> np.ndarray:
    file = Path(folder, "fashion-mnist", name)
    content = file.read_bytes() if file.exists() else gzip.decompress(file.with_name(f"{name}.gz").read_bytes())
    return np.frombuffer(content, np.uint8, offset=header)


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
