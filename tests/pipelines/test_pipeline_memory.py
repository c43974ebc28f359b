"""The pipeline moves, casts, compiles and offloads as diffusers asks of its pipelines, whatever fills the slots."""

import copy
from collections.abc import Callable

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import CpuOffload

from pdiff_hf import NeuralNetworkDiffusionPipeline

from .cases import (
    FILLINGS,
    OFFLOADING,
    assert_same,
    build_components,
    build_pipe,
    denoiser_slot,
    load,
    models_of,
    run,
)


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
    assert output.dtype == torch.float32


@pytest.mark.parametrize("slot", ["denoiser", "vae"])
def test_components_that_are_cast_by_layers_give_finite_networks(pipe, slot):
    if getattr(pipe, slot) is None:
        pytest.skip("the slot is empty")
    pipe.to(dtype=torch.bfloat16)
    getattr(pipe, slot).enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    assert run(pipe).isfinite().all()


def test_one_component_in_another_precision_serves(pipe):
    expected = run(pipe, output_type="latent")
    pipe.denoiser.to(torch.float64)
    assert run(pipe, output_type="latent").shape == expected.shape
    assert run(pipe).dtype == torch.float32


# ---- compilation


@pytest.mark.usefixtures("clean_compiler")
def test_a_compiled_denoiser_gives_the_same_networks(pipe, tmp_path):
    expected, denoiser_class = run(pipe), type(pipe.denoiser)
    setattr(pipe, denoiser_slot(pipe), torch.compile(pipe.denoiser, fullgraph=True, backend="aot_eager"))
    assert_same(run(pipe), expected)
    pipe.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert type(loaded.denoiser).__name__ == denoiser_class.__name__
    assert_same(run(loaded), expected)


@pytest.mark.usefixtures("clean_compiler")
@pytest.mark.parametrize("filling", ["unet-linear", "unet-kl"])
def test_a_pipeline_whose_blocks_are_compiled_gives_the_same_networks(filling):
    pipe = build_pipe(filling)
    expected = run(pipe)
    for model in (pipe.unet, pipe.vae):
        model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    assert_same(run(pipe), expected)


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
@pytest.mark.parametrize("filling", FILLINGS)
def test_group_offloading_does_not_change_the_networks(tmp_path, filling, kwargs, to_disk, output_type):
    pipe = build_pipe(**dict.fromkeys(("unet", "vae")) | build_components(filling, ("0.*", "1.*")))
    expected = run(pipe, output_type=output_type)
    expected = copy.deepcopy(expected)
    for name, model in models_of(pipe).items():
        disk = {"offload_to_disk_path": str(tmp_path / name)} if to_disk else {}
        model.enable_group_offload(torch.device("cpu"), **kwargs, **disk)
    for _ in range(2):
        found = run(pipe, output_type=output_type)
        if output_type == "pt":
            assert_same(found, expected)
        else:
            for one, other in zip(found, expected, strict=True):
                assert all(torch.allclose(one[name], other[name], atol=1e-4) for name in other)


@pytest.mark.parametrize("kwargs", OFFLOADING, ids=["block", "leaf"])
@pytest.mark.parametrize("excluded", [[], ["vae"], ["layout"]], ids=str)
def test_a_pipeline_offloads_all_its_models_by_groups(pipe, excluded, kwargs):
    expected = run(pipe)
    pipe.enable_group_offload(torch.device("cpu"), exclude_modules=excluded, **kwargs)
    assert_same(run(pipe), expected)
