"""One writer a folder, and rows that all have the same keys."""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pdiff_hf import ParameterLayout, PdiffError, WeightZoo, ZooError
from pdiff_hf.errors import ConfigError, WriteError
from pdiff_hf.files import LOCK, check_kind, check_room, locked, own_name

from ..conftest import random_network


def hold(folder, held, release):
    with locked(folder):
        held.set()
        release.wait(60)


@pytest.fixture
def holder(tmp_path):
    """Another process that writes `tmp_path / "zoo"`."""
    spawn = multiprocessing.get_context("spawn")
    held, release = spawn.Event(), spawn.Event()
    process = spawn.Process(target=hold, args=(tmp_path / "zoo", held, release))
    process.start()
    assert held.wait(60)
    yield
    release.set()
    process.join()


@pytest.mark.usefixtures("holder")
def test_a_folder_that_another_process_writes_is_refused_in_one_line(tmp_path, layout):
    with pytest.raises(WriteError, match="Another process writes"):
        WeightZoo.create(tmp_path / "zoo", layout)
    with pytest.raises(WriteError), locked(tmp_path / "zoo"):
        pass
    with locked(tmp_path / "other"):
        pass
    assert not (tmp_path / "other").exists()


def test_a_lock_is_held_as_often_as_it_is_taken_and_leaves_nothing(tmp_path):
    with locked(tmp_path):
        with locked(tmp_path):
            pass
        assert (tmp_path / LOCK).exists()
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_leaves_no_lock_behind(tmp_path):
    script = "import os, sys, pdiff_hf.files as f; f.locked(sys.argv[1]).__enter__(); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)]).returncode == 9
    with locked(tmp_path):
        pass


def test_two_that_opened_one_zoo_do_not_mix_their_networks(zoo):
    first, second = WeightZoo(zoo.folder), WeightZoo(zoo.folder)
    with first:
        first.append(random_network(20).state_dict(), seed=20)
    second.append(random_network(21).state_dict(), seed=21)
    with pytest.raises(ZooError, match="was changed by somebody else meanwhile"):
        second.flush()
    reopened = WeightZoo(zoo.folder)
    assert [row["seed"] for row in reopened.metadata] == [*range(10), 20]
    assert torch.equal(reopened[10], zoo.layout.flatten(random_network(20).state_dict()))


# ---- rows


def test_every_row_has_every_key(tmp_path, layout):
    zoo = WeightZoo.create(tmp_path / "zoo", layout, networks_per_shard=3)
    vector = torch.zeros(layout.vector_size)
    with zoo:
        for index in range(7):
            zoo.append(vector, **({"late": "x"} if index == 5 else {"seed": index}))
    with zoo:
        zoo.append(vector, index=99, last=1.5)
    rows = [json.loads(line) for line in (zoo.folder / "metadata.jsonl").read_text().splitlines()]
    assert {tuple(row) for row in rows} == {("index", "seed", "late", "last")}
    assert [row["index"] for row in rows] == list(range(8))
    assert [row["seed"] for row in rows] == [0, 1, 2, 3, 4, None, 6, None]
    assert [row["late"] for row in rows] == [None] * 5 + ["x"] + [None] * 2
    assert rows == WeightZoo(zoo.folder).metadata == zoo.metadata


@pytest.mark.slow
def test_two_hundred_thousand_rows_with_a_late_key_load_as_a_data_set(tmp_path):
    datasets = pytest.importorskip("datasets")
    zoo = WeightZoo.create(tmp_path / "zoo", ParameterLayout.from_state_dict({"w": torch.zeros(1)}))
    vector = torch.zeros(1)
    with zoo:
        for index in range(200_000):
            zoo.append(vector, source=f"a source of some length, so that there are several blocks {index}")
        zoo.append(vector, source="last", late="a word")
    zoo.write_card("Rows.")
    rows = datasets.load_dataset(str(zoo.folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(rows) == 200_001
    assert rows[-1]["late"] == "a word"
    assert rows[0]["late"] is None


# ---- damage


def test_a_stored_nan_is_named_where_it_is_read(zoo):
    shard = sorted(zoo.folder.glob("networks-*.safetensors"))[1]
    content = bytearray(shard.read_bytes())
    content[-4:] = torch.tensor([torch.nan]).numpy().tobytes()
    shard.write_bytes(content)
    damaged = WeightZoo(zoo.folder)
    assert torch.equal(damaged[0], zoo[0])
    for read in (lambda: damaged[7], lambda: damaged.columns(0, 42), lambda: list(damaged.batches())):
        with pytest.raises(ZooError, match=r"Network 7 of .* holds NaN or infinite values"):
            read()


def test_a_shard_that_cannot_be_opened_is_not_to_be_deleted(zoo, monkeypatch):
    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", refused)
    with pytest.raises(ZooError, match="cannot be opened") as caught:
        WeightZoo(zoo.folder)
    assert "delete" not in str(caught.value)


@pytest.mark.parametrize("marker", ["model_index.json", "train.yaml", "report.json", "evaluate.yaml"])
def test_a_zoo_does_not_go_where_something_else_is(tmp_path, layout, marker):
    (tmp_path / marker).write_text("{}")
    with pytest.raises(ConfigError, match=r"holds a (pipeline|report)"):
        WeightZoo.create(tmp_path, layout)
    assert [path.name for path in tmp_path.iterdir()] == [marker]
    with pytest.raises(ConfigError):
        check_kind(tmp_path, "collect")


def test_more_than_a_disk_holds_is_said_before(tmp_path):
    with pytest.raises(PdiffError, match=r"would take 7,600\.0 GB, and its disk has"):
        check_room(tmp_path / "not" / "there", 76 * 10**11)
    check_room(tmp_path, 1)


def test_names_of_ones_own_are_the_same_in_all_processes_and_of_no_other_user(tmp_path):
    script = "from pdiff_hf.files import own_name; print(own_name('a', 1))"
    again = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip()
    other = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={"HF_HOME": str(tmp_path), "PATH": ""}
    ).stdout.strip()
    assert own_name("a", 1) == again != other != ""
    assert own_name("a", 2) != again


def test_a_path_that_readers_cannot_name_is_said_to_be_that(tmp_path, layout):
    folder = tmp_path / os.fsdecode(b"zoo-\xff")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    zoo = WeightZoo.create(tmp_path / "zoo", layout)
    with zoo:
        zoo.append(random_network(0).state_dict())
    shutil.copytree(zoo.folder, folder, dirs_exist_ok=True)
    with pytest.raises(ZooError, match="its path is no UTF-8") as caught:
        WeightZoo(folder)
    assert "delete" not in str(caught.value)
    str(caught.value).encode()


@pytest.mark.parametrize("name", ["frozen.safetensors", "metadata.jsonl"])
def test_a_file_that_cannot_be_opened_is_not_called_damaged(zoo, monkeypatch, name):
    opened = Path.open

    def refused(self, *args, **kwargs):
        if self.name == name:
            raise PermissionError(13, "Permission denied")
        return opened(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(ZooError, match=r"cannot be (opened|read): .*Permission denied") as caught:
        _ = WeightZoo(zoo.folder).layout, WeightZoo(zoo.folder).metadata
    assert "damaged" not in str(caught.value)
