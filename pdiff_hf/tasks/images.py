"""MNIST, Fashion-MNIST and CIFAR-10, and tasks of small networks on images that are averaged down.

The data come from the Hub (`ylecun/mnist`, `zalando-datasets/fashion_mnist`, `uoft-cs/cifar10`), or from the folder
that the environment variable `PDIFF_HF_DATA` names: `mnist.npz` (`train_images`, `train_labels`, `test_images`,
`test_labels`), the four idx files of Fashion-MNIST in `fashion-mnist/`, and `cifar10-jpeg.npz` (`train_jpeg`,
`train_offsets`, `train_labels`, and the same of `test`).
"""

import gzip
import io
import itertools
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import constants
from torch import nn
from torch.nn import functional as F

from ..errors import TaskError
from ..extras import require
from .task import Task, half_cosine


REPOSITORIES = {
    "mnist": ("ylecun/mnist", "image", "label"),
    "fashion-mnist": ("zalando-datasets/fashion_mnist", "image", "label"),
    "cifar10": ("uoft-cs/cifar10", "img", "label"),
}
FILES = {"mnist": "mnist.npz", "fashion-mnist": "fashion-mnist", "cifar10": "cifar10-jpeg.npz"}
VALIDATION = 2000


@cache
def load(name: str, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels uint8 `[N, C, H, W]` and classes `[N]` of `"train"` or `"test"`, shuffled once."""
    folder = os.environ.get("PDIFF_HF_DATA")
    if folder is not None and not Path(folder, FILES[name]).exists():
        raise TaskError(f"PDIFF_HF_DATA is {folder}, where {FILES[name]} is not; without it, the data are of the Hub.")
    if folder is None:
        repository, image, label = REPOSITORIES[name]
        rows = rows_of(repository, split, " They may lie in a folder instead, which PDIFF_HF_DATA names.")
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


def rows_of(repository: str, split: str, else_from: str = "") -> Any:
    """The rows of a dataset on the Hub, or a [`TaskError`] that says where they could not be read from."""
    load_dataset = require("datasets", "datasets").load_dataset
    try:
        return load_dataset(repository, split=split)
    except Exception as error:  # whatever the library makes of a connection that is not there
        raise TaskError(
            f"The data of {repository} cannot be read from {constants.ENDPOINT} ({type(error).__name__}: "
            f"{error!s:.200}). Go online, once: they are kept.{else_from}"
        ) from error


def _idx(folder: str, name: str, header: int) -> np.ndarray:
    file = Path(folder, "fashion-mnist", name)
    content = file.read_bytes() if file.exists() else gzip.decompress(file.with_name(f"{name}.gz").read_bytes())
    return np.frombuffer(content, np.uint8, offset=header)


@cache
def _pooled(dataset: str, size: int, examples: int, split: str) -> tuple[torch.Tensor, torch.Tensor]:
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
        train, targets = pixels("test", slice(None))
    return (train - mean) / std, targets


class PooledImages(Task):
    """One pass, where a task says no more, in steps of 64 examples, at a learning rate that falls to 0 by a cosine.
    Images are averaged down, and each pixel is standardized over the training images."""

    dataset: str
    size = 7
    steps = 600
    epochs = 1
    batch_size = 64
    learning_rate = 5e-3

    def data(self, split: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels `[N, channels, size, size]` and classes `[N]`; 64 examples a step, 2,000, and the whole test set."""
        return _pooled(self.dataset, self.size, self.steps * self.batch_size, split)

    def learning_rate_factor(self, progress: float) -> float:
        """Half a cosine."""
        return half_cosine(progress)


def mlp(*sizes: int) -> nn.Module:
    """Linear layers with ReLU between them, of flattened inputs."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class FashionMLP(PooledImages):
    """Two linear layers on Fashion-MNIST at 7x7 pixels, 970 parameters; the whole network is generated."""

    dataset = "fashion-mnist"

    def build_network(self) -> nn.Module:
        return mlp(49, 16, 10)


class CIFAR10ConvNet(PooledImages):
    """Two convolutions and a linear layer on CIFAR-10 at 16x16 pixels, 7,778 parameters; the whole network is
    generated."""

    dataset = "cifar10"
    size = 16
    steps = 700
    epochs = 2

    def build_network(self) -> nn.Module:
        return nn.Sequential(
            *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(24 * 4 * 4, 10)),
        )
