"""A variational autoencoder of normalized parameter vectors."""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn
from torch.nn import functional as F


# A config may come from anywhere, and building its blocks takes time before any weight is read.
MOST_BLOCKS = 1000


class PatchLinear(nn.Module):
    """A linear map of its own for each patch: `[B, N, I]` to `[B, N, O]`."""

    def __init__(self, num_patches: int, in_features: int, out_features: int):
        super().__init__()
        bound = in_features**-0.5
        self.weight = nn.Parameter(torch.empty(num_patches, in_features, out_features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(num_patches, out_features))

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return torch.baddbmm(self.bias[:, None], patches.transpose(0, 1), self.weight).transpose(0, 1)


class ResidualConvBlock(nn.Module):
    """`x + conv(act(conv(act(norm(x)))))` over the patches: `[B, C, N]` to `[B, C, N]`."""

    def __init__(self, channels: int, kernel_size: int, norm_num_groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(norm_num_groups, channels)
        self.conv1 = nn.Conv1d(channels, channels, kernel_size, padding="same")
        self.conv2 = nn.Conv1d(channels, channels, kernel_size, padding="same")

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        residual = self.conv1(F.silu(self.norm(hidden_states)))
        return hidden_states + self.conv2(F.silu(residual))


class ParameterAutoencoderKL(ModelMixin, ConfigMixin):
    r"""
    A variational autoencoder with a KL loss that maps normalized parameter vectors `[B, P]` to latents `[B, C, L]`.

    The vector is cut into patches; each patch has a linear map of its own to `hidden_channels`, a few residual 1-D
    convolutions run over the patches, and one linear map leads to the latent. The decoder is the mirror image.

    Latents have unit scale over the training zoo once [`~ParameterAutoencoderKL.standardize_latents`] was called, so
    there is no scaling factor to apply.

    Parameters:
        num_parameters (`int`): The length P of the vectors.
        patch_size (`int`, *optional*, defaults to 64): Parameters a patch; the last patch is padded with zeros.
        hidden_channels (`int`, *optional*, defaults to 64): Features a patch.
        num_blocks (`int`, *optional*, defaults to 2): Residual blocks in the encoder, and in the decoder.
        kernel_size (`int`, *optional*, defaults to 3): Patches a convolution sees.
        norm_num_groups (`int`, *optional*, defaults to 8): Groups of the group norms.
        latent_channels (`int`, *optional*, defaults to 4): C.
        latent_length (`int`, *optional*, defaults to 32): L.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ResidualConvBlock", "PatchLinear"]
    _group_offload_block_modules = ["patch_in", "to_moments", "from_latent", "patch_out"]
    _repeated_blocks = ["ResidualConvBlock"]
    _skip_layerwise_casting_patterns = ["norm"]

    @register_to_config
    def __init__(
        self,
        num_parameters: int,
        patch_size: int = 64,
        hidden_channels: int = 64,
        num_blocks: int = 2,
        kernel_size: int = 3,
        norm_num_groups: int = 8,
        latent_channels: int = 4,
        latent_length: int = 32,
    ):
        super().__init__()
        if type(norm_num_groups) is not int or norm_num_groups < 1:
            raise ValueError(f"`norm_num_groups` has to be a positive integer, and is {norm_num_groups!r}.")
        if not 0 <= num_blocks <= MOST_BLOCKS:
            raise ValueError(f"`num_blocks` has to be between 0 and {MOST_BLOCKS}, and is {num_blocks}.")
        num_patches = -(-num_parameters // patch_size)
        latent_size = latent_channels * latent_length

        def blocks():
            return nn.ModuleList(
                ResidualConvBlock(hidden_channels, kernel_size, norm_num_groups) for _ in range(num_blocks)
            )

        self.patch_in = PatchLinear(num_patches, patch_size, hidden_channels)
        self.encoder_blocks = blocks()
        self.to_moments = nn.Linear(num_patches * hidden_channels, 2 * latent_size)
        self.from_latent = nn.Linear(latent_size, num_patches * hidden_channels)
        self.decoder_blocks = blocks()
        self.patch_out = PatchLinear(num_patches, hidden_channels, patch_size)
        self.gradient_checkpointing = False

    def _run(self, blocks: nn.ModuleList, hidden_states: torch.Tensor) -> torch.Tensor:
        for block in blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states)
            else:
                hidden_states = block(hidden_states)
        return hidden_states

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
        num_patches, patch_size, _ = self.patch_in.weight.shape
        sample = F.pad(sample, (0, num_patches * patch_size - sample.shape[1]))
        hidden_states = self.patch_in(sample.unflatten(1, (num_patches, patch_size)))
        hidden_states = self._run(self.encoder_blocks, hidden_states.transpose(1, 2).contiguous())
        moments = self.to_moments(hidden_states.flatten(1))
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
        num_patches, hidden_channels, _ = self.patch_out.weight.shape
        hidden_states = self.from_latent(latents.flatten(1)).unflatten(1, (hidden_channels, num_patches))
        hidden_states = self._run(self.decoder_blocks, hidden_states)
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

    @torch.no_grad()
    def standardize_latents(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        r"""
        Gives latents zero mean and unit scale, by folding the change into the linear maps on both sides of the
        latent. What the autoencoder reconstructs stays the same.

        Args:
            mean (`torch.Tensor`): The present mean of the latents over the training zoo, `[C, L]`.
            std (`torch.Tensor`): Their present scale; `[C, L]`, or anything that broadcasts to it.
        """
        shape = (self.config.latent_channels, self.config.latent_length)
        mean, std = mean.expand(shape).flatten(), std.expand(shape).flatten()
        # decode: W (z * std + mean) + b
        self.from_latent.bias.add_(self.from_latent.weight @ mean)
        self.from_latent.weight.mul_(std)
        # encode: (m - mean) / std, and the logarithm of the variance goes down by log(std^2)
        means, log_variances = self.to_moments.weight.chunk(2), self.to_moments.bias.chunk(2)
        means[0].div_(std[:, None])
        log_variances[0].sub_(mean).div_(std)
        log_variances[1].sub_(2 * std.log())
