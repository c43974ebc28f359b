"""Schedulers of diffusers can be swapped in, with steps of one's own, and lead to the clean sample."""

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers import KarrasDiffusionSchedulers

from .cases import FILLINGS, LATENT_SHAPE, assert_same, build_linear, build_pipe, randn, run


FLOW_MATCHING = [FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler]


@pytest.fixture(params=[name for name in FILLINGS if name != "neuron"])
def filling(request):
    """Denoisers of discrete timesteps."""
    return request.param


@pytest.mark.parametrize("scheduler", FLOW_MATCHING)
def test_the_schedulers_of_flow_matching_sample_from_a_denoiser_of_networks(scheduler):
    pipe = swapped(build_pipe("neuron"), scheduler)
    vectors = run(pipe, num_inference_steps=5)
    assert vectors.isfinite().all()
    # Euler's last step goes all the way to what the denoiser takes for clean, who is told what it took before.
    if scheduler is FlowMatchEulerDiscreteScheduler:
        start, kept = randn(2, *pipe.latent_shape), []

        def keep(pipe, step, timestep, tensors):
            kept.append((tensors["latents"], timestep))
            return {}

        run(pipe, num_inference_steps=5, latents=start, callback_on_step_end=keep)
        clean, nothing = None, pipe.condition_encoder([{}] * 2)
        with torch.no_grad():
            for latents, (_, timestep) in zip([start, *(latents for latents, _ in kept)], kept, strict=False):
                clean = pipe.transformer.predict_clean(latents, timestep, nothing, previous=clean)
            assert_same(kept[-1][0], clean)
            assert not torch.allclose(clean, pipe.transformer.predict_clean(latents, timestep, nothing), atol=1e-4)


def swapped(pipe, scheduler: type):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    return pipe


@pytest.mark.parametrize("scheduler", KarrasDiffusionSchedulers, ids=lambda scheduler: scheduler.name)
def test_all_schedulers_of_diffusers_for_discrete_timesteps_can_be_swapped_in(pipe, scheduler):
    if scheduler.name == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde")
    pipe.scheduler.register_to_config(skip_prk_steps=True)
    swapped(pipe, getattr(diffusers, scheduler.name))
    vectors = run(pipe, num_inference_steps=5)
    assert vectors.shape == (2, pipe.layout.vector_size)
    assert vectors.isfinite().all()
    assert_same(run(pipe, num_inference_steps=5, chunk_size=1), vectors, atol=1e-3)


# ---- a denoiser that knows the clean sample


class KnowingDenoiser(ModelMixin, ConfigMixin):
    """Predicts the velocity of flow matching, or the noise of diffusion, that leads to one clean sample `[C, L]`."""

    @register_to_config
    def __init__(self, flow_matching: bool, in_channels: int = 2, length: int = 6):
        super().__init__()
        self.register_buffer("clean", randn(in_channels, length, seed=3))
        self.register_buffer("kept", DDPMScheduler().alphas_cumprod)

    def forward(self, sample, timestep, return_dict=True):
        if self.config.flow_matching:
            # sample = (1 - sigma) clean + sigma noise, and the velocity is noise - clean.
            return ((sample - self.clean) / (timestep / 1000),)
        kept = self.kept[int(timestep)]
        return ((sample - kept.sqrt() * self.clean) / (1 - kept).sqrt(),)


def knowing_pipe(scheduler: type, vae: bool = True):
    denoiser = KnowingDenoiser(scheduler in FLOW_MATCHING, *(LATENT_SHAPE if vae else (1, 42)))
    return build_pipe(unet=None, transformer=denoiser, vae=build_linear() if vae else None, scheduler=scheduler())


@pytest.mark.parametrize("steps", [1, 2, 10])
@pytest.mark.parametrize("scheduler", FLOW_MATCHING)
def test_flow_matching_ends_at_the_clean_sample(scheduler, steps):
    pipe = knowing_pipe(scheduler)
    latents = run(pipe, num_networks=3, num_inference_steps=steps, output_type="latent", chunk_size=2)
    assert_same(latents, pipe.transformer.clean.expand(3, 2, 6), atol=1e-5)


@pytest.mark.parametrize("scheduler", FLOW_MATCHING)
def test_flow_matching_of_the_vectors_themselves_ends_at_the_clean_network(scheduler):
    pipe = knowing_pipe(scheduler, vae=False)
    expected = pipe.layout(pipe.transformer.clean).vectors
    assert_same(run(pipe, num_inference_steps=5), expected.expand(2, 42), atol=1e-5)


@pytest.mark.parametrize("scheduler", FLOW_MATCHING)
def test_flow_matching_starts_at_the_latents_that_are_passed_in(scheduler):
    pipe, latents = knowing_pipe(scheduler), randn(2, 2, 6)
    seen = []

    def note(pipe, step, timestep, tensors):
        seen.append(tensors["latents"])
        return tensors

    run(pipe, latents=latents, num_inference_steps=5, callback_on_step_end=note)
    sigma = pipe.scheduler.sigmas[1]
    assert_same(seen[0], (1 - sigma) * pipe.transformer.clean + sigma * latents)


@pytest.mark.parametrize("scheduler", FLOW_MATCHING)
def test_flow_matching_gives_the_same_networks_for_the_same_seed_whatever_the_chunks_and_the_dtype(pipe, scheduler):
    pipe.scheduler = scheduler()
    expected = run(pipe, num_networks=3)
    assert not torch.equal(run(pipe, num_networks=3, generator=torch.Generator().manual_seed(1)), expected)
    assert_same(run(pipe, num_networks=3, chunk_size=2), expected)
    assert_same(run(pipe.to(torch.float64), num_networks=3), expected, atol=1e-3)


@pytest.mark.parametrize(
    "scheduler", [DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler]
)
def test_diffusion_ends_at_the_clean_sample(scheduler):
    pipe = knowing_pipe(scheduler)
    pipe.scheduler.register_to_config(clip_sample=False)
    latents = run(pipe, num_inference_steps=10, output_type="latent")
    assert_same(latents, pipe.transformer.clean.expand(2, 2, 6), atol=0.05)


# ---- steps of one's own


@pytest.mark.parametrize("scheduler", [DDPMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_timesteps_of_ones_own_are_the_steps_where_the_scheduler_takes_them(pipe, scheduler):
    seen = []
    run(
        swapped(pipe, scheduler),
        timesteps=[900, 500, 100, 20],
        callback_on_step_end=lambda pipe, step, timestep, tensors: seen.append(int(timestep)),
    )
    assert seen == [900, 500, 100, 20]
    assert pipe.num_timesteps == 4


@pytest.mark.parametrize("scheduler", [DDPMScheduler, DPMSolverMultistepScheduler])
def test_the_timesteps_that_the_scheduler_chooses_can_be_passed_as_ones_own(pipe, scheduler):
    expected = run(swapped(pipe, scheduler))
    timesteps = pipe.scheduler.timesteps.tolist()
    assert_same(run(pipe, timesteps=timesteps, num_inference_steps=50), expected)


def test_timesteps_of_ones_own_serve_every_chunk(pipe):
    expected = run(pipe, num_networks=3, timesteps=[900, 500, 100])
    assert_same(run(pipe, num_networks=3, timesteps=[900, 500, 100], chunk_size=1), expected)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, UniPCMultistepScheduler])
def test_timesteps_of_ones_own_are_refused_where_the_scheduler_takes_none(scheduler):
    with pytest.raises(ValueError, match=f"{scheduler.__name__} takes no timesteps of one's own"):
        run(swapped(build_pipe(), scheduler), timesteps=[900, 500, 100])


@pytest.mark.parametrize("last", [None, 0.2])
@pytest.mark.parametrize("name", ["sigmas", "timesteps"])
@pytest.mark.parametrize("sigmas", [[1.0, 0.6, 0.3], [1.0, 0.25], [1.0]], ids=str)
def test_steps_of_ones_own_are_the_noise_of_the_steps_where_the_scheduler_takes_them(sigmas, name, last):
    pipe = knowing_pipe(FlowMatchEulerDiscreteScheduler)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, shift_terminal=last)
    given = {name: sigmas if name == "sigmas" else [1000 * sigma for sigma in sigmas]}
    seen, latents = [], randn(2, 2, 6)

    def note(pipe, step, timestep, tensors):
        seen.append((float(timestep), tensors["latents"]))
        return tensors

    run(pipe, **given, latents=latents, callback_on_step_end=note)
    assert pipe.scheduler.config.shift_terminal == last
    assert [timestep for timestep, _ in seen] == pytest.approx([1000 * sigma for sigma in sigmas])
    for (_, found), sigma in zip(seen, [*sigmas[1:], 0.0], strict=True):
        assert_same(found, (1 - sigma) * pipe.transformer.clean + sigma * latents)


@pytest.mark.parametrize("scheduler", [DDPMScheduler, DDIMScheduler])
def test_sigmas_of_ones_own_are_refused_where_the_scheduler_takes_none(scheduler):
    with pytest.raises(ValueError, match=f"{scheduler.__name__} takes no sigmas of one's own"):
        run(swapped(build_pipe(), scheduler), sigmas=[1.0, 0.5])


def test_timesteps_and_sigmas_at_once_are_refused():
    with pytest.raises(ValueError, match="`timesteps` and `sigmas` both set the steps: pass one of them"):
        run(swapped(build_pipe(), EulerDiscreteScheduler), timesteps=[900, 100], sigmas=[10.0, 1.0])


# ---- eta


def test_ddim_with_an_eta_of_1_is_ddpm(pipe):
    expected = run(pipe, num_inference_steps=10)
    assert_same(run(swapped(pipe, DDIMScheduler), num_inference_steps=10, eta=1.0), expected, atol=1e-3)


def test_ddim_adds_no_noise_by_default_and_some_where_eta_says_so(pipe):
    swapped(pipe, DDIMScheduler)
    latents = randn(2, *pipe.latent_shape)
    plain, other, noisy, still = (
        run(pipe, latents=latents, generator=torch.Generator().manual_seed(seed), eta=eta)
        for seed, eta in ((0, 0.0), (1, 0.0), (0, 0.5), (1, 0.5))
    )
    assert torch.equal(plain, other)
    assert not torch.allclose(noisy, plain, atol=1e-4)
    assert not torch.allclose(noisy, still, atol=1e-4)


def test_the_noise_of_eta_is_each_networks_own_whatever_the_chunk_size(pipe):
    swapped(pipe, DDIMScheduler)
    assert_same(run(pipe, num_networks=3, eta=1.0, chunk_size=2), run(pipe, num_networks=3, eta=1.0))


@pytest.mark.parametrize("scheduler", [DDPMScheduler, DPMSolverMultistepScheduler])
def test_other_schedulers_ignore_eta(pipe, scheduler):
    swapped(pipe, scheduler)
    assert torch.equal(run(pipe, eta=1.0), run(pipe))
