"""The cheap ways to make networks out of a zoo, each a curve over its strength."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import Any, NamedTuple

import torch

from ..pipelines.neural_network_diffusion import NeuralNetworkDiffusionPipelineOutput, ParameterLayout
from ..pipelines.neural_network_diffusion.pipeline import draw_seed
from ..zoo import WeightZoo


# Networks of which the nearest is taken.
CANDIDATES = 300


@dataclass(frozen=True)
class StandardizedZoo:
    """A zoo with the statistics that baselines need; fitted once for all of them."""

    zoo: WeightZoo

    def __len__(self) -> int:
        return len(self.zoo)

    @cached_property
    def layout(self) -> ParameterLayout:
        layout = ParameterLayout(tensors=self.zoo.layout.config["tensors"])
        layout.load_frozen(self.zoo.layout.frozen_state_dict())
        return layout.fit(self.zoo.batches())

    def combine(self, weights: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        """`[n, N]` weights of the networks, and noise in units of each parameter's std, to vectors `[n, P]`."""
        total = torch.zeros(len(weights), self.zoo.vector_size) if noise is None else noise
        for some in weights.any(0).nonzero()[:, 0].split(self.zoo.batch_size):
            total.addmm_(weights[:, some], self.layout.normalize(self.zoo.vectors(some.tolist())))
        return self.layout(total).vectors


def _copies(zoo: StandardizedZoo, strength: float, draw: torch.Generator) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.randint(len(zoo), (), generator=draw), len(zoo)).float()


def _mean(zoo: StandardizedZoo, strength: float, draw: torch.Generator) -> torch.Tensor:
    return torch.zeros(len(zoo))  # of standardized parameters


def _soup(zoo: StandardizedZoo, strength: float, draw: torch.Generator) -> torch.Tensor:
    chosen = torch.randperm(len(zoo), generator=draw)[: int(strength)]
    return torch.zeros(len(zoo)).index_fill_(0, chosen, 1 / len(chosen))


def _pair(zoo: StandardizedZoo, strength: float, draw: torch.Generator) -> torch.Tensor:
    first, second = torch.randperm(len(zoo), generator=draw)[:2].tolist()
    return _between(zoo, first, second, strength)


def _nearest_pair(zoo: StandardizedZoo, strength: float, draw: torch.Generator) -> torch.Tensor:
    first = int(torch.randperm(len(zoo), generator=draw)[0])
    others = torch.randperm(len(zoo), generator=draw)[: CANDIDATES + 1]
    others = others[others != first][:CANDIDATES]
    network, *candidates = zoo.layout.normalize(zoo.zoo.vectors([first, *others.tolist()]))
    nearest = others[(torch.stack(candidates) - network).square().sum(1).argmin()]
    return _between(zoo, first, int(nearest), strength)


def _between(zoo: StandardizedZoo, first: int, second: int, share: float) -> torch.Tensor:
    weights = torch.zeros(len(zoo))
    weights[first], weights[second] = 1 - share, share
    return weights


def _deviations(zoo: StandardizedZoo, strength: float, draw: torch.Generator) -> torch.Tensor:
    # The covariance of sum_i z_i (x_i - mean) / sqrt(count) is that of the zoo: its rank is count - 1 at most.
    normal = torch.randn(len(zoo), generator=draw)
    return 1 / len(zoo) + strength * (normal - normal.mean()) / len(zoo) ** 0.5


def _shrunk(zoo: StandardizedZoo, strength: float, draw: torch.Generator) -> torch.Tensor:
    return (1 - strength) * _copies(zoo, strength, draw)  # the mean is 0


def _difference(zoo: StandardizedZoo, strength: float, draw: torch.Generator) -> torch.Tensor:
    weights = torch.zeros(len(zoo))
    for place, weight in zip(
        torch.randperm(len(zoo), generator=draw)[:3].tolist(), (1, strength, -strength), strict=False
    ):
        weights[place] = weight
    return weights


class Kind(NamedTuple):
    """How a baseline weights the training networks, whether it adds noise, its first strength, its name, what the
    strength is, whether it is for independent networks alone, and whether it is a training network at strength 0."""

    weights: Callable[[StandardizedZoo, float, torch.Generator], torch.Tensor]
    noisy: bool
    first: float
    label: str
    unit: str
    independent: bool = False
    from_one: bool = False


DEVIATIONS = "the noise, in standard deviations of each parameter over the zoo"
KINDS = {
    "noise": Kind(_copies, True, 1 / 16, "training network + noise", DEVIATIONS, from_one=True),
    "soup": Kind(_soup, False, 2, "soup of k", "k"),
    "interpolation": Kind(_pair, False, 0.1, "interpolation of two", "the share of the second", from_one=True),
    "gaussian": Kind(_mean, True, 1 / 4, "per-parameter Gaussian", DEVIATIONS),
    "low-rank-gaussian": Kind(
        _deviations, False, 1 / 4, "low-rank Gaussian", "a factor on the deviation from the mean"
    ),
    "shrinking": Kind(_shrunk, False, 0.1, "shrunk to the mean", "the share of the mean", True, True),
    "difference": Kind(
        _difference, False, 1 / 16, "plus a difference of two others", "the part of that difference", True, True
    ),
    "nearest-interpolation": Kind(
        _nearest_pair, False, 0.1, "interpolation with the nearest of many", "the share of that one", True, True
    ),
}


MOST_DOUBLINGS = 14


def strengths_of(kind: str, count: int) -> list[float]:
    """The strengths of a kind of baseline, of a zoo of so many networks."""
    first = KINDS[kind].first
    if kind == "soup":
        return [float(2**power) for power in range(1, (count - 1).bit_length())] + [float(count)]
    if kind in ("interpolation", "nearest-interpolation", "shrinking"):
        return [first * step for step in range(1, 10 if kind == "shrinking" else 6)]
    return [first * 2**power for power in range(MOST_DOUBLINGS)]


class Baseline:
    r"""
    A generator with the interface of [`NeuralNetworkDiffusionPipeline`] that learns nothing: it combines the networks
    of a zoo. All work on standardized parameters (of positive ones near 0, such as running variances, the
    logarithms).

    | kind | a network is | strength |
    | --- | --- | --- |
    | `noise` | a training network plus Gaussian noise | noise, in standard deviations of each parameter over the zoo |
    | `soup` | the average of k training networks | k |
    | `interpolation` | a point between two training networks | the share of the second |
    | `gaussian` | the mean plus independent noise on each parameter | as for `noise` |
    | `low-rank-gaussian` | a sample of the Gaussian with the zoo's mean and covariance | factor on the deviation |
    | `shrinking` | a training network, nearer to the mean of all | the share of the mean |
    | `difference` | a training network plus a part of the difference of two others | that part |
    | `nearest-interpolation` | a point between a training network and the nearest of 300 others | share of that one |

    Args:
        zoo (`StandardizedZoo` or `WeightZoo`): The training networks.
        kind (`str`): One of the above.
        strength (`float`): How much of it.
    """

    def __init__(self, zoo: StandardizedZoo | WeightZoo, kind: str, strength: float):
        if kind not in KINDS:
            raise ValueError(f"There is no baseline {kind!r}: {', '.join(KINDS)}.")
        self.standardized = StandardizedZoo(zoo) if isinstance(zoo, WeightZoo) else zoo
        count = len(self.standardized)
        if kind == "soup" and (strength != int(strength) or not 1 <= strength <= count):
            raise ValueError(f"A soup is of 1 to {count} training networks, and not of {strength}.")
        self.kind, self.strength = kind, strength
        self.layout = self.standardized.layout

    @torch.no_grad()
    def __call__(
        self,
        num_networks: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        chunk_size: int | None = None,
        output_type: str = "state_dict",
        return_dict: bool = True,
    ) -> Any:
        r"""
        Makes networks. Arguments and result are those of the pipeline.

        Args:
            num_networks (`int`, *optional*):
                How many. Defaults to one for each of the `generator`s, and to 1 without a list of them.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): One for all, or one for each.
            chunk_size (`int`, *optional*): Networks made at a time. Defaults to 100.
            output_type (`str`, *optional*, defaults to `"state_dict"`):
                `"state_dict"`, or `"pt"` for vectors `[N, P]`.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return an output class or a tuple.
        """
        if output_type not in ("state_dict", "pt"):
            raise ValueError(f"`output_type` is {output_type!r}; expected 'state_dict' or 'pt'.")
        several = list(generator) if isinstance(generator, (list, tuple)) else None
        if num_networks is None:
            num_networks = 1 if several is None else len(several)
        if chunk_size is None:
            chunk_size = 100
        for name, value in (("num_networks", num_networks), ("chunk_size", chunk_size)):
            if not isinstance(value, Integral) or value < 1:
                raise ValueError(f"`{name}` has to be a positive integer, and is {value!r}.")
        if several is not None and len(several) != num_networks:
            raise ValueError(f"{len(several)} generators were passed for {num_networks} networks: pass one for each.")
        # One for all draws the seeds of the networks one after the other.
        parents: list[Any] = [generator] * num_networks if several is None else several
        seeds = [draw_seed(parent) for parent in parents]
        networks = torch.cat([self.vectors(seeds[i : i + chunk_size]) for i in range(0, len(seeds), chunk_size)])
        states = self.layout.unflatten(networks) if output_type == "state_dict" else networks
        return NeuralNetworkDiffusionPipelineOutput(state_dicts=states) if return_dict else (states,)

    def vectors(self, seeds: list[int]) -> torch.Tensor:
        """Vectors `[n, P]`, a network a seed."""
        kind = KINDS[self.kind]
        draws = [torch.Generator().manual_seed(seed) for seed in seeds]
        weights = torch.stack([kind.weights(self.standardized, self.strength, draw) for draw in draws])
        noise = None
        if kind.noisy:
            size = self.standardized.zoo.vector_size
            noise = self.strength * torch.stack([torch.randn(size, generator=draw) for draw in draws])
        return self.standardized.combine(weights, noise)
