"""What comes out of each component, and what its configuration says: as diffusers asks of its models."""

import copy
import json
import pickle

import pytest
import torch

from .cases import CASES, NUM_PARAMETERS, assert_same_tensors, randn


@torch.no_grad()
def test_the_output_has_the_documented_shape(case):
    output = case.run(case.model().eval())
    assert output.shape == case.output_shape
    assert output.isfinite().all()


@torch.no_grad()
def test_the_same_inputs_give_the_same_output(case):
    model = case.model().eval()
    torch.testing.assert_close(case.run(model), case.run(model), atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_tuple_comes_out_when_no_dict_is_wanted(case):
    model = case.model().eval()
    output = model(**case.inputs(), return_dict=False)
    assert isinstance(output, tuple)
    torch.testing.assert_close(output[0], case.run(model), atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_dict_output_has_the_sample_by_name(trainable):
    model = trainable.model().eval()
    output = model(**trainable.inputs())
    assert list(output) == ["sample"]
    assert output.sample is output["sample"] is output[0]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_inference_in_half_precision_is_finite_and_close(trainable, dtype):
    model = trainable.model().eval()
    expected = trainable.run(model)
    model.to(dtype)
    inputs = {
        name: value.to(dtype) if value.is_floating_point() else value for name, value in trainable.inputs().items()
    }
    output = model(**inputs)[0]
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), expected, atol=0.05, rtol=0.05)


@torch.no_grad()
@pytest.mark.parametrize("timestep", [7, 7.0, torch.tensor(7), torch.tensor([7]), torch.tensor([7, 7])])
def test_the_unet_takes_timesteps_in_every_form_that_schedulers_give_them(timestep):
    model, sample = CASES["unet"].model().eval(), randn(2, 2, 6)
    expected = model(sample, torch.tensor([7, 7])).sample
    torch.testing.assert_close(model(sample, timestep).sample, expected, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 2, 5, 6, 13])
def test_the_unet_takes_latents_of_any_length(length):
    assert CASES["unet"].model()(randn(3, 2, length), 5).sample.shape == (3, 2, length)


@torch.no_grad()
def test_an_autoencoder_samples_its_posterior_with_the_generator_it_gets(autoencoder):
    model, sample = autoencoder.model().eval(), randn(2, NUM_PARAMETERS)

    def reconstruct(seed: int) -> torch.Tensor:
        return model(sample, sample_posterior=True, generator=torch.Generator().manual_seed(seed)).sample

    assert torch.equal(reconstruct(0), reconstruct(0))
    assert not torch.equal(reconstruct(0), reconstruct(1))


@torch.no_grad()
def test_an_autoencoder_encodes_and_decodes_to_the_documented_types(autoencoder):
    model = autoencoder.model().eval()
    posterior = model.encode(randn(2, NUM_PARAMETERS)).latent_dist
    latents = posterior.mode()
    assert latents.shape == (2, *model.latent_shape) == (2, 2, 6)
    assert torch.equal(model.encode(randn(2, NUM_PARAMETERS), return_dict=False)[0].mode(), latents)
    assert torch.equal(model.decode(latents, return_dict=False)[0], model.decode(latents).sample)


def test_an_autoencoder_refuses_vectors_of_another_length(autoencoder):
    with pytest.raises(ValueError, match=r"shape \[B, 42\], found \[2, 41\]"):
        autoencoder.model().encode(torch.zeros(2, 41))


def test_the_config_rebuilds_the_model(case, tmp_path):
    model = case.model()
    model.save_config(tmp_path)
    rebuilt = type(model).from_config(type(model).load_config(tmp_path))
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in rebuilt.state_dict().items()} == expected
    assert json.loads(rebuilt.to_json_string()) == json.loads(model.to_json_string())


def test_attributes_are_those_of_the_model_and_config_values_warn(case, caplog):
    model = case.model()
    model.dummy_attribute = 5
    model.register_to_config(test_attribute=5)
    assert model.dummy_attribute == 5
    assert model.save_pretrained == getattr(model, "save_pretrained")  # noqa: B009
    assert caplog.text == ""
    with pytest.warns(FutureWarning):
        assert model.test_attribute == 5
    with pytest.raises(AttributeError, match=f"'{type(model).__name__}' object has no attribute 'does_not_exist'"):
        _ = model.does_not_exist


@torch.no_grad()
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_and_a_pickle_are_the_same_model(case, clone):
    model = case.model().eval()
    twin = clone(model)
    assert_same_tensors(model, twin)
    assert torch.equal(case.run(twin), case.run(model))
    assert dict(twin.config) == dict(model.config)
