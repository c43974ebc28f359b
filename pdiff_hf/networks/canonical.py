"""What a canonical form is: one representative of all networks that differ by a change that means nothing."""

from typing import Any

import torch
from torch import nn

from ..pipelines.neural_network_diffusion import ParameterLayout
from .adapted import AdaptedNetwork
from .predictor import Predictor


REFERENCE_ROUNDS, REFERENCE_NETWORKS = 3, 1024
# In parts of the largest output; in low precision, so many units in the last place.
ROUNDING, LAST_PLACES = 1e-3, 8


class CanonicalForm:
    """Changes of parameter vectors that leave what networks do as it is, in two steps: a choice of scale, which is
    each network's own, and of order, by which networks come near to each other."""

    def balance(self, vectors: torch.Tensor) -> torch.Tensor:
        """Vectors `[N, P]` of which no factor is larger than the other: of all scales, those of the smallest sum of
        squares."""
        raise NotImplementedError

    def align(self, vectors: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        """Vectors `[N, P]`, each brought near to the reference `[P]`."""
        raise NotImplementedError

    def shuffled(self, vector: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """A network `[P]`, changed at random in a way that means nothing."""
        raise NotImplementedError

    def reference(self, vectors: torch.Tensor) -> torch.Tensor:
        """What a zoo `[N, P]` is aligned to: its mean, aligned, which starts at the first network."""
        balanced = self.balance(vectors)
        reference = balanced[0]
        for _ in range(REFERENCE_ROUNDS):
            reference = self.align(balanced, reference).mean(0)
        return reference

    def canonical(self, vectors: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        """One representative `[N, P]` of each of the networks that differ by what means nothing."""
        return self.align(self.balance(vectors), reference)

    def holds(self, predict: Predictor, vector: torch.Tensor, inputs: torch.Tensor) -> bool:
        """Whether such changes leave a network's predictions as they are."""
        changed = self.balance(self.shuffled(vector, torch.Generator().manual_seed(0))[None])
        before, after = predict(torch.cat([vector[None], changed]).float(), inputs)
        return relative_change(before, after) <= rounding(predict.network)


def rounding(network: nn.Module) -> float:
    """What rounding may change of a network's outputs, in parts of the largest."""
    weights = [*network.parameters(), *(network.base.parameters() if isinstance(network, AdaptedNetwork) else ())]
    kinds = {weight.dtype for weight in weights if weight.is_floating_point()}
    return max(ROUNDING, *(LAST_PLACES * torch.finfo(kind).eps for kind in kinds))


def relative_change(before: torch.Tensor, after: torch.Tensor) -> float:
    """The largest difference of predictions, in parts of the largest of them, whatever unit they have; NaN where one
    of them is."""
    difference = (after.double() - before.double()).abs().max()
    return 0.0 if difference == 0 else (difference / before.double().abs().max()).item()


def units_of(layout: ParameterLayout, units: list[int], axes: dict[int, list[list[int]]]) -> dict[str, Any]:
    """Units of each group as [`NeuronTransformerModel`] is told them; `axes` of tensors are by where they start."""
    tensors = [(layout.slices[tensor["name"]].start, list(tensor["shape"])) for tensor in layout.tensors("generated")]
    return {
        "num_parameters": layout.vector_size,
        "units": units,
        "tensors": [{"start": start, "shape": shape, "axes": axes.get(start, [])} for start, shape in tensors],
    }


def aligned_distances(
    symmetry: CanonicalForm, networks: torch.Tensor, trained: torch.Tensor, candidates: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    L2 distance `[n]` of each network to the nearest training network, the former brought near, and which that is.

    Args:
        symmetry (`CanonicalForm`): Of the architecture.
        networks (`torch.Tensor`): `[n, P]`.
        trained (`torch.Tensor`): `[N, P]`.
        candidates (`torch.Tensor`):
            Indices of the training networks to try, `[n, k]`: the nearest as it is, and those with the most similar
            errors, which what means nothing does not change. Matching with all would take long.
    """
    found = torch.stack(
        [
            torch.stack([(symmetry.align(network[None], trained[i])[0] - trained[i]).norm() for i in tries])
            for network, tries in zip(networks, candidates.tolist(), strict=True)
        ]
    )
    away, place = found.min(1)
    return away, candidates.gather(1, place[:, None])[:, 0]
