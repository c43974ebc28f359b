"""The pipeline is saved and loaded as diffusers asks of each of its pipelines, whatever fills the slots."""

import copy
import json
import os
import pickle

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline

from pdiff_hf import NeuralNetworkDiffusionPipeline

from .cases import SLOTS, TRUSTED, assert_same, build_pipe, denoiser_slot, load, models_of, quiet, run


@pytest.mark.parametrize("safe_serialization", [True, False])
def test_a_saved_pipeline_gives_the_same_networks(pipe, tmp_path, safe_serialization):
    expected = run(pipe)
    pipe.save_pretrained(tmp_path, safe_serialization=safe_serialization)
    loaded = load(tmp_path)
    assert_same(run(loaded), expected, atol=5e-4)
    assert {name: type(part).__name__ for name, part in loaded.components.items()} == {
        name: type(part).__name__ for name, part in pipe.components.items()
    }


def test_components_of_this_package_are_loaded_by_its_own_classes(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    own = {name: type(part) for name, part in pipe.components.items() if "tests" not in type(part).__module__}
    assert {name: type(getattr(loaded, name)) for name in own} == own


def test_loading_names_each_component_it_loads(pipe, tmp_path, caplog):
    pipe.save_pretrained(tmp_path)
    with propagated_logs():
        diffusers.logging.set_verbosity_info()
        load(tmp_path)
    filled = [name for name, part in pipe.components.items() if part is not None]
    assert all(f"Loaded {name} as" in caplog.text for name in filled)


@pytest.mark.parametrize("own", [True, False], ids=["package", "folder"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_loading_with_a_dtype_warns_of_nothing(pipe, tmp_path, caplog, dtype, own):
    pipe.save_pretrained(tmp_path)
    with propagated_logs():
        if own:
            load(tmp_path, torch_dtype=dtype)
        else:
            DiffusionPipeline.from_pretrained(tmp_path, torch_dtype=dtype, **TRUSTED)
    warnings = [record.getMessage() for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    assert [message for message in warnings if "`trust_remote_code` is enabled" not in message] == []


class propagated_logs:  # noqa: N801
    """Diffusers' messages reach `caplog`."""

    def __enter__(self):
        diffusers.logging.enable_propagation()

    def __exit__(self, *_):
        diffusers.logging.set_verbosity_warning()
        diffusers.logging.disable_propagation()


def test_a_loaded_pipeline_can_be_saved_and_loaded_again(pipe, tmp_path):
    expected = run(pipe)
    for generation in ("first", "second"):
        pipe.save_pretrained(tmp_path / generation)
        pipe = load(tmp_path / generation)
    assert_same(run(pipe), expected)
    indices = [json.loads((tmp_path / name / "model_index.json").read_text()) for name in ("first", "second")]
    assert indices[0] == indices[1]


def test_the_folder_loads_by_the_code_it_holds(pipe, tmp_path):
    expected = run(pipe)
    pipe.save_pretrained(tmp_path)
    loaded = quiet(DiffusionPipeline.from_pretrained(tmp_path, **TRUSTED))
    assert type(loaded) is not NeuralNetworkDiffusionPipeline
    assert type(loaded).__name__ == "NeuralNetworkDiffusionPipeline"
    assert_same(run(loaded), expected)


@pytest.mark.parametrize("filling", ["unet-linear", "unet-kl", "unet"])
def test_a_component_can_be_given_when_loading(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    slot = denoiser_slot(pipe)
    loaded = load(tmp_path, **{slot: pipe.denoiser})
    assert loaded.denoiser is pipe.denoiser
    assert loaded.layout is not pipe.layout


@pytest.mark.parametrize("name", ["torch_dtype", "dtype"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_half_precision_pipeline_survives_saving(pipe, tmp_path, dtype, name):
    pipe.to(dtype=dtype)
    expected = run(pipe)
    pipe.save_pretrained(tmp_path)
    loaded = load(tmp_path, **{name: dtype})
    assert {model.dtype for model in models_of(loaded).values()} == {dtype}
    assert_same(run(loaded), expected, atol=1e-2)


def test_a_pipeline_loads_in_half_precision_with_exact_statistics(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = load(tmp_path, torch_dtype=torch.bfloat16)
    assert {model.dtype for model in models_of(loaded).values()} == {torch.bfloat16}
    assert loaded.layout.mean.dtype == torch.float32
    assert torch.equal(loaded.layout.mean, pipe.layout.mean)
    assert torch.equal(loaded.layout.std, pipe.layout.std)


@pytest.mark.parametrize("safe_serialization", [True, False])
def test_a_variant_is_written_for_each_model_and_loads(pipe, tmp_path, safe_serialization):
    pipe.save_pretrained(tmp_path, variant="fp16", safe_serialization=safe_serialization)
    models = models_of(pipe)
    for name in models:
        assert any(file.split(".")[1].startswith("fp16") for file in os.listdir(tmp_path / name))
    loaded = load(tmp_path, variant="fp16")
    for name, model in models.items():
        for key, tensor in getattr(loaded, name).state_dict().items():
            assert torch.equal(tensor, model.state_dict()[key])


def test_a_variant_that_was_not_saved_is_refused(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="You are trying to load the model files of the `variant=fp16`"):
        load(tmp_path, variant="fp16")


def test_a_pipeline_saves_in_shards(pipe, tmp_path):
    expected = run(pipe)
    pipe.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list((tmp_path / denoiser_slot(pipe)).glob("*.safetensors"))) > 1
    assert_same(run(load(tmp_path)), expected)


@pytest.mark.parametrize("kwargs", [{"low_cpu_mem_usage": False}, {"device_map": "cpu"}], ids=str)
def test_a_pipeline_loads_with_and_without_meta_tensors(pipe, tmp_path, kwargs):
    expected = run(pipe)
    pipe.save_pretrained(tmp_path)
    assert_same(run(load(tmp_path, **kwargs)), expected)


# ---- components


def test_the_components_rebuild_the_pipeline(pipe):
    assert set(pipe.components) == SLOTS
    twin = quiet(NeuralNetworkDiffusionPipeline(**pipe.components))
    assert twin.denoiser is pipe.denoiser
    assert_same(run(twin), run(pipe))


def test_a_pipeline_made_from_another_shares_its_components(pipe):
    expected = run(pipe)
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    twin = quiet(NeuralNetworkDiffusionPipeline.from_pipe(pipe))
    other = quiet(NeuralNetworkDiffusionPipeline.from_pipe(pipe, scheduler=scheduler))
    for made in (twin, other):
        assert {name: getattr(made, name) for name in models_of(pipe)} == models_of(pipe)
    assert_same(run(twin), expected, atol=1e-3)
    assert other.scheduler is scheduler
    assert_same(run(pipe), expected, atol=1e-3)
    public = {key: value for key, value in pipe.config.items() if not key.startswith("_")}
    assert {key: value for key, value in twin.config.items() if not key.startswith("_")} == public


def test_a_pipeline_made_from_another_may_take_another_denoiser(tmp_path):
    pipe, donor = build_pipe("unet-linear"), build_pipe("transformer")
    made = quiet(NeuralNetworkDiffusionPipeline.from_pipe(pipe, unet=None, transformer=donor.transformer))
    assert made.denoiser is donor.transformer
    assert made.vae is pipe.vae


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_a_copy_and_a_pickle_give_the_same_networks(pipe, clone):
    twin = clone(pipe)
    assert twin.denoiser is not pipe.denoiser
    assert torch.equal(run(twin), run(pipe))
