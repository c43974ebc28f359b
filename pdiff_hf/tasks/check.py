"""Whether a task does what a task does, before hours are spent on it."""

import copy
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from ..errors import TaskError
from ..runs import own_randomness
from .task import Task


Result = TypeVar("Result")
SPLITS = ("train", "validation", "test")
EXAMPLES = 8
LAZY = (UninitializedParameter, UninitializedBuffer)


def check_task(task: Task, device: torch.device | str = "cpu", training: bool = True) -> None:
    r"""
    Builds two networks, predicts and trains for a step.

    Args:
        task (`Task`): Of the user's own, or built in.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): Where its networks run.
        training (`bool`, *optional*, defaults to `True`): Whether its networks will be trained.

    Raises:
        [`TaskError`]: data that are no pair of tensors, empty, or differ from call to call; an architecture that does;
        a function that is not all in the state dict, so that networks could not be stored; predictions, loss or
        `correct` of a wrong shape; batches that the network cannot be trained on.
    """
    task = copy.copy(task)  # which may count what is asked of it
    name = type(task).__name__
    data = {split: _data(task, split) for split in SPLITS}
    (inputs, targets), size = data["train"], task.batch_size
    if type(size) is not int or size < 1:
        raise TaskError(f"{name}.batch_size is {size!r}; it has to be a positive integer.")
    if training and (type(task.epochs) is not int or task.epochs < 0):
        raise TaskError(f"{name}.epochs is {task.epochs!r}; it has to be an integer, 0 or more.")
    for split, (others, _) in data.items():
        if (others.shape[1:], others.dtype) != (inputs.shape[1:], inputs.dtype):
            raise TaskError(
                f"{name}.data({split!r}) has inputs of {_kind(others[0])} each, and those of 'train' are "
                f"{_kind(inputs[0])}."
            )
    with own_randomness():
        first, second = (_network(task, seed).to(device) for seed in (0, 1))
        _check_stored(task, first, second, inputs[:EXAMPLES].to(device), targets[:EXAMPLES].to(device))
        if training:
            _check_trained(task, first, inputs, targets, len(targets) % size or min(size, len(targets)), device)


def _data(task: Task, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    call = f"{type(task).__name__}.data({split!r})"
    once, again = (of_user(lambda: task.data(split), call) for _ in range(2))
    if not isinstance(once, tuple | list) or len(once) != 2 or not all(isinstance(t, torch.Tensor) for t in once):
        raise TaskError(f"{call} has to give a pair of tensors, inputs and targets; found {type(once).__name__}.")
    inputs, targets = once
    if min(inputs.ndim, targets.ndim) < 1 or len(inputs) != len(targets):
        raise TaskError(f"{call} gives {_kind(inputs)} inputs and {_kind(targets)} targets: the first sizes differ.")
    if len(inputs) == 0:
        raise TaskError(f"{call} is empty.")
    if not all(torch.equal(one, other) for one, other in zip(once, again, strict=True)):
        raise TaskError(f"{call} differs from call to call, or holds NaN: what is scored has to be fixed.")
    return inputs, targets


def _network(task: Task, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    call = f"{type(task).__name__}.build_network()"
    network = of_user(task.build_network, call)
    if not isinstance(network, nn.Module):
        raise TaskError(f"{call} has to give a torch.nn.Module; found {type(network).__name__}.")
    lazy = [name for name, value in network.state_dict().items() if isinstance(value, LAZY)]
    if lazy:
        raise TaskError(
            f"{call}: {lazy[0]} is built lazily. Run the network once on an example before it is returned."
        )
    return network


def _check_stored(
    task: Task, first: nn.Module, second: nn.Module, inputs: torch.Tensor, targets: torch.Tensor
) -> None:
    name = type(task).__name__
    state_dict = first.state_dict()
    kinds = [{key: _kind(value) for key, value in network.state_dict().items()} for network in (first, second)]
    if kinds[0] != kinds[1]:
        different = sorted(key for key in kinds[0].keys() | kinds[1].keys() if kinds[0].get(key) != kinds[1].get(key))
        raise TaskError(f"{name}.build_network() varies from call to call: {', '.join(different)[:300]} differ.")
    second.load_state_dict(state_dict)

    def predict(network: nn.Module) -> torch.Tensor:
        return of_user(lambda: task.predict(network, inputs), f"A network of {name} on {_kind(inputs)} inputs")

    expected = predict(first)
    if not isinstance(expected, torch.Tensor) or expected.shape[:1] != (len(inputs),):
        raise TaskError(
            f"{name}.predict() has to give a row for each of {len(inputs)} inputs; found {_kind(expected)}."
        )
    if not torch.allclose(predict(first), expected, rtol=1e-3, atol=1e-4, equal_nan=True):
        raise TaskError(f"A network of {name} predicts differently from call to call: it draws random numbers.")
    if not torch.allclose(predict(second), expected, rtol=1e-3, atol=1e-4, equal_nan=True):
        raise TaskError(
            f"The state dict of a network of {name} does not hold all of its function: loaded into a second network "
            "it predicts something else. Make what build_network() draws a parameter or a persistent buffer, or draw "
            "it from a fixed seed."
        )
    correct = of_user(lambda: task.correct(expected, targets), f"{name}.correct()")
    if not isinstance(correct, torch.Tensor) or correct.dtype != torch.bool or correct.shape != (len(inputs),):
        raise TaskError(
            f"{name}.correct() has to give a boolean for each of {len(inputs)} predictions; found {_kind(correct)}."
        )


def _check_trained(
    task: Task,
    network: nn.Module,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    last: int,
    device: torch.device | str,
) -> None:
    """One step, on a batch as large as the last of an epoch."""
    name = type(task).__name__
    augmented = of_user(
        lambda: task.augment(inputs[:last].to(device), torch.Generator().manual_seed(0)), f"{name}.augment()"
    )
    step = f"A network of {name} in training, on a batch of {last}"
    if last == 1:
        step += f", which the last one of an epoch is ({len(targets)} examples, batch_size {task.batch_size})"

    def train() -> Any:
        optimizer = task.optimizer(list(network.train().parameters()))
        loss = task.loss(network(augmented), targets[:last].to(device))
        if isinstance(loss, torch.Tensor) and loss.ndim == 0:
            loss.backward()
            optimizer.step()
        return loss

    loss = of_user(train, step)
    if not isinstance(loss, torch.Tensor) or loss.ndim != 0:
        raise TaskError(f"{name}.loss() has to give a scalar; found {_kind(loss)}.")


def of_user(call: Callable[[], Result], what: str) -> Result:
    """What code of the user's own gives, or a [`TaskError`] that says where in it something went wrong."""
    try:
        return call()
    except TaskError:
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        remedy = ""
        if "does not require grad" in str(error):
            remedy = (
                " Predictions are made without gradients: a forward that needs them has torch.enable_grad() around."
            )
        raise TaskError(
            f"{what}: {type(error).__name__}: {error} ({place.filename}, line {place.lineno}).{remedy}"
        ) from error


def _kind(value: Any) -> str:
    """Dtype and shape of a tensor."""
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
