"""A denoiser as a user may write it: the positions of the latents are tokens, and it takes a condition."""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from torch import nn
from torch.nn import functional as F


class TokenBlock(nn.Module):
    """Each token learns of the mean of all: `[B, L, H]` to `[B, L, H]`."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.linear1 = nn.Linear(2 * hidden_size, 2 * hidden_size)
        self.linear2 = nn.Linear(2 * hidden_size, hidden_size)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        normed = self.norm(tokens)
        mean = normed.mean(1, keepdim=True).expand_as(normed)
        return tokens + self.linear2(F.silu(self.linear1(torch.cat([normed, mean], dim=2))))


class TokenDenoiser(ModelMixin, ConfigMixin):
    """Takes noisy latents `[B, C, L]`, a timestep and a condition `[B, E]`; gives an output of the latents' shape."""

    _no_split_modules = ["TokenBlock"]

    @register_to_config
    def __init__(self, in_channels: int = 2, hidden_size: int = 16, condition_size: int = 4, num_blocks: int = 2):
        super().__init__()
        self.time_proj = Timesteps(hidden_size, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(hidden_size, hidden_size)
        self.condition_in = nn.Linear(condition_size, hidden_size)
        self.proj_in = nn.Linear(in_channels, hidden_size)
        self.blocks = nn.ModuleList(TokenBlock(hidden_size) for _ in range(num_blocks))
        self.proj_out = nn.Linear(hidden_size, in_channels)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        condition: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> dict[str, torch.Tensor] | tuple[torch.Tensor]:
        timestep = torch.as_tensor(timestep, device=sample.device).expand(sample.shape[0])
        embedding = self.time_embedding(self.time_proj(timestep).to(sample.dtype))
        if condition is not None:
            embedding = embedding + self.condition_in(condition.to(sample.dtype))
        tokens = self.proj_in(sample.transpose(1, 2)) + embedding[:, None]
        for block in self.blocks:
            tokens = block(tokens)
        sample = self.proj_out(tokens).transpose(1, 2)
        return {"sample": sample} if return_dict else (sample,)
