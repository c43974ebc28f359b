"""What is minimized: the losses of the trained parts."""

import torch
from diffusers import DDPMScheduler
from torch import nn
from torch.nn import functional as F

from ..pipelines.neural_network_diffusion import ParameterUNet1DModel


class DenoiserObjective(nn.Module):
    """The loss of the denoiser: squared error of what the scheduler's prediction type asks for."""

    def __init__(self, unet: ParameterUNet1DModel, scheduler: DDPMScheduler):
        super().__init__()
        self.unet, self.scheduler = unet, scheduler

    def draw(self, count: int, shape: torch.Size, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise `[count, *shape]` and timesteps `[count]`."""
        noise = torch.randn((count, *shape), generator=generator, device=generator.device)
        steps = self.scheduler.config.num_train_timesteps
        return noise, torch.randint(steps, (count,), generator=generator, device=generator.device)

    def forward(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        prediction = self.unet(self.scheduler.add_noise(latents, noise, timesteps), timesteps).sample
        target = {
            "epsilon": lambda: noise,
            "sample": lambda: latents,
            "v_prediction": lambda: self.scheduler.get_velocity(latents, noise, timesteps),
        }[self.scheduler.config.prediction_type]()
        return F.mse_loss(prediction.float(), target)
