"""Networks for scikit-learn's digits: 1797 images of 8x8 pixels (UCI, CC BY 4.0), in ten classes."""

from functools import cache

import torch
from torch import nn

from ..extras import require
from .images import mlp
from .resnet import ResNet
from .task import Task, half_cosine


SPLITS = {"train": slice(0, 1000), "validation": slice(1000, 1200), "test": slice(1200, 1797)}


@cache
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """All images `[1797, 1, 8, 8]`, pixels between -1 and 1, and classes, shuffled once."""
    found = require("sklearn.datasets", "digits").load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    inputs = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    return inputs[order], torch.tensor(found.target, dtype=torch.long)[order]


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
        inputs, targets = digits()
        return inputs[SPLITS[split]], targets[SPLITS[split]]


class DigitsMLP(DigitsConvNet):
    """Two linear layers, 2,410 parameters; the whole network is generated."""

    def build_network(self) -> nn.Module:
        return mlp(64, 32, 10)


class DigitsResNet(DigitsConvNet):
    """A batch-norm ResNet; its last two batch-norm layers are generated, statistics included (the p-diff protocol)."""

    patterns = ("layer2.1.bn*",)
    epochs = 10

    def build_network(self) -> nn.Module:
        return ResNet(in_channels=1, channels=(16, 32), num_classes=10)


class TwoDigitsMLP(DigitsConvNet):
    """Two linear layers, 1,074 parameters, at a learning rate that falls by half a cosine."""

    learning_rate = 5e-3

    def build_network(self) -> nn.Module:
        return mlp(64, 16, 2)

    def learning_rate_factor(self, progress: float) -> float:
        """Half a cosine."""
        return half_cosine(progress)
