"""Changes of a network that leave its function as it is: hidden units in another order, and in another scale."""

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional as F

from ..extras import require
from ..pipelines.neural_network_diffusion import ParameterLayout
from .canonical import CanonicalForm, units_of


LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# Functions f of a channel alone with f(s x) = s f(x) for s > 0, and those without.
SCALED_MODULES = (
    *(nn.ReLU, nn.LeakyReLU, nn.Identity, nn.Dropout, nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
)
OTHER_MODULES = (nn.ReLU6, nn.ELU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Hardswish, nn.Mish)
SCALED_FUNCTIONS = {torch.relu, F.relu, F.leaky_relu, F.dropout, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d}
OTHER_FUNCTIONS = {F.gelu, F.silu, F.elu, F.softplus, F.hardswish, torch.sigmoid, torch.tanh, F.tanh}
SCALED_METHODS, OTHER_METHODS = {"relu", "relu_", "contiguous"}, {"sigmoid", "tanh"}
SUMS = {"add", "iadd", "add_"}
ROUNDS = 20
# Products of units of the networks that are matched at a time.
MATCHED_VALUES = 2**24


class UnknownSymmetryError(ValueError):
    """An architecture whose hidden units are not recognized."""


@dataclass(frozen=True)
class Member:
    """A generated tensor that moves with the units of a group: along an axis, `repeat` neighbouring places a unit."""

    place: slice
    shape: tuple[int, ...]
    axis: int
    repeat: int


@dataclass
class Group:
    r"""
    Hidden units that can be exchanged: those of a layer, or of a residual stream.

    Attributes:
        units (`int`): How many.
        members (`list[Member]`): All that moves with them.
        producers, consumers (`list[Member]`):
            What is multiplied and what is divided where units are scaled; empty where they cannot be.
    """

    units: int
    members: list[Member] = field(default_factory=list)
    producers: list[Member] = field(default_factory=list)
    consumers: list[Member] = field(default_factory=list)


class Symmetry(CanonicalForm):
    r"""
    The hidden units of an architecture that can be exchanged, and those that can be scaled, found in its forward pass:
    chains of linear and convolutional layers with normalization, and residual sums, at any depth.

    Args:
        network (`nn.Module`): The architecture.
        layout (`ParameterLayout`): Of the networks. Units whose tensors are not all generated stay where they are.
        example (`torch.Tensor`): Inputs `[E, ...]`, for the shapes.

    Attributes:
        groups (`list[Group]`): In the order of the forward pass.

    Raises:
        [`UnknownSymmetryError`]: a part is not known, or there are no hidden units. The message says which.
    """

    def __init__(self, network: nn.Module, layout: ParameterLayout, example: torch.Tensor):
        self.groups = _Trace(network, layout, example).groups()
        if not self.groups:
            raise UnknownSymmetryError("There are no hidden units whose tensors are all generated.")

    def __str__(self) -> str:
        return f"groups of {', '.join(str(group.units) for group in self.groups)} hidden units"

    def described(self, layout: ParameterLayout) -> dict[str, Any]:
        """The groups as [`NeuronTransformerModel`] is told them: `units`, and `tensors` with the `axes` of each."""
        axes: dict[int, list[list[int]]] = {}
        for number, group in enumerate(self.groups):
            for member in group.members:
                axes.setdefault(member.place.start, []).append([member.axis, number, member.repeat])
        return units_of(layout, [group.units for group in self.groups], axes)

    @property
    def largest_group(self) -> int:
        """Hidden units of the group that has most."""
        return max(group.units for group in self.groups)

    def permute(self, vectors: torch.Tensor, group: Group, orders: torch.Tensor) -> torch.Tensor:
        """Vectors `[N, P]` with the units of a group in other orders, `[N, units]` or `[units]` for all."""
        permuted = vectors.clone()
        orders = orders.expand(len(vectors), -1)
        for member in group.members:
            units = _units(permuted, member)
            moved = units.gather(1, orders[:, :, None].expand(-1, -1, units.shape[2]))
            _put(permuted, member, moved)
        return permuted

    def balance(self, vectors: torch.Tensor) -> torch.Tensor:
        """Vectors `[N, P]` in whose scaled units incoming and outgoing weights have the same norm: of all scales,
        those of the smallest sum of squares."""
        vectors = vectors.clone()
        groups = [group for group in self.groups if group.producers]
        for _ in range(ROUNDS if len(groups) > 1 else min(len(groups), 1)):
            for group in groups:
                norms = [
                    torch.stack([_units(vectors, member).square().sum(2) for member in members]).sum(0)
                    for members in (group.producers, group.consumers)
                ]
                # A unit without incoming or outgoing weights stays.
                known = (norms[0] > 0) & (norms[1] > 0)
                scales = torch.where(known, (norms[1] / norms[0].clamp_min(1e-30)) ** 0.25, 1.0)
                for members, factor in ((group.producers, scales), (group.consumers, 1 / scales)):
                    for member in members:
                        _put(vectors, member, _units(vectors, member) * factor[:, :, None])
        return vectors

    def align(self, vectors: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        """Permuted vectors `[N, P]`, each brought near to the reference `[P]` by coordinate descent over the groups
        (weight matching; Ainsworth et al. 2022, arXiv 2209.04836)."""
        # A square of units each: so many networks at a time.
        most = max(1, MATCHED_VALUES // self.largest_group**2)
        if len(vectors) > most:
            return torch.cat([self.align(some, reference) for some in vectors.split(most)])
        aligned = vectors.clone()
        moving = torch.arange(len(vectors))
        for _ in range(ROUNDS):
            moved = torch.zeros(len(moving), dtype=torch.bool)
            for group in self.groups:
                some = aligned[moving]
                nearness = torch.zeros(len(some), group.units, group.units, dtype=some.dtype)
                for member in group.members:
                    units = _units(some, member)
                    nearness += _units(reference[None], member) @ units.mT
                    nearness -= units.square().sum(2)[:, None] / 2
                candidates = self.permute(some, group, _matched(nearness))
                # A tensor both of whose axes are units of the group makes matching a guess.
                nearer = (candidates - reference).square().sum(1) < (some - reference).square().sum(1) * (1 - 1e-7)
                aligned[moving[nearer]] = candidates[nearer]
                moved |= nearer
            moving = moving[moved]
            if len(moving) == 0:
                break
        return aligned

    def shuffled(self, vector: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """A network `[P]` with its units in another order."""
        changed = vector[None]
        for group in self.groups:
            changed = self.permute(changed, group, torch.randperm(group.units, generator=generator))
        return changed[0]


def _matched(nearness: torch.Tensor) -> torch.Tensor:
    """The units of N networks in the order that brings them nearest to those of a reference, `[N, units]`, by how near
    each is to each of these, `[N, units of the reference, units]`."""
    assign = require("scipy.optimize", "report").linear_sum_assignment
    # Where the nearest units are all different, no order brings them nearer: the search, which takes the third power
    # of the units, has nothing to find.
    nearest = nearness.argmax(2)
    different = (nearest.sort(1).values == torch.arange(nearest.shape[1])).all(1)
    pairs = zip(nearest, nearness, different.tolist(), strict=True)
    return torch.stack(
        [near if found else torch.from_numpy(assign(one.numpy(), maximize=True)[1]) for near, one, found in pairs]
    )


def _units(vectors: torch.Tensor, member: Member) -> torch.Tensor:
    """What a tensor holds of each unit, `[N, units, ...]` as `[N, units, F]`."""
    values = vectors[:, member.place].unflatten(1, member.shape).movedim(member.axis + 1, 1)
    return values.unflatten(1, (-1, member.repeat)).flatten(2)


def _put(vectors: torch.Tensor, member: Member, units: torch.Tensor) -> None:
    """The inverse of [`_units`]."""
    rest = [length for axis, length in enumerate(member.shape) if axis != member.axis]
    values = units.unflatten(2, (member.repeat, *rest)).flatten(1, 2).movedim(1, member.axis + 1)
    vectors[:, member.place] = values.flatten(1)


@dataclass(frozen=True)
class _Value:
    """An activation: what its channels are, as a key of a group, and the tensors that a scale of them goes into."""

    key: Hashable
    repeat: int = 1
    producers: frozenset[tuple[str, int]] = frozenset()
    direct: bool = False  # of a linear layer, and of nothing else


class _Trace:
    """Follows the channels through the forward pass: what is added has the same units."""

    def __init__(self, network: nn.Module, layout: ParameterLayout, example: torch.Tensor):
        self.layout = layout
        self.parents: dict[Hashable, Hashable] = {}
        self.found: dict[Hashable, list[tuple[str, int, int]]] = {}  # tensor, axis, repeat
        self.scaled: dict[Hashable, tuple[set[tuple[str, int]], set[tuple[str, int, int]]]] = {}
        self.fixed: set[Hashable] = {"input"}
        self.unscaled: set[Hashable] = set()
        self.roles = {tensor["name"]: tensor for tensor in layout.config.tensors}
        training = {module: module.training for module in network.modules()}
        try:
            graph = fx.symbolic_trace(network.eval())
            with torch.no_grad():
                ShapeProp(graph).propagate(example.to(next(network.parameters()).device))
        except Exception as error:  # whatever a forward of the user's own makes of the tracer
            raise UnknownSymmetryError(f"{type(network).__name__} cannot be traced: {error!s:.300}") from error
        finally:
            for module, mode in training.items():
                module.training = mode
        self.modules: Mapping[str, nn.Module] = dict(graph.named_modules())
        values: dict[fx.Node, Any] = {}
        for node in graph.graph.nodes:
            values[node] = self._follow(node, values)

    def groups(self) -> list[Group]:
        """Of units that can be exchanged."""
        gathered: dict[Hashable, list[tuple[str, int, int]]] = {}
        for key, members in self.found.items():
            gathered.setdefault(self._root(key), []).extend(members)
        fixed, unscaled = ({self._root(key) for key in keys} for keys in (self.fixed, self.unscaled))
        result = []
        for root, names in gathered.items():
            members = list(dict.fromkeys(names))
            if root in fixed or not all(self.roles[name]["role"] == "generated" for name, _, _ in members):
                continue
            made = {member: self._member(*member) for member in members}
            units = {one.shape[one.axis] // one.repeat for one in made.values()}
            if len(units) != 1 or any(one.shape[one.axis] % one.repeat for one in made.values()):
                raise UnknownSymmetryError(f"`{members[0][0]}` and what takes its outputs have different units.")
            group = Group(units.pop(), list(made.values()))
            producers, consumers = self.scaled.get(root, (set(), set()))
            if root not in unscaled and producers and consumers:
                group.producers = [one for (name, axis, _), one in made.items() if (name, axis) in producers]
                group.consumers = [made[member] for member in members if member in consumers]
            if group.units > 1:
                result.append(group)
        return result

    def _member(self, name: str, axis: int, repeat: int) -> Member:
        return Member(self.layout.slices[name], tuple(self.roles[name]["shape"]), axis, repeat)

    def _root(self, key: Hashable) -> Hashable:
        while (parent := self.parents.get(key, key)) != key:
            key = parent
        return key

    def _unite(self, one: Hashable, other: Hashable) -> None:
        one, other = self._root(one), self._root(other)
        if one != other:
            self.parents[other] = one
            mine, theirs = (self.scaled.pop(key, (set(), set())) for key in (one, other))
            self.scaled[one] = mine[0] | theirs[0], mine[1] | theirs[1]

    def _note(self, key: Hashable, name: str, axis: int, repeat: int) -> None:
        if name in self.roles:
            owner = self.roles[name].get("tied_to", name)
            place: Hashable = (owner, axis)
            # A tensor that is used twice has the same units both times.
            self.found.setdefault(key, []).append((owner, axis, repeat))
            self._unite(key, place)

    def _follow(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        inputs = [values[one] for one in node.all_input_nodes]
        known = [one for one in inputs if isinstance(one, _Value)]
        if node.op == "placeholder":
            return _Value("input")
        if node.op == "output":
            for value in known:
                self.fixed.add(value.key)
            return None
        if node.op == "call_module":
            return self._module(node, self.modules[str(node.target)], inputs)
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        if node.target in SCALED_FUNCTIONS or (node.op == "call_method" and name in SCALED_METHODS):
            return _Value(known[0].key, known[0].repeat, known[0].producers)
        if node.target in OTHER_FUNCTIONS or (node.op == "call_method" and name in OTHER_METHODS):
            return self._unscaled(known[0])
        if name in SUMS and len(known) == len(inputs) == 2 and known[0].repeat == known[1].repeat:
            self._unite(known[0].key, known[1].key)
            return _Value(known[0].key, known[0].repeat, known[0].producers | known[1].producers)
        if name in ("flatten", "view", "reshape") and known:
            return self._flattened(node, known[0])
        if name == "mean" and _dims(node) and 1 not in _dims(node) and 0 not in _dims(node):
            return _Value(known[0].key, known[0].repeat, known[0].producers)
        if name == "size" or (name == "getattr" and node.args[1] == "shape") or (name == "getitem" and not known):
            return None  # a number
        raise UnknownSymmetryError(f"{name} is not known to leave hidden units apart.")

    def _module(self, node: fx.Node, module: nn.Module, inputs: list[Any]) -> _Value:
        target, value = str(node.target), inputs[0]
        if not isinstance(value, _Value) or len(inputs) != 1:
            raise UnknownSymmetryError(f"{target} takes something else than one activation.")
        if isinstance(module, LINEAR):
            if isinstance(module, nn.Linear) and len(node.meta["tensor_meta"].shape) != 2:
                raise UnknownSymmetryError(f"{target} is a linear layer of several places.")
            return self._linear(target, module, value)
        if isinstance(module, BATCH_NORMS):
            own = [name for name, _ in (*module.named_parameters(), *module.named_buffers()) if "batches" not in name]
            for name in own:
                self._note(value.key, f"{target}.{name}", 0, value.repeat)
            if not module.affine:
                return self._unscaled(value)
            if not value.direct or len(node.all_input_nodes[0].users) > 1:
                self.unscaled.add(value.key)  # what it normalizes would have to be scaled, and its epsilon is not
            return _Value(value.key, value.repeat, frozenset({(f"{target}.weight", 0), (f"{target}.bias", 0)}))
        if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1:
            for name, _ in module.named_parameters():
                self._note(value.key, f"{target}.{name}", 0, value.repeat)
            return self._unscaled(value)
        if isinstance(module, nn.Flatten):
            return self._flattened(node, value)
        if isinstance(module, SCALED_MODULES):
            return _Value(value.key, value.repeat, value.producers)
        if isinstance(module, OTHER_MODULES):
            return self._unscaled(value)
        raise UnknownSymmetryError(f"{type(module).__name__} ({target}) is not known to leave hidden units apart.")

    def _linear(self, target: str, module: Any, value: _Value) -> _Value:
        convolution = not isinstance(module, nn.Linear)
        if convolution and module.groups != 1:
            raise UnknownSymmetryError(f"{target} is a convolution of {module.groups} groups.")
        weight = f"{target}.weight"
        self._note(value.key, weight, 1, value.repeat)
        owner = self.roles.get(weight, {}).get("tied_to", weight)
        producers, consumers = self.scaled.setdefault(self._root(value.key), (set(), set()))
        producers |= value.producers
        consumers.add((owner, 1, value.repeat))
        key: Hashable = (owner, 0)
        self._note(key, weight, 0, 1)
        made = {(weight, 0)}
        if module.bias is not None:
            self._note(key, f"{target}.bias", 0, 1)
            made.add((f"{target}.bias", 0))
        return _Value(key, 1, frozenset(made), direct=True)

    def _flattened(self, node: fx.Node, value: _Value) -> _Value:
        before = node.all_input_nodes[0].meta["tensor_meta"].shape
        after = node.meta["tensor_meta"].shape
        if len(after) != 2 or after[0] != before[0]:
            raise UnknownSymmetryError("An activation is flattened otherwise than to a row an example.")
        return _Value(value.key, value.repeat * math.prod(before[2:]), value.producers)

    def _unscaled(self, value: _Value) -> _Value:
        self.unscaled.add(value.key)
        return _Value(value.key, value.repeat)


def _dims(node: fx.Node) -> tuple[int, ...]:
    """Of a mean, from the front."""
    dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    shape = node.all_input_nodes[0].meta["tensor_meta"].shape
    listed = dims if isinstance(dims, tuple | list) else [] if dims is None else [dims]
    return tuple(one % len(shape) for one in listed if isinstance(one, int))
