"""What is minimized: the losses of the trained parts."""

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn
from torch.nn import functional as F

from ..networks.behaviour import Behaviour
from ..pipelines.neural_network_diffusion import (
    ConditionEncoder,
    NeuronTransformerModel,
    ParameterAutoencoderKL,
)


# Muon's learning rate in units of AdamW's.
MUON = 2.5
# At so many steps the denoiser is told its own prediction, as while sampling.
TOLD_BEFORE = 0.5
# Of so many networks the condition is not told, and, where there are several columns, each of them.
UNTOLD = 0.1
# What an objective takes, by name.
Batch = dict[str, torch.Tensor]


class Objective(nn.Module):
    """What the loop minimizes: `forward` is the loss of some data and of what was drawn for them, by name."""

    def draw(self, count: int, data: Batch, generator: torch.Generator) -> Batch:
        """Random tensors, a row for each of so many data like these."""
        raise NotImplementedError

    def optimizers(self, learning_rate: float) -> list[torch.optim.Optimizer]:
        """What trains it: AdamW, as the published method's."""
        return [torch.optim.AdamW(self.parameters(), lr=learning_rate, fused=True)]


class ConditionalObjective(Objective):
    """What trains a denoiser and, where it is told a condition, the encoder of that."""

    def __init__(self, denoiser: nn.Module, scheduler: Any, condition_encoder: ConditionEncoder | None = None):
        super().__init__()
        self.denoiser, self.scheduler, self.condition_encoder = denoiser, scheduler, condition_encoder

    def draw_asked(self, count: int, generator: torch.Generator) -> Batch:
        """Which columns of the condition are told, `[count, columns]`: for guidance (Ho and Salimans 2022, arXiv
        2207.12598) none of them of some networks, and not each of them of others."""
        if self.condition_encoder is None:
            return {}
        columns = len(self.condition_encoder.config.columns)
        told = torch.rand(count, 1 + columns, generator=generator, device=generator.device) >= UNTOLD
        return {"asked": told[:, :1] & (told[:, 1:] | (columns == 1))}

    def told(self, codes: torch.Tensor | None, asked: torch.Tensor | None) -> Batch:
        """What the denoiser takes beside noisy networks and timesteps."""
        if self.condition_encoder is None or codes is None:
            return {}
        return {"condition": self.condition_encoder.embed(codes, asked)}


class DenoiserObjective(ConditionalObjective):
    """The loss of the denoiser: squared error of what the scheduler's prediction type asks for."""

    def draw(self, count: int, data: Batch, generator: torch.Generator) -> Batch:
        """Noise `[count, C, L]`, timesteps `[count]` and what is told of the condition, `[count, columns]`."""
        size = (count, *data["latents"].shape[1:])
        noise = torch.randn(size, generator=generator, device=generator.device)
        steps = self.scheduler.config.num_train_timesteps
        timesteps = torch.randint(steps, (count,), generator=generator, device=generator.device)
        return {"noise": noise, "timesteps": timesteps, **self.draw_asked(count, generator)}

    def forward(
        self,
        latents: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        codes: torch.Tensor | None = None,
        asked: torch.Tensor | None = None,
    ) -> torch.Tensor:
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        prediction = self.denoiser(noisy, timesteps, **self.told(codes, asked)).sample
        target = {
            "epsilon": lambda: noise,
            "sample": lambda: latents,
            "v_prediction": lambda: self.scheduler.get_velocity(latents, noise, timesteps),
        }[self.scheduler.config.prediction_type]()
        return F.mse_loss(prediction.float(), target)


class FlowMatchingObjective(ConditionalObjective):
    r"""
    The loss of flow matching (Lipman et al. 2022, arXiv 2210.02747) on straight paths from noise to networks: squared
    error of the predicted clean network, with the weight 1 / (sigma + 0.1), and how differently it behaves. At half of
    the steps the denoiser is told what it predicts without (self-conditioning, Chen et al. 2022, arXiv 2208.04202).

    Args:
        denoiser (`NeuronTransformerModel`): What is trained.
        scheduler (`FlowMatchEulerDiscreteScheduler`): Of the sampling.
        condition_encoder (`ConditionEncoder`, *optional*): Trained with it.
        behaviour (`Behaviour`, *optional*): Compares the outputs.
        behaviour_weight (`float`, *optional*, defaults to 1.0): Of that difference.
        min_sigma (`float`, *optional*, defaults to 0.0): The least noise, from 0 to 1.
    """

    denoiser: NeuronTransformerModel

    def __init__(
        self,
        denoiser: NeuronTransformerModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        condition_encoder: ConditionEncoder | None = None,
        behaviour: Behaviour | None = None,
        behaviour_weight: float = 1.0,
        min_sigma: float = 0.0,
    ):
        super().__init__(denoiser, scheduler, condition_encoder)
        self.behaviour, self.behaviour_weight, self.min_sigma = behaviour, behaviour_weight, min_sigma

    def optimizers(self, learning_rate: float) -> list[torch.optim.Optimizer]:
        """Muon (Jordan et al. 2024) for the matrices of the blocks, its steps in units of Adam's (Liu et al. 2025,
        arXiv 2502.16982), and AdamW for the rest."""
        matrices = [weight for weight in self.denoiser.blocks.parameters() if weight.ndim == 2]
        chosen = {id(weight) for weight in matrices}
        rest = [weight for weight in self.parameters() if id(weight) not in chosen]
        return [
            torch.optim.AdamW(rest, lr=learning_rate, fused=True),
            torch.optim.Muon(matrices, lr=MUON * learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        ]

    def draw(self, count: int, data: Batch, generator: torch.Generator) -> Batch:
        """Noise `[count, 1, P]`, its levels `[count]`, whether predictions are told, `[count]`, what is told of the
        condition, `[count, columns]`, and inputs `[count, E]`; predictions and inputs are the same in all."""
        size = (count, 1, data["networks"].shape[-1])
        noise = torch.randn(size, generator=generator, device=generator.device)
        sigmas = torch.rand(count, generator=generator, device=generator.device)
        drawn = {
            "noise": noise,
            "sigmas": self.min_sigma + (1 - self.min_sigma) * sigmas,
            "again": torch.rand((), generator=generator, device=generator.device).lt(TOLD_BEFORE).expand(count),
            **self.draw_asked(count, generator),
        }
        if self.behaviour is not None:
            drawn["inputs"] = self.behaviour.draw(count, generator)
        return drawn

    def forward(
        self,
        networks: torch.Tensor,
        noise: torch.Tensor,
        sigmas: torch.Tensor,
        again: torch.Tensor,
        inputs: torch.Tensor | None = None,
        initial: torch.Tensor | None = None,
        codes: torch.Tensor | None = None,
        asked: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Of normalized networks and, where the denoiser is told, their initializations, both `[n, 1, P]`, and the
        codes of their conditions, `[n, K]`."""
        sigma = sigmas[:, None, None]
        timesteps = sigmas * self.scheduler.config.num_train_timesteps
        noisy = (1 - sigma) * networks + sigma * noise
        told = self.told(codes, asked)
        previous = None
        if again[0]:
            with torch.no_grad():
                previous = self.denoiser.predict_clean(noisy, timesteps, initial=initial, **told).float()
            # Casts that were made without gradients, which torch 2.9 takes for the others, too.
            torch.clear_autocast_cache()
        prediction = self.denoiser.predict_clean(noisy, timesteps, initial=initial, previous=previous, **told).float()
        loss = ((prediction - networks).square() / (sigma + 0.1)).mean()
        if self.behaviour is not None and inputs is not None:
            loss = loss + self.behaviour_weight * self.behaviour(prediction[:, 0], networks[:, 0], inputs[0])
        return loss


class AutoencoderObjective(Objective):
    r"""
    The loss of the parameter autoencoder: squared error of the reconstruction, KL divergence of the posterior from a
    standard normal distribution (Kingma and Welling 2013, arXiv 1312.6114), with noise on parameters and latents as
    in Neural Network Diffusion, and, optionally, the squared error of the reconstructed networks' outputs.

    Args:
        vae (`ParameterAutoencoderKL`): What is trained.
        parameter_noise (`float`): Standard deviation of the noise on normalized parameters.
        latent_noise (`float`): Of the noise on latents, beyond the posterior's own, in units of the prior.
        kl_weight (`float`): Of the KL divergence, a mean over latents.
        behaviour (`Behaviour`, *optional*): Compares the outputs.
        behaviour_weight (`float`, *optional*, defaults to 1.0): Of that difference.
    """

    def __init__(
        self,
        vae: ParameterAutoencoderKL,
        parameter_noise: float,
        latent_noise: float,
        kl_weight: float,
        behaviour: Behaviour | None = None,
        behaviour_weight: float = 1.0,
    ):
        super().__init__()
        self.vae = vae
        self.parameter_noise, self.latent_noise, self.kl_weight = parameter_noise, latent_noise, kl_weight
        self.behaviour, self.behaviour_weight = behaviour, behaviour_weight

    def draw(self, count: int, data: Batch, generator: torch.Generator) -> Batch:
        """Noise on parameters `[count, P]`, on latents `[count, C, L]`, and inputs `[count, E]`, the same in all."""
        sizes = {
            "parameter_noise": (count, *data["vectors"].shape[1:]),
            "latent_noise": (count, *self.vae.latent_shape),
        }
        drawn = {name: torch.randn(size, generator=generator, device=generator.device) for name, size in sizes.items()}
        if self.behaviour is not None:
            drawn["inputs"] = self.behaviour.draw(count, generator)
        return drawn

    def forward(
        self,
        vectors: torch.Tensor,
        parameter_noise: torch.Tensor,
        latent_noise: torch.Tensor,
        inputs: torch.Tensor | None = None,
    ) -> torch.Tensor:
        posterior = self.vae.encode(vectors + self.parameter_noise * parameter_noise).latent_dist
        # Two independent noises are one.
        latents = posterior.mean + (posterior.var + self.latent_noise**2).sqrt() * latent_noise
        decoded = self.vae.decode(latents).sample.float()
        # diffusers' own `kl()` sums, and over images.
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        loss = F.mse_loss(decoded, vectors) + self.kl_weight * kl
        if self.behaviour is not None and inputs is not None:
            loss = loss + self.behaviour_weight * self.behaviour(decoded, vectors, inputs[0])
        return loss
