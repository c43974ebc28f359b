"""What is measured of networks: overlap of errors, distances, parameters, and how certain all of it is."""

from collections.abc import Iterator
from functools import reduce
from typing import Any, NamedTuple

import torch

from ..extras import require
from ..zoo import BATCH_VALUES, WeightZoo, evenly


CONFIDENCE = 0.95
RESAMPLES = 1000
VALUES_PER_TENSOR = 20_000
# Of more training networks, so many, evenly picked, stand for all where each is compared with all.
MOST_COMPARED = 2048


def similarity(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Intersection over union of wrong predictions, 1 where both are empty: `[N, E]` and `[M, E]` to `[N, M]`."""
    # Counts, which single precision holds exactly.
    a, b = a.float(), b.float()
    intersection = (a @ b.T).double()
    union = a.sum(1).double()[:, None] + b.sum(1).double()[None] - intersection
    return torch.where(union == 0, 1.0, intersection / union.clamp_min(1))


class Nearest(NamedTuple):
    r"""
    What lies nearest to each of n networks among N others.

    Attributes:
        values (`torch.Tensor`): How near, `[n, k]`, the nearest first.
        indices (`torch.Tensor`): Which ones, `[n, k]`.
        mean (`float`): How near they are on average, all to all.
    """

    values: torch.Tensor
    indices: torch.Tensor
    mean: float


def most_similar(a: torch.Tensor, b: torch.Tensor, count: int = 1, own: torch.Tensor | None = None) -> Nearest:
    r"""
    The networks with the most similar errors, with memory for a part of all similarities at a time.

    Args:
        a (`torch.Tensor`): Wrong predictions, `[n, E]`.
        b (`torch.Tensor`): Those of the others, `[N, E]`.
        count (`int`, *optional*, defaults to 1): How many to find for each.
        own (`torch.Tensor`, *optional*): Where among the others each network itself is, `[n]`: it does not count.
    """
    values, indices, total = [], [], 0.0
    others = len(b) - (own is not None)
    for rows in torch.arange(len(a)).split(max(1, BATCH_VALUES // (2 * len(b)))):
        found = similarity(a[rows], b)
        total += found.sum().item()
        if own is not None:
            total -= found[torch.arange(len(rows)), own[rows]].sum().item()
            found[torch.arange(len(rows)), own[rows]] = -1
        best = found.topk(min(count, others), 1)
        values.append(best.values)
        indices.append(best.indices)
    return Nearest(torch.cat(values), torch.cat(indices), total / max(1, len(a) * others))


def picked(count: int) -> torch.Tensor:
    """Indices of so many networks, or of `MOST_COMPARED` of them, evenly picked."""
    return torch.tensor(evenly(count, MOST_COMPARED))


def resample(count: int, seed: int) -> torch.Tensor:
    """Weights of bootstrap samples of so many, `[RESAMPLES, count]`; each row sums to 1 (Efron 1979)."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(count, (RESAMPLES, count), generator=generator)
    weights = torch.zeros(RESAMPLES, count, dtype=torch.float64)
    return weights.scatter_add_(1, drawn, torch.ones_like(weights)) / count


def resampled_means(values: torch.Tensor, seed: int, groups: torch.Tensor | None = None) -> torch.Tensor:
    """Means of bootstrap samples of values `[n]`, `[RESAMPLES]`, with memory for a part of the samples at a time.
    Values of the same group, of 0 to G - 1 `[n]`, are drawn together: they tell what one of them would. Of values on
    the same E examples, `[n, E]`, examples are drawn, too, the same for all (Owen 2007, arXiv 0712.1111)."""
    if groups is None:
        groups = torch.arange(len(values))
    members = groups.bincount()
    sums = values.new_zeros(len(members), *values.shape[1:]).index_add(0, groups, values)
    examples = resample(values.shape[1], seed + 1).to(values.dtype) if values.ndim == 2 else None
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, BATCH_VALUES // max(sums.numel() // len(sums), len(sums)))
    means = []
    for start in range(0, RESAMPLES, rows):
        drawn = torch.randint(len(sums), (min(rows, RESAMPLES - start), len(sums)), generator=generator)
        times = torch.zeros(drawn.shape, dtype=values.dtype).scatter_add_(
            1, drawn, torch.ones_like(drawn, dtype=values.dtype)
        )
        totals = times @ sums
        if examples is not None:
            totals = (totals * examples[start : start + len(drawn)]).sum(1)
        means.append(totals / (times @ members.to(values.dtype)))
    return torch.cat(means)


def interval(values: torch.Tensor, confidence: float = CONFIDENCE) -> list[float]:
    """The percentile interval of bootstrap values."""
    tail = (1 - confidence) / 2
    return [torch.quantile(values.double(), q, interpolation="nearest").item() for q in (tail, 1 - tail)]


def spread(values: torch.Tensor) -> dict[str, float]:
    """Mean, smallest and largest."""
    return {"mean": values.mean().item(), "min": values.min().item(), "max": values.max().item()}


def batches(zoo: WeightZoo) -> Iterator[torch.Tensor]:
    """The vectors of a zoo in double precision, a bounded amount at a time."""
    for batch in zoo.batches():
        yield batch.double()


def mean(zoo: WeightZoo) -> torch.Tensor:
    """The average network, in double precision."""
    return reduce(torch.add, (batch.sum(0) for batch in batches(zoo))) / len(zoo)


def columns(*zoos: WeightZoo, some: torch.Tensor | None = None) -> Iterator[list[torch.Tensor]]:
    """The same parameters of all networks of each zoo in double precision, `[N, p]`, a bounded amount at a time; of
    some networks of the first one alone, where these are given."""
    width = max(1, BATCH_VALUES // max(map(len, zoos)))
    for start in range(0, zoos[0].vector_size, width):
        first, *rest = (zoo.columns(start, start + width) for zoo in zoos)
        yield [(first if some is None else first[some]).double(), *(one.double() for one in rest)]


def nearest(a: WeightZoo, b: WeightZoo, some: torch.Tensor, own: torch.Tensor | None = None) -> Nearest:
    r"""
    The nearest networks by L2 distance of parameter vectors, without the cancellation that inner products would bring,
    and with memory for a part of all distances at a time.

    Args:
        a (`WeightZoo`): Of its networks,
        b (`WeightZoo`): among those of the other.
        some (`torch.Tensor`): Which of them, `[n]`.
        own (`torch.Tensor`, *optional*): Where among the others each network itself is, `[n]`: it does not count.
    """
    values, indices, total = [], [], 0.0
    for rows in torch.arange(len(some)).split(max(1, BATCH_VALUES // len(b))):
        squares = torch.zeros(len(rows), len(b), dtype=torch.float64)
        for x, y in columns(a, b, some=some[rows]):
            squares += torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()
        if own is not None:
            squares[torch.arange(len(rows)), own[rows]] = torch.inf
            # A network that is there twice is no neighbour of itself, unless all are the same.
            distinct = ((squares > 0) & torch.isfinite(squares)).any(1, keepdim=True)
            squares[(squares == 0) & distinct] = torch.inf
        least = squares.min(1)
        total += squares[torch.isfinite(squares)].sqrt().sum().item()
        values.append(least.values.sqrt())
        indices.append(least.indices)
    others = len(b) - (own is not None)
    return Nearest(torch.cat(values)[:, None], torch.cat(indices)[:, None], total / max(1, len(some) * others))


def outside_span(trained: WeightZoo, generated: WeightZoo, nearest: torch.Tensor, away: torch.Tensor) -> float:
    r"""
    Mean share of the squared way from the nearest training network to a generated one that is orthogonal to all
    differences of training networks, or, where there are thousands, of the nearest and of others evenly picked.

    Args:
        trained (`WeightZoo`): N networks.
        generated (`WeightZoo`): n networks.
        nearest (`torch.Tensor`): Index of the nearest training network of each, `[n]`.
        away (`torch.Tensor`): The distance to it, `[n]`.
    """
    of_trained, of_generated, chosen = torch.zeros(()), torch.zeros(()), picked(len(nearest))
    nearest, away = nearest[chosen], away[chosen]
    some = torch.cat([picked(len(trained)), nearest]).unique()
    nearest = torch.searchsorted(some, nearest)
    for x, y in columns(trained, generated, some=some):
        centre = x.mean(0)
        of_trained = of_trained + (x - centre) @ (x - centre).T
        of_generated = of_generated + (x - centre) @ (y[chosen] - centre).T
    products = of_generated - of_trained[:, nearest]
    inside = (products * (torch.linalg.pinv(of_trained, hermitian=True, rtol=1e-10) @ products)).sum(0)
    share = torch.where(away > 0, 1 - inside / away.square().clamp_min(1e-300), 0.0)
    return share.clamp(0, 1).mean().item()


def parameter_statistics(trained: WeightZoo, generated: WeightZoo) -> list[dict[str, Any]]:
    r"""
    For each generated tensor: mean and standard deviation of its values over both zoos, and the Wasserstein distance
    of the two distributions (of at most `VALUES_PER_TENSOR` values, in the unit of the parameters).
    """
    stats = require("scipy.stats", "report")
    rows = []
    for name, values in tensor_values(trained, generated).items():
        # Squares of what is finite in single precision may not be.
        a, b = (value.double().numpy() for value in values)
        rows.append(
            {
                "tensor": name,
                "trained": {"mean": float(a.mean()), "std": float(a.std())},
                "generated": {"mean": float(b.mean()), "std": float(b.std())},
                "wasserstein": float(stats.wasserstein_distance(a, b)),
            }
        )
    return rows


def tensor_values(*zoos: WeightZoo) -> dict[str, tuple[torch.Tensor, ...]]:
    """Values of each generated tensor in each zoo: of all places and networks alike, at most `VALUES_PER_TENSOR`."""
    random = torch.Generator().manual_seed(0)
    values = {}
    for name, place in zoos[0].layout.slices.items():
        parts = [zoo.columns(place.start, place.stop, every=-(-len(zoo) // 50)).flatten() for zoo in zoos]
        # By chance, since even steps through matrices and kernels meet few of their columns.
        values[name] = tuple(
            part
            if len(part) <= VALUES_PER_TENSOR
            else part[torch.randint(len(part), (VALUES_PER_TENSOR,), generator=random)]
            for part in parts
        )
    return values
