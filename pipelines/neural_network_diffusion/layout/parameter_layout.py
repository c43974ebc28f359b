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


# The smallest variance whose logarithm is taken: far below the epsilon that batch norm adds.
SMALLEST_VARIANCE = 1e-12
GENERATED, FROZEN, TIED = "generated", "frozen", "tied"
GENERATED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
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

    Normalizing standardizes each parameter over the training zoo: `(x - mean) / std`. Running variances of
    normalization layers are positive, so their logarithm is standardized. A parameter that is constant over the zoo
    normalizes to 0 and comes back exactly.

    The statistics and the frozen tensors keep their dtypes whatever the layout is cast to: `dtype` is the dtype of
    the *normalized* vectors that it takes and gives; parameter vectors are always float32.

    Attributes:
        slices (`dict[str, slice]`): Where each generated tensor lies in the parameter vector, in its order.
        vector_size (`int`): P.

    Parameters:
        tensors (`list[dict]`):
            One entry a tensor of the state dict, in its order: `{"name": str, "shape": list[int], "dtype": str,
            "role": "generated" | "frozen" | "tied", "tied_to": str}` (`tied_to` only where tied). Usually made by
            [`ParameterLayout.from_state_dict`].
    """

    _no_split_modules = ["ParameterLayout"]

    @register_to_config
    def __init__(self, tensors: list[dict[str, Any]]):
        super().__init__()
        check_tensors(tensors)
        # Follows casts, and so makes `dtype` answer for the normalized vectors. It has to be the first buffer.
        self.register_buffer("normalized_like", torch.zeros(()), persistent=False)
        self.slices: dict[str, slice] = {}
        self.vector_size = 0
        for tensor in tensors:
            if tensor["role"] == GENERATED:
                start, self.vector_size = self.vector_size, self.vector_size + _numel(tensor)
                self.slices[tensor["name"]] = slice(start, self.vector_size)
        self._variances = [
            (place.start, place.stop)
            for name, place in self.slices.items()
            if name.rpartition(".")[2] == "running_var"
        ]
        self.register_buffer("mean", torch.zeros(self.vector_size))
        self.register_buffer("std", torch.ones(self.vector_size))
        self.register_buffer("log", torch.zeros(self.vector_size, dtype=torch.bool))
        self.frozen = nn.Module()
        for tensor in tensors:
            if tensor["role"] == FROZEN:
                *path, name = tensor["name"].split(".")
                owner = self.frozen
                try:
                    for part in path:
                        if part not in owner._modules:
                            owner.add_module(part, nn.Module())
                        owner = owner.get_submodule(part)
                    owner.register_buffer(name, torch.zeros(tensor["shape"], dtype=getattr(torch, tensor["dtype"])))
                except (AttributeError, KeyError) as error:
                    raise ValueError(f"`{tensor['name']}` is no name of a tensor: {error}") from error

    @classmethod
    def from_state_dict(
        cls, state_dict: Mapping[str, torch.Tensor], patterns: Sequence[str] = ("*",)
    ) -> "ParameterLayout":
        r"""
        The layout of a base network, its frozen tensors included.

        Args:
            state_dict (`Mapping[str, torch.Tensor]`):
                The base network's `state_dict()`. Tensors that share memory are recognized as tied.
            patterns (`Sequence[str]`, *optional*, defaults to `("*",)`):
                Shell-style patterns on the names: a tensor is generated where any of them matches. Integer tensors
                (`num_batches_tracked`) are never generated.

        Raises:
            `ValueError`: a pattern matches nothing that can be generated, or a float64 or complex tensor.
        """
        matched = dict.fromkeys(patterns, False)
        tensors: list[dict[str, Any]] = []
        owners: dict[tuple[Any, ...], dict[str, Any]] = {}
        for name, value in state_dict.items():
            tensor: dict[str, Any] = {
                "name": name,
                "shape": list(value.shape),
                "dtype": _dtype_name(value.dtype),
                "role": FROZEN,
            }
            hits = [pattern for pattern in patterns if fnmatchcase(name, pattern)]
            if hits and (value.is_floating_point() or value.is_complex()):
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
            if owner is not tensor:
                # A pattern that names any of the tied tensors means all of them.
                owner["role"] = GENERATED if GENERATED in (owner["role"], tensor["role"]) else FROZEN
                tensor.update(role=TIED, tied_to=owner["name"])
            tensors.append(tensor)
        missed = [pattern for pattern, hit in matched.items() if not hit]
        if missed or not patterns:
            raise ValueError(
                f"The patterns {missed} match no floating-point tensor of the network. It has: "
                f"{_shorten([t['name'] for t in tensors])}."
            )
        layout = cls(tensors=tensors)
        layout.load_frozen(state_dict)
        return layout

    def tensors(self, role: str) -> list[dict[str, Any]]:
        """The entries of the config with this role (`"generated"`, `"frozen"` or `"tied"`), in state-dict order."""
        return [tensor for tensor in self.config.tensors if tensor["role"] == role]

    def frozen_state_dict(self) -> dict[str, torch.Tensor]:
        """The tensors that are not generated, by their names in the network."""
        return {tensor["name"]: self.frozen.get_buffer(tensor["name"]) for tensor in self.tensors(FROZEN)}

    @torch.no_grad()
    def load_frozen(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Copies the frozen tensors out of a state dict of the network (extra names are ignored)."""
        for tensor in self.tensors(FROZEN):
            self.frozen.get_buffer(tensor["name"]).copy_(_checked(tensor, state_dict))

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
        names = [tensor["name"] for tensor in self.config.tensors]
        unexpected = [name for name in state_dict if name not in set(names)]
        if unexpected:
            raise ValueError(f"The network has tensors that the layout does not know: {_shorten(unexpected)}.")
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
        Takes mean and standard deviation of each parameter from a zoo, in one pass with bounded memory.

        Args:
            batches (`Iterable[torch.Tensor]`): Parameter vectors, each `[n, P]`; together at least two rows.

        Returns:
            `ParameterLayout`: itself.
        """
        count = 0
        for batch in batches:
            # On the CPU, where vectors are read and float64 is at hand; MPS lacks it.
            raw = batch.to("cpu", torch.float32)
            values = raw.to(torch.float64)
            for start, stop in self._variances:
                values[:, start:stop] = raw[:, start:stop].clamp_min(SMALLEST_VARIANCE).log()
            if count == 0:
                first = raw[0].clone()
                constant = torch.ones_like(first, dtype=torch.bool)
                mean = torch.zeros_like(values[0])
                squares = torch.zeros_like(values[0])
            # Chan, Golub and LeVeque (1983): merging the moments of two samples.
            batch_mean, total = values.mean(0), count + len(values)
            shift = batch_mean - mean
            mean.add_(shift, alpha=len(values) / total)
            squares.add_(values.sub_(batch_mean).square_().sum(0))
            squares.addcmul_(shift, shift, value=count * len(values) / total)
            constant &= (raw == first).all(0)
            count = total
        if count < 2:
            raise ValueError(f"Statistics need a zoo of at least two networks, and this one has {count}.")
        for start, stop in self._variances:
            self.log[start:stop] = ~constant[start:stop]
        self.mean.copy_(torch.where(constant, first, mean.to(torch.float32)))
        self.std.copy_(torch.where(constant, 0.0, (squares / count).sqrt().to(torch.float32)))
        return self

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
        for first, last in self._variances:
            first, last = max(first, start), min(last, stop)
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
        for start, stop in self._variances:
            part = vectors[:, start:stop]
            part.copy_(torch.where(self.log[start:stop], part.exp(), part))
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
        if not isinstance(name, str) or not all(name.split(".")) or name in seen:
            raise ValueError(f"{name!r:.200} is no name of a tensor, or stands twice.")
        if not isinstance(shape, (list, tuple)) or not all(type(length) is int and length >= 0 for length in shape):
            raise ValueError(f"`{name}` has the shape {shape!r:.200}, which is none.")
        if not isinstance(dtype, str) or not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"`{name}` has the dtype {dtype!r:.200}, which is none.")
        size += math.prod(shape)
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
        seen[name] = dict(tensor)
    if not any(tensor["role"] == GENERATED and math.prod(tensor["shape"]) for tensor in tensors):
        raise ValueError("A layout needs at least one generated parameter, and this one has none.")


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
