"""What is measured of networks: overlap of errors, distances, parameters, and how certain all of it is."""

from collections.abc import Iterator
from functools import reduce
from typing import Any

import torch

from ..extras import require
from ..zoo import BATCH_VALUES, WeightZoo


CONFIDENCE = 0.95
RESAMPLES = 1000
VALUES_PER_TENSOR = 20_000


def similarity(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Intersection over union of wrong predictions, 1 where both are empty: `[N, E]` and `[M, E]` to `[N, M]`."""
    a, b = a.double(), b.double()
    intersection = a @ b.T
    union = a.sum(1)[:, None] + b.sum(1)[None] - intersection
    return torch.where(union == 0, 1.0, intersection / union.clamp_min(1))


def resample(count: int, seed: int) -> torch.Tensor:
    """Weights of bootstrap samples of so many, `[RESAMPLES, count]`; each row sums to 1 (Efron 1979)."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(count, (RESAMPLES, count), generator=generator)
    weights = torch.zeros(RESAMPLES, count, dtype=torch.float64)
    return weights.scatter_add_(1, drawn, torch.ones_like(weights)) / count


def interval(values: torch.Tensor, confidence: float = CONFIDENCE) -> list[float]:
    """The percentile interval of bootstrap values."""
    tail = (1 - confidence) / 2
    return [torch.quantile(values.double(), q, interpolation="nearest").item() for q in (tail, 1 - tail)]


def batches(zoo: WeightZoo) -> Iterator[torch.Tensor]:
    """The vectors of a zoo in double precision, a bounded amount at a time."""
    for batch in zoo.batches():
        yield batch.double()


def mean(zoo: WeightZoo) -> torch.Tensor:
    """The average network, in double precision."""
    return reduce(torch.add, (batch.sum(0) for batch in batches(zoo))) / len(zoo)


def columns(*zoos: WeightZoo) -> Iterator[list[torch.Tensor]]:
    """The same parameters of all networks of each zoo in double precision, `[N, p]`, a bounded amount at a time."""
    width = max(1, BATCH_VALUES // max(map(len, zoos)))
    for start in range(0, zoos[0].vector_size, width):
        yield [zoo.columns(start, start + width).double() for zoo in zoos]


def distances(a: WeightZoo, b: WeightZoo) -> torch.Tensor:
    """L2 distances of parameter vectors, `[N, M]`, without the cancellation that inner products would bring."""
    exact = "donot_use_mm_for_euclid_dist"
    squares = (torch.cdist(x, y, compute_mode=exact).square() for x, y in columns(a, b))
    return reduce(torch.add, squares).sqrt()


def outside_span(trained: WeightZoo, generated: WeightZoo, nearest: torch.Tensor, away: torch.Tensor) -> float:
    r"""
    Mean share of the squared way from the nearest training network to a generated one that is orthogonal to all
    differences of training networks.

    Args:
        trained (`WeightZoo`): N networks.
        generated (`WeightZoo`): n networks.
        nearest (`torch.Tensor`): Index of the nearest training network of each, `[n]`.
        away (`torch.Tensor`): The distance to it, `[n]`.
    """
    of_trained, of_generated = torch.zeros(()), torch.zeros(())
    for x, y in columns(trained, generated):
        centre = x.mean(0)
        of_trained = of_trained + (x - centre) @ (x - centre).T
        of_generated = of_generated + (x - centre) @ (y - centre).T
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
    """Values of each generated tensor in each zoo, evenly picked: at most `VALUES_PER_TENSOR` of each."""
    values = {}
    for name, place in zoos[0].layout.slices.items():
        parts = [zoo.columns(place.start, place.stop, every=-(-len(zoo) // 50)).flatten() for zoo in zoos]
        # Copies: a view of the few would keep all.
        values[name] = tuple(part[:: -(-len(part) // VALUES_PER_TENSOR)].clone() for part in parts)
    return values
