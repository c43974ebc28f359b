"""Stage 2: learn the distribution of the networks of a zoo."""

from ..errors import TrainingError
from .latent_diffusion import denoising_scheduler
from .loop import LOSSES, TrainingLoop
from .objectives import AutoencoderObjective, DenoiserObjective, FlowMatchingObjective
from .stage import run_train


__all__ = [
    "LOSSES",
    "AutoencoderObjective",
    "DenoiserObjective",
    "FlowMatchingObjective",
    "TrainingError",
    "TrainingLoop",
    "denoising_scheduler",
    "run_train",
]
