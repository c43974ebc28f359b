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
from pdiff_hf.files import LOCK, check_kind, check_parts, check_room, locked, own_name
from pdiff_hf.zoo import built
from pdiff_hf.zoo.fill import PARTS, _write_part, fill
from pdiff_hf.zoo.rows import column_types

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


@pytest.mark.parametrize("seeds", [[20], [20, 22]], ids=["once", "twice, into a file with the number of the first"])
def test_two_that_opened_one_zoo_do_not_mix_their_networks(zoo, seeds):
    second = WeightZoo(zoo.folder)
    for seed in seeds:
        with WeightZoo(zoo.folder) as first:
            first.append(random_network(seed).state_dict(), seed=seed)
    second.append(random_network(21).state_dict(), seed=21)
    with pytest.raises(ZooError, match="was changed by somebody else meanwhile"):
        second.flush()
    reopened = WeightZoo(zoo.folder)
    assert [row["seed"] for row in reopened.metadata] == [*range(10), *seeds]
    assert torch.equal(reopened[10], zoo.layout.flatten(random_network(20).state_dict()))


# ---- rows


def test_a_column_that_the_first_network_lacks_stays(zoo):
    file = zoo.folder / "metadata.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows[5:]:
        row["label"] = f"mine {row['index']}"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with WeightZoo(zoo.folder) as grown:
        grown.append(random_network(10).state_dict(), seed=10, label="new")
    labels = [row["label"] for row in WeightZoo(zoo.folder).rows()]
    assert labels == [None] * 5 + [f"mine {index}" for index in range(5, 10)] + ["new"]


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


def named(home: Path | str, cache: Path | str) -> tuple[str, str]:
    """A name of the user of this home and this cache, and what is said."""
    script = "from pdiff_hf.files import own_name; print(own_name('a', 1))"
    environment = {"HOME": str(home), "HF_HOME": str(cache), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    return done.stdout.strip(), done.stderr


def test_names_of_ones_own_are_the_same_in_all_processes_and_of_no_other_user(tmp_path):
    (alice, said), (bob, _) = (
        named(tmp_path / "alice", tmp_path / "cache"),
        named(tmp_path / "bob", tmp_path / "cache"),
    )
    assert alice != bob != ""
    assert said == ""
    assert named(tmp_path / "alice", tmp_path / "of another job")[0] == alice
    # Without a home that can be written it is the cache that knows.
    first = named("/dev/null", tmp_path / "cache")[0]
    assert first == named("/dev/null", tmp_path / "cache")[0] != alice
    lost, said = named("/dev/null", "/dev/null")
    assert lost not in (named("/dev/null", "/dev/null")[0], first)
    assert "HF_HOME can be written: what is interrupted now cannot be gone on with" in said
    assert own_name("a", 2) != own_name("a", 1) == own_name("a", 1)


@pytest.mark.parametrize("make", [WeightZoo.create, lambda *arguments: built(*arguments).__enter__()])
def test_rows_of_something_else_are_not_written_over(tmp_path, layout, make):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "cat.png"}\n')
    with pytest.raises(ZooError, match=r"metadata\.jsonl is there without a zoo\.json"):
        make(tmp_path, layout)
    assert (tmp_path / "metadata.jsonl").read_text() == '{"file_name": "cat.png"}\n'


@pytest.mark.parametrize("name", ["evaluation", "unet", "pipeline.py"])
def test_what_no_training_made_is_not_replaced_by_one(tmp_path, name):
    place = tmp_path / name
    if place.suffix:
        place.write_text("mine")
    else:
        place.mkdir()
        check_parts(tmp_path, "a pipeline")  # nothing is lost
        (place / "results.csv").write_text("mine")
    with pytest.raises(ConfigError, match=f"holds {name}, which is none of a pipeline"):
        check_parts(tmp_path, "a pipeline")
    (tmp_path / "train.yaml").write_text("")
    check_parts(tmp_path, "a pipeline")


def test_what_processes_left_for_a_zoo_that_is_gone_is_in_no_other(tmp_path, layout):
    stranger = layout.flatten(random_network(7).state_dict())
    part = tmp_path / PARTS / f"networks-2-to-4-{own_name('networks')[:16]}.safetensors"
    _write_part(part, [(stranger, {"seed": 7})] * 2)
    own = layout.flatten(random_network(0).state_dict())
    zoo = fill(
        tmp_path,
        lambda: WeightZoo.create(tmp_path, layout),
        num_networks=4,
        unit_size=2,
        make=lambda unit: [(own, {"seed": index}) for index in unit],
        description="test",
    )
    assert [row["seed"] for row in zoo.rows()] == [0, 1, 2, 3]
    assert torch.equal(zoo.vectors(), own.expand(4, -1))


def test_a_copy_of_a_zoo_replaces_no_files(zoo, tmp_path):
    (tmp_path / "clone").mkdir()
    (tmp_path / "clone" / "README.md").write_text("mine")
    zoo.write_card("ours")
    with pytest.raises(ZooError, match=r"holds README\.md already"):
        zoo.save_pretrained(tmp_path / "clone")
    assert [file.name for file in (tmp_path / "clone").iterdir()] == ["README.md"]


def test_a_copy_of_what_a_killed_writer_left_can_be_read(zoo, tmp_path):
    networks = zoo.vectors()
    # It was renaming the shards for a fourth one.
    (zoo.folder / "networks-00001-of-00003.safetensors").rename(zoo.folder / "networks-00001-of-00004.safetensors")
    (zoo.folder / "networks-00004-of-00004.safetensors.part").touch()
    again = WeightZoo(zoo.folder)
    again.save_pretrained(tmp_path / "copy")
    copied = WeightZoo(tmp_path / "copy")
    assert torch.equal(copied.vectors(), networks)
    assert len(list((tmp_path / "copy").glob("*.safetensors"))) == 4


def test_shards_of_two_zoos_are_told_apart(tmp_path, layout):
    for name, count in (("old", 4), ("new", 6)):
        with WeightZoo.create(tmp_path / name, layout, networks_per_shard=2) as zoo:
            for seed in range(count):
                zoo.append(random_network(seed + count).state_dict())
    shutil.copytree(tmp_path / "new", tmp_path / "old", dirs_exist_ok=True)
    with pytest.raises(
        ZooError, match=r"networks-0000\d-of-0000\d\.safetensors and .* of two zoos: remove those of one"
    ):
        WeightZoo(tmp_path / "old")


def test_a_zoo_that_grew_meanwhile_is_not_pushed_with_the_rows_it_had(tmp_path, layout):
    with WeightZoo.create(tmp_path / "zoo", layout) as zoo:
        zoo.append(random_network(0).state_dict())
    with WeightZoo(tmp_path / "zoo") as other:
        other.append(random_network(1).state_dict())
    with pytest.raises(ZooError, match="was changed by somebody else meanwhile"):
        zoo.push_to_hub("alice/zoo")


def test_the_sum_of_a_zoo_tells_another_one(tmp_path, layout):
    def made(name, *seeds, **row):
        with WeightZoo.create(tmp_path / name, layout) as zoo:
            for seed in seeds:
                zoo.append(random_network(seed).state_dict(), **row)
        return zoo.sha256()

    sums = [
        made("a", 0, 1),
        made("b", 0, 2),
        made("c", 0, 1, seed=3),
        made("d"),
        made("f", 0, 5, 1),
        made("g", 0, 6, 1),
    ]
    assert len(set(sums)) == len(sums)
    assert made("e", 0, 1) == sums[0] == WeightZoo(tmp_path / "a").sha256()


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


def test_columns_that_the_hub_has_no_type_for_are_not_described():
    assert column_types([{"a": [1.5, 2]}, {"a": None}]) == [{"name": "a", "list": "float64"}]
    assert column_types([{"a": [[1, 2]]}]) is None
