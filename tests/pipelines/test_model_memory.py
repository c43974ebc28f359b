"""Each component saves memory in all the ways that diffusers knows: offloading, device maps, layerwise casting."""

import pytest
import torch
from accelerate.hooks import attach_align_device_hook_on_blocks, remove_hook_from_module

from pdiff_hf.pipelines.neural_network_diffusion.transformer.neuron_transformer import UnitIndex

from .cases import CASES, NUM_PARAMETERS, OFFLOADING, randn


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
def test_an_autoencoder_encodes_and_decodes_while_it_is_offloaded(autoencoder, tmp_path, kwargs):
    model, sample = autoencoder.model().eval(), randn(2, NUM_PARAMETERS)
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
@pytest.mark.parametrize("name", ["unet", "kl", "neuron"])  # the linear autoencoder is one tensor
def test_a_model_runs_partly_from_disk_on_a_small_memory_budget(name, tmp_path):
    trainable = CASES[name]
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
@pytest.mark.parametrize(
    ("name", "start"), [("unet", "mid_block"), ("unet", "up_blocks"), ("kl", "to_moments"), ("kl", "patch_out")]
)
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


@torch.no_grad()
def test_layerwise_casting_stores_every_weight_of_an_autoencoder_in_the_storage_dtype(autoencoder):
    model = autoencoder.model().eval()
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    for _ in range(2):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float8_e4m3fn}
        assert autoencoder.run(model).dtype == torch.float32


@torch.no_grad()
def test_an_autoencoder_whose_weights_are_cast_by_layers_encodes_and_decodes(autoencoder):
    model, sample = autoencoder.model().eval(), randn(2, NUM_PARAMETERS)
    latents = model.encode(sample).latent_dist.mode()
    decoded = model.decode(latents).sample
    model.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
    torch.testing.assert_close(model.encode(sample).latent_dist.mode(), latents, atol=0.02, rtol=0.02)
    torch.testing.assert_close(model.decode(latents).sample, decoded, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("storage", [torch.float16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_a_layerwise_cast_model_can_be_trained_under_autocast(trainable, storage):
    model = trainable.model().train()
    model.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
    with torch.autocast("cpu"):
        loss = trainable.loss(model)
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


def test_units_that_no_number_belongs_to_are_refused():
    """A small file may claim them, and tokens for all of them would take the memory."""
    tensors = [{"start": 0, "shape": [10], "axes": []}]
    UnitIndex(num_parameters=10, units=[20], tensors=tensors)
    with pytest.raises(ValueError, match="100,000,000 units cannot share 10 parameters"):
        UnitIndex(num_parameters=10, units=[10**8], tensors=tensors)
