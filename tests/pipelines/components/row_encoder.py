"""A condition encoder as a user may write it: rows ask for an accuracy, or for nothing."""

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn


class RowEncoder(ModelMixin, ConfigMixin):
    """Embeddings `[B, E]` of B rows; the learned one stands for rows that ask for nothing."""

    @register_to_config
    def __init__(self, embedding_size: int = 4):
        super().__init__()
        self.nothing = nn.Parameter(torch.randn(embedding_size))
        self.embed = nn.Linear(1, embedding_size)

    def forward(self, rows: list[dict[str, Any]]) -> torch.Tensor:
        nothing = self.nothing
        accuracies = torch.tensor([[row.get("accuracy", 0.0)] for row in rows], device=nothing.device)
        asked = torch.tensor([["accuracy" in row] for row in rows], device=nothing.device)
        return torch.where(asked, self.embed(accuracies.to(nothing.dtype)), nothing)
