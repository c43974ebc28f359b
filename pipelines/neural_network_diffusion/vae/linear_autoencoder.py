"""A linear variational autoencoder of normalized parameter vectors, fitted in closed form."""

import math
from collections.abc import Callable, Iterable

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn


class LinearBasis(nn.Linear):
    """R directions of parameter space, all orthogonal and of one length."""

    def __init__(self, num_parameters: int, rank: int):
        super().__init__(rank, num_parameters, bias=False)
        nn.init.normal_(self.weight, std=0.02)
        # Length of a direction: what a latent of 1 moves a vector by.
        self.scale: torch.Tensor
        self.register_buffer("scale", torch.ones(()))
        # Of the posterior: the variance that the basis leaves over in a direction, in units of the latents.
        self.logvar: torch.Tensor
        self.register_buffer("logvar", torch.zeros(()))

    def forward(self, inputs: torch.Tensor, encode: bool = False) -> torch.Tensor:
        """Latents `[B, R]` to vectors `[B, P]`, or vectors to mean and log-variance of latents, `[B, 2 R]`."""
        if not encode:
            return super().forward(inputs)
        mean = (inputs / self.scale) @ self.weight / self.scale  # whose square half precision may not hold
        return torch.cat([mean, self.logvar.to(mean.dtype).expand_as(mean)], dim=1)


class LinearParameterAutoencoder(ModelMixin, ConfigMixin):
    r"""
    A variational autoencoder that maps normalized parameter vectors `[B, P]` to latents `[B, C, L]`, by a linear
    basis of C * L directions.

    A zoo of N networks spans N - 1 directions, however many parameters a network has, so that linear maps lose
    nothing that a nonlinear autoencoder could keep. The optimum of a linear variational autoencoder is probabilistic
    principal component analysis (Tipping and Bishop 1999; Lucas et al. 2019, arXiv 1911.02469), which
    [`~LinearParameterAutoencoder.fit`] computes from the N x N inner products of the networks: the vectors are read
    twice, some columns at a time, and memory is that of the basis, C * L numbers a parameter.

    Latents have a standard deviation of 1 over the training zoo, all of them taken together: the first ones, which
    explain most, are larger than the last.

    Parameters:
        num_parameters (`int`): The length P of the vectors.
        latent_channels (`int`, *optional*, defaults to 8): C.
        latent_length (`int`, *optional*, defaults to 8): L.
    """

    _no_split_modules = ["LinearBasis"]
    _repeated_blocks = ["LinearBasis"]
    _group_offload_block_modules = ["basis"]

    @register_to_config
    def __init__(self, num_parameters: int, latent_channels: int = 8, latent_length: int = 8):
        super().__init__()
        self.basis = LinearBasis(num_parameters, latent_channels * latent_length)

    @property
    def latent_shape(self) -> tuple[int, int]:
        """C and L of the latents, `[B, C, L]`."""
        return self.config.latent_channels, self.config.latent_length

    @torch.no_grad()
    def fit(self, columns: Callable[[], Iterable[torch.Tensor]]) -> torch.Tensor:
        r"""
        Finds the directions in which the networks of a zoo differ most.

        Args:
            columns (`Callable[[], Iterable[torch.Tensor]]`):
                Gives the normalized vectors of all N networks, `[N, p]` consecutive parameters at a time. Called
                twice.

        Returns:
            `torch.Tensor`: The share of the variance that each direction explains, `[C * L]`; those past the rank of
            the zoo, N - 1 at most, are 0 and their latents empty.

        Raises:
            `ValueError`: the networks do not differ.
        """
        weight = self.basis.weight
        size, rank = weight.shape
        # In double precision, which MPS lacks: the products are few.
        blocks = (block.cpu().double() for block in columns())
        gram = sum((block @ block.T for block in blocks), start=torch.zeros(()))
        count = len(gram)
        values, vectors = torch.linalg.eigh(gram.double())
        values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
        total = values.sum()
        if total == 0:
            raise ValueError("The networks do not differ: there is nothing to encode.")
        kept = min(rank, count - 1, int((values > 1e-9 * total).sum()))
        # The sign of an eigenvector is arbitrary: its largest entry shall be positive.
        largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
        vectors = (vectors * largest.sign())[:, :kept]
        scale = (values[:kept].sum() / (count * kept)).sqrt()
        combine = (vectors / values[:kept].sqrt() * scale).to(weight.device, torch.float32)
        weight.zero_()
        start = 0
        for block in columns():
            rows = block.to(weight.device, torch.float32).T @ combine
            weight[start : start + len(rows), :kept] = rows.to(weight.dtype)
            start += len(rows)
        left = (total - values[:kept].sum()) / (count * max(size - kept, 1))
        self.basis.scale.fill_(scale.item())
        self.basis.logvar.fill_(max(math.log(max(left.item(), 1e-30) / scale.item() ** 2), -30.0))
        shares = torch.zeros(rank)
        shares[:kept] = values[:kept] / total
        return shares

    @apply_forward_hook
    def encode(
        self, sample: torch.Tensor, return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        r"""
        The posterior of the latents of normalized vectors.

        Args:
            sample (`torch.Tensor`): `[B, P]`.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return an `AutoencoderKLOutput`.

        Returns:
            `AutoencoderKLOutput` or `tuple`: its `latent_dist` is over `[B, C, L]`.
        """
        if sample.ndim != 2 or sample.shape[1] != self.config.num_parameters:
            raise ValueError(
                f"Expected normalized vectors of shape [B, {self.config.num_parameters}], found {list(sample.shape)}."
            )
        moments = self.basis(sample, encode=True)
        posterior = DiagonalGaussianDistribution(
            moments.unflatten(1, (2 * self.config.latent_channels, self.config.latent_length))
        )
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(self, latents: torch.Tensor, return_dict: bool = True) -> DecoderOutput | tuple[torch.Tensor]:
        r"""
        Normalized vectors of latents.

        Args:
            latents (`torch.Tensor`): `[B, C, L]`.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return a `DecoderOutput`.

        Returns:
            `DecoderOutput` or `tuple`: its `sample` is `[B, P]`.
        """
        sample = self.basis(latents.flatten(1))
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(
        self,
        sample: torch.Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[torch.Tensor]:
        r"""
        Encodes and decodes normalized vectors.

        Args:
            sample (`torch.Tensor`): `[B, P]`.
            sample_posterior (`bool`, *optional*, defaults to `False`): Decode a sample instead of the mean.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return a `DecoderOutput`.
            generator (`torch.Generator`, *optional*): Of the posterior's samples.

        Returns:
            `DecoderOutput` or `tuple`: its `sample` is `[B, P]`.
        """
        posterior = self.encode(sample).latent_dist
        latents = posterior.sample(generator) if sample_posterior else posterior.mode()
        return self.decode(latents, return_dict=return_dict)
