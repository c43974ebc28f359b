"""Many networks of one architecture run at once: side by side in each layer, their weights stacked."""

import math
import operator
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.func import functional_call
from torch.nn import functional as F

from ..pipelines.neural_network_diffusion import ParameterLayout
from .adapted import AdaptedNetwork


Weights = Mapping[str, torch.Tensor]
# Up to so many inputs of a place, a matrix product is faster than a convolution.
FEW_INPUTS = 64
POINTWISE_MODULES = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Hardswish),
    *(nn.Identity, nn.Mish),
)
POINTWISE_FUNCTIONS = {
    *(F.relu, torch.relu, F.gelu, F.silu, F.leaky_relu, F.elu, torch.sigmoid, torch.tanh, F.softplus),
    *(operator.add, operator.iadd, operator.mul, operator.sub, torch.add, torch.mul),
}
POINTWISE_METHODS = {"relu", "relu_", "sigmoid", "tanh", "add", "mul"}


class NotStackableError(Exception):
    """An architecture with a part that has no stacked form here; its networks run one by one."""


class StackedNetwork:
    r"""
    The forward pass of N networks of one architecture at once. Inside, an activation is `[E, N, F]` or
    `[E, H, W, N, C]`: the channels of all networks stand beside each other, last, where pooling and pointwise
    functions read them in one go, and the convolutions of all networks are one with N groups. That is several times
    faster than N passes for networks of a few thousand parameters.

    Known are linear layers, 2-D convolutions, batch norm with fixed statistics, pooling, flattening, residual sums
    and pointwise functions.

    Args:
        network (`nn.Module`): The architecture; its own weights are not used.
        frozen (`Collection[str]`, *optional*): Names of tensors that are the same in all networks.

    Raises:
        [`NotStackableError`]: it has another part, or cannot be traced.

    Attributes:
        in_threads (`bool`): Whether several threads may call it at once.
    """

    in_threads = True

    def __init__(self, network: nn.Module, frozen: Collection[str] = ()):
        try:
            self.graph = fx.Tracer().trace(network)
        except Exception as error:  # whatever a forward of the user's own makes of the tracer
            raise NotStackableError(f"{type(network).__name__} cannot be traced: {error}") from error
        self.modules = dict(network.named_modules())
        self.tensors = {
            owner: [(name, f"{owner}.{name}") for name in module.state_dict()]
            for owner, module in self.modules.items()
        }
        for node in self.graph.nodes:
            if node.op == "call_module":
                module = self.modules[node.target]
                if type(module) not in RULES or module._forward_hooks or module._forward_pre_hooks:
                    raise NotStackableError(f"{type(module).__name__} ({node.target}) has no stacked form.")
            elif node.op == "get_attr":
                raise NotStackableError(f"The tensor {node.target} outside of a layer has no stacked form.")
        if sum(node.op == "placeholder" for node in self.graph.nodes) != 1:
            raise NotStackableError(f"{type(network).__name__} takes several inputs.")
        self._pool_before_relu()
        # What a layer returned and nothing else reads can be overwritten.
        self.in_place = {
            node
            for node in self.graph.nodes
            if self._is(node, nn.ReLU)
            and len(node.args[0].users) == 1
            and self._is(node.args[0], nn.Linear, nn.Conv2d, nn.BatchNorm2d, nn.BatchNorm1d, nn.MaxPool2d)
        }
        # What the networks have in common: all that is computed of the inputs before the first difference.
        self.shared: set[fx.Node] = set()
        for node in self.graph.nodes:
            own = self.tensors[node.target] if node.op == "call_module" else []
            if all(place in frozen for _, place in own) and self.shared.issuperset(node.all_input_nodes):
                self.shared.add(node)

    def to(self, device: torch.device) -> "StackedNetwork":
        """Itself: it has no weights of its own."""
        return self

    def largest_activation(self, weights: Weights, inputs: torch.Tensor) -> int:
        """Values of the largest activation, patches included, that each of two networks has for one example."""
        return _largest(
            lambda: self(weights, inputs[None]),
            lambda shape: math.prod(shape) // 2 if shape[-2:-1] == (2,) and len(shape) in (3, 5) else 0,
        )

    def _pool_before_relu(self) -> None:
        """The largest of rectified values is the largest value, rectified: of which there are fewer."""
        for node in self.graph.nodes:
            users = list(node.users)
            if self._is(node, nn.ReLU) and len(users) == 1 and self._is(users[0], nn.MaxPool2d):
                pool = users[0]
                pool.replace_all_uses_with(node)
                pool.args, node.args = node.args, (pool,)
                pool.append(node)

    def _is(self, node: fx.Node, *classes: type) -> bool:
        return node.op == "call_module" and type(self.modules[node.target]) in classes and len(node.args) > 0

    def __call__(self, weights: Weights, inputs: torch.Tensor, common: dict[Any, Any] | None = None) -> torch.Tensor:
        r"""
        Args:
            weights (`Mapping[str, torch.Tensor]`):
                Each tensor of the state dict, stacked: `[N, ...]`, or `[1, ...]` where all networks have the same.
            inputs (`torch.Tensor`): Examples of each network, `[N, E, ...]`, or `[1, E, ...]` for all of them.
            common (`dict`, *optional*):
                Keeps what the networks have in common, for further calls with other networks and the same inputs.

        Returns:
            `torch.Tensor`: Outputs, `[N, E, ...]`.
        """
        values: dict[Any, Any] = {} if common is None else dict(common)
        for node in self.graph.nodes:
            if node in values:
                continue
            args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
            if node.op == "placeholder":
                values[node] = _side_by_side(inputs)
            elif node.op == "call_module":
                module = self.modules[node.target]
                if node in self.in_place and not torch.is_grad_enabled():
                    values[node] = args[0].relu_()
                    continue
                own = {name: weights[place] for name, place in self.tensors[node.target]}
                if type(module) is nn.Conv2d and common is not None and node.all_input_nodes[0] in self.shared:
                    kwargs = {**kwargs, "kept": common.setdefault(f"patches of {node.name}", {})}
                values[node] = RULES[type(module)](module, own, *args, **kwargs)
            elif node.op == "call_function" and node.target in POINTWISE_FUNCTIONS:
                values[node] = node.target(*args, **kwargs)
            elif node.op == "call_method" and node.target in POINTWISE_METHODS:
                values[node] = getattr(args[0], node.target)(*args[1:], **kwargs)
            elif node.target in (torch.flatten, "flatten"):
                values[node] = _flatten(*args, **kwargs)
            elif node.target in (torch.mean, "mean"):
                values[node] = _mean(*args, **kwargs)
            elif node.op == "output":
                if common is not None:
                    common.update((shared, values[shared]) for shared in self.shared if shared in values)
                return _one_by_one(args[0])
            else:
                raise NotStackableError(f"{node.target} has no stacked form.")
        raise AssertionError("A graph ends with its output.")


class VmappedNetwork:
    r"""
    The same by `torch.vmap`, for adapters of a base network: no architecture is unknown to it, and it is called as
    [`StackedNetwork`] is.

    Args:
        network (`nn.Module`): The architecture; its own weights are not used.
    """

    in_threads = False  # a call puts weights into the modules while it lasts

    def __init__(self, network: nn.Module):
        self.network = network

    def to(self, device: torch.device) -> "VmappedNetwork":
        """The same, with the base network on a device."""
        self.network.to(device)
        return self

    def __call__(self, weights: Weights, inputs: torch.Tensor, common: dict[Any, Any] | None = None) -> torch.Tensor:
        """Outputs `[N, E, ...]` of weights `[N or 1, ...]` and examples `[N or 1, E, ...]`."""
        count = max(len(inputs), *(len(value) for value in weights.values()))

        def one(own: Weights, examples: torch.Tensor) -> torch.Tensor:
            return functional_call(self.network, dict(own), (examples,))

        each = {name: value.expand(count, *value.shape[1:]) for name, value in weights.items()}
        if len(inputs) == 1:
            return torch.vmap(one, in_dims=(0, None))(each, inputs[0])
        return torch.vmap(one)(each, inputs)

    def largest_activation(self, weights: Weights, inputs: torch.Tensor) -> int:
        """Values of the largest activation for one example."""
        one = {name: value[0] for name, value in weights.items()}
        return _largest(lambda: functional_call(self.network, one, (inputs,)), math.prod)


def side_by_side(network: nn.Module, frozen: Collection[str] = ()) -> StackedNetwork | VmappedNetwork:
    r"""
    What runs many networks of an architecture at once.

    Raises:
        [`NotStackableError`]: nothing does.
    """
    return VmappedNetwork(network) if isinstance(network, AdaptedNetwork) else StackedNetwork(network, frozen)


def _largest(run: Callable[[], Any], size: Callable[[torch.Size], int]) -> int:
    """The largest size of a tensor that is computed."""
    largest = 1

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, size(result.shape))
            return result

    with Watch():
        run()
    return largest


def _side_by_side(inputs: torch.Tensor) -> torch.Tensor:
    """`[N, E, F]` or `[N, E, C, H, W]` as activations are laid out."""
    if inputs.ndim == 3:
        return inputs.transpose(0, 1)
    if inputs.ndim == 5:
        return inputs.permute(1, 3, 4, 0, 2)
    raise NotStackableError(f"Examples of {inputs.ndim - 2} dimensions.")


def _one_by_one(outputs: torch.Tensor) -> torch.Tensor:
    """The inverse of [`_side_by_side`]."""
    return outputs.transpose(0, 1) if outputs.ndim == 3 else outputs.permute(3, 0, 4, 1, 2)


def _as_images(hidden: torch.Tensor) -> torch.Tensor:
    """`[E, H, W, N, C]` as the channels-last images `[E, N * C, H, W]`."""
    if hidden.ndim != 5:
        raise NotStackableError("A layer for images among flat features.")
    return hidden.flatten(3).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def _as_activation(images: torch.Tensor, count: int) -> torch.Tensor:
    return images.permute(0, 2, 3, 1).unflatten(3, (count, -1))


def _linear(module: nn.Linear, own: Weights, hidden: torch.Tensor) -> torch.Tensor:
    if hidden.ndim != 3:
        raise NotStackableError("A linear layer over more than one dimension of features.")
    weight, bias = _as_many(own)
    if hidden.shape[1] == 1:
        # One product for all networks, since they see the same.
        return _product(hidden[:, 0], weight, bias)
    weight, hidden = weight.expand(hidden.shape[1], -1, -1).transpose(1, 2), hidden.transpose(0, 1)
    outputs = torch.bmm(hidden, weight) if bias is None else torch.baddbmm(bias[:, None], hidden, weight)
    return outputs.transpose(0, 1)


def _as_many(own: Weights) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of as many networks, where one of them is the same in all."""
    weight, bias = own["weight"], own.get("bias")
    if bias is not None and len(bias) != len(weight):
        count = max(len(bias), len(weight))
        weight, bias = (values.expand(count, *values.shape[1:]) for values in (weight, bias))
    return weight, bias


def _product(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`[R, I]` times `[N, O, I]`: `[R, N, O]`."""
    matrix = weight.flatten(0, 1).T
    outputs = rows @ matrix if bias is None else torch.addmm(bias.flatten(), rows, matrix)
    return outputs.unflatten(1, weight.shape[:2])


def _conv2d(module: nn.Conv2d, own: Weights, hidden: torch.Tensor, kept: dict[str, Any] | None = None) -> torch.Tensor:
    """`kept` keeps the patches of the inputs for other networks."""
    if module.padding_mode != "zeros":
        raise NotStackableError("A convolution with an unusual padding.")
    weight, bias = _as_many(own)
    count = max(len(weight), hidden.shape[-2]) if hidden.ndim == 5 else 0
    same_inputs = count > 1 and hidden.shape[-2] == 1 and module.groups == 1
    images = _as_images(hidden if same_inputs else hidden.expand(*hidden.shape[:3], max(count, 1), -1))
    if same_inputs and weight[0, 0].numel() <= FEW_INPUTS and not isinstance(module.padding, str):
        kept = {} if kept is None else kept
        if "patches" not in kept:
            patches = F.unfold(images, module.kernel_size, module.dilation, module.padding, module.stride)
            kept["patches"] = patches.transpose(1, 2).flatten(0, 1)
        outputs = _product(kept["patches"], weight.flatten(2), bias)
        rows = module.dilation[0] * (module.kernel_size[0] - 1) + 1
        height = (images.shape[2] + 2 * module.padding[0] - rows) // module.stride[0] + 1
        return outputs.unflatten(0, (len(images), height, -1))
    weight = weight.expand(count, -1, -1, -1, -1).flatten(0, 1).contiguous(memory_format=torch.channels_last)
    bias = None if bias is None else bias.expand(count, -1).flatten()
    groups = 1 if same_inputs else count * module.groups
    outputs = F.conv2d(images, weight, bias, module.stride, module.padding, module.dilation, groups)
    return _as_activation(outputs, count)


def _pool(module: nn.Module, own: Weights, hidden: torch.Tensor) -> torch.Tensor:
    return _as_activation(module(_as_images(hidden)), hidden.shape[3])


def _max_pool(module: nn.MaxPool2d, own: Weights, hidden: torch.Tensor) -> torch.Tensor:
    if module.return_indices:
        raise NotStackableError("Pooling that returns places.")
    return _pool(module, own, hidden)


def _batch_norm(module: nn.BatchNorm2d, own: Weights, hidden: torch.Tensor) -> torch.Tensor:
    if module.training or module.running_mean is None:
        raise NotStackableError("Batch norm with the statistics of the batch.")
    scale = (own["running_var"] + module.eps).rsqrt()
    if module.affine:
        scale = scale * own["weight"]
    shift = -own["running_mean"] * scale
    if module.affine:
        shift = shift + own["bias"]
    return torch.addcmul(shift, hidden, scale)


def _dropout(module: nn.Dropout, own: Weights, hidden: torch.Tensor) -> torch.Tensor:
    if module.training:
        raise NotStackableError("Dropout in training.")
    return hidden


def _flatten(hidden: torch.Tensor, start_dim: int = 0, end_dim: int = -1) -> torch.Tensor:
    if start_dim != 1 or end_dim != -1:
        raise NotStackableError("Flattening of other dimensions than all of the features.")
    # A network's own order of the features is [C, H, W].
    return hidden if hidden.ndim == 3 else hidden.permute(0, 3, 4, 1, 2).flatten(2)


def _mean(hidden: torch.Tensor, dim: Any, keepdim: bool = False) -> torch.Tensor:
    dims = sorted(d % 4 for d in ([dim] if isinstance(dim, int) else dim))
    if hidden.ndim != 5 or dims != [2, 3]:
        raise NotStackableError("A mean over other dimensions than the places of images.")
    return hidden.mean((1, 2), keepdim=keepdim)


RULES: dict[type, Callable[..., torch.Tensor]] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv2d,
    nn.MaxPool2d: _max_pool,
    nn.AvgPool2d: _pool,
    nn.AdaptiveAvgPool2d: _pool,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.Dropout: _dropout,
    nn.Flatten: lambda module, own, hidden: _flatten(hidden, module.start_dim, module.end_dim),
    **dict.fromkeys(POINTWISE_MODULES, lambda module, own, hidden: module(hidden)),
}


def stack(layout: ParameterLayout, vectors: torch.Tensor) -> dict[str, torch.Tensor]:
    r"""
    The state dict of N networks of their parameter vectors `[N, P]`: what is generated is `[N, ...]`, what is frozen
    `[1, ...]`.
    """
    values = {}
    for tensor in layout.tensors("generated"):
        part = vectors[:, layout.slices[tensor["name"]]]
        part = part.unflatten(1, tensor["shape"]) if tensor["shape"] else part[:, 0]
        values[tensor["name"]] = part.to(getattr(torch, tensor["dtype"]))
    for name, frozen in layout.frozen_state_dict().items():
        values[name] = frozen.to(vectors.device)[None]
    return {t["name"]: values[t.get("tied_to", t["name"])] for t in layout.config.tensors}
