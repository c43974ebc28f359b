"""Learn the distribution of trained neural networks, and sample new ones."""

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING


__version__ = version("pdiff-hf")

_HOMES = {
    "CollectConfig": "collect",
    "EvaluateConfig": "evaluate",
    "GenerateConfig": "generate",
    "NeuralNetworkDiffusionPipeline": "pipelines.neural_network_diffusion",
    "ParameterAutoencoderKL": "pipelines.neural_network_diffusion",
    "ParameterLayout": "pipelines.neural_network_diffusion",
    "ParameterUNet1DModel": "pipelines.neural_network_diffusion",
    "Task": "tasks",
    "TrainConfig": "train",
    "WeightZoo": "zoo",
    "ZooError": "zoo",
    "load_pipeline": "hub",
    "load_task": "tasks",
    "run_collect": "collect",
    "run_evaluate": "evaluate",
    "run_generate": "generate",
    "run_train": "train",
}
__all__ = sorted([*_HOMES, "__version__"])

if TYPE_CHECKING:
    from .collect import CollectConfig, run_collect
    from .evaluate import EvaluateConfig, run_evaluate
    from .generate import GenerateConfig, run_generate
    from .hub import load_pipeline
    from .pipelines.neural_network_diffusion import (
        NeuralNetworkDiffusionPipeline,
        ParameterAutoencoderKL,
        ParameterLayout,
        ParameterUNet1DModel,
    )
    from .tasks import Task, load_task
    from .train import TrainConfig, run_train
    from .zoo import WeightZoo, ZooError


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
