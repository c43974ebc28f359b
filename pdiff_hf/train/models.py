"""Building what is trained: from a seed, and not what memory does not hold."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import psutil
import torch
from torch import nn

from ..errors import ConfigError, TaskError
from ..files import human_size
from ..pipelines.neural_network_diffusion import ConditionEncoder
from ..runs import own_randomness
from ..zoo import WeightZoo


Model = TypeVar("Model", bound=nn.Module)


def seeded(seed: int, build: Callable[[], Model]) -> Model:
    """A model whose weights a seed draws, without a trace in the caller's randomness."""
    with own_randomness():
        torch.manual_seed(seed)
        return build()


def condition_encoder(rows: Sequence[dict[str, Any]], names: Sequence[str], seed: int) -> ConditionEncoder | None:
    """That of some columns of the rows of a zoo; nothing without columns. Raises [`ConfigError`] for what cannot be
    asked for."""
    if not names:
        return None
    try:
        return seeded(seed, lambda: ConditionEncoder.from_rows(selected(rows, names), names))
    except ValueError as error:
        columns = ", ".join(sorted({name for row in rows for name in row}))
        raise ConfigError(f"--condition: {error} The zoo's columns are {columns}.") from error


def selected(rows: Iterable[dict[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """These columns of the rows of a zoo."""
    return [{name: row.get(name) for name in names} for row in rows]


def check_networks(network: nn.Module, zoo: WeightZoo, task: str) -> None:
    """Raises [`TaskError`] where the networks of a zoo are not those of a task of this name, such as this one."""
    try:
        zoo.layout.flatten(network.state_dict())
    except ValueError as error:
        raise TaskError(f"The networks of {zoo.folder} are no networks of {task}: {error}") from error


def check_memory(build: Callable[[], list[nn.Module]], more: int, remedy: str) -> None:
    r"""
    Raises [`ConfigError`] for models whose training does not fit this machine's memory, before any is built.

    Args:
        build (`Callable[[], list[nn.Module]]`): Builds what is trained.
        more (`int`): Bytes that are needed beside it.
        remedy (`str`): What takes less.
    """
    try:
        with torch.device("meta"):
            models = build()
    except (RuntimeError, ValueError, TypeError, OverflowError) as error:
        raise ConfigError(f"These models cannot be built: {str(error).splitlines()[0]:.300}") from error
    # Weights, gradients, Adam's two averages and the moving one.
    size = more + 5 * 4 * sum(weight.numel() for model in models for weight in model.parameters())
    memory = psutil.virtual_memory().total
    if size > memory:
        needed, there = human_size(size), human_size(memory)
        raise ConfigError(f"The training takes at least {needed}, and this machine has {there}. {remedy}")
