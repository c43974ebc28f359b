"""Changes of an adapter that leave its product as it is: another basis of the rank between its two factors."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..pipelines.neural_network_diffusion import ParameterLayout
from .adapted import FACTORS
from .canonical import CanonicalForm, units_of
from .symmetry import Symmetry


@dataclass(frozen=True)
class Pair:
    r"""
    The factors of a low-rank update B A (Hu et al. 2021, arXiv 2106.09685).

    Attributes:
        a, b (`str`): Names of the factors: A is `[r, in, ...]`, and B `[out, r, ...]`.
    """

    a: str
    b: str


def pairs_of(layout: ParameterLayout) -> list[Pair]:
    """The generated low-rank updates of an architecture."""
    names = set(layout.slices)
    return [
        Pair(name, name.removesuffix(a) + b)
        for name in layout.slices
        for a, b in FACTORS.items()
        if name.endswith(a) and name.removesuffix(a) + b in names
    ]


class Gauge(CanonicalForm):
    r"""
    The canonical form of adapters: (B G, G^-1 A) is the same update for every invertible G. Balanced factors, for
    which B^T B = A A^T, are those of the smallest norm; what is left of G is a rotation, and the one that brings the
    factors nearest to the zoo's mean is chosen (orthogonal Procrustes; Schoenemann 1966), which also chooses signs,
    and is continuous where singular values are equal.

    Args:
        layout (`ParameterLayout`): Of the adapters.
    """

    def __init__(self, layout: ParameterLayout):
        self.layout = layout
        self.pairs = pairs_of(layout)
        shapes = {tensor["name"]: tensor["shape"] for tensor in layout.tensors("generated")}
        self.ranks = {pair: shapes[pair.a][0] for pair in self.pairs}
        self._out = {pair: shapes[pair.b][0] for pair in self.pairs}

    def __str__(self) -> str:
        return f"{len(self.pairs)} low-rank updates"

    def described(self, layout: ParameterLayout) -> dict[str, Any]:
        """The updates as [`NeuronTransformerModel`] is told them: the directions of the rank of an update are the
        units of a group."""
        axes = {
            layout.slices[name].start: [[axis, number, 1]]
            for number, pair in enumerate(self.pairs)
            for name, axis in ((pair.a, 0), (pair.b, 1))
        }
        return units_of(layout, [self.ranks[pair] for pair in self.pairs], axes)

    def factors(self, vectors: torch.Tensor, pair: Pair) -> tuple[torch.Tensor, torch.Tensor]:
        """B `[N, out, r]` and A `[N, r, in]`, float64, of vectors `[N, P]`."""
        rank, out = self.ranks[pair], self._out[pair]
        b, a = (vectors[:, self.layout.slices[name]].double() for name in (pair.b, pair.a))
        return b.view(-1, out, rank), a.view(len(a), rank, -1)

    def _put(self, vectors: torch.Tensor, pair: Pair, b: torch.Tensor, a: torch.Tensor) -> None:
        for name, factor in ((pair.b, b), (pair.a, a)):
            vectors[:, self.layout.slices[name]] = factor.flatten(1).to(vectors.dtype)

    def balance(self, vectors: torch.Tensor) -> torch.Tensor:
        """Vectors `[N, P]` with factors of the same product for which B^T B = A A^T is diagonal and falls."""
        vectors = vectors.clone()
        for pair in self.pairs:
            self._put(vectors, pair, *_balanced(*self.factors(vectors, pair), self.ranks[pair]))
        return vectors

    def mix(self, vectors: torch.Tensor) -> torch.Tensor:
        """The adapter `[P]` whose updates are nearest to the mean updates of others, `[N, P]`, in the basis that is
        nearest to their mean, and whose other tensors are their mean: PEFT's `add_weighted_adapter` by singular
        values."""
        mean = vectors.mean(0)
        mixed = mean[None].clone()
        for pair in self.pairs:
            b, a = self.factors(vectors, pair)
            together = b.movedim(0, 1).flatten(1)[None] / len(vectors), a.flatten(0, 1)[None]
            self._put(mixed, pair, *_balanced(*together, self.ranks[pair]))
        return self.align(mixed, mean)[0]

    def align(self, vectors: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        """Rotated vectors `[N, P]`, each brought near to the reference `[P]`."""
        aligned = vectors.clone()
        for pair in self.pairs:
            (b, a), (to_b, to_a) = self.factors(vectors, pair), self.factors(reference[None], pair)
            left, _, right = torch.linalg.svd(b.mT @ to_b + a @ to_a.mT)
            rotation = left @ right
            self._put(aligned, pair, b @ rotation, rotation.mT @ a)
        return aligned

    def shuffled(self, vector: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """An adapter `[P]` in another basis of each rank."""
        changed = vector[None].clone()
        for pair in self.pairs:
            b, a = self.factors(changed, pair)
            basis = torch.eye(self.ranks[pair], dtype=torch.float64)
            basis = basis + 0.3 * torch.randn(basis.shape, generator=generator, dtype=torch.float64) / len(basis)
            self._put(changed, pair, b @ basis, torch.linalg.inv(basis) @ a)
        return changed[0]


def _balanced(b: torch.Tensor, a: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Balanced factors of this rank of the products of B `[N, out, R]` and A `[N, R, in]`."""
    (basis_b, rest_b), (basis_a, rest_a) = torch.linalg.qr(b), torch.linalg.qr(a.mT)
    left, values, right = torch.linalg.svd(rest_b @ rest_a.mT, full_matrices=False)
    roots = values[:, :rank].sqrt()
    kept = roots.shape[1]  # fewer than the rank, where a layer is narrower than that
    balanced_b, balanced_a = b.new_zeros(len(b), b.shape[1], rank), a.new_zeros(len(a), rank, a.shape[2])
    balanced_b[:, :, :kept] = basis_b @ left[:, :, :kept] * roots[:, None]
    balanced_a[:, :kept] = roots[:, :, None] * right[:, :kept] @ basis_a.mT
    return balanced_b, balanced_a


def symmetry_of(network: nn.Module, layout: ParameterLayout, example: torch.Tensor) -> Symmetry | Gauge:
    r"""
    The changes of an architecture that mean nothing: of the ranks of adapters, of hidden units elsewhere.

    Raises:
        [`UnknownSymmetryError`]: hidden units are not recognized.
    """
    return Gauge(layout) if pairs_of(layout) else Symmetry(network, layout, example)
