"""A base network with an adapter, whose own tensors are the adapter's alone."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from ..errors import TaskError


# What PEFT calls the two factors: of linear and convolutional layers, and of embeddings.
FACTORS = {".lora_A.weight": ".lora_B.weight", ".lora_embedding_A": ".lora_embedding_B"}
# It puts this before the names of the base network.
PREFIX = "base_model.model."
BASE_LAYER = ".base_layer."
MAGNITUDE = "lora_magnitude_vector"
_BACK = {b: a for a, b in FACTORS.items()}


class AdaptedNetwork(nn.Module):
    r"""
    A base network with a LoRA adapter (Hu et al. 2021, arXiv 2106.09685). Its state dict holds the adapter alone,
    under the names of PEFT's files, so that a task of adapters can build it. Forward adds each update B A, of scale 1,
    to the weight of its layer, and takes the tensors that were trained entirely (PEFT's `modules_to_save`) in the
    place of the base network's.

    Args:
        base (`nn.Module`): The base network, which is no part of the state dict. Its parameters are frozen.
        adapter (`Mapping[str, torch.Tensor]`):
            Names and values of an adapter: those that training begins with. Names that begin with
            `base_model.model.` are PEFT's.

    Attributes:
        base (`nn.Module`): The base network.
        adapter_config (`dict`): PEFT's configuration of it; empty where the names are those of diffusers.

    Raises:
        [`TaskError`]: a tensor belongs to no part of the base network, or does not fit it.

    Example:

    ```py
    >>> network = AdaptedNetwork(base, lora(base, ["q_proj", "v_proj"], rank=2, trained=["classifier"]))
    >>> network.load_state_dict(zoo.state_dict(0))
    ```
    """

    def __init__(self, base: nn.Module, adapter: Mapping[str, torch.Tensor]):
        super().__init__()
        # In a list, modules are no children.
        self._base = [base.requires_grad_(False)]
        self.training = base.training
        parameters = dict(base.named_parameters(remove_duplicate=False))
        self._updates: list[tuple[str, str, str]] = []  # weight of the base network, A, B
        self._trained: dict[str, str] = {}  # of the base network: of the adapter
        for name, value in adapter.items():
            if MAGNITUDE in name:
                raise TaskError(f"The adapter has `{name}`: DoRA is imported and exported, and cannot be run here.")
            # Of layers that it adapts, PEFT calls what else is trained so.
            path = name.removeprefix(PREFIX).replace(BASE_LAYER, ".")
            suffix = next((suffix for suffix in (*FACTORS, *FACTORS.values()) if path.endswith(suffix)), None)
            target = path if suffix is None else f"{path.removesuffix(suffix)}.weight"
            if target not in parameters:
                raise TaskError(f"The adapter has `{name}`, and the base network no `{target}`.")
            if suffix is None:
                self._trained[target] = name
            elif suffix in FACTORS:
                other = name.removesuffix(suffix) + FACTORS[suffix]
                if other not in adapter:
                    raise TaskError(f"The adapter has `{name}`, and no `{other}`.")
                self._updates.append((target, name, other))
            elif (other := name.removesuffix(suffix) + _BACK[suffix]) not in adapter:
                raise TaskError(f"The adapter has `{name}`, and no `{other}`.")
            _register(self, name, nn.Parameter(value.detach().clone()))
        own = dict(self.named_parameters())
        for target, name in self._trained.items():
            if own[name].shape != parameters[target].shape:
                raise TaskError(
                    f"`{name}` is {list(own[name].shape)}, and that of the base network "
                    f"{list(parameters[target].shape)}."
                )
        for target, a, b in self._updates:
            self._update(target, own[a], own[b])

    @property
    def base(self) -> nn.Module:
        """The base network."""
        return self._base[0]

    @property
    def adapter_config(self) -> dict[str, Any]:
        """PEFT's configuration of the adapter, where its names are PEFT's; the base model is named where transformers
        knows it."""
        if not any(name.startswith(PREFIX) for _, name, _ in self._updates):
            return {}
        own = dict(self.named_parameters())
        ranks = {target.removesuffix(".weight"): len(own[a]) for target, a, _ in self._updates}
        rank = next(iter(ranks.values()), 1)
        trained = sorted({target.rpartition(".")[0] for target, n in self._trained.items() if BASE_LAYER not in n})
        biases = any(BASE_LAYER in name and name.endswith(".bias") for name in self._trained.values())
        return {
            "peft_type": "LORA",
            "base_model_name_or_path": getattr(self.base, "name_or_path", None) or None,
            "r": rank,
            "lora_alpha": rank,
            "rank_pattern": {name: own_rank for name, own_rank in ranks.items() if own_rank != rank},
            "target_modules": sorted(ranks),
            "modules_to_save": trained or None,
            "bias": "lora_only" if biases else "none",
            "fan_in_fan_out": any(_by_inputs(self._layer(target)) for target, _, _ in self._updates),
        }

    def _layer(self, weight: str) -> nn.Module:
        """That of the base network with this weight."""
        return self.base.get_submodule(weight.rpartition(".")[0])

    def _update(self, target: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """B A, in the shape of the weight that it is added to."""
        module, weight = self._layer(target), self.base.get_parameter(target)
        product = b.flatten(1) @ a.flatten(1)
        if isinstance(module, nn.Embedding) or _by_inputs(module):
            product = product.T
        if product.shape != weight.flatten(1).shape:
            raise TaskError(f"The update of `{target}` is {list(product.shape)}, and the weight {list(weight.shape)}.")
        return product.reshape(weight.shape)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base network's outputs with the adapter; the logits, where it returns several things."""
        own = dict(self.named_parameters())
        base = self.base
        if base.training != self.training:  # another network may share it, or this one was switched as its parts are
            self.train(self.training)
        changed: dict[str, torch.Tensor] = {target: own[name] for target, name in self._trained.items()}
        for target, a, b in self._updates:
            changed[target] = changed.get(target, base.get_parameter(target)) + self._update(target, own[a], own[b])
        # Adapters are in float32, whatever their base is in, to which they are rounded, as PEFT merges them.
        changed = {target: value.to(base.get_parameter(target).dtype) for target, value in changed.items()}
        # A tensor that the base ties to an adapted one stays as it is, as with PEFT.
        outputs = functional_call(base, changed, args, kwargs, tie_weights=False)
        return getattr(outputs, "logits", outputs)

    def _apply(self, fn: Any, recurse: bool = True) -> "AdaptedNetwork":
        self.base._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> "AdaptedNetwork":
        """Of the base network too, but for the statistics of its batch norms: they stay, as no adapter holds them."""
        for module in self.base.train(mode).modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return super().train(mode)


def lora(
    base: nn.Module, targets: list[str], rank: int, trained: list[str] | None = None, prefix: str = PREFIX
) -> dict[str, torch.Tensor]:
    r"""
    The LoRA adapter that training begins with, as PEFT initializes it: A is drawn, and B is zero.

    Args:
        base (`nn.Module`): The base network.
        targets (`list[str]`):
            Ends of the names of linear layers, in whole parts. Those in modules that are trained are no targets.
        rank (`int`): r.
        trained (`list[str]`, *optional*): Modules whose parameters are trained entirely.
        prefix (`str`, *optional*, defaults to `"base_model.model."`):
            Stands before all names. Without it they are those of a LoRA of diffusers, where the base network holds the
            denoiser as `unet` or `transformer`.

    Returns:
        `dict[str, torch.Tensor]`: in float32, whatever the base network is in.

    Raises:
        [`TaskError`]: no module has such a name, or a target is no linear layer.
    """
    adapter: dict[str, torch.Tensor] = {}
    found = set()
    for name, module in base.named_modules():
        target = next((one for one in targets if f".{name}".endswith(f".{one}")), None)
        inside = any(f"{name}.".startswith(f"{one}.") for one in trained or ())
        if target is not None and not inside:
            if not (isinstance(module, nn.Linear) or _by_inputs(module)):
                raise TaskError(f"`{name}` is a {type(module).__name__}, and no linear layer.")
            found.add(target)
            weight: torch.Tensor = module.weight
            inputs, outputs = weight.shape if _by_inputs(module) else weight.shape[::-1]
            # Drawn on the CPU: the same seed gives the same adapter wherever the base network is.
            drawn = nn.init.kaiming_uniform_(torch.empty(rank, inputs), a=5**0.5)
            adapter[f"{prefix}{name}.lora_A.weight"] = drawn.to(weight.device)
            adapter[f"{prefix}{name}.lora_B.weight"] = weight.new_zeros(outputs, rank, dtype=torch.float32)
        elif name in (trained or ()):
            found.add(name)
            for own, value in module.named_parameters():
                adapter[f"{prefix}{name}.{own}"] = value.detach().clone().float()
    if lacking := [name for name in (*targets, *(trained or ())) if name not in found]:
        raise TaskError(f"{type(base).__name__} has no module `{lacking[0]}`.")
    return adapter


def _by_inputs(module: nn.Module) -> bool:
    """Whether a layer stores its weight as [inputs, outputs], as `Conv1D` of transformers does."""
    return type(module).__name__ == "Conv1D"


def _register(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Puts a parameter where its name says."""
    *path, last = name.split(".")
    for part in path:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    module.register_parameter(last, parameter)
