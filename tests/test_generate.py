import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from pdiff_hf import GenerateConfig, PdiffError, WeightZoo, load_pipeline, run_generate
from pdiff_hf.errors import ConfigError


def config(folder, output_dir, **changes) -> GenerateConfig:
    names = {"pipeline": str(folder), "output_dir": str(output_dir)}
    return GenerateConfig(**{**names, "num_networks": 5, "num_inference_steps": 3, **changes})


def test_a_generated_zoo_names_what_made_each_network_so_that_it_can_be_made_again(digits_pipeline, tmp_path):
    zoo = run_generate(config(digits_pipeline, tmp_path, seed=10, task="digits-convnet"))
    assert len(WeightZoo(tmp_path)) == 5
    assert WeightZoo(tmp_path).task == "digits-convnet"
    row = zoo.metadata[3]
    assert row["seed"] == 13
    assert row["scheduler"] == "DDPMScheduler"
    assert row["pipeline"] == digits_pipeline.name
    pipe = load_pipeline(digits_pipeline)
    again = pipe(
        generator=torch.Generator().manual_seed(row["seed"]),
        num_inference_steps=row["num_inference_steps"],
        output_type="pt",
    ).state_dicts
    torch.testing.assert_close(again[0], zoo[3], atol=1e-4, rtol=1e-4)


def test_noise_and_dtype_are_those_that_were_asked_for(digits_pipeline, tmp_path):
    zoo = run_generate(config(digits_pipeline, tmp_path, num_networks=2, parameter_noise=0.5, dtype="bfloat16"))
    assert zoo.dtype == torch.bfloat16
    generators = [torch.Generator().manual_seed(row["seed"]) for row in zoo.rows()]
    settings = {"num_inference_steps": 3, "output_type": "pt"}
    pipe = load_pipeline(digits_pipeline)
    noisy = pipe(2, generator=generators, parameter_noise=0.5, **settings).state_dicts
    torch.testing.assert_close(zoo.vectors(), noisy.bfloat16().float(), atol=1e-3, rtol=1e-2)
    generators = [torch.Generator().manual_seed(row["seed"]) for row in zoo.rows()]
    assert (pipe(2, generator=generators, **settings).state_dicts - noisy).abs().max() > 0.01


def test_an_unfinished_zoo_is_completed(digits_pipeline, tmp_path):
    run_generate(config(digits_pipeline, tmp_path / "a", num_networks=2))
    completed = run_generate(config(digits_pipeline, tmp_path / "a", batch_size=2))
    at_once = run_generate(config(digits_pipeline, tmp_path / "b"))
    torch.testing.assert_close(completed.vectors(), at_once.vectors(), atol=1e-4, rtol=1e-4)
    assert [row["seed"] for row in completed.metadata] == [0, 1, 2, 3, 4]


def test_half_precision_gives_nearly_the_same_networks(digits_pipeline, tmp_path):
    exact = run_generate(config(digits_pipeline, tmp_path / "exact"))
    half = run_generate(config(digits_pipeline, tmp_path / "half", mixed_precision="bf16"))
    assert {row["mixed_precision"] for row in half.metadata} == {"bf16"}
    difference = (half.vectors() - exact.vectors()).square().mean().sqrt()
    assert 0 < difference < 0.05 * (exact.vectors() - exact.vectors().mean(0)).square().mean().sqrt()


def test_another_scheduler_can_be_named(digits_pipeline, tmp_path):
    zoo = run_generate(config(digits_pipeline, tmp_path, scheduler="DPMSolverMultistepScheduler"))
    assert {row["scheduler"] for row in zoo.metadata} == {"DPMSolverMultistepScheduler"}
    assert json.loads((digits_pipeline / "model_index.json").read_text())["scheduler"][1] == "DDPMScheduler"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scheduler": "NoSuchScheduler"}, r"'NoSuchScheduler' is no scheduler.*DDIMScheduler, .*DPMSolverMultistep"),
        ({"scheduler": "UNet2DModel"}, "is no scheduler that fits"),
        ({"num_networks": 0}, "num_networks has to be at least 1, and is 0"),
        ({"num_inference_steps": 1001}, "num_inference_steps is 1001; the scheduler has 1000 timesteps"),
        ({"mixed_precision": "fp8"}, "mixed_precision is 'fp8'; expected no or bf16"),
        ({"num_inference_steps": 0}, "num_inference_steps has to be at least 1"),
        ({"pipeline": "no/such/folder"}, r"no/such/folder holds no pipeline: there is no model_index\.json"),
    ],
)
def test_what_cannot_be_generated_is_explained_and_leaves_no_zoo(digits_pipeline, tmp_path, changes, message):
    with pytest.raises(PdiffError, match=message):
        run_generate(config(digits_pipeline, tmp_path / "zoo", **changes))
    assert not (tmp_path / "zoo").exists()


def test_networks_of_a_pipeline_that_was_replaced_are_not_mixed_in(digits_pipeline, tmp_path):
    shutil.copytree(digits_pipeline, tmp_path / "pipeline")
    run_generate(config(tmp_path / "pipeline", tmp_path / "zoo", num_networks=2))
    pipe = load_pipeline(tmp_path / "pipeline")
    with torch.no_grad():
        pipe.unet.conv_out.bias.add_(1)
    pipe.save_pretrained(tmp_path / "pipeline")
    with pytest.raises(ConfigError, match=r"The weights of the run in .* changed meanwhile: it cannot be resumed"):
        run_generate(config(tmp_path / "pipeline", tmp_path / "zoo"))
    assert len(WeightZoo(tmp_path / "zoo")) == 2


def test_networks_of_another_sampling_are_not_mixed_in(digits_pipeline, tmp_path):
    shutil.copytree(digits_pipeline, tmp_path / "pipeline")
    run_generate(config(tmp_path / "pipeline", tmp_path / "zoo", num_networks=2))
    file = tmp_path / "pipeline" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"timestep_spacing": "leading"}))
    with pytest.raises(ConfigError, match=r"The settings of the run in .* changed meanwhile: it cannot be resumed"):
        run_generate(config(tmp_path / "pipeline", tmp_path / "zoo"))


def test_an_interrupted_export_goes_on_and_exports_are_not_mixed(digits_pipeline, tmp_path):
    exported = tmp_path / "networks"
    run_generate(config(digits_pipeline, tmp_path / "zoo", export=str(exported)))
    expected = load_file(exported / "00003" / "model.safetensors")
    (exported / "00003" / "model.safetensors").unlink()
    shutil.rmtree(exported / "00004")
    run_generate(config(digits_pipeline, tmp_path / "zoo", export=str(exported)))
    assert sorted(path.name for path in exported.iterdir()) == [f"{index:05d}" for index in range(5)]
    again = load_file(exported / "00003" / "model.safetensors")
    assert all(torch.equal(again[name], value) for name, value in expected.items())
    with pytest.raises(PdiffError, match=r"00000/model\.safetensors holds another network"):
        run_generate(config(digits_pipeline, tmp_path / "other", seed=9, export=str(exported)))
    with pytest.raises(PdiffError, match="is not empty: 00004 is none of these 4 networks"):
        run_generate(config(digits_pipeline, tmp_path / "fewer", num_networks=4, export=str(exported)))
    (exported / "notes.txt").touch()
    with pytest.raises(PdiffError, match=r"is not empty: notes\.txt is none of these 5"):
        run_generate(config(digits_pipeline, tmp_path / "new", export=str(exported)))
    assert not (tmp_path / "new").exists()


def test_facts_of_a_thousand_levels_are_damaged(digits_pipeline, tmp_path):
    run_generate(config(digits_pipeline, tmp_path, num_networks=2))
    (tmp_path / "generate.facts.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match=r"generate\.facts\.json is damaged"):
        run_generate(config(digits_pipeline, tmp_path))


def test_zoos_of_different_runs_are_not_mixed(digits_pipeline, tmp_path):
    run_generate(config(digits_pipeline, tmp_path))
    with pytest.raises(ConfigError, match="holds a run with num_inference_steps 3, not 4"):
        run_generate(config(digits_pipeline, tmp_path, num_inference_steps=4))
