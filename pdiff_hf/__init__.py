"""Learn the distribution of trained neural networks, and sample new ones."""

import importlib
from typing import TYPE_CHECKING


if TYPE_CHECKING:  # `as`: exported, for type checkers too
    __version__: str
    from .align import run_align as run_align
    from .collect import run_collect as run_collect
    from .configs import AlignConfig as AlignConfig
    from .configs import CollectConfig as CollectConfig
    from .configs import EvaluateConfig as EvaluateConfig
    from .configs import GenerateConfig as GenerateConfig
    from .configs import ImportConfig as ImportConfig
    from .configs import InfoConfig as InfoConfig
    from .configs import NeuronTrainConfig as NeuronTrainConfig
    from .configs import PlayConfig as PlayConfig
    from .configs import PullConfig as PullConfig
    from .configs import PushConfig as PushConfig
    from .configs import QuickstartConfig as QuickstartConfig
    from .configs import TrainConfig as TrainConfig
    from .errors import PdiffError as PdiffError
    from .evaluation import Baseline as Baseline
    from .evaluation import evaluate as evaluate
    from .evaluation import run_evaluate as run_evaluate
    from .generate import run_generate as run_generate
    from .hub.pipelines import load_pipeline as load_pipeline
    from .info import run_info as run_info
    from .networks.adapted import AdaptedNetwork as AdaptedNetwork
    from .networks.adapted import lora as lora
    from .pipelines.neural_network_diffusion import ConditionEncoder as ConditionEncoder
    from .pipelines.neural_network_diffusion import LinearParameterAutoencoder as LinearParameterAutoencoder
    from .pipelines.neural_network_diffusion import NeuralNetworkDiffusionPipeline as NeuralNetworkDiffusionPipeline
    from .pipelines.neural_network_diffusion import NeuronTransformerModel as NeuronTransformerModel
    from .pipelines.neural_network_diffusion import ParameterAutoencoderKL as ParameterAutoencoderKL
    from .pipelines.neural_network_diffusion import ParameterLayout as ParameterLayout
    from .pipelines.neural_network_diffusion import ParameterUNet1DModel as ParameterUNet1DModel
    from .play import run_play as run_play
    from .play import serve as serve
    from .quickstart import run_quickstart as run_quickstart
    from .share import run_import as run_import
    from .share import run_pull as run_pull
    from .share import run_push as run_push
    from .tasks import Task as Task
    from .tasks import TaskFamily as TaskFamily
    from .tasks import load_task as load_task
    from .train import run_train as run_train
    from .zoo import WeightZoo as WeightZoo
    from .zoo import ZooError as ZooError


_HOMES = {
    "align": ("run_align",),
    "collect": ("run_collect",),
    "configs": (
        "AlignConfig",
        "CollectConfig",
        "EvaluateConfig",
        "GenerateConfig",
        "ImportConfig",
        "InfoConfig",
        "NeuronTrainConfig",
        "PlayConfig",
        "PullConfig",
        "PushConfig",
        "QuickstartConfig",
        "TrainConfig",
    ),
    "errors": ("PdiffError",),
    "evaluation": ("Baseline", "evaluate", "run_evaluate"),
    "generate": ("run_generate",),
    "hub.pipelines": ("load_pipeline",),
    "info": ("run_info",),
    "networks.adapted": ("AdaptedNetwork", "lora"),
    "pipelines.neural_network_diffusion": (
        "ConditionEncoder",
        "LinearParameterAutoencoder",
        "NeuralNetworkDiffusionPipeline",
        "NeuronTransformerModel",
        "ParameterAutoencoderKL",
        "ParameterLayout",
        "ParameterUNet1DModel",
    ),
    "play": ("run_play", "serve"),
    "quickstart": ("run_quickstart",),
    "share": ("run_import", "run_pull", "run_push"),
    "tasks": ("Task", "TaskFamily", "load_task"),
    "train": ("run_train",),
    "zoo": ("WeightZoo", "ZooError"),
}
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted([*_MODULE_OF, "__version__"])


def __getattr__(name: str) -> object:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("pdiff-hf")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
