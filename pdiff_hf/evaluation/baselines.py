"""The cheap ways to make networks out of a zoo, each a curve over its strength."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import Any

import torch

from ..pipelines.neural_network_diffusion import NeuralNetworkDiffusionPipelineOutput, ParameterLayout
from ..zoo import WeightZoo


@dataclass(frozen=True)
class Source:
    """A zoo with the statistics that baselines need; fitted once for all of them."""

    zoo: WeightZoo

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


def _copies(count: int, strength: float, draw: torch.Generator) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.randint(count, (), generator=draw), count).float()


def _mean(count: int, strength: float, draw: torch.Generator) -> torch.Tensor:
    return torch.zeros(count)  # of standardized parameters


def _soup(count: int, strength: float, draw: torch.Generator) -> torch.Tensor:
    chosen = torch.randperm(count, generator=draw)[: int(strength)]
    return torch.zeros(count).index_fill_(0, chosen, 1 / len(chosen))


def _pair(count: int, strength: float, draw: torch.Generator) -> torch.Tensor:
    first, second = torch.randperm(count, generator=draw)[:2].tolist()
    weights = torch.zeros(count)
    weights[first], weights[second] = 1 - strength, strength
    return weights


def _deviations(count: int, strength: float, draw: torch.Generator) -> torch.Tensor:
    # The covariance of sum_i z_i (x_i - mean) / sqrt(count) is that of the zoo: its rank is count - 1 at most.
    normal = torch.randn(count, generator=draw)
    return 1 / count + strength * (normal - normal.mean()) / count**0.5


# Name: how the training networks are weighted, whether noise of `strength` is added, the first strength.
KINDS: dict[str, tuple[Callable, bool, float]] = {
    "noise": (_copies, True, 1 / 16),
    "soup": (_soup, False, 2),
    "interpolation": (_pair, False, 0.1),
    "gaussian": (_mean, True, 1 / 4),
    "low-rank-gaussian": (_deviations, False, 1 / 4),
}
LABELS = {
    "noise": "training network + noise",
    "soup": "soup of k",
    "interpolation": "interpolation of two",
    "gaussian": "per-parameter Gaussian",
    "low-rank-gaussian": "low-rank Gaussian",
}


class Baseline:
    r"""
    A generator with the interface of [`NeuralNetworkDiffusionPipeline`] that learns nothing: it combines the networks
    of a zoo. All work on standardized parameters (running variances: on their logarithms).

    | kind | a network is | strength |
    | --- | --- | --- |
    | `noise` | a training network plus Gaussian noise | noise, in standard deviations of each parameter over the zoo |
    | `soup` | the average of k training networks | k |
    | `interpolation` | a point between two training networks | the share of the second |
    | `gaussian` | the mean plus independent noise on each parameter | as for `noise` |
    | `low-rank-gaussian` | a sample of the Gaussian with the zoo's mean and covariance | factor on the deviation |

    Args:
        source (`Source` or `WeightZoo`): The training networks.
        kind (`str`): One of the above.
        strength (`float`): How much of it.
    """

    def __init__(self, source: Source | WeightZoo, kind: str, strength: float):
        if kind not in KINDS:
            raise ValueError(f"There is no baseline {kind!r}: {', '.join(KINDS)}.")
        self.source = Source(source) if isinstance(source, WeightZoo) else source
        if kind == "soup" and (strength != int(strength) or not 1 <= strength <= len(self.source.zoo)):
            raise ValueError(f"A soup is of 1 to {len(self.source.zoo)} training networks, and not of {strength}.")
        self.kind, self.strength = kind, strength
        self.layout = self.source.layout

    @torch.no_grad()
    def __call__(
        self,
        num_networks: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        batch_size: int = 100,
        output_type: str = "state_dict",
        return_dict: bool = True,
    ) -> NeuralNetworkDiffusionPipelineOutput | tuple:
        r"""
        Makes networks. Arguments and result are those of the pipeline.

        Args:
            num_networks (`int`, *optional*):
                How many. Defaults to one for each of the `generator`s, and to 1 without a list of them.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): One for all, or one for each.
            batch_size (`int`, *optional*, defaults to 100): Networks made at a time.
            output_type (`str`, *optional*, defaults to `"state_dict"`):
                `"state_dict"`, or `"pt"` for vectors `[N, P]`.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return an output class or a tuple.
        """
        if output_type not in ("state_dict", "pt"):
            raise ValueError(f"`output_type` is {output_type!r}; expected 'state_dict' or 'pt'.")
        several = list(generator) if isinstance(generator, (list, tuple)) else None
        if num_networks is None:
            num_networks = 1 if several is None else len(several)
        for name, value in (("num_networks", num_networks), ("batch_size", batch_size)):
            if not isinstance(value, Integral) or value < 1:
                raise ValueError(f"`{name}` has to be a positive integer, and is {value!r}.")
        if several is not None and len(several) != num_networks:
            raise ValueError(f"{len(several)} generators were passed for {num_networks} networks: pass one for each.")
        # One for all draws the seeds of the networks one after the other.
        parents: list[Any] = [generator] * num_networks if several is None else several
        seeds = [int(torch.randint(2**63 - 1, (), generator=parent)) for parent in parents]
        networks = torch.cat([self.vectors(seeds[i : i + batch_size]) for i in range(0, len(seeds), batch_size)])
        states = self.layout.unflatten(networks) if output_type == "state_dict" else networks
        return NeuralNetworkDiffusionPipelineOutput(state_dicts=states) if return_dict else (states,)

    def vectors(self, seeds: list[int]) -> torch.Tensor:
        """Vectors `[n, P]`, a network a seed."""
        weigh, noisy, _ = KINDS[self.kind]
        draws = [torch.Generator().manual_seed(seed) for seed in seeds]
        weights = torch.stack([weigh(len(self.source.zoo), self.strength, draw) for draw in draws])
        noise = None
        if noisy:
            size = self.source.zoo.vector_size
            noise = self.strength * torch.stack([torch.randn(size, generator=draw) for draw in draws])
        return self.source.combine(weights, noise)
