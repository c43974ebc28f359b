"""Whether a pipeline that can be asked for a quality delivers it."""

from typing import Any

import torch

from ..errors import PipelineError
from ..hub.pipelines import check_draws
from ..pipelines.neural_network_diffusion import NeuralNetworkDiffusionPipeline
from ..zoo import WeightZoo
from .measures import interval, resample
from .scoring import Scorer


# A column that says how good a network is, levels of it that are asked for, and networks of each.
QUALITY, LEVELS, EACH = "validation_accuracy", 9, 16
# Below it, a zoo's accuracies are all the same.
SMALLEST_RANGE = 1e-4


def asked_quality(
    scorer: Scorer, trained: WeightZoo, pipeline: NeuralNetworkDiffusionPipeline, num_inference_steps: int
) -> dict[str, Any] | None:
    r"""
    Whether a pipeline that can be asked for a validation accuracy delivers it: over the range of the zoo, the slope of
    what is measured against what was asked for, and its 95 % interval over networks. None where it cannot be asked, or
    not without an initialization, or where the zoo's networks are equally good.

    Args:
        scorer (`Scorer`): Of the task.
        trained (`WeightZoo`): Its rows tell the range.
        pipeline (`NeuralNetworkDiffusionPipeline`): Is asked.
        num_inference_steps (`int`): Of the sampling: with few, networks are better than what is asked for.
    """
    encoder = pipeline.condition_encoder
    if QUALITY not in {column["name"] for column in getattr(getattr(encoder, "config", None), "columns", ())}:
        return None
    found = torch.tensor([row[QUALITY] for row in trained.rows() if isinstance(row.get(QUALITY), float)])
    try:
        check_draws(pipeline)
    except PipelineError:
        return None
    if not len(found):
        return None
    low, high = torch.quantile(found.double(), torch.tensor([0.05, 0.95]).double()).tolist()
    if not high - low > SMALLEST_RANGE:
        return None
    asked = torch.linspace(low, high, LEVELS, dtype=torch.float64).repeat_interleave(EACH)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(asked))]
    rows = [{QUALITY: value} for value in asked.tolist()]
    made = pipeline(condition=rows, generator=generators, num_inference_steps=num_inference_steps, output_type="pt")
    vectors = made.state_dicts.cpu()
    scores = scorer(lambda some: vectors[some.start : some.stop], len(vectors), "asked", vectors)
    # Least squares of each bootstrap sample, whose weights sum to 1.
    weights = resample(len(asked), 0)
    weights = torch.cat([torch.full_like(weights[:1], 1 / len(asked)), weights])
    x, y = asked - asked.mean(), scores.validation.double()
    slopes = (weights @ (x * y) - (weights @ x) * (weights @ y)) / (weights @ x.square() - (weights @ x).square())
    return {
        "column": QUALITY,
        "num_inference_steps": num_inference_steps,
        "asked": asked[::EACH].tolist(),
        "measured": scores.validation.view(LEVELS, EACH).mean(1).tolist(),
        "slope": slopes[0].item(),
        "interval": interval(slopes[1:]),
    }
