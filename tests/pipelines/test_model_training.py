"""Each component with weights can be trained as diffusers asks of its models."""

from collections.abc import Callable

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch.nn import functional as F

from .cases import CASES, assert_same_tensors, randn


def test_all_parameters_get_gradients(trainable):
    model = trainable.model().train()
    trainable.loss(model).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0, name


def test_gradients_flow_through_the_layout_to_what_it_gets():
    normalized = randn(2, 32).requires_grad_()
    CASES["layout"].model()(normalized).vectors.sum().backward()
    assert normalized.grad.isfinite().all()
    assert list(CASES["layout"].model().parameters()) == []


def test_training_lowers_the_loss(trainable):
    model = trainable.model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    first = trainable.loss(model).item()
    for _ in range(10):
        optimizer.zero_grad()
        trainable.loss(model).backward()
        optimizer.step()
    assert trainable.loss(model).item() < first


def test_an_ema_follows_training_and_survives_a_checkpoint(trainable, tmp_path):
    model = trainable.model().train()
    ema = EMAModel(model.parameters(), decay=0.5, model_cls=type(model), model_config=model.config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        trainable.loss(model).backward()
        optimizer.step()
        ema.step(model.parameters())
    averaged = trainable.model()
    ema.copy_to(averaged.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(averaged.parameters(), model.parameters(), strict=True))

    ema.save_pretrained(tmp_path)
    restored = EMAModel.from_pretrained(tmp_path, type(model))
    assert restored.optimization_step == 3
    assert all(torch.equal(a, b) for a, b in zip(restored.shadow_params, averaged.parameters(), strict=True))
    assert_same_tensors(type(model).from_pretrained(tmp_path), averaged)


@pytest.mark.parametrize("name", ["unet", "kl", "neuron"])
def test_gradient_checkpointing_is_off_until_it_is_enabled(name):
    model = CASES[name].model()
    assert not model.is_gradient_checkpointing
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing
    model.disable_gradient_checkpointing()
    assert not model.is_gradient_checkpointing


@pytest.mark.parametrize("name", ["linear", "layout"])
def test_gradient_checkpointing_is_refused_where_there_is_nothing_to_checkpoint(name):
    with pytest.raises(ValueError, match="does not support gradient checkpointing"):
        CASES[name].model().enable_gradient_checkpointing()


@pytest.mark.parametrize("name", ["unet", "kl", "neuron"])
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(name):
    trainable = CASES[name]
    plain, checkpointed = trainable.model(), trainable.model()
    checkpointed.enable_gradient_checkpointing()
    calls = []
    checkpointed._gradient_checkpointing_func = record_calls(checkpointed._gradient_checkpointing_func, calls)
    losses = [trainable.loss(model) for model in (plain, checkpointed)]
    assert abs(losses[0] - losses[1]) < 1e-5
    for loss in losses:
        loss.backward()
    for one, other in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=5e-5, rtol=0)
    repeated = [module for module in plain.modules() if type(module).__name__ == trainable.block]
    assert len(calls) == len(repeated)


def record_calls(function: Callable, calls: list) -> Callable:
    def recording(*args, **kwargs):
        calls.append(args[0])
        return function(*args, **kwargs)

    return recording


def test_training_under_bfloat16_autocast_gives_finite_float32_gradients(trainable):
    model = trainable.model().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = trainable.run(model)
        loss = F.mse_loss(output.float(), randn(*output.shape, seed=1))
    # The velocity divides by the noise level, in the precision of the sample.
    assert output.dtype == (torch.float32 if trainable is CASES["neuron"] else torch.bfloat16)
    loss.backward()
    for parameter in model.parameters():
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()
