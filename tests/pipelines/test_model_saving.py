"""Each component is saved and loaded as diffusers asks of its models."""

import json

import pytest
import torch
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, constants

from .cases import assert_same_tensors


DTYPES = [torch.float32, torch.float16, torch.bfloat16]


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
