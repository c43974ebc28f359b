"""Networks for tables that scikit-learn ships: no download, trained in a second."""

from functools import cache
from typing import ClassVar

import torch
from torch import nn

from ..extras import require
from .images import mlp
from .task import Task


# Of the examples; the rest are for training.
VALIDATION, TEST = 0.2, 0.3


@cache
def table(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns `[N, columns]` and classes `[N]`, shuffled once."""
    inputs, targets = getattr(require("sklearn.datasets", "digits"), f"load_{name}")(return_X_y=True)
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    return torch.tensor(inputs, dtype=torch.float32)[order], torch.tensor(targets)[order]


class Table(Task):
    """Columns, each standardized over the training examples; two linear layers."""

    name: ClassVar[str]
    sizes: ClassVar[tuple[int, ...]]
    batch_size = 32

    def build_network(self) -> nn.Module:
        return mlp(*self.sizes)

    def data(self, split: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Columns `[N, columns]` and classes `[N]`: half of the examples, a fifth, and the rest."""
        inputs, targets = table(self.name)
        first = round((1 - VALIDATION - TEST) * len(targets))
        second = round((1 - TEST) * len(targets))
        train = inputs[:first]
        inputs = (inputs - train.mean(0)) / train.std(0).clamp_min(1e-6)
        rows = {"train": slice(0, first), "validation": slice(first, second), "test": slice(second, None)}[split]
        return inputs[rows], targets[rows]


class BreastCancerMLP(Table):
    """Benign or malignant, of 30 measurements of cells (UCI, CC BY 4.0): 569 examples, 530 parameters."""

    name, sizes = "breast_cancer", (30, 16, 2)


class WineMLP(Table):
    """Which of three growers, of 13 measurements of a wine (UCI, CC BY 4.0): 178 examples, 275 parameters."""

    name, sizes = "wine", (13, 16, 3)
