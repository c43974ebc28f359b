"""Learn the distribution of trained neural networks, and sample new ones."""

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING


__version__ = version("pdiff-hf")

if TYPE_CHECKING:
    from .collect import CollectConfig, run_collect
    from .errors import PdiffError
    from .evaluation import Baseline, EvaluateConfig, evaluate, run_evaluate
    from .generate import GenerateConfig, run_generate
    from .hub import load_pipeline
    from .pipelines.neural_network_diffusion import (
        LinearParameterAutoencoder,
        NeuralNetworkDiffusionPipeline,
        ParameterAutoencoderKL,
        ParameterLayout,
        ParameterUNet1DModel,
    )
    from .tasks import Task, load_task
    from .train import TrainConfig, run_train
    from .zoo import WeightZoo, ZooError


_HOMES = {
    "collect": ("CollectConfig", "run_collect"),
    "evaluation": ("Baseline", "EvaluateConfig", "evaluate", "run_evaluate"),
    "generate": ("GenerateConfig", "run_generate"),
    "hub": ("load_pipeline",),
    "pipelines.neural_network_diffusion": (
        "LinearParameterAutoencoder",
        "NeuralNetworkDiffusionPipeline",
        "ParameterAutoencoderKL",
        "ParameterLayout",
        "ParameterUNet1DModel",
    ),
    "tasks": ("Task", "load_task"),
    "train": ("TrainConfig", "run_train"),
    "zoo": ("WeightZoo", "ZooError"),
    "errors": ("PdiffError",),
}
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted([*_MODULE_OF, "__version__"])


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
