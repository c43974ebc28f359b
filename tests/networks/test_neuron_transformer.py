"""The denoiser of hidden units: exchanging units exchanges the result, and nothing else does."""

import pytest
import torch
from torch import nn

from pdiff_hf import ParameterLayout
from pdiff_hf.networks.symmetry import Symmetry
from pdiff_hf.pipelines.neural_network_diffusion import NeuronTransformerModel

from .test_symmetry import ARCHITECTURES


SMALL = {"hidden_size": 16, "num_layers": 2, "num_attention_heads": 2, "pair_channels": 8, "pair_head_dim": 4}


def described(name: str) -> tuple[Symmetry, ParameterLayout]:
    build, shape, *_ = ARCHITECTURES[name]
    network = build()
    layout = ParameterLayout.from_state_dict(network.state_dict())
    return Symmetry(network, layout, torch.randn(shape)), layout


def model_of(symmetry: Symmetry, layout: ParameterLayout, **settings) -> NeuronTransformerModel:
    """With weights everywhere: those of a fresh model predict zero."""
    torch.manual_seed(0)
    model = NeuronTransformerModel(**symmetry.described(layout), **SMALL, **settings).eval()
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.3)
    return model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_exchanging_units_exchanges_the_result(name):
    symmetry, layout = described(name)
    model = model_of(symmetry, layout, with_initial=True, condition_dim=3)
    sample, initial = torch.randn(2, 3, 1, layout.vector_size)
    timesteps, condition = torch.tensor([1000.0, 400.0, 10.0]), torch.randn(3, 3)

    def clean(sample, initial):
        with torch.no_grad():
            return model.predict_clean(sample, timesteps, condition, initial)[:, 0]

    expected = clean(sample, initial)
    assert expected.std() > 0.01
    for group in symmetry.groups:
        order = torch.randperm(group.units).roll(1)

        def moved(vectors, group=group, order=order):
            return symmetry.permute(vectors, group, order)

        found = clean(moved(sample[:, 0])[:, None], moved(initial[:, 0])[:, None])
        torch.testing.assert_close(found, moved(expected), atol=1e-4, rtol=1e-3)
        if not torch.equal(order, torch.arange(group.units)):
            # Units are no copies of each other, and the initialization tells them apart.
            other = clean(sample, moved(initial[:, 0])[:, None])
            assert (other - expected).norm() > 1e-3 * expected.norm()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_number_reaches_the_result(name):
    symmetry, layout = described(name)
    model = model_of(symmetry, layout)
    sample = torch.randn(1, 1, layout.vector_size, requires_grad=True)
    model.predict_clean(sample, 500).square().sum().backward()
    assert (sample.grad != 0).all()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in model.parameters())


def test_the_velocity_leads_to_the_clean_network():
    symmetry, layout = described("three hidden layers")
    model = model_of(symmetry, layout)
    sample = torch.randn(2, 1, layout.vector_size)
    clean = model.predict_clean(sample, 600)
    torch.testing.assert_close(sample - 0.6 * model(sample, 600).sample, clean, atol=1e-4, rtol=1e-3)


def test_a_fresh_model_predicts_the_mean():
    symmetry, layout = described("three hidden layers")
    model = NeuronTransformerModel(**symmetry.described(layout), **SMALL)
    assert (model.predict_clean(torch.randn(2, 1, layout.vector_size), 300) == 0).all()


def test_what_is_told_has_to_be_passed_and_nothing_else():
    symmetry, layout = described("one hidden layer")
    sample = torch.randn(1, 1, layout.vector_size)
    with pytest.raises(ValueError, match="needs `initial`"):
        model_of(symmetry, layout, with_initial=True)(sample, 1)
    with pytest.raises(ValueError, match="takes no `initial`"):
        model_of(symmetry, layout)(sample, 1, initial=sample)
    with pytest.raises(ValueError, match="needs a `condition`"):
        model_of(symmetry, layout, condition_dim=2)(sample, 1)
    with pytest.raises(ValueError, match="takes no `condition`"):
        model_of(symmetry, layout)(sample, 1, condition=torch.zeros(1, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_parameters": 10**12}, "at most"),
        ({"num_parameters": 11}, "hold 10 numbers"),
        ({"units": []}, "1 to 1000 groups"),
        ({"units": [2.0]}, "1 to 1000 groups"),
        ({"tensors": [{"start": 1, "shape": [10], "axes": []}]}, "begins at 1"),
        ({"tensors": [{"start": 0, "shape": [-10, -1], "axes": []}]}, "begins at 0"),
        ({"tensors": [{"start": 0, "shape": [10], "axes": [[0, 0, 3]]}]}, "do not fit"),
        ({"tensors": [{"start": 0, "shape": [10], "axes": [[0, 4, 5]]}]}, "do not fit"),
        ({"tensors": [{"start": 0, "shape": [10], "axes": [[0, 0, 5], [0, 0, 5]]}]}, "do not fit"),
        ({"num_layers": 10**6}, "between 1 and 1000"),
        ({"hidden_size": 30}, "even multiple"),
    ],
)
def test_a_config_that_describes_nothing_is_refused(change, message):
    right = {"num_parameters": 10, "units": [2], "tensors": [{"start": 0, "shape": [10], "axes": [[0, 0, 5]]}]}
    NeuronTransformerModel(**right)
    with pytest.raises(ValueError, match=message):
        NeuronTransformerModel(**(right | change))
