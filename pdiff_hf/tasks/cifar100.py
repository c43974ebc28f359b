"""ResNet-18 on CIFAR-100 (Krizhevsky 2009), the main setting of the p-diff paper."""

from functools import cache

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from .images import rows_of
from .resnet import ResNet
from .task import Task


REPOSITORY = "uoft-cs/cifar100"
# Of the training pixels, per channel.
MEAN = torch.tensor([0.5071, 0.4866, 0.4409]).view(3, 1, 1)
STD = torch.tensor([0.2673, 0.2564, 0.2762]).view(3, 1, 1)


@cache
def _cifar100(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    dataset = rows_of(REPOSITORY, split)
    pixels = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in dataset["img"]]))
    return pixels.permute(0, 3, 1, 2).contiguous(), torch.tensor(dataset["fine_label"])


class CIFAR100ResNet18(Task):
    """A ResNet-18; its last two batch-norm layers are generated: 2,048 weights and biases, and as many statistics."""

    patterns = ("layer4.1.bn*",)
    epochs = 100
    batch_size = 128
    learning_rate = 1e-3

    def build_network(self) -> nn.Module:
        return ResNet(in_channels=3, channels=(64, 128, 256, 512), num_classes=100)

    def data(self, split: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Standardized images `[N, 3, 32, 32]` and classes `[N]`; the last tenth of the training set is validation."""
        pixels, targets = _cifar100("test" if split == "test" else "train")
        if split != "test":
            cut = len(pixels) * 9 // 10
            part = slice(0, cut) if split == "train" else slice(cut, None)
            pixels, targets = pixels[part], targets[part]
        return (pixels / 255 - MEAN) / STD, targets

    def augment(self, inputs: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """One random shift of up to 4 pixels a batch, and a horizontal flip of each image with probability 1/2."""
        size = inputs.shape[-1]
        top, left = torch.randint(9, (2,), generator=generator).tolist()
        inputs = F.pad(inputs, (4, 4, 4, 4))[..., top : top + size, left : left + size]
        flip = torch.rand(len(inputs), generator=generator) < 0.5
        return torch.where(flip.to(inputs.device).view(-1, 1, 1, 1), inputs.flip(-1), inputs)

    def optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=5e-4)
