"""The denoiser of networks without an autoencoder: a transformer whose tokens are hidden units."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import nn
from torch.nn import functional as F


# A config may come from anywhere, and building its blocks takes time before any weight is read.
MOST_BLOCKS, MOST_GROUPS = 1000, 1000
# Far above any network whose units are tokens; where each number lies is kept in memory.
MOST_PARAMETERS = 2 * 10**7
Pairs = dict[tuple[int, int], torch.Tensor]


@dataclass
class NeuronTransformerOutput(BaseOutput):
    """
    Args:
        sample (`torch.Tensor`): The velocity, `[B, 1, P]`.
    """

    sample: torch.Tensor


class NeuronTransformerModel(ModelMixin, ConfigMixin):
    r"""
    A transformer over the hidden units of networks, which takes noisy normalized networks and the noise level and
    returns the velocity of flow matching, noise minus clean network (Lipman et al. 2022, arXiv 2210.02747). Inside, it
    predicts the clean network, and is told what it predicted at the step before (Chen et al. 2022, arXiv 2208.04202).

    A unit's token holds what belongs to the unit alone: weights from inputs, to outputs, bias, normalization. One more
    token holds what belongs to no unit. Weights between two groups of units are features of the pair of units, as in
    neural graphs (Kofinas et al. 2024, arXiv 2403.12143; Lim et al. 2023, arXiv 2312.04501): they carry messages
    between the two as the network itself carries activations and gradients, and are updated by products of both
    tokens. Unless they are ordered, nothing tells the units of a group apart but their weights, so that exchanging
    them exchanges the result.

    Parameters:
        num_parameters (`int`): P.
        units (`list[int]`): Units of each group.
        tensors (`list[dict]`):
            Where each tensor lies in the vector: `{"start": int, "shape": list[int], "axes": list[list[int]]}`. An
            axis is `[axis, group, repeat]`: along it lie the units of a group, `repeat` neighbouring places each.
        ordered (`bool`, *optional*, defaults to `False`):
            Whether the units of a group are told apart by their place, since the networks were put into an order. By
            default they are exchangeable.
        hidden_size (`int`, *optional*, defaults to 128): Width D of a token.
        num_layers (`int`, *optional*, defaults to 4): Blocks.
        num_attention_heads (`int`, *optional*, defaults to 4): Heads of the attention between units.
        pair_channels (`int`, *optional*, defaults to 32): Features C of a pair of units.
        pair_head_dim (`int`, *optional*, defaults to 8): Size of a message, and of the products, of each of these.
        with_initial (`bool`, *optional*, defaults to `False`): Whether it is told each network's initialization.
        condition_dim (`int`, *optional*): Size E of the embedding of what is asked for.
        num_train_timesteps (`int`, *optional*, defaults to 1000): The timestep of pure noise.

    Attributes:
        self_conditioned (`bool`): That it can be told its prediction at the step before.
    """

    self_conditioned = True

    _supports_gradient_checkpointing = True
    _no_split_modules = ["NeuronTransformerBlock"]
    _repeated_blocks = ["NeuronTransformerBlock"]
    _skip_layerwise_casting_patterns = ["norm"]

    @register_to_config
    def __init__(
        self,
        num_parameters: int,
        units: list[int],
        tensors: list[dict[str, Any]],
        ordered: bool = False,
        hidden_size: int = 128,
        num_layers: int = 4,
        num_attention_heads: int = 4,
        pair_channels: int = 32,
        pair_head_dim: int = 8,
        with_initial: bool = False,
        condition_dim: int | None = None,
        num_train_timesteps: int = 1000,
    ):
        super().__init__()
        if not 1 <= num_layers <= MOST_BLOCKS:
            raise ValueError(f"`num_layers` has to be between 1 and {MOST_BLOCKS}, and is {num_layers!r}.")
        if hidden_size % num_attention_heads or (hidden_size // num_attention_heads) % 2:
            raise ValueError(
                f"`hidden_size` has to be an even multiple of the {num_attention_heads} heads, and is {hidden_size}."
            )
        self.index = UnitIndex(num_parameters, units, tensors)
        channels = 3 if with_initial else 2  # the noisy network, the prediction before, the initialization
        self.time_proj = Timesteps(hidden_size, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(hidden_size, hidden_size)
        self.condition_embedding = None if condition_dim is None else nn.Linear(condition_dim, hidden_size)
        sizes = self.index.token_sizes
        self.token_in = nn.ModuleList([nn.Linear(channels * size, hidden_size) for size in sizes])
        self.pair_in = nn.ModuleList([nn.Linear(channels * size, pair_channels) for size in self.index.pair_sizes])
        self.places = nn.Embedding(sum(units), hidden_size) if ordered else None
        with_pairs = len(self.pair_in) > 0
        self.blocks = nn.ModuleList(
            [
                NeuronTransformerBlock(
                    hidden_size, num_attention_heads, pair_channels if with_pairs else 0, pair_head_dim
                )
                for _ in range(num_layers)
            ]
        )
        self.norm_out = nn.LayerNorm(hidden_size, elementwise_affine=False)
        self.modulation_out = _zero(nn.Linear(hidden_size, 2 * hidden_size))
        self.token_out = nn.ModuleList([_zero(nn.Linear(hidden_size, size)) for size in sizes])
        self.pair_norm_out = nn.LayerNorm(pair_channels) if with_pairs else None
        self.pair_out = nn.ModuleList([_zero(nn.Linear(pair_channels, size)) for size in self.index.pair_sizes])
        self.gradient_checkpointing = False

    @property
    def pair_values(self) -> int:
        """Features of all pairs of one network, which a block has in about a dozen forms: most of its memory."""
        return self.config.pair_channels * self.index.num_pairs

    def predict_clean(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        condition: torch.Tensor | None = None,
        initial: torch.Tensor | None = None,
        previous: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The clean networks `[B, 1, P]` of noisy ones. Arguments are those of `forward`."""
        if (initial is not None) != self.config.with_initial:
            need = "needs" if self.config.with_initial else "takes no"
            raise ValueError(f"This denoiser {need} `initial`.")
        if (condition is not None) != (self.condition_embedding is not None):
            need = "takes no" if self.condition_embedding is None else "needs a"
            raise ValueError(f"This denoiser {need} `condition`.")

        # 1. time and condition
        timestep = torch.as_tensor(timestep, device=sample.device).expand(sample.shape[0])
        embedding = self.time_embedding(self.time_proj(timestep).to(sample.dtype))
        if condition is not None:
            assert self.condition_embedding is not None
            embedding = embedding + self.condition_embedding(condition)
        embedding = F.silu(embedding)

        # 2. tokens and pairs
        previous = torch.zeros_like(sample) if previous is None else previous
        channels = torch.cat([sample, previous] if initial is None else [sample, previous, initial], 1)
        tokens = torch.cat(
            [layer(values) for layer, values in zip(self.token_in, self.index.tokens(channels), strict=True)], 1
        )
        if self.places is not None:
            # Called, since hooks bring its weights where they are needed.
            places = self.places(torch.arange(self.places.num_embeddings, device=tokens.device))
            tokens = torch.cat([tokens[:, :-1] + places.to(tokens.dtype), tokens[:, -1:]], 1)
        pairs = {
            key: layer(values)
            for layer, (key, values) in zip(self.pair_in, self.index.pairs(channels).items(), strict=True)
        }

        # 3. blocks
        for block in self.blocks:
            arguments = (tokens, pairs, embedding, self.index.places)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                tokens, pairs = self._gradient_checkpointing_func(block, *arguments)
            else:
                tokens, pairs = block(*arguments)

        # 4. out
        scale, shift = self.modulation_out(embedding)[:, None].chunk(2, -1)
        tokens = self.norm_out(tokens) * (1 + scale) + shift
        units = [tokens[:, place] for place in (*self.index.places, slice(tokens.shape[1] - 1, None))]
        outs = [layer(values) for layer, values in zip(self.token_out, units, strict=True)]
        if self.pair_norm_out is not None:
            outs += [
                layer(self.pair_norm_out(values)) for layer, values in zip(self.pair_out, pairs.values(), strict=True)
            ]
        return self.index.vector(outs)[:, None]

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        condition: torch.Tensor | None = None,
        initial: torch.Tensor | None = None,
        previous: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> NeuronTransformerOutput | tuple[torch.Tensor]:
        r"""
        Args:
            sample (`torch.Tensor`): Noisy normalized networks, `[B, 1, P]`: (1 - sigma) clean + sigma noise.
            timestep (`torch.Tensor` or `float` or `int`):
                Sigma times `num_train_timesteps`, as flow-matching schedulers give it; one for all, or `[B]`.
            condition (`torch.Tensor`, *optional*): Embeddings of what is asked for, `[B, E]`.
            initial (`torch.Tensor`, *optional*): The normalized untrained networks, `[B, 1, P]`.
            previous (`torch.Tensor`, *optional*):
                The clean networks as they were predicted at the step before, `[B, 1, P]`; 0 by default.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return a `NeuronTransformerOutput`.

        Returns:
            `NeuronTransformerOutput` or `tuple`: its `sample` is `[B, 1, P]`.
        """
        clean = self.predict_clean(sample, timestep, condition, initial, previous)
        sigma = torch.as_tensor(timestep, device=sample.device).to(torch.float32) / self.config.num_train_timesteps
        difference = sample.to(torch.float32) - clean.to(torch.float32)
        velocity = (difference / sigma.clamp_min(1e-6).view(-1, 1, 1)).to(sample.dtype)
        return NeuronTransformerOutput(sample=velocity) if return_dict else (velocity,)


class NeuronTransformerBlock(nn.Module):
    r"""
    Attention between all units, messages along pairs, a perceptron a unit; time and condition scale, shift and gate
    them (Peebles and Xie 2022, arXiv 2212.09748).

    Args:
        hidden_size (`int`): D.
        heads (`int`): Of the attention.
        pair_channels (`int`): C; 0 where there are no pairs.
        pair_head_dim (`int`): Size of a message, and of the products, of each channel.
    """

    def __init__(self, hidden_size: int, heads: int, pair_channels: int, pair_head_dim: int):
        super().__init__()
        self.heads, self.pair_channels, self.pair_head_dim = heads, pair_channels, pair_head_dim
        self.modulation = _zero(nn.Linear(hidden_size, 6 * hidden_size))
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False)
        self.to_qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.to_out = nn.Linear(hidden_size, hidden_size)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False)
        self.mlp = _mlp(hidden_size, 4 * hidden_size, hidden_size)
        if pair_channels:
            inner = 2 * pair_channels * pair_head_dim
            self.pair_norm = nn.LayerNorm(pair_channels)
            self.to_bias = nn.Linear(pair_channels, heads)
            self.to_weights = nn.Linear(pair_channels, pair_channels)
            self.to_messages = nn.Linear(hidden_size, inner)
            self.from_messages = nn.Linear(inner, hidden_size)
            self.to_products = nn.Linear(hidden_size, inner)
            self.pair_mlp = _mlp(2 * pair_channels, 2 * pair_channels, pair_channels)

    def forward(
        self, tokens: torch.Tensor, pairs: Pairs, embedding: torch.Tensor, places: list[slice]
    ) -> tuple[torch.Tensor, Pairs]:
        """Tokens `[B, T, D]`, pairs `[B, units, units, C]` and the embedding `[B, D]`; `places` are the groups'."""
        scale1, shift1, gate1, scale2, shift2, gate2 = self.modulation(embedding)[:, None].chunk(6, -1)
        normed = self.norm1(tokens) * (1 + scale1) + shift1
        query, key, value = self.to_qkv(normed).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        bias = messages = None
        if pairs:
            bias, messages, pairs = self._along_pairs(normed, pairs, places)
        attention = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        attended = self.to_out(attention.transpose(1, 2).flatten(2))
        tokens = tokens + gate1 * (attended if messages is None else attended + messages)
        normed = self.norm2(tokens) * (1 + scale2) + shift2
        return tokens + gate2 * self.mlp(normed), pairs

    def _along_pairs(
        self, tokens: torch.Tensor, pairs: Pairs, places: list[slice]
    ) -> tuple[torch.Tensor, torch.Tensor, Pairs]:
        """The bias of the attention `[B, H, T, T]`, messages `[B, T, D]`, and updated pairs."""
        batch, count = tokens.shape[:2]
        shape = (2, self.pair_channels, self.pair_head_dim)
        # Both ends of a pair send and multiply in their own way: [2, B, C, T, d].
        sent, factors = (
            layer(tokens).unflatten(2, shape).permute(2, 0, 3, 1, 4) for layer in (self.to_messages, self.to_products)
        )
        bias = tokens.new_zeros(batch, self.heads, count, count)
        received = torch.zeros_like(sent)
        updated = {}
        for (one, other), values in pairs.items():
            first, second = places[one], places[other]
            normed = self.pair_norm(values)
            # Messages follow the values as they are, as activations do the weights of the network.
            of_heads, weights = (x.permute(0, 3, 1, 2) for x in (self.to_bias(normed), self.to_weights(values)))
            bias[:, :, first, second] += of_heads
            bias[:, :, second, first] += of_heads.mT
            received[0, :, :, first] += weights @ sent[0, :, :, second] / weights.shape[3] ** 0.5
            received[1, :, :, second] += weights.mT @ sent[1, :, :, first] / weights.shape[2] ** 0.5
            products = factors[0, :, :, first] @ factors[1, :, :, second].mT / self.pair_head_dim**0.5
            updated[one, other] = values + self.pair_mlp(torch.cat([normed, products.permute(0, 2, 3, 1)], -1))
        return bias, self.from_messages(received.permute(1, 3, 0, 2, 4).flatten(2)), updated


class UnitIndex:
    r"""
    Where the numbers of tokens and pairs lie in a parameter vector, and back.

    Args:
        num_parameters (`int`): P.
        units (`list[int]`): Of each group.
        tensors (`list[dict]`): As in [`NeuronTransformerModel`].

    Attributes:
        places (`list[slice]`): Of the units of each group among the tokens; the token of no unit is the last.
        token_sizes (`list[int]`): Numbers of a token of each group, and of the last one.
        pair_sizes (`list[int]`): Numbers of a pair of units of each pair of groups.
        num_pairs (`int`): Pairs of units of all of them.
        exchangeable (`list[torch.Tensor]`):
            Places of the numbers that exchanging units exchanges, `[n, numbers]`: one column each.

    Raises:
        `ValueError`: the tensors are no partition of the vector.
    """

    def __init__(self, num_parameters: int, units: list[int], tensors: list[dict[str, Any]]):
        _check_partition(num_parameters, units, tensors)
        tokens: list[list[torch.Tensor]] = [[] for _ in units]
        pairs: dict[tuple[int, int], list[torch.Tensor]] = {}
        rest = [torch.empty(0, dtype=torch.long, device="cpu")]
        for tensor in tensors:
            size = math.prod(tensor["shape"])
            # On the CPU whatever the default: these are places, and no weights.
            where = torch.arange(tensor["start"], tensor["start"] + size, device="cpu").reshape(tensor["shape"])
            if not tensor["axes"]:
                rest.append(where.flatten())
                continue
            axes = [tuple(axis) for axis in tensor["axes"]]
            where = where.movedim([axis for axis, _, _ in axes], list(range(len(axes))))
            if len(axes) == 1:
                ((_, group, _),) = axes
                tokens[group].append(where.reshape(units[group], -1))
                continue
            (_, one, repeat), (_, other, again) = axes
            where = where.reshape(units[one], repeat, units[other], again, -1).movedim(2, 1).flatten(2)
            if one > other:
                one, other, where = other, one, where.transpose(0, 1)
            pairs.setdefault((one, other), []).append(where)
        empty = [torch.empty(count, 0, dtype=torch.long, device="cpu") for count in units]
        self._tokens = [torch.cat([*found, none], 1) for found, none in zip(tokens, empty, strict=True)]
        self._tokens.append(torch.cat(rest)[None])
        self._pairs = {key: torch.cat(found, 2) for key, found in pairs.items()}
        self.token_sizes = [where.shape[1] for where in self._tokens]
        self.pair_sizes = [where.shape[2] for where in self._pairs.values()]
        self.num_pairs = sum(where[:, :, 0].numel() for where in self._pairs.values())
        self.exchangeable = [*self._tokens[:-1], *(where.flatten(0, 1) for where in self._pairs.values())]
        ends = [sum(units[: group + 1]) for group in range(len(units))]
        self.places = [slice(end - count, end) for end, count in zip(ends, units, strict=True)]
        order = torch.cat([where.flatten() for where in (*self._tokens, *self._pairs.values())])
        self._order = order.argsort()

    def tokens(self, channels: torch.Tensor) -> list[torch.Tensor]:
        """Of vectors `[B, channels, P]`, a tensor `[B, units, channels * numbers]` a group, and one of the rest."""
        return [_picked(channels, where) for where in self._tokens]

    def pairs(self, channels: torch.Tensor) -> Pairs:
        """Of vectors `[B, channels, P]`, a tensor `[B, units, units, channels * numbers]` a pair of groups."""
        return {key: _picked(channels, where) for key, where in self._pairs.items()}

    def vector(self, values: list[torch.Tensor]) -> torch.Tensor:
        """Vectors `[B, P]` of the numbers of tokens and pairs, in the order of both."""
        return torch.cat([value.flatten(1) for value in values], 1)[:, self._order.to(values[0].device)]


def _picked(channels: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    return channels[:, :, where.to(channels.device)].movedim(1, -2).flatten(-2)


def _check_partition(num_parameters: int, units: list[int], tensors: list[dict[str, Any]]) -> None:
    if type(num_parameters) is not int or not 1 <= num_parameters <= MOST_PARAMETERS:
        raise ValueError(f"`num_parameters` has to be at most {MOST_PARAMETERS:,}, and is {num_parameters!r}.")
    if not 1 <= len(units) <= MOST_GROUPS or not all(type(count) is int and count >= 1 for count in units):
        raise ValueError(f"`units` has to hold the units of 1 to {MOST_GROUPS} groups, and is {units!s:.200}.")
    if sum(units) > 2 * num_parameters:  # each has a number of its own, or one with each unit of another group
        raise ValueError(f"{sum(units):,} units cannot share {num_parameters:,} parameters.")
    end = 0
    for tensor in tensors:
        shape, axes = tensor["shape"], tensor["axes"]
        if tensor["start"] != end or not all(type(length) is int and length >= 1 for length in shape):
            raise ValueError(f"A tensor begins at {tensor['start']!r} where the one before ends at {end}.")
        end += math.prod(shape)
        fit = len(axes) <= 2 and len({axis[0] for axis in axes}) == len(axes)
        for axis, group, repeat in axes:
            fit = fit and 0 <= axis < len(shape) and 0 <= group < len(units) and repeat >= 1
            fit = fit and shape[axis] == units[group] * repeat
        if not fit:
            raise ValueError(f"A tensor of shape {list(shape)!r:.100} has the axes {axes!r:.100}, which do not fit.")
    if end != num_parameters:
        raise ValueError(f"The tensors hold {end} numbers, and the vector {num_parameters}.")


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, outputs))


def _zero(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
