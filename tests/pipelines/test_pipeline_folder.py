"""What a saved folder holds: exactly the files of its filled slots, with the code that was loaded, byte for byte."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, UNet1DModel

from pdiff_hf import NeuralNetworkDiffusionPipeline, load_pipeline
from pdiff_hf.errors import PipelineError

from ..conftest import site_without_this_package
from .cases import CONDITIONS, FILLINGS, SLOTS, TRUSTED, build_pipe, files_of, load, quiet, run


SOURCE = Path(__file__).parents[2] / "pipelines" / "neural_network_diffusion"
HERE = Path(__file__).parent / "components"
PIPELINE = {"pipeline.py": SOURCE / "pipeline.py"}
LAYOUT = {"layout/parameter_layout.py": SOURCE / "layout" / "parameter_layout.py"}
UNET = {"unet/parameter_unet.py": SOURCE / "unet" / "parameter_unet.py"}
LINEAR = {"vae/linear_autoencoder.py": SOURCE / "vae" / "linear_autoencoder.py"}
KL = {"vae/parameter_autoencoder.py": SOURCE / "vae" / "parameter_autoencoder.py"}
NEURON = {"transformer/neuron_transformer.py": SOURCE / "transformer" / "neuron_transformer.py"}
ENCODER = {"condition_encoder/condition_encoder.py": SOURCE / "condition_encoder" / "condition_encoder.py"}
OTHERS = {
    "transformer/token_denoiser.py": HERE / "token_denoiser.py",
    "condition_encoder/row_encoder.py": HERE / "row_encoder.py",
}
CODE = {
    "unet-linear": PIPELINE | LAYOUT | UNET | LINEAR,
    "unet-kl": PIPELINE | LAYOUT | UNET | KL,
    "unet": PIPELINE | LAYOUT | UNET,
    "neuron": PIPELINE | LAYOUT | NEURON | ENCODER,
    "transformer": PIPELINE | LAYOUT | LINEAR | OTHERS,
}


def expected_files(filling: str) -> set[str]:
    """Code, and the config and weights of each slot that has code."""
    models = {Path(file).parent.name for file in CODE[filling] if "/" in file}
    weights = {f"{name}/{file}" for name in models for file in ("config.json", "diffusion_pytorch_model.safetensors")}
    return {*CODE[filling], *weights, "model_index.json", "scheduler/scheduler_config.json"}


def assert_same_files(one: Path, other: Path) -> None:
    found, expected = files_of(one), files_of(other)
    assert sorted(found) == sorted(expected)
    assert [name for name in expected if found[name] != expected[name]] == []


def add_to(file: Path, text: bytes) -> None:
    file.write_bytes(file.read_bytes() + text)


# ---- the files


def test_a_folder_holds_exactly_the_files_of_the_filled_slots(pipe, filling, tmp_path):
    pipe.save_pretrained(tmp_path)
    assert set(files_of(tmp_path)) == expected_files(filling)


def test_the_code_in_a_folder_is_the_source_byte_for_byte(pipe, filling, tmp_path):
    pipe.save_pretrained(tmp_path)
    code = {name: content for name, content in files_of(tmp_path).items() if name.endswith(".py")}
    assert code == {name: source.read_bytes() for name, source in CODE[filling].items()}


def test_the_index_names_the_file_and_class_of_each_filled_slot(pipe, filling, tmp_path):
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index.pop("_class_name") == ["pipeline", "NeuralNetworkDiffusionPipeline"]
    assert index.pop("_diffusers_version")
    assert index.pop("scheduler") == ["diffusers", type(pipe.scheduler).__name__]
    empty = {name: [None, None] for name in SLOTS - {"scheduler"}}
    modules = {Path(file).parent.name: Path(file).stem for file in CODE[filling] if "/" in file}
    filled = {name: [module, type(getattr(pipe, name)).__name__] for name, module in modules.items()}
    assert index == empty | filled


def test_configs_tell_nothing_of_where_a_pipeline_was_loaded_from(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "first")
    load(tmp_path / "first").save_pretrained(tmp_path / "second")
    for name, content in files_of(tmp_path / "second").items():
        assert str(tmp_path).encode() not in content, name
        assert b"_name_or_path" not in content or name.endswith(".py"), name


def test_the_same_pipeline_gives_the_same_files(pipe, tmp_path):
    for name in ("first", "second"):
        pipe.save_pretrained(tmp_path / name)
    assert_same_files(tmp_path / "second", tmp_path / "first")


@pytest.mark.parametrize("own", [True, False], ids=["package", "folder"])
def test_a_reloaded_pipeline_saved_again_is_the_same_in_every_file(pipe, tmp_path, own):
    pipe.save_pretrained(tmp_path / "first")
    again = load(tmp_path / "first") if own else DiffusionPipeline.from_pretrained(tmp_path / "first", **TRUSTED)
    again.save_pretrained(tmp_path / "second")
    assert_same_files(tmp_path / "second", tmp_path / "first")


# What pipelines of a filling are asked for.
ASKED = {"neuron": {"condition": CONDITIONS[0], "guidance_scale": 1.5}}


def test_a_process_without_this_package_loads_each_folder_samples_and_saves_the_same_files(tmp_path):
    for name in FILLINGS:
        pipe = build_pipe(name)
        pipe.save_pretrained(tmp_path / "folders" / name)
        torch.save(run(pipe, **ASKED.get(name, {})), tmp_path / f"{name}.pt")
    script = textwrap.dedent("""
        import importlib.util, json, sys
        site, folder = sys.argv[1:3]
        asked = json.loads(sys.argv[3])
        sys.path.insert(0, site)
        import torch
        from diffusers import DiffusionPipeline
        assert importlib.util.find_spec("pdiff_hf") is None
        torch.set_num_threads(1)
        pipes = {}
        for name in sys.argv[4:]:
            pipes[name] = DiffusionPipeline.from_pretrained(f"{folder}/folders/{name}", trust_remote_code=True)
        for name, pipe in pipes.items():
            generator = torch.Generator().manual_seed(0)
            settings = {"num_inference_steps": 3, "output_type": "pt", **asked.get(name, {})}
            vectors = pipe(num_networks=2, generator=generator, **settings).state_dicts
            assert torch.equal(vectors, torch.load(f"{folder}/{name}.pt")), name
            pipe.save_pretrained(f"{folder}/again/{name}")
    """)
    places = [str(site_without_this_package(tmp_path)), str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-S", "-c", script, *places, json.dumps(ASKED), *FILLINGS],
        cwd=tmp_path,
        env={**os.environ, "HF_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for name in FILLINGS:
        assert_same_files(tmp_path / "again" / name, tmp_path / "folders" / name)


# ---- the code is what was loaded


def test_the_code_that_is_saved_is_what_was_loaded_though_other_code_came_since(tmp_path):
    build_pipe().save_pretrained(tmp_path / "a")
    build_pipe().save_pretrained(tmp_path / "b")
    for file in ("pipeline.py", "layout/parameter_layout.py", "unet/parameter_unet.py", "vae/linear_autoencoder.py"):
        add_to(tmp_path / "a" / file, b"\n# of a\n")
        add_to(tmp_path / "b" / file, b"\n# of b\n")
    pipes = {name: DiffusionPipeline.from_pretrained(tmp_path / name, **TRUSTED) for name in ("a", "b")}
    for name, pipe in pipes.items():
        pipe.save_pretrained(tmp_path / f"{name} again")
    for name in pipes:
        assert_same_files(tmp_path / f"{name} again", tmp_path / name)


def test_the_code_that_is_saved_is_what_was_loaded_though_the_folder_changed_since(tmp_path):
    build_pipe().save_pretrained(tmp_path / "first")
    before = files_of(tmp_path / "first")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "first", **TRUSTED)
    for file in ("pipeline.py", "unet/parameter_unet.py"):
        add_to(tmp_path / "first" / file, b"\n# changed\n")
    pipe.save_pretrained(tmp_path / "second")
    assert files_of(tmp_path / "second") == before


def test_this_package_saves_its_own_code_whatever_the_folder_held(tmp_path):
    build_pipe().save_pretrained(tmp_path / "first")
    before = files_of(tmp_path / "first")
    for file in ("pipeline.py", "unet/parameter_unet.py"):
        add_to(tmp_path / "first" / file, b"\n# of somebody\n")
    load_pipeline(tmp_path / "first").save_pretrained(tmp_path / "second")
    assert files_of(tmp_path / "second") == before


def test_a_component_that_is_swapped_in_brings_its_own_code(tmp_path):
    pipe = build_pipe()
    pipe.vae = build_pipe("unet-kl").vae
    pipe.save_pretrained(tmp_path)
    assert set(files_of(tmp_path)) == expected_files("unet-kl")


@pytest.mark.parametrize("loader", [load_pipeline, NeuralNetworkDiffusionPipeline.from_pretrained])
def test_code_that_only_the_folder_has_does_not_run_unless_it_is_trusted(tmp_path, loader):
    build_pipe("transformer").save_pretrained(tmp_path)
    add_to(tmp_path / "transformer" / "token_denoiser.py", b"\nraise SystemExit('code of a folder ran')\n")
    with pytest.raises((PipelineError, ValueError)):
        loader(tmp_path)


# ---- saving over another pipeline


@pytest.mark.parametrize("after", FILLINGS)
@pytest.mark.parametrize("before", FILLINGS)
def test_saving_over_another_pipeline_leaves_nothing_of_it(tmp_path, before, after):
    build_pipe(before).save_pretrained(tmp_path)
    pipe = build_pipe(after)
    pipe.save_pretrained(tmp_path)
    assert set(files_of(tmp_path)) == expected_files(after)
    assert torch.equal(run(load(tmp_path)), run(pipe))


def test_saving_over_a_pipeline_leaves_no_code_where_the_new_component_is_of_diffusers(tmp_path):
    pipe = build_pipe()
    pipe.save_pretrained(tmp_path)
    pipe.unet = UNet1DModel(in_channels=2, out_channels=2)
    pipe.save_pretrained(tmp_path)
    assert set(files_of(tmp_path)) == expected_files("unet-linear") - {"unet/parameter_unet.py"}


def test_saving_over_a_pipeline_keeps_files_that_are_none_of_it(tmp_path):
    build_pipe().save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("# Networks")
    (tmp_path / "vae-notes").mkdir()
    (tmp_path / "vae-notes" / "notes.txt").write_text("of the autoencoder")
    build_pipe("unet").save_pretrained(tmp_path)
    assert set(files_of(tmp_path)) == expected_files("unet") | {"README.md", "vae-notes/notes.txt"}


def test_saving_a_pipeline_without_an_autoencoder_elsewhere_keeps_a_folder_of_that_name(tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "notes.txt").write_text("no pipeline's")
    build_pipe("unet").save_pretrained(tmp_path)
    assert (tmp_path / "vae" / "notes.txt").exists()


def test_a_pipeline_that_was_saved_over_another_loads_by_the_code_of_the_folder(tmp_path):
    build_pipe("unet-kl").save_pretrained(tmp_path)
    pipe = build_pipe("unet")
    pipe.save_pretrained(tmp_path)
    loaded = quiet(DiffusionPipeline.from_pretrained(tmp_path, **TRUSTED))
    assert loaded.vae is None
    assert torch.equal(run(loaded), run(pipe))
