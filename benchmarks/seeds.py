"""Tasks of zoos of independent networks: each network has an initialization and an order of data of its own."""

from torch import nn

from pdiff_hf.tasks.images import PooledImages, mlp


class FashionMLP2(PooledImages):
    """Two hidden layers: 1,242 parameters."""

    dataset = "fashion-mnist"

    def build_network(self) -> nn.Module:
        return mlp(49, 16, 16, 10)


class FashionConvNet(PooledImages):
    """Two convolutions and a linear layer: 4,906 parameters."""

    dataset = "fashion-mnist"

    def build_network(self) -> nn.Module:
        return nn.Sequential(
            *(nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(12, 24, 3, padding=1), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(24 * 3 * 3, 10)),
        )


class MNISTMLP32(PooledImages):
    """784-32-32-10, 26,506 parameters: the setting of DeepWeightFlow."""

    dataset = "mnist"
    size = 28
    steps = 900
    epochs = 5

    def build_network(self) -> nn.Module:
        return mlp(784, 32, 32, 10)
