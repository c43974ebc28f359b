"""A pipeline is saved whole or not at all, over another one too."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pdiff_hf import PdiffError, load_pipeline
from pdiff_hf.errors import HubError
from pdiff_hf.files import UNFINISHED as PREFIX
from pdiff_hf.hub.push import push
from pdiff_hf.pipelines.neural_network_diffusion.pipeline import UNFINISHED

from .cases import build_pipe


class Killed(BaseException):
    """Stands for the end of a process, at any call to the operating system."""


def everything(folder: Path) -> dict[str, bytes]:
    """Names and bytes of all files."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def filled(pipe, value: float):
    """The same pipeline with other weights."""
    with torch.no_grad():
        for part in (pipe.unet, pipe.vae):
            for weight in part.parameters():
                weight.fill_(value)
    return pipe


@pytest.fixture
def pipe():
    return build_pipe("unet-kl")


@pytest.fixture
def two(pipe, tmp_path) -> tuple[Path, Path]:
    """The folders of two pipelines of the same components and different weights."""
    for name, value in (("a", 0.25), ("b", 0.5)):
        filled(pipe, value).save_pretrained(tmp_path / name)
    return tmp_path / "a", tmp_path / "b"


@pytest.mark.parametrize("number", range(40))
def test_whenever_saving_ends_there_is_the_old_pipeline_or_the_new_or_none(pipe, two, tmp_path, monkeypatch, number):
    old, new = map(everything, two)
    folder = tmp_path / "folder"
    shutil.copytree(two[0], folder)
    (folder / "train.yaml").write_text("kept: true")
    left = number

    def counted(call):
        def counting(*args, **kwargs):
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return call(*args, **kwargs)

        return counting

    pipe = filled(pipe, 0.5)
    with monkeypatch.context() as patched:
        for owner, name in ((os, "fsync"), (Path, "replace"), (Path, "unlink"), (shutil, "rmtree")):
            patched.setattr(owner, name, counted(getattr(owner, name)))
        try:
            pipe.save_pretrained(folder)
            finished = True
        except Killed:
            finished = False
    found = everything(folder)
    assert found.pop("train.yaml") == b"kept: true"
    whole = {name: content for name, content in found.items() if not name.startswith(UNFINISHED)}
    if finished:
        assert found == new
    elif "model_index.json" in whole:
        assert whole in (old, new)
    else:
        with pytest.raises(PdiffError, match=r"saving it was interrupted\. Save or train it again"):
            load_pipeline(folder)
        with pytest.raises(HubError):
            push(folder, "me/mixture")
    assert finished or number < 39, "This many calls were to be enough."
    # The next one mends it.
    pipe.save_pretrained(folder)
    assert everything(folder) == {**new, "train.yaml": b"kept: true"}


@pytest.mark.slow
def test_a_process_that_is_killed_while_it_saves_leaves_no_mixture(two, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(two[0], folder)
    code = (
        "import os, sys; from pdiff_hf import load_pipeline, ParameterUNet1DModel as M; "
        "pipe = load_pipeline(sys.argv[1]); M.save_pretrained = lambda *a, **k: os._exit(9); "
        "pipe.save_pretrained(sys.argv[2])"
    )
    assert subprocess.run([sys.executable, "-c", code, str(two[1]), str(folder)]).returncode == 9
    found = {name: content for name, content in everything(folder).items() if not name.startswith(UNFINISHED)}
    assert found == everything(two[0])
    with pytest.raises(HubError, match="is unfinished"):
        push(folder, "me/mixture")


def test_a_failed_write_leaves_the_old_pipeline_and_nothing_beside_it(pipe, two, monkeypatch):
    old = everything(two[0])

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        filled(pipe, 0.75).save_pretrained(two[0])
    assert everything(two[0]) == old


def test_what_an_earlier_pipeline_had_and_this_one_has_not_is_gone(pipe, two, tmp_path):
    stale = (
        "unet/diffusion_pytorch_model.safetensors.index.json",
        "vae/old_code.py",
        "vae/diffusion.fp16.safetensors",
    )
    for name in stale:
        (two[0] / name).write_text("{}")
    pipe.save_pretrained(two[0])
    assert not any((two[0] / name).exists() for name in stale)
    load_pipeline(two[0])


def test_a_variant_is_saved_beside_the_others(pipe, two):
    before = everything(two[0])
    filled(pipe, 0.75).save_pretrained(two[0], variant="fp16")
    after = everything(two[0])
    added = set(after) - set(before)
    assert added == {f"{part}/diffusion_pytorch_model.fp16.safetensors" for part in ("layout", "unet", "vae")}
    weights = [name for name in before if name.endswith(".safetensors")]
    assert all(after[name] == before[name] for name in weights)


def test_folders_that_an_index_names_are_not_removed_outside(pipe, two, tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    index = two[0] / "model_index.json"
    for name in ("../precious", "..", str(precious)):
        index.write_text(json.dumps(json.loads(index.read_text()) | {name: ["diffusers", "X"]}))
        pipe.save_pretrained(two[0])
        assert precious.is_dir()


def test_the_name_of_what_is_unfinished_is_one_that_is_never_pushed():
    assert UNFINISHED.startswith(PREFIX)
