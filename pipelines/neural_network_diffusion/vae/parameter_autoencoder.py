"""A convolutional variational autoencoder of normalized parameter vectors."""

import math
from collections.abc import Iterable

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn
from torch.nn import functional as F


# Sums over more inputs than these are scaled down, and their weights up, so that one learning rate of Adam fits
# vectors of any length (maximal update parametrization; Yang et al. 2022, arXiv 2203.03466).
FEW_PARAMETERS, FEW_FEATURES = 64, 1024

# A description that asks for more is refused before minutes are spent on building it.
MOST_BLOCKS = 1000


class PatchLinear(nn.Conv1d):
    """A linear map of its own for each of N patches: `[B, N, I]` to `[B, N, O]`."""

    # A convolution of N groups, so that whatever knows convolutions knows it; products in a batch are faster.
    def __init__(self, num_patches: int, in_features: int, out_features: int):
        super().__init__(num_patches * in_features, num_patches * out_features, 1, groups=num_patches)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        weight = self.weight.view(self.groups, -1, self.in_channels // self.groups)
        assert self.bias is not None
        bias = self.bias.view(self.groups, 1, -1)
        return torch.baddbmm(bias, patches.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1)


class ResidualBlock1D(nn.Module):
    """Two convolutions over neighbouring patches, added to their input `[B, H, N]`; they start as nothing."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv1d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv1d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        assert self.conv2.bias is not None
        nn.init.zeros_(self.conv2.bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.conv2(F.silu(self.conv1(F.silu(hidden_states))))


class ParameterAutoencoderKL(ModelMixin, ConfigMixin):
    r"""
    A variational autoencoder that maps normalized parameter vectors `[B, P]` to latents `[B, C, L]`.

    A vector is cut into patches, each of which has a linear map of its own (what a parameter means depends on its
    place); residual 1-D convolutions mix neighbouring patches, and one linear map gives mean and log-variance of the
    latents. The decoder is the mirror image. The convolutions start as nothing: training begins at a linear
    autoencoder. Weights and memory grow linearly with P.

    Latents have mean 0 and standard deviation 1 over the training zoo after [`~ParameterAutoencoderKL.standardize`].

    Parameters:
        num_parameters (`int`): The length P of the vectors.
        latent_channels (`int`, *optional*, defaults to 8): C.
        latent_length (`int`, *optional*, defaults to 8): L.
        patch_size (`int`, *optional*):
            Parameters of a patch. Defaults to the square root of P, and to 64 at least: a vector four times as long
            has twice as many patches, each twice as long.
        hidden_channels (`int`, *optional*, defaults to 32): Features of a patch.
        num_blocks (`int`, *optional*, defaults to 2): Residual blocks of the encoder, and of the decoder.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["PatchLinear", "ResidualBlock1D"]
    _repeated_blocks = ["ResidualBlock1D"]
    # All but the lists of blocks: `encode` and `decode` do without `forward`, which would bring the rest.
    _group_offload_block_modules = ["patch_in", "to_moments", "from_latents", "patch_out"]

    @register_to_config
    def __init__(
        self,
        num_parameters: int,
        latent_channels: int = 8,
        latent_length: int = 8,
        patch_size: int | None = None,
        hidden_channels: int = 32,
        num_blocks: int = 2,
    ):
        super().__init__()
        if type(num_blocks) is not int or not 0 <= num_blocks <= MOST_BLOCKS:
            raise ValueError(f"`num_blocks` has to be between 0 and {MOST_BLOCKS}, and is {num_blocks!r}.")
        patch_size = patch_size or max(64, math.isqrt(num_parameters))
        self.patch_size = patch_size
        self.num_patches = -(-num_parameters // patch_size)
        features, latents = self.num_patches * hidden_channels, latent_channels * latent_length
        self.patch_in = PatchLinear(self.num_patches, patch_size, hidden_channels)
        self.encoder_blocks = nn.ModuleList(ResidualBlock1D(hidden_channels) for _ in range(num_blocks))
        self.to_moments = nn.Linear(features, 2 * latents)
        self.from_latents = nn.Linear(latents, features)
        self.decoder_blocks = nn.ModuleList(ResidualBlock1D(hidden_channels) for _ in range(num_blocks))
        self.patch_out = PatchLinear(self.num_patches, hidden_channels, patch_size)
        self.patch_scale = min(1.0, FEW_PARAMETERS / patch_size)
        self.feature_scale = min(1.0, FEW_FEATURES / features)
        with torch.no_grad():
            self.patch_in.weight /= self.patch_scale
            self.to_moments.weight /= self.feature_scale
        # Latents begin almost free of noise: the reconstruction comes first, and the noise that it bears after that.
        nn.init.zeros_(self.to_moments.weight[latents:])
        nn.init.constant_(self.to_moments.bias[latents:], -4.0)
        self.gradient_checkpointing = False

    @property
    def latent_shape(self) -> tuple[int, int]:
        """C and L of the latents, `[B, C, L]`."""
        return self.config.latent_channels, self.config.latent_length

    def _run(self, block: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, hidden_states)
        return block(hidden_states)

    @torch.no_grad()
    def standardize(self, batches: Iterable[torch.Tensor]) -> "ParameterAutoencoderKL":
        r"""
        Shifts and scales the latents, so that they have mean 0 and standard deviation 1 over a zoo. What is decoded
        stays the same: the linear maps to and from the latents take it in.

        Args:
            batches (`Iterable[torch.Tensor]`): Normalized vectors of the networks of the zoo, each `[n, P]`.

        Returns:
            `ParameterAutoencoderKL`: itself.
        """
        means = torch.cat([self.encode(batch).latent_dist.mean.flatten(1).float() for batch in batches])
        mean = means.mean(0)
        # One scale for all: latents that say nothing stay small, and are no noise for the denoiser to learn.
        std = (means - mean).square().mean().sqrt().clamp_min(1e-6)
        encode, decode = self.to_moments, self.from_latents
        latents = len(mean)
        decode.bias.add_(decode.weight @ mean.to(decode.weight.dtype))
        decode.weight *= std
        encode.bias[:latents] -= mean
        encode.bias[:latents] /= std
        encode.weight[:latents] /= std
        encode.bias[latents:] -= 2 * std.log()
        return self

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
        config = self.config
        if sample.ndim != 2 or sample.shape[1] != config.num_parameters:
            raise ValueError(
                f"Expected normalized vectors of shape [B, {config.num_parameters}], found {list(sample.shape)}."
            )
        padded = F.pad(sample, (0, -config.num_parameters % self.patch_size))
        patches = padded.unflatten(1, (self.num_patches, -1))
        hidden_states = self.patch_in(self.patch_scale * patches).transpose(1, 2).contiguous()
        for block in self.encoder_blocks:
            hidden_states = self._run(block, hidden_states)
        moments = self.to_moments(self.feature_scale * hidden_states.flatten(1))
        posterior = DiagonalGaussianDistribution(
            moments.unflatten(1, (2 * config.latent_channels, config.latent_length))
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
        hidden_states = self.from_latents(latents.flatten(1)).unflatten(1, (-1, self.num_patches))
        for block in self.decoder_blocks:
            hidden_states = self._run(block, hidden_states)
        sample = self.patch_out(hidden_states.transpose(1, 2)).flatten(1)[:, : self.config.num_parameters]
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
