"""Permutations of hidden units leave a network's function as it is; some of them bring two networks close."""

import torch

from ..extras import require
from ..pipelines.neural_network_diffusion import ParameterLayout
from .predictor import Predictor


class Alignment:
    r"""
    The hidden units of a chain of linear and convolutional layers: each can be permuted together with its bias, its
    normalization and the inputs of the next layer. Weight matching as in Ainsworth et al. 2022 (arXiv 2209.04836).

    Args:
        layout (`ParameterLayout`): Of the networks; all of it is generated.

    Raises:
        `ValueError`: the tensors do not look like such a chain.
    """

    def __init__(self, layout: ParameterLayout):
        self.layers: list[list[tuple[int, tuple[int, ...]]]] = []  # of each layer: its weight, then what goes along
        for tensor in layout.tensors("generated"):
            start, shape = layout.slices[tensor["name"]].start, tuple(tensor["shape"])
            if len(shape) in (2, 4):
                previous = self.layers[-1][0][1][0] if self.layers else None
                if previous is not None and shape[1] % previous:
                    raise ValueError(f"`{tensor['name']}` does not take the outputs of the layer before.")
                self.layers.append([(start, shape)])
            elif len(shape) == 1 and self.layers and shape[0] == self.layers[-1][0][1][0]:
                self.layers[-1].append((start, shape))
            else:
                raise ValueError(f"`{tensor['name']}` belongs to no layer of a chain.")
        if len(self.layers) < 2 or any(len(tensor["shape"]) for tensor in layout.tensors("frozen")):
            raise ValueError("There are no hidden units, or some of them are frozen.")

    @property
    def widths(self) -> list[int]:
        """Hidden units of each layer but the last."""
        return [layer[0][1][0] for layer in self.layers[:-1]]

    def _views(self, vector: torch.Tensor, layer: int) -> list[torch.Tensor]:
        """Everything that moves with the units of a layer, as `[units, ...]`, sharing memory with the vector."""
        units = self.layers[layer][0][1][0]
        views = [self._tensor(vector, place).view(units, -1) for place in self.layers[layer]]
        # The next layer sees each unit at one or, after flattening, several neighbouring places.
        following = self._tensor(vector, self.layers[layer + 1][0])
        return [*views, following.view(following.shape[0], units, -1).transpose(0, 1)]

    @staticmethod
    def _tensor(vector: torch.Tensor, place: tuple[int, tuple[int, ...]]) -> torch.Tensor:
        start, shape = place
        return vector[start : start + torch.Size(shape).numel()].view(shape)

    def permute(self, vector: torch.Tensor, layer: int, order: torch.Tensor) -> torch.Tensor:
        """The vector `[P]` with the units of a layer in another order."""
        permuted = vector.clone()
        for view in self._views(permuted, layer):
            view.copy_(view[order])
        return permuted

    def align(self, vector: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        """The permuted vector `[P]` that coordinate descent over the layers brings nearest to the reference."""
        assign = require("scipy.optimize", "report").linear_sum_assignment
        for _ in range(20):
            moved = False
            for layer, width in enumerate(self.widths):
                views = zip(self._views(reference, layer), self._views(vector, layer), strict=True)
                products = torch.stack([a.flatten(1) @ b.flatten(1).T for a, b in views]).sum(0)
                order = torch.from_numpy(assign(products.numpy(), maximize=True)[1])
                if not torch.equal(order, torch.arange(width)):
                    vector, moved = self.permute(vector, layer, order), True
            if not moved:
                break
        return vector

    def holds(self, predict: Predictor, vector: torch.Tensor, inputs: torch.Tensor) -> bool:
        """Whether permuting leaves a network's predictions as they are: shapes alone do not prove the chain."""
        generator, permuted = torch.Generator().manual_seed(0), vector
        for layer, width in enumerate(self.widths):
            permuted = self.permute(permuted, layer, torch.randperm(width, generator=generator))
        before, after = predict(torch.stack([vector, permuted]).float(), inputs)
        return torch.allclose(before, after, atol=1e-4)


def aligned_distances(
    alignment: Alignment, networks: torch.Tensor, trained: torch.Tensor, candidates: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    L2 distance `[n]` of each network to the nearest training network, the former permuted to match, and which that is.

    Args:
        alignment (`Alignment`): Of the architecture.
        networks (`torch.Tensor`): `[n, P]`.
        trained (`torch.Tensor`): `[N, P]`.
        candidates (`torch.Tensor`):
            Indices of the training networks to try, `[n, k]`: the nearest as it is, and those with the most similar
            errors, which permutations do not change. Matching with all would take long.
    """
    found = torch.stack(
        [
            torch.stack([(alignment.align(network, trained[i]) - trained[i]).norm() for i in tries])
            for network, tries in zip(networks, candidates.tolist(), strict=True)
        ]
    )
    away, place = found.min(1)
    return away, candidates.gather(1, place[:, None])[:, 0]
