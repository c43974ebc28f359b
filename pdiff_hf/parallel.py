"""Work that several processes share, on one or many hosts: `accelerate launch` starts them."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env

from .errors import ConfigError
from .files import check_kind, locked


Result = TypeVar("Result")
# What a killed run loses, apart from the networks that are being made; more only where saving takes longer than this
# share of the time.
SECONDS_BETWEEN_SAVES = 5.0
MOST_SAVING = 0.1
# One process may wait for the others as long as its work takes.
TIMEOUT = timedelta(days=30)


def processes() -> PartialState:
    r"""
    What `accelerate` knows of this process and of the others that were started with it.

    Raises:
        [`ConfigError`]: a launcher started several processes that do not see each other.
    """
    # Accelerate reads this variable for an Accelerator only.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=TIMEOUT)
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != state.num_processes:
        seen = state.num_processes
        PartialState._reset_state()
        raise ConfigError(
            f"{started} processes were started, and accelerate sees {seen}. Several processes on a CPU: "
            "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 ..."
        )
    return state


def wait_for_everyone() -> None:
    """Returns when all processes have come here."""
    state = processes()
    if state.num_processes > 1 and state.device.type == "cpu":
        # Accelerate passes a device's index, for which torch takes a GPU that is there, though nobody uses it.
        torch.distributed.barrier()
    else:
        state.wait_for_everyone()


@contextmanager
def written(folder: str | os.PathLike[str], stage: str) -> Iterator[None]:
    """Holds the folder of a stage, in which only it may write, for all processes of the stage."""
    state = processes()
    with locked(folder) if state.is_main_process else nullcontext():
        wait_for_everyone()
        check_kind(folder, stage)
        yield


def from_main(compute: Callable[[], Result]) -> Result:
    """What the main process computes; the others wait for it."""
    state = processes()
    results = [compute() if state.is_main_process else None]
    return broadcast_object_list(results)[0]


def share(count: int, work: Callable[[int], Result]) -> Iterator[Result]:
    """The results of `work(0)` to `work(count - 1)`, each computed by one of the processes and told to all; no more
    of them are in memory than there are processes."""
    state = processes()
    for start in range(0, count, state.num_processes):
        index = start + state.process_index
        yield from gather_object([work(index)] if index < count else [])


class Saving:
    """Saves the progress of a long stage from time to time, and not so often that it takes much of the time."""

    def __init__(self, save: Callable[[], Any]):
        self.save, self.due = save, time.monotonic() + SECONDS_BETWEEN_SAVES

    def when_due(self) -> None:
        """Saves, if the last time is long enough ago."""
        start = time.monotonic()
        if start >= self.due:
            self.save()
            now = time.monotonic()
            self.due = now + max(SECONDS_BETWEEN_SAVES, (now - start) / MOST_SAVING)
