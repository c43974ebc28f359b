"""What training makes of networks in the time that generating takes."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..networks.stacked import NotStackableError
from ..networks.trainer import StackedTrainer, is_stackable
from ..pipelines.neural_network_diffusion import NeuralNetworkDiffusionPipeline, ParameterLayout
from ..tasks import Task


NETWORKS = 50
# Steps whose time tells that of one, and how often it is taken: the least of it is the work's own.
TIMED, TIMES = 100, 3


def train_as_long(
    tasks: Sequence[Task],
    layout: ParameterLayout,
    generate: Callable[[int], Any],
    starts: dict[str, tuple[torch.Tensor, int]],
) -> tuple[dict[str, Any], dict[str, torch.Tensor]] | None:
    r"""
    Trains as long as a pipeline takes to generate, many networks at once in both.

    Args:
        tasks (`Sequence[Task]`): Of N networks.
        layout (`ParameterLayout`): Theirs.
        generate (`Callable[[int], Any]`): Generates so many of them.
        starts (`dict[str, tuple[torch.Tensor, int]]`):
            Vectors `[N, P]` to train from, and how many times as long, by name.

    Returns:
        `tuple`: the number of `steps`, `of` those of a training, and the `seconds` a network that both take; and the
        trained networks `[N, P]` of each start. None where networks are not trained many at once.
    """
    if not is_stackable([tasks[0], tasks[-1]], layout):
        return None
    try:
        timed = StackedTrainer(tasks, list(range(len(tasks))))
    except NotStackableError:
        return None
    generate(2)  # whatever is done once
    timed.train_steps(2, layout)
    # In turn, as other processes may come and go. The order of the examples and the vectors at the end are no part of
    # a step.
    rounds = [
        (_seconds(generate, len(tasks)), *(_seconds(timed.train_steps, steps, layout) for steps in (2, 2 + TIMED)))
        for _ in range(TIMES)
    ]
    taken, around, longer = (min(one) for one in zip(*rounds, strict=True))
    steps = max(1, round(taken * TIMED / max(longer - around, longer / 2)))
    trained = {}
    for name, (vectors, times) in starts.items():
        trainer = StackedTrainer(tasks, list(range(len(tasks))))
        trainer.load(vectors, layout)
        trainer.steps = times * steps  # over which the learning rate follows the task's schedule
        trained[name] = trainer.train_steps(trainer.steps, layout)
    return {"steps": steps, "of": timed.steps, "seconds": taken / len(tasks)}, trained


def _seconds(work: Callable[..., Any], *arguments: Any) -> float:
    started = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - started


def from_the_same(
    task: Task, pipeline: NeuralNetworkDiffusionPipeline, num_inference_steps: int, bf16: bool
) -> tuple[dict[str, Any], torch.Tensor] | None:
    """What [`train_as_long`] makes of initializations that the pipeline, too, generates from in bfloat16 where `bf16`;
    None where it is not known how to draw them."""
    pipeline.set_progress_bar_config(disable=True)
    try:
        initial = pipeline.layout.draw_initial([torch.Generator().manual_seed(seed) for seed in range(NETWORKS)])
    except ValueError:
        return None

    def generate(count: int) -> None:
        with torch.autocast(pipeline.device.type, torch.bfloat16, enabled=bf16):
            pipeline(initial=initial[:count], num_inference_steps=num_inference_steps, output_type="pt")

    found = train_as_long(
        [task] * NETWORKS,
        pipeline.layout,
        generate,
        {"scratch": (initial, 1)},
    )
    return None if found is None else (found[0], found[1]["scratch"])
