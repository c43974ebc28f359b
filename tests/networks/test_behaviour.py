"""Many networks at once, where gradients have to pass: of architectures that rules know, and of others."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pdiff_hf import ParameterLayout
from pdiff_hf.networks.behaviour import Behaviour, run_at_once
from pdiff_hf.networks.stacked import NotStackableError, StackedNetwork, VmappedNetwork


class Tutorial(nn.Module):
    """Pools by a function, which no rule knows."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(1, 4, 3), nn.Linear(36, 2)

    def forward(self, images):
        return self.linear(torch.flatten(F.max_pool2d(F.relu(self.conv(images)), 2), 1))


class Branching(nn.Linear):
    """Does what its numbers say."""

    def forward(self, inputs):
        return super().forward(inputs) if self.weight.sum() > 0 else inputs[:, : self.out_features]


def flat() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 2))


@pytest.mark.parametrize(
    ("network", "shape", "kind"),
    [
        (flat, (1, 8, 8), StackedNetwork),
        (lambda: flat().bfloat16(), (1, 8, 8), StackedNetwork),
        (flat, (8, 8), VmappedNetwork),  # images without channels
        (Tutorial, (1, 8, 8), VmappedNetwork),
    ],
)
def test_what_networks_do_is_a_loss_whatever_layers_they_have(network, shape, kind):
    networks = [network() for _ in range(3)]
    layout = ParameterLayout.from_state_dict(networks[0].state_dict())
    vectors = torch.stack([layout.flatten(one.state_dict()) for one in networks])
    layout.fit([vectors])
    dtype = next(networks[0].parameters()).dtype
    inputs = torch.randn(20, *shape, dtype=dtype)
    found = run_at_once(networks[0], layout, inputs)
    assert isinstance(found, kind)
    normalized = layout.normalize(vectors).requires_grad_()
    behaviour = Behaviour(found, layout, inputs, normalized.detach())
    outputs = behaviour.outputs(normalized, inputs)
    expected = torch.stack([one(inputs) for one in networks])
    near = 1e-4 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(outputs, expected, rtol=near, atol=near)
    behaviour(normalized, normalized.detach().roll(1, 0), torch.arange(20)).backward()
    assert (normalized.grad.norm(dim=1) > 0).all()


def test_what_depends_on_numbers_is_refused():
    network = Branching(4, 2)
    with pytest.raises(NotStackableError, match="cannot be traced"):
        run_at_once(network, ParameterLayout.from_state_dict(network.state_dict()), torch.ones(3, 4))
