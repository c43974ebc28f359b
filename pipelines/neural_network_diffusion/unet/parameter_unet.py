"""The denoiser: a plain 1-D U-Net over the latents of networks."""

from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import nn
from torch.nn import functional as F


# A config may come from anywhere, and building its blocks takes time before any weight is read.
MOST_BLOCKS = 1000


@dataclass
class ParameterUNet1DOutput(BaseOutput):
    """
    Args:
        sample (`torch.Tensor`): The model's output, `[B, C, L]`.
    """

    sample: torch.Tensor


class TimeResidualBlock1D(nn.Module):
    """A residual block; the timestep scales and shifts its second normalization: `[B, I, L]` to `[B, O, L]`."""

    def __init__(self, in_channels: int, out_channels: int, time_embed_dim: int, norm_num_groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(norm_num_groups, in_channels)
        self.conv1 = nn.Conv1d(in_channels, out_channels, 3, padding=1)
        self.time_proj = nn.Linear(time_embed_dim, 2 * out_channels)
        self.norm2 = nn.GroupNorm(norm_num_groups, out_channels)
        self.conv2 = nn.Conv1d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv1d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(
        self, hidden_states: torch.Tensor, temb: torch.Tensor, skip: torch.Tensor | None = None
    ) -> torch.Tensor:
        if skip is not None:  # joined here, where both are on the block's device
            hidden_states = torch.cat([hidden_states, skip], dim=1)
        residual = self.conv1(F.silu(self.norm1(hidden_states)))
        scale, shift = self.time_proj(temb)[..., None].chunk(2, dim=1)
        residual = self.conv2(F.silu(self.norm2(residual) * (1 + scale) + shift))
        return self.shortcut(hidden_states) + residual


class ParameterUNet1DModel(ModelMixin, ConfigMixin):
    r"""
    A 1-D U-Net that takes noisy latents and a timestep and returns an output of the latents' shape.

    Parameters:
        in_channels (`int`, *optional*, defaults to 8): Channels C of the latents.
        out_channels (`int`, *optional*, defaults to 8): Channels of the output.
        block_out_channels (`tuple[int]`, *optional*, defaults to `(64, 64)`):
            Channels a level; the length is halved from one level to the next.
        layers_per_block (`int`, *optional*, defaults to 1): Residual blocks a level.
        norm_num_groups (`int`, *optional*, defaults to 8): Groups of the group norms.
        condition_dim (`int`, *optional*): Size E of the embedding of what is asked for.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["TimeResidualBlock1D"]
    _repeated_blocks = ["TimeResidualBlock1D"]
    _skip_layerwise_casting_patterns = ["norm"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 8,
        out_channels: int = 8,
        block_out_channels: tuple[int, ...] = (64, 64),
        layers_per_block: int = 1,
        norm_num_groups: int = 8,
        condition_dim: int | None = None,
    ):
        super().__init__()
        if type(norm_num_groups) is not int or norm_num_groups < 1:
            raise ValueError(f"`norm_num_groups` has to be a positive integer, and is {norm_num_groups!r}.")
        if layers_per_block < 1 or layers_per_block * len(block_out_channels) > MOST_BLOCKS:
            raise ValueError(f"`layers_per_block` has to be between 1 and {MOST_BLOCKS}, and is {layers_per_block}.")
        first, last = block_out_channels[0], block_out_channels[-1]
        time_embed_dim = 4 * first
        self.time_proj = Timesteps(first, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(first, time_embed_dim)
        self.condition_embedding = None if condition_dim is None else nn.Linear(condition_dim, time_embed_dim)

        def block(channels_in: int, channels_out: int) -> TimeResidualBlock1D:
            return TimeResidualBlock1D(channels_in, channels_out, time_embed_dim, norm_num_groups)

        self.conv_in = nn.Conv1d(in_channels, first, 3, padding=1)
        self.down_blocks, self.downsamplers = nn.ModuleList(), nn.ModuleList()
        skips, channels = [first], first
        for level, width in enumerate(block_out_channels):
            for _ in range(layers_per_block):
                self.down_blocks.append(block(channels, width))
                channels = width
                skips.append(channels)
            if level < len(block_out_channels) - 1:
                self.downsamplers.append(nn.Conv1d(channels, channels, 3, stride=2, padding=1))
                skips.append(channels)

        self.mid_block = block(last, last)

        self.up_blocks, self.upsamplers = nn.ModuleList(), nn.ModuleList()
        for level, width in reversed(list(enumerate(block_out_channels))):
            for _ in range(layers_per_block + 1):
                self.up_blocks.append(block(channels + skips.pop(), width))
                channels = width
            if level > 0:
                self.upsamplers.append(nn.Conv1d(channels, channels, 3, padding=1))

        self.norm_out = nn.GroupNorm(norm_num_groups, first)
        self.conv_out = nn.Conv1d(first, out_channels, 3, padding=1)
        self.gradient_checkpointing = False

    def _run(self, block: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *inputs)
        return block(*inputs)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        condition: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> ParameterUNet1DOutput | tuple[torch.Tensor]:
        r"""
        Args:
            sample (`torch.Tensor`): Noisy latents, `[B, C, L]`; any length L.
            timestep (`torch.Tensor` or `float` or `int`): One for all, or `[B]`.
            condition (`torch.Tensor`, *optional*): Embeddings of what is asked for, `[B, E]`.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return a `ParameterUNet1DOutput`.

        Returns:
            `ParameterUNet1DOutput` or `tuple`: its `sample` is `[B, C, L]`.
        """
        if (condition is not None) != (self.condition_embedding is not None):
            need = "takes no" if self.condition_embedding is None else "needs a"
            raise ValueError(f"This denoiser {need} `condition`.")

        # 1. time and condition
        timestep = torch.as_tensor(timestep, device=sample.device).expand(sample.shape[0])
        temb = self.time_embedding(self.time_proj(timestep).to(sample.dtype))
        if condition is not None:
            assert self.condition_embedding is not None
            temb = temb + self.condition_embedding(condition)
        temb = F.silu(temb)

        # 2. down
        layers = self.config.layers_per_block
        hidden_states = self.conv_in(sample)
        skips = [hidden_states]
        for index, block in enumerate(self.down_blocks):
            if index > 0 and index % layers == 0:
                hidden_states = self.downsamplers[index // layers - 1](hidden_states)
                skips.append(hidden_states)
            hidden_states = self._run(block, hidden_states, temb)
            skips.append(hidden_states)

        # 3. mid
        hidden_states = self._run(self.mid_block, hidden_states, temb)

        # 4. up
        for index, block in enumerate(self.up_blocks):
            skip = skips.pop()
            if index > 0 and index % (layers + 1) == 0:
                hidden_states = F.interpolate(hidden_states, size=skip.shape[-1], mode="nearest")
                hidden_states = self.upsamplers[index // (layers + 1) - 1](hidden_states)
            hidden_states = self._run(block, hidden_states, temb, skip)

        # 5. out
        sample = self.conv_out(F.silu(self.norm_out(hidden_states)))
        return ParameterUNet1DOutput(sample=sample) if return_dict else (sample,)
