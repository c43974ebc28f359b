"""What is minimized: the losses of the trained parts."""

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn
from torch.nn import functional as F

from ..networks.stacked import StackedNetwork, stack
from ..pipelines.neural_network_diffusion import (
    NeuronTransformerModel,
    ParameterAutoencoderKL,
    ParameterLayout,
)
from ..zoo import evenly


# Inputs, evenly picked, and networks that tell the variance of outputs.
VARIANCE_INPUTS, VARIANCE_NETWORKS = 256, 64
# Muon's learning rate in units of AdamW's.
MUON = 2.5


class Objective(nn.Module):
    """What the loop minimizes: `forward` is the loss of some data and of what was drawn for them."""

    def draw(self, count: int, shape: torch.Size, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        """Random tensors, a row for each of so many data of this shape."""
        raise NotImplementedError

    def optimizers(self, learning_rate: float) -> list[torch.optim.Optimizer]:
        """What trains it: AdamW, as the published method's."""
        return [torch.optim.AdamW(self.parameters(), lr=learning_rate, fused=True)]


class DenoiserObjective(Objective):
    """The loss of the denoiser: squared error of what the scheduler's prediction type asks for."""

    def __init__(self, denoiser: nn.Module, scheduler: DDPMScheduler):
        super().__init__()
        self.denoiser, self.scheduler = denoiser, scheduler

    def draw(self, count: int, shape: torch.Size, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        """Noise `[count, *shape]` and timesteps `[count]`."""
        noise = torch.randn((count, *shape), generator=generator, device=generator.device)
        steps = self.scheduler.config.num_train_timesteps
        return noise, torch.randint(steps, (count,), generator=generator, device=generator.device)

    def forward(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        prediction = self.denoiser(self.scheduler.add_noise(latents, noise, timesteps), timesteps).sample
        target = {
            "epsilon": lambda: noise,
            "sample": lambda: latents,
            "v_prediction": lambda: self.scheduler.get_velocity(latents, noise, timesteps),
        }[self.scheduler.config.prediction_type]()
        return F.mse_loss(prediction.float(), target)


class Behaviour:
    r"""
    How differently networks behave: the mean squared difference of their outputs, relative to the variance of the
    outputs over examples.

    Args:
        network (`StackedNetwork`): The architecture.
        layout (`ParameterLayout`): With its statistics.
        inputs (`torch.Tensor`): Training inputs, `[E, ...]`; their targets are not needed.
        some (`torch.Tensor`): Normalized networks, `[n, P]`, whose outputs tell the variance.
        count (`int`, *optional*, defaults to 64): Inputs a step.
    """

    def __init__(
        self,
        network: StackedNetwork,
        layout: ParameterLayout,
        inputs: torch.Tensor,
        some: torch.Tensor,
        count: int = 64,
    ):
        self.network, self.layout, self.inputs, self.count = network, layout, inputs, count
        with torch.no_grad():
            outputs = self.outputs(some.to(layout.device), inputs[list(evenly(len(inputs), VARIANCE_INPUTS))])
        # One number for all: processes see other networks of a batch each.
        self.variance = outputs.var(dim=1).mean().clamp_min(1e-12)

    def outputs(self, normalized: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        """Of networks `[N, P]` for examples `[E, ...]`: `[N, E, ...]`."""
        return self.network(stack(self.layout, self.layout(normalized.float()).vectors), inputs[None])

    def __call__(self, ours: torch.Tensor, stored: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Of normalized vectors, both `[N, P]`, on these inputs, `[E]`."""
        inputs = self.inputs[indices]
        with torch.autocast(ours.device.type, enabled=False):  # small products, whose errors add up
            with torch.no_grad():
                expected = self.outputs(stored, inputs)
            return F.mse_loss(self.outputs(ours, inputs), expected) / self.variance

    def draw(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Indices of inputs for so many networks, `[count, E]`: a row each, since processes share them, all alike."""
        indices = torch.randint(len(self.inputs), (self.count,), generator=generator, device=generator.device)
        return indices.expand(count, -1)


class FlowMatchingObjective(Objective):
    r"""
    The loss of flow matching (Lipman et al. 2022, arXiv 2210.02747) on straight paths from noise to networks: squared
    error of the predicted clean network, with the weight 1 / (sigma + 0.1), and how differently it behaves.

    Args:
        denoiser (`NeuronTransformerModel`): What is trained.
        scheduler (`FlowMatchEulerDiscreteScheduler`): Of the sampling.
        behaviour (`Behaviour`, *optional*): Compares the outputs.
        behaviour_weight (`float`, *optional*, defaults to 1.0): Of that difference.
    """

    def __init__(
        self,
        denoiser: NeuronTransformerModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        behaviour: Behaviour | None = None,
        behaviour_weight: float = 1.0,
    ):
        super().__init__()
        self.denoiser, self.scheduler = denoiser, scheduler
        self.behaviour, self.behaviour_weight = behaviour, behaviour_weight

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

    def draw(self, count: int, shape: torch.Size, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        """Noise `[count, 1, P]`, its levels `[count]`, and inputs `[count, E]`, the same in all."""
        noise = torch.randn((count, 1, shape[-1]), generator=generator, device=generator.device)
        sigmas = torch.rand(count, generator=generator, device=generator.device)
        return (noise, sigmas) if self.behaviour is None else (noise, sigmas, self.behaviour.draw(count, generator))

    def forward(
        self, networks: torch.Tensor, noise: torch.Tensor, sigmas: torch.Tensor, inputs: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Of normalized networks and, behind each, its initialization where the denoiser is told: `[n, 1 or 2, P]`."""
        clean, initial = networks[:, :1], networks[:, 1:] if networks.shape[1] > 1 else None
        sigma = sigmas[:, None, None]
        timesteps = sigmas * self.scheduler.config.num_train_timesteps
        prediction = self.denoiser.predict_clean(
            (1 - sigma) * clean + sigma * noise, timesteps, initial=initial
        ).float()
        loss = ((prediction - clean).square() / (sigma + 0.1)).mean()
        if self.behaviour is not None and inputs is not None:
            loss = loss + self.behaviour_weight * self.behaviour(prediction[:, 0], clean[:, 0], inputs[0])
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

    def draw(self, count: int, shape: torch.Size, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        """Noise on parameters `[count, P]`, on latents `[count, C, L]`, and inputs `[count, E]`, the same in all."""
        sizes = ((count, *shape), (count, *self.vae.latent_shape))
        noise = [torch.randn(size, generator=generator, device=generator.device) for size in sizes]
        if self.behaviour is None:
            return tuple(noise)
        return (*noise, self.behaviour.draw(count, generator))

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
