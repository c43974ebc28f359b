"""The components behave as diffusers asks of each of its models: what its common model test suites check."""

import copy
import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from accelerate.hooks import attach_align_device_hook_on_blocks, remove_hook_from_module
from diffusers.models.modeling_utils import ModelMixin
from diffusers.training_utils import EMAModel
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, constants
from torch import nn
from torch.nn import functional as F

from pdiff_hf import ParameterAutoencoderKL, ParameterLayout, ParameterUNet1DModel

from ..conftest import random_network


NUM_PARAMETERS = 42  # of the small network


@dataclass
class Case:
    """A small model, its inputs, the shape of its output, and the blocks that gradient checkpointing repeats."""

    build: Callable[[], ModelMixin]
    inputs: Callable[[], dict]
    output_shape: tuple[int, ...]
    block: str = ""

    def model(self) -> ModelMixin:
        torch.manual_seed(0)
        return self.build()

    def run(self, model: ModelMixin, **changes) -> torch.Tensor:
        output = model(**self.inputs(), **changes)
        return output if isinstance(output, torch.Tensor) else output[0]


def build_unet() -> ParameterUNet1DModel:
    return ParameterUNet1DModel(in_channels=2, out_channels=2, block_out_channels=(8, 16), norm_num_groups=4)


def build_vae() -> ParameterAutoencoderKL:
    return ParameterAutoencoderKL(
        num_parameters=NUM_PARAMETERS,
        latent_channels=2,
        latent_length=6,
    )


def build_layout() -> ParameterLayout:
    networks = [random_network(seed).state_dict() for seed in range(6)]
    layout = ParameterLayout.from_state_dict(networks[0], ("0.*", "1.*"))
    return layout.fit([torch.stack([layout.flatten(network) for network in networks])])


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


CASES = {
    "unet": Case(
        build_unet,
        lambda: {"sample": randn(2, 2, 6), "timestep": torch.tensor([3, 500])},
        output_shape=(2, 2, 6),
        block="TimeResidualBlock1D",
    ),
    "vae": Case(
        build_vae,
        lambda: {"sample": randn(2, NUM_PARAMETERS)},
        output_shape=(2, NUM_PARAMETERS),
    ),
    "layout": Case(build_layout, lambda: {"normalized": randn(2, 32)}, output_shape=(2, 32)),
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OFFLOADING = [{"offload_type": "block_level", "num_blocks_per_group": 1}, {"offload_type": "leaf_level"}]


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(params=["unet", "vae"])
def trainable(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def assert_same_tensors(one: nn.Module, other: nn.Module) -> None:
    expected, found = one.state_dict(), other.state_dict()
    assert list(expected) == list(found)
    for name in expected:
        assert expected[name].dtype == found[name].dtype
        assert torch.equal(expected[name], found[name]), name


def loss_of(case: Case, model: ModelMixin) -> torch.Tensor:
    output = case.run(model)
    return F.mse_loss(output.float(), randn(*output.shape, seed=1))


# ---- outputs


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
def test_the_vae_samples_its_posterior_with_the_generator_it_gets():
    model, sample = CASES["vae"].model().eval(), randn(2, NUM_PARAMETERS)

    def reconstruct(seed: int) -> torch.Tensor:
        return model(sample, sample_posterior=True, generator=torch.Generator().manual_seed(seed)).sample

    assert torch.equal(reconstruct(0), reconstruct(0))
    assert not torch.equal(reconstruct(0), reconstruct(1))


@torch.no_grad()
def test_the_vae_encodes_and_decodes_to_the_documented_types():
    model = CASES["vae"].model().eval()
    posterior = model.encode(randn(2, NUM_PARAMETERS)).latent_dist
    latents = posterior.mode()
    assert latents.shape == (2, 2, 6)
    assert torch.equal(model.encode(randn(2, NUM_PARAMETERS), return_dict=False)[0].mode(), latents)
    assert torch.equal(model.decode(latents, return_dict=False)[0], model.decode(latents).sample)


# ---- configuration and attributes


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


# ---- saving and loading


@torch.no_grad()
@pytest.mark.parametrize("safe_serialization", [True, False])
def test_a_saved_model_loads_unchanged(case, tmp_path, safe_serialization):
    model = case.model().eval()
    model.save_pretrained(tmp_path, safe_serialization=safe_serialization)
    loaded = type(model).from_pretrained(tmp_path)
    assert not loaded.training
    assert_same_tensors(model, loaded)
    torch.testing.assert_close(case.run(loaded), case.run(model), atol=5e-5, rtol=5e-5)


@torch.no_grad()
def test_a_variant_is_loaded_by_its_name_and_only_by_it(case, tmp_path):
    model = case.model().eval()
    model.save_pretrained(tmp_path, variant="fp16")
    with pytest.raises(OSError, match=r"Error no file named diffusion_pytorch_model\.bin found in directory"):
        type(model).from_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, variant="fp16")
    torch.testing.assert_close(case.run(loaded), case.run(model), atol=5e-5, rtol=0)


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_model_loads_in_the_dtype_it_was_saved_in(case, tmp_path, dtype, low_cpu_mem_usage):
    model = case.model().to(dtype)
    assert model.dtype == dtype
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, torch_dtype=dtype)
    assert loaded.dtype == dtype
    assert_same_tensors(model, loaded)


@pytest.mark.parametrize("name", ["torch_dtype", "dtype"])
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_a_model_saved_in_float32_loads_in_the_dtype_asked_for(case, tmp_path, name, low_cpu_mem_usage):
    case.model().save_pretrained(tmp_path)
    model_class = type(case.model())
    loaded = model_class.from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, **{name: torch.bfloat16})
    assert loaded.dtype == torch.bfloat16
    assert_same_tensors(loaded, case.model().to(torch.bfloat16))


def test_loading_tells_what_was_missing_and_unexpected(case, tmp_path):
    model = case.model()
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert_same_tensors(model, loaded)
    assert info["missing_keys"] == info["unexpected_keys"] == info["mismatched_keys"] == []


@torch.no_grad()
@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("parallel", [False, True])
def test_sharded_checkpoints_load_unchanged(case, tmp_path, variant, parallel, monkeypatch):
    model = case.model().eval()
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    model.save_pretrained(tmp_path, max_shard_size=int(0.75 * size), variant=variant)
    index_name = SAFE_WEIGHTS_INDEX_NAME.replace(".index", f".index.{variant}") if variant else SAFE_WEIGHTS_INDEX_NAME
    weight_map = json.loads((tmp_path / index_name).read_text())["weight_map"]
    assert {path.name for path in tmp_path.glob("*.safetensors")} == set(weight_map.values())
    assert len(set(weight_map.values())) > 1

    monkeypatch.setattr(constants, "HF_ENABLE_PARALLEL_LOADING", parallel)
    loaded = type(model).from_pretrained(tmp_path, variant=variant)
    assert_same_tensors(model, loaded)
    torch.testing.assert_close(case.run(loaded), case.run(model), atol=1e-5, rtol=0)


# ---- training


def test_all_parameters_get_gradients(trainable):
    model = trainable.model().train()
    loss_of(trainable, model).backward()
    for name, parameter in model.named_parameters():
        if "to_moments" not in name:  # the half that makes the variances is not part of the mode
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
    first = loss_of(trainable, model).item()
    for _ in range(10):
        optimizer.zero_grad()
        loss_of(trainable, model).backward()
        optimizer.step()
    assert loss_of(trainable, model).item() < first


def test_an_ema_follows_training_and_survives_a_checkpoint(trainable, tmp_path):
    model = trainable.model().train()
    ema = EMAModel(model.parameters(), decay=0.5, model_cls=type(model), model_config=model.config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        loss_of(trainable, model).backward()
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


def test_gradient_checkpointing_is_off_until_it_is_enabled():
    model = CASES["unet"].model()
    assert not model.is_gradient_checkpointing
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing
    model.disable_gradient_checkpointing()
    assert not model.is_gradient_checkpointing


@pytest.mark.parametrize("name", ["vae", "layout"])
def test_gradient_checkpointing_is_refused_where_there_is_nothing_to_checkpoint(name):
    with pytest.raises(ValueError, match="does not support gradient checkpointing"):
        CASES[name].model().enable_gradient_checkpointing()


def test_gradient_checkpointing_changes_neither_loss_nor_gradients():
    trainable = CASES["unet"]
    plain, checkpointed = trainable.model(), trainable.model()
    checkpointed.enable_gradient_checkpointing()
    calls = []
    checkpointed._gradient_checkpointing_func = record_calls(checkpointed._gradient_checkpointing_func, calls)
    losses = [loss_of(trainable, model) for model in (plain, checkpointed)]
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
    assert output.dtype == torch.bfloat16
    loss.backward()
    for parameter in model.parameters():
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


# ---- memory


@torch.no_grad()
@pytest.mark.parametrize("kwargs", OFFLOADING, ids=["block", "leaf"])
@pytest.mark.parametrize("to_disk", [False, True])
def test_group_offloading_does_not_change_the_output(case, tmp_path, kwargs, to_disk):
    model = case.model().eval()
    expected = case.run(model)
    disk = {"offload_to_disk_path": str(tmp_path)} if to_disk else {}
    model.enable_group_offload(torch.device("cpu"), **kwargs, **disk)
    for _ in range(2):
        torch.testing.assert_close(case.run(model), expected, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("kwargs", OFFLOADING, ids=["block", "leaf"])
def test_the_vae_encodes_and_decodes_while_it_is_offloaded(tmp_path, kwargs):
    model, sample = CASES["vae"].model().eval(), randn(2, NUM_PARAMETERS)
    latents = model.encode(sample).latent_dist.mode()
    decoded = model.decode(latents).sample
    model.enable_group_offload(torch.device("cpu"), offload_to_disk_path=str(tmp_path), **kwargs)
    torch.testing.assert_close(model.encode(sample).latent_dist.mode(), latents, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.decode(latents).sample, decoded, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("kwargs", OFFLOADING, ids=["block", "leaf"])
def test_the_layout_keeps_its_frozen_tensors_while_it_is_offloaded(tmp_path, kwargs):
    layout = CASES["layout"].model()
    expected = {name: tensor.clone() for name, tensor in layout.frozen_state_dict().items()}
    layout.enable_group_offload(torch.device("cpu"), offload_to_disk_path=str(tmp_path), **kwargs)
    layout(randn(2, 32))
    frozen = layout.frozen_state_dict()
    assert all(torch.equal(frozen[name], expected[name]) for name in expected)


@torch.no_grad()
def test_a_model_runs_partly_from_disk_on_a_small_memory_budget(tmp_path):
    trainable = CASES["unet"]  # the autoencoder is one tensor
    model = trainable.model().eval()
    expected = trainable.run(model)
    model.save_pretrained(tmp_path / "model")
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    loaded = type(model).from_pretrained(
        tmp_path / "model", device_map="auto", max_memory={"cpu": size // 2}, offload_folder=str(tmp_path / "offload")
    )
    assert set(loaded.hf_device_map.values()) == {"cpu", "disk"}
    torch.testing.assert_close(trainable.run(loaded), expected, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize(("name", "start"), [("unet", "mid_block"), ("unet", "up_blocks")])
def test_a_model_runs_on_two_devices(name, start):
    # The meta device stands for a second accelerator: it computes shapes and refuses tensors of other devices.
    model = CASES[name].model().eval()
    children = [child for child, _ in model.named_children()]
    first = children[: children.index(start)]
    device_map = {child: "cpu" if child in first else "meta" for child in children}
    for child, device in device_map.items():
        getattr(model, child).to(device)
    attach_align_device_hook_on_blocks(model, execution_device=device_map)
    remove_hook_from_module(model)  # it would bring the output back to the CPU
    output = CASES[name].run(model)
    assert output.device.type == "meta"
    assert output.shape == CASES[name].output_shape


@torch.no_grad()
def test_a_model_loads_with_a_device_map(case, tmp_path):
    model = case.model().eval()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, device_map="cpu")
    torch.testing.assert_close(case.run(loaded), case.run(model), atol=1e-5, rtol=0)


@torch.no_grad()
def test_layerwise_casting_shrinks_the_model():
    trainable = CASES["unet"]
    footprints = []
    for storage, compute in [
        (torch.float32, torch.float32),
        (torch.float8_e4m3fn, torch.float32),
        (torch.float8_e4m3fn, torch.bfloat16),
    ]:
        model = trainable.model().eval().to(compute)
        model.enable_layerwise_casting(storage_dtype=storage, compute_dtype=compute)
        inputs = {
            name: value.to(compute) if value.is_floating_point() else value
            for name, value in trainable.inputs().items()
        }
        output = model(**inputs)[0]
        assert output.dtype == compute
        assert output.isfinite().all()
        footprints.append(model.get_memory_footprint())
    assert footprints[0] > footprints[1] > footprints[2]


@pytest.mark.parametrize("storage", [torch.float16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_a_layerwise_cast_model_can_be_trained_under_autocast(trainable, storage):
    model = trainable.model().train()
    model.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
    with torch.autocast("cpu"):
        loss = loss_of(trainable, model)
    loss.backward()
    assert any(parameter.grad is not None for parameter in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("kwargs", OFFLOADING, ids=["block", "leaf"])
def test_group_offloading_and_layerwise_casting_go_together(case, kwargs):
    model = case.model().eval()
    expected = case.run(model)
    model.enable_group_offload(torch.device("cpu"), **kwargs)
    model.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
    torch.testing.assert_close(case.run(model), expected, atol=0.02, rtol=0.02)


# ---- compilation


@pytest.fixture
def clean_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@torch.no_grad()
@pytest.mark.usefixtures("clean_compiler")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_model_compiles_to_one_graph_and_only_once(case, backend):
    model = case.model().eval()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            torch.testing.assert_close(case.run(compiled), case.run(model), atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.usefixtures("clean_compiler")
def test_the_compiled_unet_serves_all_shapes():
    model = CASES["unet"].model().eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        # The first batch differs from the channels: the compiler takes equal sizes for the same one.
        for batch, length in ((3, 6), (4, 8), (5, 10)):
            sample, timestep = randn(batch, 2, length), torch.arange(batch)
            torch.testing.assert_close(compiled(sample, timestep)[0], model(sample, timestep)[0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.usefixtures("clean_compiler")
@pytest.mark.parametrize("name", ["vae", "layout"])
def test_the_compiled_model_serves_all_batch_sizes(name):
    model = CASES[name].model().eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    width = CASES[name].output_shape[1]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (3, 4, 7):
            inputs = randn(batch, width)
            expected, found = model(inputs), compiled(inputs)
            if name == "vae":
                expected, found = expected[0], found[0]
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.usefixtures("clean_compiler")
def test_the_repeated_blocks_compile_once(trainable):
    model = trainable.model().eval()
    if not model._repeated_blocks:
        pytest.skip("no blocks to compile one by one")
    expected = trainable.run(model)
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    with torch._dynamo.config.patch({limit: 1}):
        for _ in range(2):
            torch.testing.assert_close(trainable.run(model), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.usefixtures("clean_compiler")
def test_a_group_offloaded_model_compiles(case):
    model = case.model().eval()
    expected = case.run(model)
    model.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    model.compile(backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(case.run(model), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_model_exports_ahead_of_time(case):
    model = case.model().eval()
    exported = torch.export.export(model, args=(), kwargs=case.inputs()).module()
    torch.testing.assert_close(case.run(exported), case.run(model), atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.slow
def test_the_exported_model_is_packaged_and_runs(case, tmp_path):
    model = case.model().eval()
    exported = torch.export.export(model, args=(), kwargs=case.inputs())
    package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"))
    assert Path(package).exists()
    loaded = torch._inductor.aoti_load_package(package, run_single_threaded=True)
    torch.testing.assert_close(case.run(loaded), case.run(model), atol=1e-4, rtol=1e-4)


# ---- the layout, which has statistics instead of parameters


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


# ---- the autoencoder, which is fitted instead of trained


def columns_of(vectors: torch.Tensor, width: int) -> Callable[[], list[torch.Tensor]]:
    return lambda: list(vectors.split(width, dim=1))


@torch.no_grad()
def test_a_fitted_autoencoder_keeps_all_that_its_networks_span():
    vectors = randn(7, NUM_PARAMETERS)
    vectors = vectors - vectors.mean(0)
    vae = CASES["vae"].model()
    shares = vae.fit(columns_of(vectors, 10))
    assert shares.sum().item() == pytest.approx(1, abs=1e-5)
    assert (shares[:6] > 0).all()
    assert not shares[6:].any()
    torch.testing.assert_close(vae(vectors).sample, vectors, atol=1e-4, rtol=0)
    latents = vae.encode(vectors).latent_dist.mean.flatten(1)
    assert latents[:, :6].square().mean().item() == pytest.approx(1, abs=1e-4)
    assert not latents[:, 6:].any()


@torch.no_grad()
def test_the_fit_is_the_principal_subspace_whatever_the_width_of_the_columns():
    vectors = randn(30, NUM_PARAMETERS) * torch.linspace(3, 0.1, NUM_PARAMETERS)
    vectors = vectors - vectors.mean(0)
    one, other = CASES["vae"].model(), CASES["vae"].model()
    shares = one.fit(columns_of(vectors, NUM_PARAMETERS))
    other.fit(columns_of(vectors, 5))
    torch.testing.assert_close(one.basis.weight, other.basis.weight, atol=1e-5, rtol=1e-4)
    _, values, directions = torch.linalg.svd(vectors.double(), full_matrices=False)
    torch.testing.assert_close(shares.double(), (values.square() / values.square().sum())[:12], atol=1e-6, rtol=1e-4)
    subspace = directions[:12].T @ directions[:12]
    torch.testing.assert_close(one(vectors).sample.double(), vectors.double() @ subspace, atol=1e-4, rtol=0)
    # What is left over is the variance of the posterior, in units of the latents.
    left = values[12:].square().sum() / (30 * (NUM_PARAMETERS - 12)) / one.basis.scale.double().square()
    assert one.encode(vectors).latent_dist.var[0, 0, 0].item() == pytest.approx(left.item(), rel=1e-3)


def test_networks_that_do_not_differ_cannot_be_encoded():
    with pytest.raises(ValueError, match="do not differ"):
        CASES["vae"].model().fit(columns_of(torch.zeros(3, NUM_PARAMETERS), 10))
