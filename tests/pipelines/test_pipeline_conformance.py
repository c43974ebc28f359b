"""The pipeline behaves as diffusers asks of each of its pipelines: what its common pipeline test suites check."""

import copy
import inspect
import json
import os
import pickle
from collections.abc import Callable

import diffusers
import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import CpuOffload
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline
from diffusers.callbacks import PipelineCallback
from diffusers.schedulers import KarrasDiffusionSchedulers
from torch import nn

from pdiff_hf import (
    NeuralNetworkDiffusionPipeline,
    ParameterAutoencoderKL,
    ParameterLayout,
    ParameterUNet1DModel,
)

from ..conftest import random_network, small_network


LATENT_SHAPE = (2, 6)
OFFLOADING = [{"offload_type": "block_level", "num_blocks_per_group": 1}, {"offload_type": "leaf_level"}]


def build_components(patterns: tuple[str, ...] = ("*",)) -> dict:
    torch.manual_seed(0)
    networks = [random_network(seed).state_dict() for seed in range(6)]
    layout = ParameterLayout.from_state_dict(networks[0], patterns)
    layout.fit([torch.stack([layout.flatten(network) for network in networks])])
    channels, length = LATENT_SHAPE
    return {
        "unet": ParameterUNet1DModel(
            in_channels=channels, out_channels=channels, block_out_channels=(8, 16), norm_num_groups=4
        ).eval(),
        "vae": ParameterAutoencoderKL(
            num_parameters=layout.vector_size,
            latent_channels=channels,
            latent_length=length,
        ).eval(),
        "layout": layout,
        "scheduler": DDPMScheduler(num_train_timesteps=1000, clip_sample=False),
    }


def build_pipe(**components) -> NeuralNetworkDiffusionPipeline:
    pipe = NeuralNetworkDiffusionPipeline(**(build_components() | components))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe() -> NeuralNetworkDiffusionPipeline:
    return build_pipe()


def run(pipe: NeuralNetworkDiffusionPipeline, **changes):
    """The first output for the standard inputs, with some of them changed."""
    inputs = {"num_networks": 2, "num_inference_steps": 3, "generator": seeded(0), "output_type": "pt"}
    return pipe(**(inputs | changes))[0]


def models_of(pipe: NeuralNetworkDiffusionPipeline) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_same(one: torch.Tensor, other: torch.Tensor, atol: float = 1e-4) -> None:
    assert one.isfinite().all()
    torch.testing.assert_close(one, other, atol=atol, rtol=0)


# ---- the call


def test_every_argument_of_the_call_is_optional_and_named_as_in_diffusers():
    parameters = inspect.signature(NeuralNetworkDiffusionPipeline.__call__).parameters
    optional = {name for name, parameter in parameters.items() if parameter.default is not inspect.Parameter.empty}
    assert optional == set(parameters) - {"self"}
    assert optional >= {"num_networks", "num_inference_steps", "generator", "latents", "output_type", "return_dict"}
    assert optional >= {"callback_on_step_end", "callback_on_step_end_tensor_inputs"}


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
    assert latents.shape == (2, *LATENT_SHAPE)
    assert_same(pipe.layout(pipe.vae.decode(latents).sample).vectors, vectors)


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


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7])
def test_the_batch_size_does_not_change_the_networks(pipe, batch_size):
    assert_same(run(pipe, num_networks=5, batch_size=batch_size), run(pipe, num_networks=5))


def test_latents_passed_in_are_where_denoising_starts(pipe):
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)  # draws no noise of its own
    latents = torch.randn(2, *LATENT_SHAPE, generator=seeded(0))
    kept = latents.clone()
    assert torch.equal(run(pipe, latents=latents), run(pipe, latents=latents, generator=seeded(5)))
    assert not torch.equal(run(pipe, latents=latents), run(pipe, latents=latents + 1))
    assert torch.equal(latents, kept)


@pytest.mark.parametrize("scheduler", KarrasDiffusionSchedulers, ids=lambda scheduler: scheduler.name)
def test_all_schedulers_of_diffusers_for_discrete_timesteps_can_be_swapped_in(pipe, scheduler):
    if scheduler.name == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde")
    pipe.scheduler.register_to_config(skip_prk_steps=True)
    pipe.scheduler = getattr(diffusers, scheduler.name).from_config(pipe.scheduler.config)
    vectors = run(pipe, num_inference_steps=5)
    assert vectors.shape == (2, pipe.layout.vector_size)
    assert vectors.isfinite().all()


# ---- callbacks


def test_callbacks_get_the_tensors_they_ask_for_at_each_step(pipe):
    seen = []

    def note(pipe, step, timestep, tensors):
        seen.append((step, int(timestep), sorted(tensors)))
        return tensors

    run(pipe, callback_on_step_end=note, callback_on_step_end_tensor_inputs=pipe._callback_tensor_inputs)
    timesteps = pipe.scheduler.timesteps.tolist()
    assert seen == [(step, timestep, ["latents"]) for step, timestep in enumerate(timesteps)]


def test_callbacks_may_ask_for_no_tensors_and_return_none(pipe):
    seen = []
    vectors = run(
        pipe,
        callback_on_step_end=lambda pipe, step, timestep, tensors: seen.append(dict(tensors)),
        callback_on_step_end_tensor_inputs=[],
    )
    assert seen == [{}, {}, {}]
    assert_same(vectors, run(pipe))


def test_a_callback_replaces_the_latents_of_the_last_step(pipe):
    def zero_at_the_end(pipe, step, timestep, tensors):
        if step == pipe.num_timesteps - 1:
            tensors["latents"] = torch.zeros_like(tensors["latents"])
        return tensors

    latents = run(pipe, output_type="latent", callback_on_step_end=zero_at_the_end)
    assert latents.abs().sum() == 0
    assert pipe.num_timesteps == 3


def test_callbacks_asking_for_unknown_tensors_are_refused(pipe):
    with pytest.raises(ValueError, match=r"callback_on_step_end_tensor_inputs.*latents"):
        run(pipe, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])


def test_the_callback_objects_of_diffusers_serve(pipe):
    class Counter(PipelineCallback):
        tensor_inputs = ["latents"]
        steps = 0

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            self.steps += 1
            assert step_index < pipeline.num_timesteps
            return callback_kwargs

    counter = Counter(cutoff_step_ratio=0.5)
    run(pipe, callback_on_step_end=counter)
    assert counter.steps == 3


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler"])
def test_the_progress_bar_counts_denoising_steps_and_can_be_disabled(pipe, capfd, scheduler):
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    run(pipe, num_inference_steps=5)
    assert capfd.readouterr().err == ""
    pipe.set_progress_bar_config(disable=False, desc="networks")
    run(pipe, num_inference_steps=5)
    printed = capfd.readouterr().err
    assert "networks: 100%" in printed
    assert "5/5" in printed


# ---- saving and loading


@pytest.mark.parametrize("safe_serialization", [True, False])
def test_a_saved_pipeline_gives_the_same_networks(pipe, tmp_path, safe_serialization):
    expected = run(pipe)
    pipe.save_pretrained(tmp_path, safe_serialization=safe_serialization)
    loaded = NeuralNetworkDiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert_same(run(loaded), expected, atol=5e-4)
    assert {name: type(part) for name, part in loaded.components.items()} == {
        name: type(part) for name, part in pipe.components.items()
    }


def test_loading_names_each_component_it_loads(pipe, tmp_path, caplog):
    pipe.save_pretrained(tmp_path)
    diffusers.logging.enable_propagation()
    diffusers.logging.set_verbosity_info()
    try:
        NeuralNetworkDiffusionPipeline.from_pretrained(tmp_path)
    finally:
        diffusers.logging.set_verbosity_warning()
        diffusers.logging.disable_propagation()
    assert all(f"Loaded {name} as" in caplog.text for name in pipe.components)


def test_a_loaded_pipeline_can_be_saved_and_loaded_again(pipe, tmp_path):
    expected = run(pipe)
    for generation in ("first", "second"):
        pipe.save_pretrained(tmp_path / generation)
        pipe = NeuralNetworkDiffusionPipeline.from_pretrained(tmp_path / generation)
        pipe.set_progress_bar_config(disable=True)
    assert_same(run(pipe), expected)
    indices = [json.loads((tmp_path / name / "model_index.json").read_text()) for name in ("first", "second")]
    assert indices[0] == indices[1]


def test_the_folder_loads_by_the_code_it_holds(pipe, tmp_path):
    expected = run(pipe)
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is not NeuralNetworkDiffusionPipeline
    assert type(loaded).__name__ == "NeuralNetworkDiffusionPipeline"
    assert_same(run(loaded), expected)


def test_a_component_can_be_given_when_loading(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = NeuralNetworkDiffusionPipeline.from_pretrained(tmp_path, unet=pipe.unet)
    assert loaded.unet is pipe.unet
    assert loaded.vae is not pipe.vae


@pytest.mark.parametrize("name", ["torch_dtype", "dtype"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_half_precision_pipeline_survives_saving(tmp_path, dtype, name):
    pipe = build_pipe().to(dtype=dtype)
    expected = run(pipe)
    pipe.save_pretrained(tmp_path)
    loaded = NeuralNetworkDiffusionPipeline.from_pretrained(tmp_path, **{name: dtype})
    loaded.set_progress_bar_config(disable=True)
    for component in ("unet", "vae", "layout"):
        assert getattr(loaded, component).dtype == dtype
    assert_same(run(loaded), expected, atol=1e-2)


def test_a_pipeline_loads_in_half_precision_with_exact_statistics(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = NeuralNetworkDiffusionPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert {loaded.unet.dtype, loaded.vae.dtype, loaded.layout.dtype} == {torch.bfloat16}
    assert loaded.layout.mean.dtype == torch.float32
    assert torch.equal(loaded.layout.mean, pipe.layout.mean)
    assert torch.equal(loaded.layout.std, pipe.layout.std)


@pytest.mark.parametrize("safe_serialization", [True, False])
def test_a_variant_is_written_for_each_model_and_loads(pipe, tmp_path, safe_serialization):
    pipe.save_pretrained(tmp_path, variant="fp16", safe_serialization=safe_serialization)
    models = models_of(pipe)
    for name in models:
        assert any(file.split(".")[1].startswith("fp16") for file in os.listdir(tmp_path / name))
    loaded = NeuralNetworkDiffusionPipeline.from_pretrained(tmp_path, variant="fp16")
    for name, model in models.items():
        for key, tensor in getattr(loaded, name).state_dict().items():
            assert torch.equal(tensor, model.state_dict()[key])


def test_a_variant_that_was_not_saved_is_refused(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="You are trying to load the model files of the `variant=fp16`"):
        NeuralNetworkDiffusionPipeline.from_pretrained(tmp_path, variant="fp16")


def test_a_pipeline_saves_in_shards(pipe, tmp_path):
    expected = run(pipe)
    pipe.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 1
    loaded = NeuralNetworkDiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert_same(run(loaded), expected)


@pytest.mark.parametrize("kwargs", [{"low_cpu_mem_usage": False}, {"device_map": "cpu"}], ids=str)
def test_a_pipeline_loads_with_and_without_meta_tensors(pipe, tmp_path, kwargs):
    expected = run(pipe)
    pipe.save_pretrained(tmp_path)
    loaded = NeuralNetworkDiffusionPipeline.from_pretrained(tmp_path, **kwargs)
    loaded.set_progress_bar_config(disable=True)
    assert_same(run(loaded), expected)


# ---- components


def test_the_components_rebuild_the_pipeline(pipe):
    assert set(pipe.components) == {"unet", "vae", "layout", "scheduler"}
    twin = NeuralNetworkDiffusionPipeline(**pipe.components)
    twin.set_progress_bar_config(disable=True)
    assert twin.unet is pipe.unet
    assert_same(run(twin), run(pipe))


def test_a_pipeline_made_from_another_shares_its_components(pipe):
    expected = run(pipe)
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    twin = NeuralNetworkDiffusionPipeline.from_pipe(pipe)
    other = NeuralNetworkDiffusionPipeline.from_pipe(pipe, scheduler=scheduler)
    for made in (twin, other):
        made.set_progress_bar_config(disable=True)
        assert made.unet is pipe.unet
    assert_same(run(twin), expected, atol=1e-3)
    assert other.scheduler is scheduler
    assert_same(run(pipe), expected, atol=1e-3)
    public = {key: value for key, value in pipe.config.items() if not key.startswith("_")}
    assert {key: value for key, value in twin.config.items() if not key.startswith("_")} == public


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_a_copy_and_a_pickle_give_the_same_networks(pipe, clone):
    twin = clone(pipe)
    assert twin.unet is not pipe.unet
    assert torch.equal(run(twin), run(pipe))


# ---- devices and dtypes


def test_a_pipeline_moves_to_a_device_with_all_its_models(pipe):
    pipe.to("meta")
    assert {model.device.type for model in models_of(pipe).values()} == {"meta"}
    assert pipe.device.type == "meta"


def test_a_pipeline_is_cast_with_all_its_models(pipe):
    models = models_of(pipe).values()
    assert {model.dtype for model in models} == {torch.float32}
    pipe.to(dtype=torch.float16)
    assert {model.dtype for model in models} == {torch.float16}
    assert pipe.dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("output_type", ["pt", "latent"])
def test_half_precision_inference_gives_finite_networks(pipe, dtype, output_type):
    output = run(pipe.to(dtype=dtype), output_type=output_type)
    assert output.isfinite().all()
    assert output.dtype == (torch.float32 if output_type == "pt" else dtype)


def test_layerwise_cast_denoisers_give_finite_networks(pipe):
    pipe.to(dtype=torch.bfloat16)
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    assert run(pipe).isfinite().all()


def test_a_compiled_denoiser_gives_the_same_networks(pipe, tmp_path):
    expected = run(pipe)
    torch.compiler.reset()
    pipe.unet = torch.compile(pipe.unet, fullgraph=True, backend="aot_eager")
    assert_same(run(pipe), expected)
    pipe.save_pretrained(tmp_path)
    loaded = NeuralNetworkDiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.unet) is ParameterUNet1DModel
    assert_same(run(loaded), expected)


# ---- offloading


def offload_by_model(pipe: NeuralNetworkDiffusionPipeline) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def offload_by_layer(pipe: NeuralNetworkDiffusionPipeline) -> None:
    # `enable_sequential_cpu_offload` without its device, which it makes "cpu:0" and Accelerate then mishandles.
    pipe.remove_all_hooks()
    for name, model in models_of(pipe).items():
        if name not in pipe._exclude_from_cpu_offload:
            cpu_offload(model, torch.device("cpu"), offload_buffers=len(model._parameters) > 0)


@pytest.mark.parametrize("offload", [offload_by_model, offload_by_layer])
def test_offloading_does_not_change_the_networks_and_can_be_repeated(pipe, offload: Callable):
    expected = run(pipe)
    for _ in range(2):
        offload(pipe)
        assert pipe._execution_device.type == "cpu"
        assert_same(run(pipe), expected)
        assert_same(run(pipe), expected)


def test_model_offloading_hooks_every_model(pipe):
    offload_by_model(pipe)
    run(pipe)
    for name, model in models_of(pipe).items():
        assert name in pipe._exclude_from_cpu_offload or isinstance(model._hf_hook, CpuOffload)


def test_sequential_offloading_leaves_no_weights_on_the_device(pipe):
    offload_by_layer(pipe)
    run(pipe)
    for name, model in models_of(pipe).items():
        assert name in pipe._exclude_from_cpu_offload or model.device.type == "meta"


@pytest.mark.parametrize("kwargs", OFFLOADING, ids=["block", "leaf"])
@pytest.mark.parametrize("to_disk", [False, True])
@pytest.mark.parametrize("output_type", ["pt", "state_dict"])
def test_group_offloading_does_not_change_the_networks(tmp_path, kwargs, to_disk, output_type):
    pipe = build_pipe(**build_components(("0.*", "1.*")))
    expected = run(pipe, output_type=output_type)
    expected = copy.deepcopy(expected)
    for name in ("unet", "vae", "layout"):
        disk = {"offload_to_disk_path": str(tmp_path / name)} if to_disk else {}
        getattr(pipe, name).enable_group_offload(torch.device("cpu"), **kwargs, **disk)
    for _ in range(2):
        found = run(pipe, output_type=output_type)
        if output_type == "pt":
            assert_same(found, expected)
        else:
            for one, other in zip(found, expected, strict=True):
                assert all(torch.allclose(one[name], other[name], atol=1e-4) for name in other)


@pytest.mark.parametrize("kwargs", OFFLOADING, ids=["block", "leaf"])
def test_a_pipeline_offloads_all_its_models_by_groups(pipe, kwargs):
    expected = run(pipe)
    pipe.enable_group_offload(torch.device("cpu"), exclude_modules=["vae"], **kwargs)
    assert_same(run(pipe), expected)
    pipe = build_pipe()
    pipe.enable_group_offload(torch.device("cpu"), **kwargs)
    assert_same(run(pipe), expected)


# ---- training


def test_the_components_of_a_loaded_pipeline_can_be_trained_further(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    unet = NeuralNetworkDiffusionPipeline.from_pretrained(tmp_path).unet.train()
    unet.enable_gradient_checkpointing()
    scheduler = DDPMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    latents, noise = torch.randn(2, 4, *LATENT_SHAPE, generator=seeded(0))
    timesteps = torch.tensor([0, 10, 500, 999])
    prediction = unet(scheduler.add_noise(latents, noise, timesteps), timesteps).sample
    nn.functional.mse_loss(prediction, noise).backward()
    assert all(parameter.grad.isfinite().all() for parameter in unet.parameters())


def test_sampling_leaves_no_gradients_and_no_modes_changed(pipe):
    pipe.unet.train()
    vectors = run(pipe)
    assert not vectors.requires_grad
    assert pipe.unet.training
    assert all(parameter.grad is None for parameter in pipe.unet.parameters())
