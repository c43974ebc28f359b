"""How differently networks behave, as a loss."""

import copy

import torch
from torch import nn
from torch.nn import functional as F

from ..pipelines.neural_network_diffusion import ParameterLayout
from ..zoo import evenly
from .canonical import relative_change, rounding
from .stacked import NotStackableError, StackedNetwork, VmappedNetwork, side_by_side, stack


# Inputs, evenly picked, and networks that tell the variance of outputs.
VARIANCE_INPUTS, VARIANCE_NETWORKS = 256, 64


def run_at_once(network: nn.Module, layout: ParameterLayout, inputs: torch.Tensor) -> StackedNetwork | VmappedNetwork:
    r"""
    What runs many networks at once, tried on two of them: by rules, or by `torch.vmap` where these have a gap.

    Args:
        network (`nn.Module`): The architecture, which is copied.
        layout (`ParameterLayout`): Of its parameters.
        inputs (`torch.Tensor`): Examples, `[E, ...]`.

    Raises:
        [`NotStackableError`]: neither gives what the network does.
    """
    network = copy.deepcopy(network).eval().cpu()
    layout, inputs = copy.deepcopy(layout).cpu(), inputs[:2].cpu()
    weights = stack(layout, layout.flatten(network.state_dict()).float().expand(2, -1))
    reason: Exception | None = None
    with torch.no_grad():
        expected = network(inputs)
        for kind in (side_by_side, VmappedNetwork):
            try:
                found = kind(network)
                outputs = found(weights, inputs[None])
                same = outputs.shape == (2, *expected.shape)
                if same and relative_change(expected, outputs[1]) <= rounding(network):
                    return found
            except Exception as error:  # whatever a forward of the user's own makes of either
                reason = reason or error
    raise NotStackableError(str(reason or "Many at once predict something else."))


class Behaviour:
    r"""
    How differently networks behave: the mean squared difference of their outputs, relative to the variance of the
    outputs over examples.

    Args:
        network (`StackedNetwork` or `VmappedNetwork`): The architecture.
        layout (`ParameterLayout`): With its statistics.
        inputs (`torch.Tensor`): Training inputs, `[E, ...]`; their targets are not needed.
        some (`torch.Tensor`): Normalized networks, `[n, P]`, whose outputs tell the variance.
        count (`int`, *optional*, defaults to 64): Inputs a step.
    """

    def __init__(
        self,
        network: StackedNetwork | VmappedNetwork,
        layout: ParameterLayout,
        inputs: torch.Tensor,
        some: torch.Tensor,
        count: int = 64,
    ):
        self.network, self.layout, self.inputs, self.count = network.to(layout.device), layout, inputs, count
        with torch.no_grad():
            outputs = self.outputs(some.to(layout.device), inputs[list(evenly(len(inputs), VARIANCE_INPUTS))])
        # One number for all: processes see other networks of a batch each.
        self.variance = outputs.var(dim=1).mean().clamp_min(1e-12)

    def outputs(self, normalized: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        """Of networks `[N, P]` for examples `[E, ...]`: `[N, E, ...]`."""
        return self.network(stack(self.layout, self.layout(normalized.float()).vectors), inputs[None])

    def __call__(self, ours: torch.Tensor, stored: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Of normalized vectors, both `[N, P]`, on these inputs, `[E]`."""
        with torch.no_grad(), torch.autocast(ours.device.type, enabled=False):
            expected = self.outputs(stored, self.inputs[indices])
        return self.difference(ours, expected, indices)

    def difference(self, ours: torch.Tensor, expected: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Of normalized vectors, `[N, P]`, from outputs, `[N, E, ...]`, on these inputs, `[E]`."""
        with torch.autocast(ours.device.type, enabled=False):  # small products, whose errors add up
            return F.mse_loss(self.outputs(ours, self.inputs[indices]), expected) / self.variance

    def draw(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Indices of inputs for so many networks, `[count, E]`: a row each, since processes share them, all alike."""
        indices = torch.randint(len(self.inputs), (self.count,), generator=generator, device=generator.device)
        return indices.expand(count, -1)
