"""What training makes of the same initializations in the time that generating takes."""

import time
from typing import Any

import torch

from ..networks.stacked import NotStackableError
from ..networks.trainer import StackedTrainer
from ..pipelines.neural_network_diffusion import NeuralNetworkDiffusionPipeline
from ..tasks import Task


NETWORKS = 50
# Steps whose time tells that of one.
TIMED = 10


def train_as_long(
    task: Task, pipeline: NeuralNetworkDiffusionPipeline, num_inference_steps: int
) -> tuple[dict[str, Any], torch.Tensor] | None:
    r"""
    Trains from initializations as long as the pipeline takes to generate from them, many networks at once in both.

    Args:
        task (`Task`): Of the networks.
        pipeline (`NeuralNetworkDiffusionPipeline`): Is told initializations.
        num_inference_steps (`int`): Of its sampling.

    Returns:
        `tuple`: the number of `steps`, and the `seconds` a network that both take; and the trained networks `[N, P]`.
        None where it is not known how to draw initializations, or networks are not trained many at once.
    """
    layout = pipeline.layout
    seeds = list(range(NETWORKS))

    def begin() -> StackedTrainer:
        trainer = StackedTrainer(task, seeds)
        trainer.load(initial, layout)
        return trainer

    try:
        initial = layout.draw_initial([torch.Generator().manual_seed(seed) for seed in seeds])
        timed = begin()
    except (NotStackableError, ValueError):
        return None
    pipeline.set_progress_bar_config(disable=True)

    def generate(count: int) -> float:
        started = time.perf_counter()
        pipeline(initial=initial[:count], num_inference_steps=num_inference_steps, output_type="pt")
        return time.perf_counter() - started

    generate(2)  # whatever is done once
    seconds = generate(NETWORKS)
    timed.train_steps(2, layout)
    started = time.perf_counter()
    timed.train_steps(TIMED, layout)
    of_step = (time.perf_counter() - started) / TIMED
    trainer = begin()
    trainer.steps = max(1, round(seconds / of_step))  # over which the learning rate follows the task's schedule
    trained = trainer.train_steps(trainer.steps, layout)
    return {"steps": trainer.steps, "seconds": seconds / NETWORKS}, trained
