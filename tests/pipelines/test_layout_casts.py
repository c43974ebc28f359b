"""The layout, which has statistics instead of parameters, keeps them exactly on every way."""

import copy

import pytest
import torch
from torch import nn

from .cases import CASES, assert_same_tensors, randn


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_casting_the_layout_changes_its_dtype_and_none_of_its_numbers(dtype):
    layout, cast = CASES["layout"].model(), CASES["layout"].model().to(dtype)
    assert cast.dtype == dtype
    assert cast.normalize(layout(randn(2, 32)).vectors).dtype == dtype
    assert_same_tensors(layout, cast)
    assert torch.equal(cast(randn(2, 32)).vectors, layout(randn(2, 32)).vectors)
    assert cast(randn(2, 32)).vectors.dtype == torch.float32
    assert_same_tensors(layout, cast.half().float())


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double])
def test_the_shorthands_for_casting_do_the_same(cast):
    layout = CASES["layout"].model()
    expected = copy.deepcopy(layout)
    cast(layout)
    assert layout.dtype != torch.float32
    assert_same_tensors(layout, expected)


def test_the_layout_moves_between_devices_as_a_whole():
    layout = CASES["layout"].model().to("meta", torch.bfloat16)
    assert layout.dtype == torch.bfloat16
    assert {tensor.device.type for tensor in layout.buffers()} == {"meta"}
    assert {tensor.dtype for tensor in layout.state_dict().values()} == {torch.float32, torch.bool, torch.int64}


def test_generated_networks_are_whole_on_the_device_of_the_vectors():
    layout = CASES["layout"].model()
    (network,) = layout.unflatten(torch.empty(1, 32, device="meta"))
    assert {tensor.device.type for tensor in network.values()} == {"meta"}
