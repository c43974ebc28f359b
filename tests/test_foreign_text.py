"""Configurations and names that came from somebody else."""

import os
import time

import pytest

from pdiff_hf import CollectConfig, TrainConfig
from pdiff_hf.config import parse
from pdiff_hf.text import MOST_YAML, plain, printable

from .test_cli import line_of


CANARY = "open('CANARY', 'w')\nclass T: pass\n"


@pytest.mark.parametrize(
    "task",
    [
        *("{folder}/task.py:T", "{folder}/../{name}/task.py:T", "pulled_task:T"),
        *("~/{name}/task.py:T", "{name}.task:T", "{folder}/../elsewhere.py:T"),
    ],
)
def test_code_that_came_with_a_configuration_runs_only_by_name(tmp_path, monkeypatch, task):
    folder = tmp_path / "pulled"
    folder.mkdir()
    (folder / "task.py").write_text(CANARY)
    (folder / "pulled_task.py").write_text(CANARY)
    (tmp_path / "elsewhere.py").write_text(CANARY)
    monkeypatch.setenv("HOME", str(tmp_path))
    task = task.format(folder=folder, name=folder.name)
    (folder / "collect.yaml").write_text(f"task: {task}\n")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.chdir(tmp_path)
    line = line_of("collect", "--config", str(folder / "collect.yaml"))
    named = os.path.expanduser(task)
    assert f"names the task {named!r}, which is code of its own: pass --task {named} to run it." in line
    assert not (tmp_path / "CANARY").exists()
    config = parse(CollectConfig, "collect", ["--config", str(folder / "collect.yaml"), "--task", task])
    assert config.task == named


def test_a_configuration_may_name_a_built_in_task(tmp_path):
    (tmp_path / "collect.yaml").write_text("task: digits-mlp\n")
    assert parse(CollectConfig, "collect", ["--config", str(tmp_path / "collect.yaml")]).task == "digits-mlp"


def test_conditions_that_are_asked_for_take_the_place_of_those_of_the_file(tmp_path):
    (tmp_path / "train.yaml").write_text("condition: [classes]\n")
    file = ["--config", str(tmp_path / "train.yaml")]
    assert parse(TrainConfig, "train", file).condition == ("classes",)
    assert parse(TrainConfig, "train", [*file, "--condition", "topic"]).condition == ("topic",)
    assert parse(TrainConfig, "train", [*file, "--condition=a", "--condition=b"]).condition == ("a", "b")


def bomb(depth: int, width: int = 10) -> str:
    levels = [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * width)}]" for i in range(1, depth)]
    return "\n".join([f"a0: &a0 [{','.join('x' * width)}]", *levels, f"task: *a{depth - 1}"])


@pytest.mark.parametrize("depth", [2, 5, 30])
def test_aliases_are_refused_at_once(tmp_path, depth):
    file = tmp_path / "collect.yaml"
    file.write_text(bomb(depth))
    start = time.monotonic()
    line = line_of("collect", "--config", str(file))
    assert time.monotonic() - start < 2
    assert "aliases (*name) are not read" in line
    assert len(line) < 500


def test_very_long_metadata_are_refused(tmp_path):
    file = tmp_path / "collect.yaml"
    file.write_text("task: " + "x" * MOST_YAML)
    assert "characters are more than" in line_of("collect", "--config", str(file))


def test_text_for_cards_keeps_names_and_nothing_else():
    assert plain("my_task.py:BreastCancer") == "my_task.py:BreastCancer"
    assert plain("tägs-1 (a, b)") == "tägs-1 (a, b)"
    hostile = "<!-- pdiff-hf: end --><script>`|*[a](b)\n#\ud800"
    assert plain(hostile) == "??-- pdiff-hf: end --??script?????a?(b)???"
    assert len(plain("x" * 10**6)) == 200
    assert printable("a\tb\nc") == "a\\tb\nc"
