# Over 400 lines: a repository on the Hub holds the layout in one file, and half of it documents.
"""Where each generated number of a network lives: state dict <-> parameter vector <-> normalized vector."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter


# The smallest variance whose logarithm is taken: far below the epsilon that batch norm adds.
SMALLEST_VARIANCE = 1e-12
GENERATED, FROZEN, TIED = "generated", "frozen", "tied"
POSITIVE, NOT_NEGATIVE, WHOLE = "positive", "not negative", "whole"
VALUES = ("values", "range")
# Positive values whose mean is so many standard deviations above 0 are as good without a logarithm.
FAR_FROM_ZERO = 10
# Frozen tensors that count batches say nothing of a network's function.
COUNTER = "num_batches_tracked"
# What the values of a tensor are drawn from before training; "other" is what is known of no tensor.
# Values that are "the same" in all untrained networks, as those of a pretrained head, are kept.
UNIFORM, NORMAL, CONSTANT, SAME, OTHER = "uniform", "normal", "constant", "the same", "other"
KURTOSIS = {UNIFORM: 1.8, NORMAL: 3.0}
# Of so few networks, sums of squares say nothing.
FEW = 30
GENERATED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# What safetensors holds and torch computes with.
DTYPES = (
    *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "complex64"),
    *("float16", "bfloat16", "float32", "float64"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
)
# Above it, all numbers that float32 holds are whole.
LARGEST = 2**24
# Far above any network of today; more is an error or an attack.
MOST_PARAMETERS = 10**11


@dataclass
class ParameterLayoutOutput(BaseOutput):
    """
    Args:
        vectors (`torch.Tensor`): Parameter vectors, float32 `[N, P]`.
    """

    vectors: torch.Tensor


class ParameterLayout(ModelMixin, ConfigMixin):
    r"""
    Maps the state dict of one architecture to a parameter vector and back, and standardizes that vector.

    The vector holds the generated tensors in state-dict order, each flattened row-major, as float32 `[P]`. Everything
    else of the state dict is *frozen*: kept here with its own dtype, and part of every generated network. A tensor
    that the network uses under several names is stored once (the other names are *tied* to the first).

    Normalizing standardizes each parameter over the training zoo: `(x - mean) / std`. A parameter that is constant
    over the zoo normalizes to 0 and comes back exactly. What else a tensor holds, its values over the zoo tell: where
    they are positive and come near 0 (variances, whatever their name), their logarithm is standardized; where they are
    not negative, nothing below 0 comes back; where they are whole numbers (0/1 masks), the nearest ones in their range
    come back.

    The statistics and the frozen tensors keep their dtypes whatever the layout is cast to: `dtype` is the dtype of
    the *normalized* vectors that it takes and gives; parameter vectors are always float32.

    Attributes:
        slices (`dict[str, slice]`): Where each generated tensor lies in the parameter vector, in its order.
        vector_size (`int`): P.

    Parameters:
        tensors (`list[dict]`):
            One entry a tensor of the state dict, in its order: `{"name": str, "shape": list[int], "dtype": str,
            "role": "generated" | "frozen" | "tied"}`, usually made by [`ParameterLayout.from_state_dict`]. Where tied
            it has `"tied_to": str` too; from [`~ParameterLayout.fit`], `"values": "positive" | "not negative" |
            "whole"` where that is so, and `"range": [int, int]` of whole ones; from [`~ParameterLayout.fit_initial`],
            `"initial": {"distribution": "uniform" | "normal" | "constant" | "the same" | "other", "mean": float,
            "std": float}`.
        adapter (`dict`, *optional*):
            Where the networks are LoRA adapters of scale 1: their configuration, as PEFT writes it; empty for those
            of diffusers.
    """

    _no_split_modules = ["ParameterLayout"]

    @register_to_config
    def __init__(self, tensors: list[dict[str, Any]], adapter: dict[str, Any] | None = None):
        super().__init__()
        check_tensors(tensors)
        if adapter is not None and not isinstance(adapter, Mapping):
            raise ValueError(f"The adapter of a layout is a mapping, not {type(adapter).__name__}.")
        # Follows casts, and so makes `dtype` answer for the normalized vectors. It has to be the first buffer.
        self.register_buffer("normalized_like", torch.zeros(()), persistent=False)
        self.slices: dict[str, slice] = {}
        self.vector_size = 0
        for tensor in tensors:
            if tensor["role"] == GENERATED:
                start, self.vector_size = self.vector_size, self.vector_size + _numel(tensor)
                self.slices[tensor["name"]] = slice(start, self.vector_size)
        self._read_values()
        # Whatever the default dtype is, which may be that of a language model.
        self.register_buffer("mean", torch.zeros(self.vector_size, dtype=torch.float32))
        self.register_buffer("std", torch.ones(self.vector_size, dtype=torch.float32))
        self.register_buffer("log", torch.zeros(self.vector_size, dtype=torch.bool))
        # By their place in the list: any text is a name in a state dict, and not of a buffer.
        self.frozen, self.initial = nn.Module(), nn.Module()
        for place, tensor in enumerate(tensors):
            if tensor.get("initial", {}).get("distribution") == SAME:
                self.initial.register_buffer(str(place), torch.zeros(_numel(tensor), dtype=torch.float32))
            if tensor["role"] == FROZEN:
                values = torch.zeros(tensor["shape"], dtype=getattr(torch, tensor["dtype"]))
                self.frozen.register_buffer(str(place), values)

    def _read_values(self) -> None:
        """Where what values lie, from the config."""
        self._positive: list[slice] = []
        self._not_negative: list[slice] = []
        self._whole: list[tuple[slice, int, int]] = []
        for tensor in self.tensors(GENERATED):
            place = self.slices[tensor["name"]]
            if tensor.get("values") == POSITIVE:
                self._positive.append(place)
            elif tensor.get("values") == NOT_NEGATIVE:
                self._not_negative.append(place)
            elif tensor.get("values") == WHOLE:
                self._whole.append((place, *tensor["range"]))

    @classmethod
    def from_state_dict(
        cls, state_dict: Mapping[str, torch.Tensor], patterns: str | Sequence[str] = ("*",)
    ) -> "ParameterLayout":
        r"""
        The layout of a base network, its frozen tensors included.

        Args:
            state_dict (`Mapping[str, torch.Tensor]`):
                The base network's `state_dict()`. Tensors that share memory are recognized as tied.
            patterns (`str` or `Sequence[str]`, *optional*, defaults to `("*",)`):
                Shell-style patterns on the names: a tensor is generated where one of them matches and none that begins
                with `!` does (`["*", "!*mask"]`). Integer tensors (`num_batches_tracked`) and masks with infinite
                values are never generated.

        Raises:
            `ValueError`: a pattern matches nothing that can be generated, or a tensor that cannot be: float64,
            complex, sparse, quantized, or without values yet.
        """
        patterns = [patterns] if isinstance(patterns, str) else list(patterns)
        without = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
        wanted = [pattern for pattern in patterns if not pattern.startswith("!")] or ["*"][: len(without)]
        matched = dict.fromkeys(patterns, False)
        tensors: list[dict[str, Any]] = []
        owners: dict[tuple[Any, ...], dict[str, Any]] = {}
        excluded = set()
        for name, value in state_dict.items():
            _check_dense(name, value)
            tensor: dict[str, Any] = {
                "name": name,
                "shape": list(value.shape),
                "dtype": _dtype_name(value.dtype),
                "role": FROZEN,
            }
            misses = [f"!{pattern}" for pattern in without if fnmatchcase(name, pattern)]
            matched.update(dict.fromkeys(misses, True))
            hits = [pattern for pattern in wanted if fnmatchcase(name, pattern) and not misses]
            if hits and (value.is_floating_point() or value.is_complex()) and not _is_infinite_mask(value):
                if value.dtype not in GENERATED_DTYPES:
                    raise ValueError(
                        f"`{name}` is {tensor['dtype']}; parameter vectors are float32 and cannot hold it exactly. "
                        "Convert the network with `network.float()`, or leave the tensor out of the patterns."
                    )
                if value.numel() > 0:
                    tensor["role"] = GENERATED
                    matched.update(dict.fromkeys(hits, True))
            place = (value.untyped_storage().data_ptr(), value.storage_offset(), value.shape, value.stride())
            owner = owners.setdefault(place, tensor) if value.numel() > 0 else tensor
            if misses:
                excluded.add(owner["name"])
            if owner is not tensor:
                # A pattern that names any of the tied tensors means all of them.
                owner["role"] = GENERATED if GENERATED in (owner["role"], tensor["role"]) else FROZEN
                tensor.update(role=TIED, tied_to=owner["name"])
            if owner["name"] in excluded:
                owner["role"] = FROZEN
            tensors.append(tensor)
        missed = [pattern for pattern, hit in matched.items() if not hit]
        if missed or not any(tensor["role"] == GENERATED for tensor in tensors):
            raise ValueError(
                f"The patterns {missed or patterns} match no floating-point tensor of the network. It has: "
                f"{_shorten([t['name'] for t in tensors])}."
            )
        layout = cls(tensors=tensors)
        layout.load_frozen(state_dict)
        return layout

    @property
    def architecture(self) -> list[dict[str, Any]]:
        """The entries of the config without what the values of a zoo told."""
        told = (*VALUES, "initial")
        return [{key: value for key, value in entry.items() if key not in told} for entry in self.config.tensors]

    def tensors(self, role: str) -> list[dict[str, Any]]:
        """The entries of the config with this role (`"generated"`, `"frozen"` or `"tied"`), in state-dict order."""
        return [tensor for tensor in self.config.tensors if tensor["role"] == role]

    def frozen_state_dict(self) -> dict[str, torch.Tensor]:
        """The tensors that are not generated, by their names in the network."""
        return {tensor["name"]: self.frozen.get_buffer(str(place)) for place, tensor in self._places(FROZEN)}

    def _places(self, role: str) -> list[tuple[int, dict[str, Any]]]:
        return [(place, tensor) for place, tensor in enumerate(self.config.tensors) if tensor["role"] == role]

    @torch.no_grad()
    def load_frozen(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Copies the frozen tensors out of a state dict of the network (extra names are ignored)."""
        state_dict = self._with_owners(state_dict)
        for place, tensor in self._places(FROZEN):
            self.frozen.get_buffer(str(place)).copy_(_checked(tensor, state_dict))

    def check_frozen(self, state_dict: Mapping[str, torch.Tensor], may_differ: str | Sequence[str] = ()) -> None:
        r"""
        Raises `ValueError` where a frozen tensor of a network is not that of the layout: its state dict could not be
        made again. Counts of batches (`num_batches_tracked`) may differ.

        Args:
            state_dict (`Mapping[str, torch.Tensor]`): A state dict of the architecture.
            may_differ (`str` or `Sequence[str]`, *optional*):
                Shell-style patterns of frozen tensors that may differ.
        """
        state_dict = self._with_owners(state_dict)
        may_differ = [may_differ] if isinstance(may_differ, str) else may_differ
        for name, expected in self.frozen_state_dict().items():
            free = name.rpartition(".")[2] == COUNTER or any(fnmatchcase(name, pattern) for pattern in may_differ)
            if not free and not _same(state_dict[name].detach().to(expected.device), expected):
                raise ValueError(f"`{name}` is not generated, and differs from that of the first network.")

    def _with_owners(self, state_dict: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """The same, with the tensors that files hold under the name of one that is tied to them."""
        lacking = {
            tensor["tied_to"]: state_dict[tensor["name"]]
            for tensor in self.tensors(TIED)
            if tensor["tied_to"] not in state_dict and tensor["name"] in state_dict
        }
        return {**state_dict, **lacking} if lacking else state_dict

    def flatten(self, state_dict: Mapping[str, torch.Tensor]) -> torch.Tensor:
        r"""
        The parameter vector of a network.

        Args:
            state_dict (`Mapping[str, torch.Tensor]`): A state dict of the architecture.

        Returns:
            `torch.Tensor`: float32 `[P]`, exactly the values of the generated tensors.

        Raises:
            `ValueError`: names, shapes or dtypes differ from the layout's, a value is NaN or infinite, or tied
            tensors differ. The message names the tensor, what was expected and what was found.
        """
        names = {tensor["name"] for tensor in self.config.tensors}
        unexpected = [name for name in state_dict if name not in names]
        if unexpected:
            raise ValueError(f"The network has tensors that the layout does not know: {_shorten(unexpected)}.")
        state_dict = self._with_owners(state_dict)
        parts = []
        for tensor in self.config.tensors:
            if tensor["role"] == TIED:
                # Files often hold a tied tensor under one of its names only.
                if tensor["name"] in state_dict:
                    value = _checked(tensor, state_dict)
                    if not torch.equal(value, state_dict[tensor["tied_to"]]):
                        raise ValueError(f"`{tensor['name']}` should equal `{tensor['tied_to']}` (tied), and differs.")
                continue
            value = _checked(tensor, state_dict)
            if tensor["role"] == GENERATED:
                if not torch.isfinite(value).all():
                    raise ValueError(f"`{tensor['name']}` holds NaN or infinite values.")
                parts.append(value.detach().reshape(-1).to(torch.float32))
        return torch.cat(parts)

    def unflatten(self, vectors: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        r"""
        Complete state dicts, which load into the base network with `strict=True`.

        Args:
            vectors (`torch.Tensor`): Parameter vectors, `[N, P]`.

        Returns:
            `list[dict[str, torch.Tensor]]`: One state dict a row, in the network's own dtypes. The frozen tensors are
            the same objects in all of them; nothing shares memory with `vectors` or the layout.
        """
        if vectors.ndim != 2 or vectors.shape[1] != self.vector_size:
            raise ValueError(f"Expected vectors of shape [N, {self.vector_size}], and found {list(vectors.shape)}.")
        frozen = {name: tensor.to(vectors.device, copy=True) for name, tensor in self.frozen_state_dict().items()}
        generated = self.tensors(GENERATED)
        state_dicts = []
        for vector in vectors:
            own = vector.clone()  # a copy a network: saving one of them does not save them all
            values = {
                tensor["name"]: own[self.slices[tensor["name"]]]
                .view(tensor["shape"])
                .to(getattr(torch, tensor["dtype"]))
                for tensor in generated
            } | frozen
            state_dicts.append({t["name"]: values[t.get("tied_to", t["name"])] for t in self.config.tensors})
        return state_dicts

    def fit(self, batches: Iterable[torch.Tensor]) -> "ParameterLayout":
        r"""
        Takes mean and standard deviation of each parameter from a zoo, and what kind of values each tensor holds, in
        one pass with bounded memory.

        Args:
            batches (`Iterable[torch.Tensor]`): Parameter vectors, each `[n, P]`; together at least two rows.

        Returns:
            `ParameterLayout`: itself.
        """
        moments = _Moments()
        variances = {name for name in self.slices if name.rpartition(".")[2] == "running_var"}
        # What tensors may turn out to hold: their logarithms and smallest values, and the range of whole ones.
        positive = {name: (_Moments(), torch.tensor(torch.inf)) for name in self.slices}
        whole = dict.fromkeys(self.slices, (math.inf, -math.inf))
        for batch in batches:
            # On the CPU, where vectors are read and float64 is at hand; MPS lacks it.
            raw = batch.to("cpu", torch.float32)
            if moments.count == 0:
                first = raw[0].clone()
                constant = torch.ones_like(first, dtype=torch.bool)
            constant &= (raw == first).all(0)
            for name, place in self.slices.items():
                part = raw[:, place]
                if name in positive and (name in variances or (part >= 0).all()):
                    logs, least = positive[name]
                    logs.add(part.to(torch.float64).clamp_min(SMALLEST_VARIANCE).log())
                    positive[name] = logs, torch.minimum(least, part.amin(0))
                else:
                    positive.pop(name, None)
                if name in whole and ((part == part.round()) & (part.abs() <= LARGEST)).all():
                    whole[name] = min(whole[name][0], part.min().item()), max(whole[name][1], part.max().item())
                else:
                    whole.pop(name, None)
            moments.add(raw.to(torch.float64))
        if moments.count < 2:
            raise ValueError(f"Statistics need a zoo of at least two networks, and this one has {moments.count}.")
        tensors = [{key: value for key, value in t.items() if key not in VALUES} for t in self.config.tensors]
        self.log.zero_()
        for tensor in tensors:
            name = tensor["name"]
            varying = None if tensor["role"] != GENERATED else ~constant[self.slices[name]]
            if varying is None or not varying.any():
                continue
            if name in whole:
                tensor.update(values=WHOLE, range=[int(limit) for limit in whole[name]])
            elif name in positive:
                (logs, least), place = positive[name], self.slices[name]
                std = (moments.squares[place] / moments.count).sqrt()
                near_zero = (moments.mean[place] < FAR_FROM_ZERO * std)[varying].any()
                if name not in variances and not (near_zero and (least[varying] > 0).all()):
                    tensor["values"] = NOT_NEGATIVE
                    continue
                tensor["values"] = POSITIVE
                self.log[place] = varying.to(self.log.device)
                moments.mean[place], moments.squares[place] = logs.mean, logs.squares
        self.register_to_config(tensors=tensors)
        self._read_values()
        self.mean.copy_(torch.where(constant, first, moments.mean.to(torch.float32)))
        self.std.copy_(torch.where(constant, 0.0, (moments.squares / moments.count).sqrt().to(torch.float32)))
        return self

    def fit_initial(self, vectors: torch.Tensor) -> "ParameterLayout":
        r"""
        Finds what untrained networks are drawn from: the distribution, mean and standard deviation of each tensor.

        Args:
            vectors (`torch.Tensor`): Parameter vectors of untrained networks, `[N, P]`, at least two.

        Returns:
            `ParameterLayout`: itself.
        """
        tensors = [dict(tensor) for tensor in self.config.tensors]
        self.initial = nn.Module()
        for place, tensor in enumerate(tensors):
            if tensor["role"] == GENERATED:
                values = vectors[:, self.slices[tensor["name"]]]
                tensor["initial"] = _distribution(values.to("cpu", torch.float64))
                if tensor["initial"]["distribution"] == SAME:
                    self.initial.register_buffer(str(place), values[0].to(self.mean.device, torch.float32, copy=True))
        self.register_to_config(tensors=tensors)
        return self

    def draw_initial(self, generators: Sequence[torch.Generator]) -> torch.Tensor:
        r"""
        Parameter vectors of untrained networks, as [`~ParameterLayout.fit_initial`] found them to be drawn.

        Args:
            generators (`Sequence[torch.Generator]`): One a network, on the CPU.

        Returns:
            `torch.Tensor`: float32 `[N, P]`, on the CPU.

        Raises:
            `ValueError`: of some tensor it is not known how it is drawn.
        """
        vectors = torch.empty(len(generators), self.vector_size, dtype=torch.float32)
        for place, tensor in self._places(GENERATED):
            initial = tensor.get("initial") or {"distribution": OTHER}
            part = vectors[:, self.slices[tensor["name"]]]
            if initial["distribution"] == OTHER:
                raise ValueError(
                    f"`{tensor['name']}` is initialized in a way of its own, or it is not known how: pass `initial`."
                )
            if initial["distribution"] == SAME:
                part.copy_(self.initial.get_buffer(str(place)).cpu().expand_as(part))
                continue
            for row, generator in zip(part, generators, strict=True):
                if initial["distribution"] == UNIFORM:
                    row.uniform_(-(3**0.5), 3**0.5, generator=generator)
                elif initial["distribution"] == NORMAL:
                    row.normal_(generator=generator)
                else:
                    row.zero_()
            part.mul_(initial["std"]).add_(initial["mean"])
        return vectors

    def normalize(self, vectors: torch.Tensor, start: int = 0) -> torch.Tensor:
        r"""
        Normalized vectors, in the layout's `dtype`.

        Args:
            vectors (`torch.Tensor`): Parameter vectors `[N, P]`, or p consecutive columns of them, `[N, p]`.
            start (`int`, *optional*, defaults to 0): The first of the columns.

        Returns:
            `torch.Tensor`: of the same shape.
        """
        stop = start + vectors.shape[1]
        values = vectors.to(torch.float32, copy=True)
        for place in self._positive:
            first, last = max(place.start, start), min(place.stop, stop)
            if first < last:
                part = values[:, first - start : last - start]
                part.copy_(torch.where(self.log[first:last], part.clamp_min(SMALLEST_VARIANCE).log(), part))
        std = self.std[start:stop]
        # What is divided by infinity is 0.
        values.sub_(self.mean[start:stop]).div_(std.masked_fill(std == 0, torch.inf))
        return values.to(self.normalized_like.dtype)

    def forward(
        self, normalized: torch.Tensor, return_dict: bool = True
    ) -> ParameterLayoutOutput | tuple[torch.Tensor]:
        r"""
        Parameter vectors of normalized vectors, the inverse of [`~ParameterLayout.normalize`].

        Args:
            normalized (`torch.Tensor`): `[N, P]` of any floating-point dtype.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return a `ParameterLayoutOutput`.

        Returns:
            `ParameterLayoutOutput` or `tuple`: its `vectors` are float32 `[N, P]`.
        """
        vectors = torch.addcmul(self.mean, normalized.to(torch.float32), self.std)
        for place in self._positive:
            part = vectors[:, place]
            part.copy_(torch.where(self.log[place], part.exp(), part))
        for place in self._not_negative:
            vectors[:, place].clamp_(min=0)
        for place, least, most in self._whole:
            vectors[:, place].round_().clamp_(least, most).add_(0.0)  # no -0
        return ParameterLayoutOutput(vectors=vectors) if return_dict else (vectors,)

    def enable_group_offload(self, onload_device: torch.device, *args: Any, **kwargs: Any) -> None:
        """Moves the whole layout, which has no layers to offload one by one, and keeps its tensors readable."""
        self.to(onload_device)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        # Moves between devices, but never changes the dtype of anything except the marker.
        def move(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype or tensor is self.normalized_like else tensor.to(moved.device)

        return super()._apply(move, recurse)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        # A requested dtype is that of the normalized vectors; the stored tensors are read as they are.
        dtype = kwargs.pop("torch_dtype", None) or kwargs.pop("dtype", None)
        loaded = super().from_pretrained(*args, **kwargs)
        if dtype is not None:
            layout = loaded[0] if isinstance(loaded, tuple) else loaded
            layout.normalized_like = layout.normalized_like.to(dtype)
        return loaded


def check_tensors(tensors: list[dict[str, Any]]) -> None:
    r"""
    Raises `ValueError` where the description of a layout, which may come from anywhere, is not one: names, shapes,
    dtypes, roles and ties of all tensors are checked, before anything is allocated.
    """
    if not isinstance(tensors, (list, tuple)):
        raise ValueError(f"The tensors of a layout are a list, not {type(tensors).__name__}.")
    seen: dict[str, dict[str, Any]] = {}
    size = 0
    for tensor in tensors:
        if not isinstance(tensor, Mapping) or not {"name", "shape", "dtype", "role"} <= set(tensor):
            raise ValueError(f"A tensor of a layout has a name, a shape, a dtype and a role; found {tensor!r:.200}.")
        name, shape, dtype, role = (tensor[key] for key in ("name", "shape", "dtype", "role"))
        if not isinstance(name, str) or not all(name.split(".")) or name in seen or not _is_text(name):
            raise ValueError(f"{name!r:.200} is no name of a tensor, or stands twice.")
        if not isinstance(shape, (list, tuple)) or not all(type(length) is int and length >= 0 for length in shape):
            raise ValueError(f"`{name}` has the shape {shape!r:.200}, which is none.")
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ValueError(f"`{name}` has the dtype {dtype!r:.200}, which is none.")
        size += math.prod(max(length, 1) for length in shape)  # of those without numbers, torch multiplies them, too
        if size > MOST_PARAMETERS:
            raise ValueError(f"The layout claims {size:,} numbers or more; at most {MOST_PARAMETERS:,} are supported.")
        if role == TIED:
            owner = seen.get(tensor.get("tied_to", ""))
            if owner is None or owner["role"] == TIED or (owner["shape"], owner["dtype"]) != (shape, dtype):
                raise ValueError(f"`{name}` is tied to {tensor.get('tied_to')!r:.200}, which does not fit it.")
        elif role == GENERATED:
            if getattr(torch, dtype) not in GENERATED_DTYPES:
                raise ValueError(f"`{name}` cannot be generated: its dtype is {dtype}.")
        elif role != FROZEN:
            raise ValueError(f"`{name}` has the role {role!r:.200}; expected generated, frozen or tied.")
        values, limits = tensor.get("values"), tensor.get("range")
        if values not in (None, POSITIVE, NOT_NEGATIVE, WHOLE) or (values == WHOLE) != (limits is not None):
            raise ValueError(f"`{name}` has the values {values!r:.200} in the range {limits!r:.200}, which are none.")
        if limits is not None and not (
            isinstance(limits, (list, tuple))
            and [type(limit) for limit in limits] == [int, int]
            and -LARGEST <= limits[0] <= limits[1] <= LARGEST
        ):
            raise ValueError(f"`{name}` has the range {limits!r:.200}, which is none.")
        if "initial" in tensor and not _is_initial(tensor["initial"]):
            raise ValueError(f"`{name}` is said to be initialized by {tensor['initial']!r:.200}, which is no way.")
        seen[name] = dict(tensor)
    if not any(tensor["role"] == GENERATED and math.prod(tensor["shape"]) for tensor in tensors):
        raise ValueError("A layout needs at least one generated parameter, and this one has none.")


class _Moments:
    """Mean, and sum of squared deviations from it, of rows that come in batches (Chan, Golub and LeVeque 1983)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.squares = torch.zeros((), dtype=torch.float64)

    def add(self, values: torch.Tensor) -> None:
        """Takes in rows `[n, p]`, which are overwritten."""
        batch_mean, total = values.mean(0), self.count + len(values)
        shift = batch_mean - self.mean
        self.mean = self.mean + shift * (len(values) / total)
        self.squares = self.squares + values.sub_(batch_mean).square_().sum(0)
        self.squares.addcmul_(shift, shift, value=self.count * len(values) / total)
        self.count = total


def _distribution(values: torch.Tensor) -> dict[str, Any]:
    """What the values `[N, p]` of a tensor in N untrained networks are drawn from."""
    mean = values.mean()
    rest = values - mean
    variance = rest.square().mean()
    found = {"distribution": CONSTANT, "mean": mean.item(), "std": variance.sqrt().item()}
    if (values == values[0, 0]).all():
        return {**found, "mean": values[0, 0].item(), "std": 0.0}
    if (values == values[0]).all():
        return {**found, "distribution": SAME}
    kurtosis = (rest.square().square().mean() / variance.square()).item()
    # Independent draws of one distribution: means over networks differ little from place to place, and sums of squares
    # over places differ from network to network, which those of orthogonal matrices do not.
    count, size = values.shape
    places = rest.mean(0).square().mean() / (variance / count)
    squares = rest.square().sum(1).var() / (size * variance.square())
    alike = places < 1 + 8 * (2 / size) ** 0.5
    independent = count < FEW or size == 1 or 0.25 < squares / max(kurtosis - 1, 1e-12) < 4
    if not alike or not independent:
        return {**found, "distribution": OTHER}
    nearest = min(KURTOSIS, key=lambda name: abs(KURTOSIS[name] - kurtosis))
    # The error of a kurtosis is that of normal values, 24 / n of them squared (Fisher 1930), or less.
    explained = abs(KURTOSIS[nearest] - kurtosis) < 0.15 + 5 * (24 / values.numel()) ** 0.5
    return {**found, "distribution": nearest if explained else OTHER}


def _is_initial(initial: Any) -> bool:
    return (
        isinstance(initial, Mapping)
        and set(initial) == {"distribution", "mean", "std"}
        and initial["distribution"] in (*KURTOSIS, CONSTANT, SAME, OTHER)
        and all(type(initial[name]) in (int, float) and abs(initial[name]) < LARGEST for name in ("mean", "std"))
        and initial["std"] >= 0
    )


def _check_dense(name: str, value: Any) -> None:
    """Raises `ValueError` for what is no dense tensor with values."""
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"`{name}` is no tensor, but {type(value).__name__}.")
    if isinstance(value, UninitializedBuffer | UninitializedParameter):
        raise ValueError(f"`{name}` is built lazily and has no values yet: run the network once before.")
    if value.layout != torch.strided or value.is_quantized or value.is_meta:
        kind = "on the meta device" if value.is_meta else "quantized" if value.is_quantized else "sparse"
        raise ValueError(f"`{name}` is {kind}; a network's tensors have to be dense numbers.")


def _is_infinite_mask(value: torch.Tensor) -> bool:
    """Whether a tensor masks by infinite values, such as a causal mask: besides them it has one value at most."""
    if not value.is_floating_point() or value.dtype.itemsize < 2:
        return False
    infinite = torch.isinf(value)
    rest = value[~infinite]
    return bool(infinite.any()) and (len(rest) == 0 or bool((rest == rest[0]).all()))


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal, NaN to NaN."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    bits = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return torch.equal(*bits) or torch.equal(one, other)


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _numel(tensor: Mapping[str, Any]) -> int:
    return torch.Size(tensor["shape"]).numel()


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _checked(tensor: Mapping[str, Any], state_dict: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The tensor of the state dict, after comparing it with its entry in the layout."""
    name = tensor["name"]
    if name not in state_dict:
        raise ValueError(f"`{name}` is missing. Found: {_shorten(list(state_dict))}.")
    value = state_dict[name]
    expected = f"{tensor['dtype']} {tensor['shape']}"
    found = f"{_dtype_name(value.dtype)} {list(value.shape)}"
    if found != expected:
        raise ValueError(f"`{name}`: expected {expected}, found {found}.")
    return value


def _shorten(names: list[str], limit: int = 20) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
