"""The scripts that measure what is claimed can be started, and take nothing for what it is not."""

import importlib
from dataclasses import MISSING, fields

import pytest
import tyro

from benchmarks import minutes_of
from pdiff_hf import TrainConfig
from pdiff_hf.errors import ConfigError

from .conftest import ROOT, SMALL_TRAINING


@pytest.mark.parametrize("name", sorted(file.stem for file in (ROOT / "benchmarks").glob("[!_]*.py")))
def test_each_benchmark_is_whole(name):
    module = importlib.import_module(f"benchmarks.{name}")
    if hasattr(module, "Config"):
        needed = [field.name for field in fields(module.Config) if field.default is MISSING]
        config = tyro.cli(module.Config, args=[part for one in needed for part in (f"--{one.replace('_', '-')}", "1")])
        assert isinstance(config, module.Config)


def test_a_pipeline_of_other_settings_is_not_taken_for_the_one_that_is_measured(digits_zoo, tmp_path):
    settings = {**SMALL_TRAINING, "unet_steps": 3, "output_dir": str(tmp_path / "pipeline")}
    minutes = minutes_of(TrainConfig(zoo=str(digits_zoo.folder), **settings))
    assert minutes > 0
    assert minutes_of(TrainConfig(zoo=str(digits_zoo.folder), **settings)) == minutes
    with pytest.raises(ConfigError, match="holds a run with unet_steps 3, not 4"):
        minutes_of(TrainConfig(zoo=str(digits_zoo.folder), **settings | {"unet_steps": 4}))
    (tmp_path / "pipeline.minutes.json").unlink()
    with pytest.raises(ConfigError, match="is not known: remove it"):
        minutes_of(TrainConfig(zoo=str(digits_zoo.folder), **settings))
    (tmp_path / "pipeline" / "model_index.json").unlink()  # as where it was killed
    assert minutes_of(TrainConfig(zoo=str(digits_zoo.folder), **settings | {"unet_steps": 4})) > 0
