"""Stage 2: learn the distribution of the networks of a zoo."""

from ..errors import TrainingError
from .latent_diffusion import TrainConfig, denoising_scheduler
from .loop import LOSSES, LoopConfig, TrainingLoop
from .neuron_diffusion import NeuronTrainConfig
from .objectives import AutoencoderObjective, DenoiserObjective, FlowMatchingObjective
from .stage import run_train


__all__ = [
    "LOSSES",
    "AutoencoderObjective",
    "DenoiserObjective",
    "FlowMatchingObjective",
    "LoopConfig",
    "NeuronTrainConfig",
    "TrainConfig",
    "TrainingError",
    "TrainingLoop",
    "denoising_scheduler",
    "run_train",
]
