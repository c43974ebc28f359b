"""On an accelerator, where there is one: components, pipelines and stages do there what they do on the CPU."""

import copy
from dataclasses import replace

import pytest
import torch

from pdiff_hf import (
    CollectConfig,
    EvaluateConfig,
    GenerateConfig,
    NeuralNetworkDiffusionPipeline,
    NeuronTrainConfig,
    TrainConfig,
    load_pipeline,
    run_collect,
    run_evaluate,
    run_generate,
    run_train,
)
from pdiff_hf.networks.adapted import lora
from pdiff_hf.networks.predictor import in_float32
from pdiff_hf.parallel import processes

from .cases import OFFLOADING, Case, assert_same, denoiser_slot, load, models_of, quiet, run, seeded


pytestmark = pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator")
TRAININGS = {
    "linear": TrainConfig(autoencoder="linear", unet_steps=60, block_out_channels=(16, 16)),
    "kl": TrainConfig(autoencoder_steps=20, behaviour_weight=0.1, unet_steps=20, block_out_channels=(16, 16)),
    "neuron": NeuronTrainConfig(
        hidden_size=16, num_layers=2, num_attention_heads=2, batch_size=16, transformer_steps=20
    ),
}


@pytest.fixture(autouse=True)
def exact():
    with in_float32():
        yield


@pytest.fixture
def device() -> torch.device:
    return torch.accelerator.current_accelerator()


def moved(case: Case, device: torch.device, dtype: torch.dtype = torch.float32) -> Case:
    """The same model, with inputs of this device."""
    inputs = case.inputs()

    def there() -> dict:
        return {name: value.to(device, dtype if value.is_floating_point() else None) for name, value in inputs.items()}

    return Case(case.build, there, case.output_shape, case.block, case.graphs)


# ---- components


@torch.no_grad()
def test_a_component_gives_the_same_there(case, device):
    model = case.model().eval()
    expected = case.run(model)
    output = moved(case, device).run(model.to(device))
    assert output.device.type == device.type
    assert_same(output.cpu(), expected)


def test_a_component_has_the_same_gradients_there(trainable, device):
    model = trainable.model()
    other = copy.deepcopy(model).to(device)
    trainable.loss(model).backward()
    moved(trainable, device).loss(other).backward()
    for one, expected in zip(other.parameters(), model.parameters(), strict=True):
        if expected.grad is not None:
            assert_same(one.grad.cpu(), expected.grad)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_component_is_about_as_good_in_half_precision(trainable, device, dtype):
    model = trainable.model().eval()
    expected = trainable.run(model)
    output = moved(trainable, device, dtype).run(model.to(device, dtype))
    assert output.dtype == dtype
    assert (output.float().cpu() - expected).square().mean() < 0.01 * expected.square().mean()


@torch.no_grad()
@pytest.mark.usefixtures("clean_compiler")
def test_a_component_compiles_there(trainable, device):
    model, there = trainable.model().eval().to(device), moved(trainable, device)
    expected = there.run(model)
    assert_same(there.run(torch.compile(model, fullgraph=True)), expected)


@torch.no_grad()
def test_a_component_loads_onto_it(case, device, tmp_path):
    model = case.model().eval()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, device_map=str(device))
    assert loaded.device.type == device.type
    assert_same(moved(case, device).run(loaded).cpu(), case.run(model))


def test_an_adapter_begins_as_the_same_there(device):
    base = torch.nn.Sequential(torch.nn.Linear(6, 5))
    torch.manual_seed(0)
    expected = lora(base, ["0"], 2)
    torch.manual_seed(0)
    found = lora(base.to(device), ["0"], 2)
    for name, value in expected.items():
        assert found[name].device.type == device.type
        assert torch.equal(found[name].cpu(), value)


# ---- pipelines


def test_the_same_seeds_give_the_same_networks_there(pipe, device):
    expected, latents = run(pipe), run(pipe, output_type="latent")
    pipe.to(device)
    output = run(pipe)
    assert output.device.type == device.type
    assert_same(output.cpu(), expected, atol=1e-3)
    assert_same(run(pipe, output_type="latent").cpu(), latents, atol=1e-3)
    networks = run(pipe, output_type="state_dict")
    assert {tensor.device.type for network in networks for tensor in network.values()} == {"cpu"}


def test_a_generator_of_that_device_is_used(pipe, device):
    pipe.to(device)
    first, again, other = (run(pipe, generator=torch.Generator(device).manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_a_pipeline_saved_there_is_loaded_on_the_cpu(pipe, device, tmp_path):
    expected = run(pipe)
    pipe.to(device).save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert {model.device.type for model in models_of(loaded).values()} == {"cpu"}
    assert_same(run(loaded), expected)


def test_a_pipeline_loads_onto_it(device, filling, pipe, tmp_path):
    if filling == "transformer":
        pytest.skip("its components are not of this package")
    expected = run(pipe)
    pipe.save_pretrained(tmp_path)
    loaded = NeuralNetworkDiffusionPipeline.from_pretrained(tmp_path, device_map=device.type)
    assert_same(run(quiet(loaded)).cpu(), expected, atol=1e-3)


@pytest.mark.parametrize("way", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading_to_the_cpu_does_not_change_the_networks(pipe, device, way):
    expected = run(pipe)
    getattr(pipe, way)()
    assert pipe._execution_device.type == device.type
    for _ in range(2):
        assert_same(run(pipe).cpu(), expected, atol=1e-3)


@pytest.mark.parametrize("kwargs", OFFLOADING, ids=["block", "leaf"])
@pytest.mark.parametrize("stream", [False, True])
def test_offloading_by_groups_does_not_change_the_networks(pipe, device, kwargs, stream):
    expected = run(pipe)
    pipe.enable_group_offload(device, use_stream=stream, **kwargs)
    for _ in range(2):
        assert_same(run(pipe).cpu(), expected, atol=1e-3)


@pytest.mark.usefixtures("clean_compiler")
def test_a_pipeline_with_a_compiled_denoiser_gives_the_same_networks(pipe, device):
    expected = run(pipe)
    pipe.to(device)
    setattr(pipe, denoiser_slot(pipe), torch.compile(pipe.denoiser, fullgraph=True))
    assert_same(run(pipe).cpu(), expected, atol=1e-3)


def test_a_denoiser_in_float8_gives_finite_networks(pipe, device):
    pipe.to(device, torch.bfloat16)
    pipe.denoiser.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    assert run(pipe).isfinite().all()


# ---- stages


@pytest.fixture(scope="module")
def independent(tmp_path_factory):
    folder = tmp_path_factory.mktemp("accelerator") / "zoo"
    run_collect(CollectConfig("digits-mlp", output_dir=str(folder), num_networks=64, protocol="independent"))
    return folder


@pytest.mark.parametrize("training", TRAININGS)
@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_every_stage_runs_there(training, mixed_precision, independent, digits_zoo, device, tmp_path):
    assert processes().device.type == device.type
    zoo, task = (independent, "digits-mlp") if training == "neuron" else (digits_zoo.folder, "digits-convnet")
    places = {"zoo": str(zoo), "output_dir": str(tmp_path / "pipeline")}
    run_train(replace(TRAININGS[training], task=task, mixed_precision=mixed_precision, **places))
    settings = {"pipeline": str(tmp_path / "pipeline"), "num_networks": 6, "num_inference_steps": 3, "task": task}
    generated = run_generate(GenerateConfig(output_dir=str(tmp_path / "generated"), **settings))
    report = run_evaluate(
        EvaluateConfig(
            task=task,
            trained=str(zoo),
            generated=str(tmp_path / "generated"),
            pipeline=str(tmp_path / "pipeline"),
            output_dir=str(tmp_path / "report"),
            networks_per_point=6,
        )
    )
    assert report["groups"]["generated"]["accuracy"]["mean"] > 0.05
    # What was trained there serves on the CPU, and says the same.
    pipe = quiet(load_pipeline(tmp_path / "pipeline"))
    again = pipe(6, num_inference_steps=3, generator=[seeded(seed) for seed in range(6)], output_type="pt").state_dicts
    assert_same(again, generated.vectors(), atol=0.01)
