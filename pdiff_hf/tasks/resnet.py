"""A residual network for small images (He et al. 2015, arXiv 1512.03385)."""

import torch
from torch import nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm and a shortcut: `[B, I, H, W]` to `[B, O, H / stride, W / stride]`."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(inputs)))))
        return F.relu(hidden + self.downsample(inputs))


class ResNet(nn.Module):
    r"""
    A 3x3 stem, `layer1` to `layer<n>` of two basic blocks each (halving the image from the second on), mean pooling
    and a linear layer. With channels `(64, 128, 256, 512)` it is the ResNet-18 for 32x32 images.

    Args:
        in_channels (`int`): Channels of the images.
        channels (`tuple[int, ...]`): Channels of each layer.
        num_classes (`int`): Outputs.
    """

    def __init__(self, in_channels: int, channels: tuple[int, ...], num_classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels[0])
        self.depth = len(channels)
        width = channels[0]
        for index, layer_channels in enumerate(channels, start=1):
            first = BasicBlock(width, layer_channels, stride=1 if index == 1 else 2)
            self.add_module(f"layer{index}", nn.Sequential(first, BasicBlock(layer_channels, layer_channels, 1)))
            width = layer_channels
        self.fc = nn.Linear(width, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = F.relu(self.bn1(self.conv1(images)))
        for index in range(1, self.depth + 1):
            hidden = self.get_submodule(f"layer{index}")(hidden)
        return self.fc(hidden.mean((2, 3)))
