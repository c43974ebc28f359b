import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch

import pdiff_hf
from pdiff_hf import WeightZoo, cli
from pdiff_hf.config import load_config, parse
from pdiff_hf.configs import ImportConfig, PullConfig, TrainConfig
from pdiff_hf.errors import ConfigError
from pdiff_hf.extras import install, require
from pdiff_hf.runs import check_same_run, save_run

from .conftest import run


@dataclass(frozen=True)
class Example:
    """An example."""

    folder: str
    count: int = 3
    rate: float = 0.5
    kind: Literal["a", "b"] = "a"
    names: tuple[str, ...] | None = None


def test_command_line_yaml_and_python_are_the_same_dataclass(tmp_path):
    expected = Example("x", 4, 1.0, "b", ("p", "q"))
    arguments = ["--folder", "x", "--count", "4", "--rate", "1", "--kind", "b", "--names", "p", "q"]
    assert parse(Example, "example", arguments) == expected
    save_run(tmp_path, "example", expected, extra=1)
    assert load_config(Example, tmp_path / "example.yaml") == expected
    facts = json.loads((tmp_path / "example.facts.json").read_text())
    assert facts["extra"] == 1
    assert facts["versions"]["pdiff-hf"] == pdiff_hf.__version__


def test_arguments_override_the_file(tmp_path):
    save_run(tmp_path, "example", Example("x"))
    assert parse(Example, "example", ["--config", str(tmp_path / "example.yaml"), "--count", "9"]) == Example("x", 9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("folder: x\ncuont: 4", "cuont unknown. Example has: folder, count"),
        ("count: 4", "lacks folder"),
        ("folder: x\ncount: many", "count is 'many', and should be <class 'int'>"),
        ("folder: x\ncount: true", "count is True"),
        ("folder: x\nkind: c", "kind is 'c'"),
        ("folder: x\nnames: [a, 5]", r"names is \['a', 5\], and should be tuple\[str, \.\.\.\]"),
        ("folder: x\nnames: [[a]]", r"names is \[\['a'\]\], and should be"),
        ("folder: 2024-02-31", "is no YAML file: day is out of range"),
        ("- folder", "holds a list"),
    ],
)
def test_a_file_that_describes_no_run_is_explained(tmp_path, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(Example, tmp_path / "bad.yaml")


def test_every_default_survives_yaml(tmp_path):
    save_run(tmp_path, "train", TrainConfig())
    assert load_config(TrainConfig, tmp_path / "train.yaml") == TrainConfig()


def test_a_path_may_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "train.yaml").write_text("zoo: ~/zoo\n")
    config = parse(TrainConfig, "train", ["--config", str(tmp_path / "train.yaml"), "--output-dir=~/pipeline"])
    assert (config.zoo, config.output_dir) == (f"{tmp_path}/zoo", f"{tmp_path}/pipeline")


def test_help_imports_nothing_that_takes_long():
    stages = "import sys; from pdiff_hf import cli, config\nfor stage in cli.STAGES:\n"
    stages += "    try: config.parse(cli.config_class(stage), stage, ['--help'])\n    except SystemExit: pass\n"
    slow = "('torch', 'diffusers', 'accelerate', 'numpy', 'scipy', 'huggingface_hub')"
    done = run("-c", f"{stages}print([name for name in {slow} if name in sys.modules])")
    assert done.stdout.count("--config FILE") == len(cli.STAGES)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("stage", cli.STAGES)
def test_every_stage_documents_its_arguments(stage, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pdiff-hf", stage, "--help"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    assert f"usage: pdiff-hf {stage}" in capsys.readouterr().out


def test_an_unknown_stage_lists_the_known(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pdiff-hf", "colect"])
    with pytest.raises(SystemExit, match="there is no stage 'colect'") as end:
        cli.main()
    assert "collect" in str(end.value)


def test_an_error_that_the_user_can_mend_is_one_line_without_traceback(tmp_path):
    done = run("-m", "pdiff_hf", "train", "--zoo", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.strip() == f"pdiff-hf train: {tmp_path} holds no zoo: there is no zoo.json."


def test_a_missing_extra_is_named():
    with pytest.raises(ModuleNotFoundError, match=r"needs no_such_module.*pip install '.*\[plots\]'"):
        require("no_such_module.part", "plots")


@pytest.mark.parametrize(
    ("modules", "without"),
    [
        ("pdiff_hf", {"torch", "sklearn", "matplotlib", "datasets", "tensorboard"}),
        # Pipelines of diffusers take seconds.
        ("pdiff_hf.collect, pdiff_hf.align, pdiff_hf.share", {"diffusers.pipelines.pipeline_utils", "sklearn"}),
        pytest.param(
            "pdiff_hf.train, pdiff_hf.generate, pdiff_hf.evaluation",
            {"sklearn", "matplotlib", "datasets"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_is_imported_imports_nothing_that_only_others_need(modules, without):
    imported = run("-c", f"import json, sys, {modules}; print(json.dumps([*sys.modules]))").stdout
    found = set(json.loads(imported))
    assert "pdiff_hf" in found
    assert not found & without


def test_every_public_name_can_be_imported():
    assert all(getattr(pdiff_hf, name) is not None for name in pdiff_hf.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = pdiff_hf.nothing


@pytest.mark.parametrize(
    ("origin", "command"),
    [
        (None, "pip install 'pdiff-hf[report]'"),
        ({"url": "https://some.where/pdiff.whl"}, "pip install 'pdiff-hf[report]'"),
        (
            {"url": "https://git.hub/pdiff", "vcs_info": {"vcs": "git"}},
            "'pdiff-hf[report] @ git+https://git.hub/pdiff'",
        ),
        ("a clone", "/a clone[report]'"),
        ("where one is", "pip install '.[report]'"),
    ],
)
def test_an_extra_is_installed_from_where_the_package_was(origin, command, tmp_path, monkeypatch):
    notes = tmp_path / "site" / "pdiff_hf-9.dist-info"
    notes.mkdir(parents=True)
    (notes / "METADATA").write_text("Name: pdiff-hf\nVersion: 9\n")
    if isinstance(origin, str):
        folder = tmp_path / origin
        folder.mkdir()
        (folder / "pyproject.toml").touch()
        monkeypatch.chdir(folder if origin == "where one is" else tmp_path)
        origin = {"url": folder.as_uri(), "dir_info": {}}
    if origin is not None:
        (notes / "direct_url.json").write_text(json.dumps(origin))
    monkeypatch.setattr(sys, "path", [str(notes.parent)])
    assert install("report").endswith(command)


def test_settings_of_a_program_are_those_of_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    files = ImportConfig(str(tmp_path), checkpoints=[Path("~/0.pt"), "1.pt"]).checkpoints
    assert files == (f"{tmp_path}/0.pt", "1.pt")
    config = TrainConfig(zoo=Path("~/zoo"), output_dir="~/runs", block_out_channels=[8, 8])
    assert config == TrainConfig(zoo=f"{tmp_path}/zoo", output_dir=f"{tmp_path}/runs", block_out_channels=(8, 8))
    save_run(tmp_path, "train", config)
    check_same_run(tmp_path, "train", config, ())
    assert PullConfig(repo="me/zoo", output_dir=tmp_path / "x").output_dir == f"{tmp_path}/x"


def test_folders_at_home_are_at_home(tmp_path, monkeypatch, zoo):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for seed in range(2):
        torch.save({"weight": torch.full((3,), float(seed))}, tmp_path / f"{seed}.pt")
    assert len(WeightZoo.from_checkpoints("~/imported", "~/*.pt")) == 2
    zoo.save_pretrained("~/copied")
    assert len(WeightZoo(tmp_path / "copied")) == len(zoo)
    assert not (tmp_path / "~").exists()
