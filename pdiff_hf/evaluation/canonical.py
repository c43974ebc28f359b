"""Baselines of independent networks work on their canonical form: on raw ones they are weak and flatter generators."""

from pathlib import Path

import torch

from ..networks.canonical import REFERENCE_NETWORKS, CanonicalForm
from ..networks.gauge import pairs_of, symmetry_of
from ..networks.predictor import Predictor
from ..networks.symmetry import Symmetry, UnknownSymmetryError
from ..zoo import WeightZoo, evenly


# Matching the units of larger networks, of all networks together, or of wider layers takes minutes.
MOST_ALIGNED, MOST_ALIGNED_VALUES, MOST_UNITS = 10**6, 2**28, 2048
# Larger numbers have squares that are none.
LARGEST = 1e15
# Networks whose units are in one order already, as those of one run, come no nearer than this to their mean.
NEARER = 0.98


def symmetry_that_holds(zoo: WeightZoo, predict: Predictor, inputs: torch.Tensor) -> CanonicalForm | None:
    """The symmetry of the networks of a zoo, where it is recognized and their predictions bear it out."""
    if zoo.vector_size > MOST_ALIGNED and not pairs_of(zoo.layout):
        return None
    try:
        symmetry = symmetry_of(predict.network, zoo.layout, inputs[:1])
    except UnknownSymmetryError:
        return None
    if isinstance(symmetry, Symmetry) and symmetry.largest_group > MOST_UNITS:
        return None
    return symmetry if symmetry.holds(predict, zoo[0], inputs) else None


def canonical_zoo(
    zoo: WeightZoo, symmetry: CanonicalForm | None, folder: Path
) -> tuple[WeightZoo, torch.Tensor] | None:
    """The zoo in canonical form, in a folder of its own, and what it is near to, `[P]`; None where its networks have
    one order of units already."""
    if symmetry is None or len(zoo) * zoo.vector_size > MOST_ALIGNED_VALUES:
        return None
    some = zoo.vectors(evenly(len(zoo), REFERENCE_NETWORKS))
    balanced = symmetry.balance(some)
    reference = symmetry.reference(some)
    before = balanced - balanced.mean(0)
    after = symmetry.align(balanced, reference) - reference
    # Each tensor in units of its own spread: the bias of a regression has the unit of its targets.
    for place in zoo.layout.slices.values():
        spread = before[:, place].square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
        before[:, place] /= spread
        after[:, place] /= spread
    if after.norm(dim=1).mean() > NEARER * before.norm(dim=1).mean():
        return None
    return in_form(zoo, symmetry, reference, folder), reference


def in_form(zoo: WeightZoo, symmetry: CanonicalForm, reference: torch.Tensor, folder: Path) -> WeightZoo:
    """A zoo in the canonical form that is near to a reference `[P]`, in a folder of its own; as they are, networks
    with numbers that are too large for it."""
    found = WeightZoo.create(folder, zoo.layout, may_differ=zoo.may_differ)
    with found:
        for batch in zoo.batches():
            fits = batch.abs().amax(1) < LARGEST  # no number is none
            if fits.any():
                batch[fits] = symmetry.canonical(batch[fits], reference)
            for vector in batch:
                found.append(vector)
    return found
