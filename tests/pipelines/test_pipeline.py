"""What the pipeline promises beyond what diffusers asks of every pipeline: trained networks, anywhere, again."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    ScoreSdeVeScheduler,
    UNet1DModel,
    UniPCMultistepScheduler,
)
from safetensors.torch import load_file, save_file

from pdiff_hf import NeuralNetworkDiffusionPipeline, ParameterLayout, load_pipeline, load_task
from pdiff_hf.errors import PipelineError

from ..conftest import site_without_this_package


COMPONENT_FILES = [
    "layout/parameter_layout.py",
    "pipeline.py",
    "unet/parameter_unet.py",
    "vae/linear_autoencoder.py",
]


@pytest.fixture
def pipe(digits_pipeline) -> NeuralNetworkDiffusionPipeline:
    pipe = load_pipeline(digits_pipeline)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, seed=0, **arguments):
    arguments = {"num_networks": 4, "num_inference_steps": 5, "output_type": "pt"} | arguments
    return pipe(generator=torch.Generator().manual_seed(seed), **arguments).state_dicts


def test_generated_state_dicts_load_strictly_into_the_base_network(pipe):
    network = load_task("digits-convnet").build_network()
    for state_dict in sample(pipe, output_type="state_dict"):
        network.load_state_dict(state_dict, strict=True)
        assert torch.isfinite(network(torch.zeros(1, 1, 8, 8))).all()


@pytest.mark.parametrize("scheduler", [None, DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_the_same_seed_gives_the_same_networks_whatever_the_chunk_size(pipe, scheduler):
    if scheduler is not None:
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    together = sample(pipe)
    torch.testing.assert_close(sample(pipe, chunk_size=1), together, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(sample(pipe, chunk_size=3), together, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(sample(pipe, num_networks=2), together[:2], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(sample(pipe, seed=1), together, atol=1e-4)


def test_a_list_of_generators_gives_one_network_each(pipe):
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    both = pipe(generator=generators, num_inference_steps=5, output_type="pt").state_dicts
    single = sample(pipe, seed=6, num_networks=1)
    assert len(both) == 2
    torch.testing.assert_close(both[1:], single, atol=1e-4, rtol=1e-4)


def test_networks_differ_from_each_other(pipe):
    assert torch.pdist(sample(pipe)).min() > 0.01


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_networks": 0}, "`num_networks` has to be a positive integer, and is 0"),
        ({"num_networks": 1.5}, r"`num_networks` has to be a positive integer, and is 1\.5"),
        ({"chunk_size": 0}, "`chunk_size` has to be a positive integer"),
        ({"num_inference_steps": -1}, "`num_inference_steps` has to be a positive integer"),
        ({"output_type": "pil"}, "'pil'; expected 'state_dict', 'pt', 'np' or 'latent'"),
        ({"latents": torch.zeros(4, 3)}, r"shape \(4, 3\); expected \(4, 8, 8\)"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "has to be in"),
    ],
)
def test_arguments_that_do_not_fit_are_explained(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        sample(pipe, **arguments)


def test_as_many_generators_as_networks_are_needed(pipe):
    with pytest.raises(ValueError, match="1 generators were passed for 2 networks"):
        pipe(num_networks=2, generator=[torch.Generator()])


def test_a_scheduler_of_another_kind_is_refused(pipe):
    pipe.scheduler = ScoreSdeVeScheduler()
    with pytest.raises(ValueError, match=r"ScoreSdeVeScheduler does not step .*DDIMScheduler"):
        sample(pipe)


@pytest.mark.parametrize("output_type", ["state_dict", "latent"])
def test_a_scheduler_that_leads_away_from_networks_is_refused(pipe, output_type):
    pipe.scheduler = DDIMInverseScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match=r"not finite: DDIMInverseScheduler does not fit this denoiser"):
        sample(pipe, output_type=output_type)


def test_components_of_different_networks_are_refused(pipe):
    other = ParameterLayout.from_state_dict({"weight": torch.zeros(7)})
    with pytest.raises(ValueError, match="vectors of 1898 parameters, and the layout has 7"):
        NeuralNetworkDiffusionPipeline(**(pipe.components | {"layout": other}))


def test_networks_do_not_share_memory_with_the_pipeline(digits_zoo):
    layout = ParameterLayout.from_state_dict(digits_zoo.state_dict(0), ("0.*",))
    (first,) = layout.unflatten(torch.zeros(1, layout.vector_size))
    first["7.bias"].fill_(99)
    (second,) = layout.unflatten(torch.zeros(1, layout.vector_size))
    assert torch.equal(second["7.bias"], digits_zoo.state_dict(0)["7.bias"])


def test_a_saved_pipeline_carries_its_code_byte_for_byte(digits_pipeline):
    source = Path(__file__).parents[2] / "pipelines" / "neural_network_diffusion"
    for file in COMPONENT_FILES:
        assert (digits_pipeline / file).read_bytes() == (source / file).read_bytes()
    index = json.loads((digits_pipeline / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "NeuralNetworkDiffusionPipeline"]
    assert index["layout"] == ["parameter_layout", "ParameterLayout"]
    assert index["scheduler"] == ["diffusers", "DDPMScheduler"]


def test_a_denoiser_of_diffusers_serves_as_well_and_needs_no_code(pipe, tmp_path):
    # Residual blocks, as diffusers' own value-guided planning uses them.
    pipe.unet = UNet1DModel(
        8,
        in_channels=8,
        out_channels=8,
        time_embedding_type="positional",
        use_timestep_embedding=True,
        flip_sin_to_cos=False,
        freq_shift=1,
        act_fn="mish",
        down_block_types=("DownResnetBlock1D", "DownResnetBlock1D"),
        mid_block_type="MidResTemporalBlock1D",
        up_block_types=("UpResnetBlock1D",),
        out_block_type="OutConv1DBlock",
        block_out_channels=(16, 32),
    )
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["unet"] == ["diffusers", "UNet1DModel"]
    assert not list((tmp_path / "unet").glob("*.py"))
    again = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    torch.testing.assert_close(sample(again), sample(pipe))


def test_remote_code_runs_only_where_it_is_trusted(digits_pipeline):
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(digits_pipeline)


def test_loading_with_this_package_runs_none_of_the_folders_code(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    for file in COMPONENT_FILES:
        (tmp_path / file).write_text("raise SystemExit('code of a folder ran')")
    assert torch.equal(sample(load_pipeline(tmp_path)), sample(pipe))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: weights_without(folder / "unet", "conv_in.weight"),
            r"unet do not fit its config: conv_in\.weight",
        ),
        (lambda folder: weights_without(folder / "layout", "mean"), "layout do not fit its config: mean"),
        (lambda folder: weights_with(folder / "layout", mean=torch.full((1898,), torch.nan)), "are no numbers"),
        (lambda folder: (folder / "layout" / "config.json").write_text("{"), "cannot be loaded"),
        (lambda folder: (folder / "model_index.json").write_text("[]"), "cannot be loaded"),
        (lambda folder: (folder / "model_index.json").write_text('{"unet": []}'), "cannot be loaded"),
        (lambda folder: (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink(), "cannot be loaded"),
        (lambda folder: reconfigured(folder / "vae", latent_length=10**7), "vae do not fit its config"),
        (lambda folder: reconfigured(folder / "vae", latent_length=0), "cannot be loaded"),
        (lambda folder: reconfigured(folder / "unet", layers_per_block=10**9), "`layers_per_block` has to be between"),
        (lambda folder: reconfigured(folder / "unet", block_out_channels=[8 * 10**6]), "unet do not fit its config"),
        (lambda folder: claim(folder / "layout", 10**12), r"claims 1,000,000,000,000 numbers"),
    ],
)
def test_a_damaged_or_hostile_pipeline_is_refused(pipe, tmp_path, damage, message):
    pipe.save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(PipelineError, match=message):
        load_pipeline(tmp_path)


def weights_without(folder, name):
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    del weights[name]
    save_file(weights, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})


def weights_with(folder, **changes):
    weights = load_file(folder / "diffusion_pytorch_model.safetensors") | changes
    save_file(weights, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})


def reconfigured(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def claim(folder, size):
    config = json.loads((folder / "config.json").read_text())
    config["tensors"][0]["shape"] = [size]
    (folder / "config.json").write_text(json.dumps(config))


def test_a_component_of_a_script_cannot_be_saved(pipe):
    script_class = type("Mine", (type(pipe.unet),), {"__module__": "__main__"})
    with pytest.raises(ValueError, match="Mine is defined in a script"):
        pipe.unet = script_class()


def test_components_may_have_different_precisions(pipe):
    pipe.unet.to(torch.bfloat16)
    assert torch.isfinite(sample(pipe)).all()


def test_one_saved_network_is_not_the_whole_batch(pipe, tmp_path):
    torch.save(sample(pipe, num_networks=20, output_type="state_dict")[0], tmp_path / "one.pt")
    assert (tmp_path / "one.pt").stat().st_size < 3 * 4 * 1898


def test_a_reloaded_pipeline_saved_again_is_the_same(digits_pipeline, tmp_path):
    again = DiffusionPipeline.from_pretrained(digits_pipeline, trust_remote_code=True)
    again.save_pretrained(tmp_path / "again")
    files = [path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*") if path.is_file()]
    assert {Path(file) for file in COMPONENT_FILES} < set(files)
    for file in files:
        assert (tmp_path / "again" / file).read_bytes() == (digits_pipeline / file).read_bytes()


@pytest.mark.slow
def test_a_process_without_this_package_samples_the_same_networks_and_saves_the_same_folder(
    pipe, digits_pipeline, tmp_path
):
    site = site_without_this_package(tmp_path)
    script = textwrap.dedent("""
        import importlib.util, sys
        site, folder, output = sys.argv[1:]
        sys.path.insert(0, site)
        import torch
        from diffusers import DiffusionPipeline
        assert importlib.util.find_spec("pdiff_hf") is None
        torch.set_num_threads(1)
        pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
        generator = torch.Generator().manual_seed(0)
        vectors = pipe(num_networks=4, num_inference_steps=5, output_type="pt", generator=generator).state_dicts
        state_dicts = pipe(num_networks=2, num_inference_steps=2).state_dicts
        assert state_dicts[0]["0.weight"].shape == (8, 1, 3, 3)
        pipe.save_pretrained(output + "/pipeline")
        torch.save(vectors, output + "/vectors.pt")
    """)
    output = tmp_path / "output"
    output.mkdir()
    done = subprocess.run(
        [sys.executable, "-S", "-c", script, str(site), str(digits_pipeline), str(output)],
        cwd=output,
        env={**os.environ, "HF_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(output / "vectors.pt"), sample(pipe))
    for file in [*COMPONENT_FILES, "model_index.json", "unet/config.json", "layout/config.json"]:
        assert (output / "pipeline" / file).read_bytes() == (digits_pipeline / file).read_bytes()


def test_noise_has_the_size_that_was_asked_for_and_is_each_networks_own(pipe):
    plain, noisy = (sample(pipe, parameter_noise=noise) for noise in (0.0, 0.5))
    std = pipe.layout.std
    away = ((noisy - plain) / std)[:, std > 0]
    assert away.std().item() == pytest.approx(0.5, rel=0.05)
    assert torch.equal(noisy[:, std == 0], plain[:, std == 0])
    assert not torch.allclose(away[0], away[1])
    torch.testing.assert_close(sample(pipe, parameter_noise=0.5, chunk_size=1), noisy, atol=1e-4, rtol=1e-4)
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="`parameter_noise` has to be at least 0"):
            sample(pipe, parameter_noise=wrong)
