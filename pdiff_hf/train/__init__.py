"""Stage 2: learn the distribution of the networks of a zoo. Runs alone or under `accelerate launch`."""

from ..errors import TrainingError
from .latent_diffusion import denoising_scheduler
from .loop import LOSSES, Training
from .objectives import DenoiserObjective
from .stage import TrainConfig, run_train


__all__ = [
    "LOSSES",
    "DenoiserObjective",
    "TrainConfig",
    "Training",
    "TrainingError",
    "denoising_scheduler",
    "run_train",
]
