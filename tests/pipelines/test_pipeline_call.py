"""The call behaves as diffusers asks of each of its pipelines, whatever fills the slots."""

import inspect

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn

from pdiff_hf import NeuralNetworkDiffusionPipeline
from pdiff_hf.pipelines.neural_network_diffusion import pipeline as pipeline_module

from ..conftest import small_network
from .cases import assert_same, build_neuron, build_pipe, load, randn, run, seeded


def test_every_argument_of_the_call_is_optional_and_named_as_in_diffusers():
    parameters = inspect.signature(NeuralNetworkDiffusionPipeline.__call__).parameters
    optional = {name for name, parameter in parameters.items() if parameter.default is not inspect.Parameter.empty}
    assert optional == set(parameters) - {"self"}
    assert optional >= {"num_networks", "num_inference_steps", "generator", "latents", "output_type", "return_dict"}
    assert optional >= {"callback_on_step_end", "callback_on_step_end_tensor_inputs", "timesteps", "sigmas", "eta"}


@pytest.mark.parametrize("number", [1, 2, 5])
def test_as_many_networks_come_out_as_were_asked_for(pipe, number):
    assert run(pipe, num_networks=number).shape == (number, pipe.layout.vector_size)


def test_dict_and_tuple_outputs_are_equal(pipe):
    output = pipe(num_inference_steps=2, generator=seeded(0), output_type="pt")
    (vectors,) = pipe(num_inference_steps=2, generator=seeded(0), output_type="pt", return_dict=False)
    assert output.state_dicts is output["state_dicts"] is output[0]
    assert_same(vectors, output.state_dicts)


def test_all_output_types_hold_the_same_networks(pipe):
    vectors = run(pipe)
    array = run(pipe, output_type="np")
    assert isinstance(array, np.ndarray)
    assert_same(torch.from_numpy(array), vectors)

    for state_dict, vector in zip(run(pipe, output_type="state_dict"), vectors, strict=True):
        small_network().load_state_dict(state_dict, strict=True)
        assert_same(pipe.layout.flatten(state_dict), vector)

    latents = run(pipe, output_type="latent")
    assert latents.shape == (2, *pipe.latent_shape)
    assert_same(pipe.decode(latents), vectors)


# ---- seeds


def test_the_same_seed_gives_the_same_networks_and_another_seed_others(pipe):
    assert torch.equal(run(pipe), run(pipe))
    assert not torch.equal(run(pipe), run(pipe, generator=seeded(1)))


def test_without_a_generator_the_global_seed_decides(pipe):
    first, second = (torch.manual_seed(seed) and run(pipe, generator=None) for seed in (0, 0))
    assert torch.equal(first, second)
    assert not torch.equal(first, run(pipe, generator=None))


def test_a_batch_equals_its_networks_one_by_one(pipe):
    batch = run(pipe, num_networks=3, generator=[seeded(seed) for seed in range(3)])
    singles = [run(pipe, num_networks=1, generator=seeded(seed)) for seed in range(3)]
    assert_same(batch, torch.cat(singles))


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 7])
def test_the_chunk_size_does_not_change_the_networks(pipe, chunk_size):
    assert_same(run(pipe, num_networks=5, chunk_size=chunk_size), run(pipe, num_networks=5))


def test_networks_with_many_pairs_of_units_are_made_fewer_at_a_time(monkeypatch):
    pipe = build_pipe("neuron", transformer=build_neuron(pair_channels=64), condition_encoder=None)
    assert (pipe.default_chunk_size, pipe.transformer.pair_values) == (100, 3 * 2 * 64)
    monkeypatch.setattr(pipeline_module, "CHUNK_VALUES", 3 * pipe.transformer.pair_values)
    batches = []
    pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: batches.append(len(args[0])), with_kwargs=True)
    run(pipe, num_networks=7, num_inference_steps=1)
    assert batches == [3, 3, 1]


def test_the_first_networks_stay_the_same_when_more_are_asked_for(pipe):
    assert_same(run(pipe, num_networks=5)[:2], run(pipe, num_networks=2))


def test_latents_passed_in_are_where_denoising_starts(pipe):
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)  # draws no noise of its own
    latents = randn(2, *pipe.latent_shape)
    kept = latents.clone()
    assert torch.equal(run(pipe, latents=latents), run(pipe, latents=latents, generator=seeded(5)))
    assert not torch.equal(run(pipe, latents=latents), run(pipe, latents=latents + 1))
    assert torch.equal(latents, kept)


def test_as_many_networks_come_out_as_latents_or_generators_were_passed():
    pipe = build_pipe()
    assert len(run(pipe, num_networks=None, latents=randn(3, 2, 6))) == 3
    assert len(run(pipe, num_networks=None, generator=[seeded(0), seeded(1)])) == 2
    assert len(run(pipe, num_networks=None)) == 1


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DDPMScheduler])
@pytest.mark.parametrize("parameter_noise", [0.0, 0.5])
def test_double_precision_gives_the_same_networks_for_the_same_seed(pipe, scheduler, parameter_noise):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    expected = run(pipe, parameter_noise=parameter_noise)
    pipe.to(torch.float64)
    assert_same(run(pipe, parameter_noise=parameter_noise), expected, atol=1e-3)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DDPMScheduler])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_starts_from_the_same_noise_and_adds_the_same(pipe, scheduler, dtype):
    if not isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler):
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    expected = run(pipe, output_type="latent")
    latents = run(pipe.to(dtype), output_type="latent").float()
    assert (latents - expected).square().mean().sqrt() < 0.05 * expected.std()


# ---- results and arguments that are refused


@pytest.mark.parametrize("output_type", ["state_dict", "pt", "np", "latent"])
def test_networks_that_are_not_finite_are_refused(pipe, output_type):
    nn.init.constant_(next(iter(pipe.denoiser.parameters())), torch.nan)
    name = type(pipe.scheduler).__name__
    with pytest.raises(ValueError, match=rf"not finite: {name} does not fit this denoiser"):
        run(pipe, output_type=output_type)


@pytest.mark.parametrize("generator", [3, "0", [3, 4]], ids=str)
def test_a_seed_that_is_no_generator_is_refused_with_the_remedy(generator):
    with pytest.raises(
        ValueError, match=r"`generator` has to be a torch\.Generator.*torch\.Generator\(\)\.manual_seed"
    ):
        run(build_pipe(), generator=generator)


@pytest.mark.parametrize("number", [2, None])
@pytest.mark.parametrize("latents", [[[0.0], [1.0]], np.zeros((2, 2, 6))], ids=["list", "array"])
def test_latents_that_are_no_tensor_are_refused(number, latents):
    with pytest.raises(
        ValueError, match=r"`latents` has to be a tensor of shape \(2, 2, 6\), and is a (list|ndarray)"
    ):
        run(build_pipe(), num_networks=number, latents=latents)


def test_latents_of_another_shape_are_refused_by_the_shape_of_the_filled_slots():
    with pytest.raises(ValueError, match=r"shape \(2, 2, 6\); expected \(2, 1, 42\) for these networks"):
        run(build_pipe("unet"), latents=torch.zeros(2, 2, 6))


# ---- modes


def test_sampling_leaves_no_gradients_and_no_modes_changed(pipe):
    pipe.denoiser.train()
    vectors = run(pipe)
    assert not vectors.requires_grad
    assert pipe.denoiser.training
    assert all(parameter.grad is None for parameter in pipe.denoiser.parameters())


def test_the_components_of_a_loaded_pipeline_can_be_trained_further(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    denoiser = load(tmp_path).denoiser.train()
    if denoiser._supports_gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    scheduler = DDPMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    encoder = pipe.condition_encoder
    condition = {} if encoder is None else {"condition": encoder([{}] * 4).detach()}
    latents, noise = randn(2, 4, *pipe.latent_shape)
    timesteps = torch.tensor([0, 10, 500, 999])
    prediction = denoiser(scheduler.add_noise(latents, noise, timesteps), timesteps, **condition, return_dict=False)[0]
    nn.functional.mse_loss(prediction, noise).backward()
    assert all(parameter.grad.isfinite().all() for parameter in denoiser.parameters())
