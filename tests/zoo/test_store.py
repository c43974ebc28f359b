# Over 400 lines: all of it shares one zoo, whole or damaged in many ways.
import json
import signal
import subprocess
import sys
import textwrap
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pdiff_hf import ParameterLayout, WeightZoo, ZooError
from pdiff_hf.errors import ConfigError, WriteError
from pdiff_hf.files import whole
from pdiff_hf.zoo import shards

from ..conftest import ROOT, random_network, run, small_network


def test_networks_come_back_bit_by_bit_and_load_strictly(zoo):
    reopened = WeightZoo(zoo.folder)
    assert len(reopened) == 10
    for seed in range(10):
        expected = random_network(seed).state_dict()
        assert torch.equal(reopened[seed], reopened.layout.flatten(expected))
        small_network().load_state_dict(reopened.state_dict(seed), strict=True)
    assert [row["seed"] for row in reopened.metadata] == list(range(10))
    assert torch.equal(torch.cat(list(reopened.batches(3))), reopened.vectors())


def test_the_folder_holds_what_the_format_promises(zoo):
    files = sorted(path.name for path in zoo.folder.iterdir())
    assert files == [
        "frozen.safetensors",
        "metadata.jsonl",
        "networks-00001-of-00003.safetensors",
        "networks-00002-of-00003.safetensors",
        "networks-00003-of-00003.safetensors",
        "zoo.json",
    ]
    assert [len(load_file(zoo.folder / name)["networks"]) for name in files[2:5]] == [4, 4, 2]
    assert list(load_file(zoo.folder / "frozen.safetensors")) == ["1.num_batches_tracked"]
    assert json.loads((zoo.folder / "zoo.json").read_text())["format_version"] == 1


def test_appending_goes_on_after_reopening(zoo):
    reopened = WeightZoo(zoo.folder)
    with reopened:
        for seed in range(10, 13):
            reopened.append(random_network(seed).state_dict(), seed=seed)
            assert torch.equal(reopened[-1], reopened.layout.flatten(random_network(seed).state_dict()))
    again = WeightZoo(zoo.folder)
    assert [row["index"] for row in again.metadata] == list(range(13))
    assert torch.equal(again[12], again.layout.flatten(random_network(12).state_dict()))
    assert again[12].dtype == torch.float32


def test_an_index_out_of_range_is_an_index_error(zoo):
    with pytest.raises(IndexError, match="Network 10 of a zoo of 10"):
        zoo[10]


def test_a_network_that_does_not_fit_leaves_the_zoo_as_it_was(zoo):
    state_dict = random_network(0).state_dict()
    state_dict["0.bias"] = torch.full((4,), torch.nan)
    with pytest.raises(ZooError, match=r"a\.pt: `0\.bias` holds NaN"):
        zoo.append(state_dict, source="a.pt")
    with pytest.raises(ZooError, match=r"vector of 42 parameters; found shape \[3\]"):
        zoo.append(torch.zeros(3))
    zoo.flush()
    assert len(WeightZoo(zoo.folder)) == 10


def test_a_copy_holds_the_same(zoo, tmp_path):
    zoo.save_pretrained(tmp_path / "copy")
    assert torch.equal(WeightZoo.from_pretrained(tmp_path / "copy").vectors(), zoo.vectors())


def test_a_copy_is_no_mixture_with_a_zoo_that_was_there(zoo, layout, tmp_path):
    other = WeightZoo.create(tmp_path / "other", layout, networks_per_shard=4)
    with other:
        for _ in range(12):
            other.append(torch.zeros(zoo.vector_size), source="other")
    with pytest.raises(ZooError, match="holds a zoo already"):
        zoo.save_pretrained(other.folder)
    (other.folder / "zoo.json").rename(tmp_path / "zoo.json")
    with pytest.raises(ZooError, match=r"networks-.* is there without a zoo\.json"):
        zoo.save_pretrained(other.folder)
    (tmp_path / "zoo.json").rename(other.folder / "zoo.json")
    assert not WeightZoo(other.folder).vectors().any()
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").touch()
    with pytest.raises(ConfigError, match="holds a pipeline"):
        zoo.save_pretrained(tmp_path / "pipeline")


def test_a_second_zoo_does_not_replace_the_first(zoo, layout):
    with pytest.raises(ZooError, match="holds a zoo already"):
        WeightZoo.create(zoo.folder, layout)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "zoo.json").unlink(), r"there is no zoo\.json"),
        (lambda folder: (folder / "zoo.json").write_text("{"), r"zoo\.json is damaged"),
        (lambda folder: (folder / "zoo.json").write_text('{"format_version": 9}'), "format version 9"),
        (lambda folder: (folder / "networks-00002-of-00003.safetensors").unlink(), r"lacks the shards \[2\]"),
        (lambda folder: (folder / "networks-00003-of-00003.safetensors").unlink(), r"lacks the shards \[3\]"),
        (lambda folder: truncate(folder / "networks-00002-of-00003.safetensors"), r"00002-of-00003.*truncated"),
        (lambda folder: (folder / "metadata.jsonl").unlink(), r"lacks metadata\.jsonl"),
        (
            lambda folder: save_file({"networks": torch.zeros(4, 3)}, folder / "networks-00001-of-00003.safetensors"),
            "expected networks of 42 parameters, found 3",
        ),
    ],
)
def test_a_damaged_zoo_says_which_file(zoo, damage, message):
    damage(zoo.folder)
    with pytest.raises(ZooError, match=message):
        WeightZoo(zoo.folder)


def rewritten(*path, value):
    """Damage that gives one entry of zoo.json another value."""

    def damage(folder):
        description = json.loads((folder / "zoo.json").read_text())
        place = description
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value
        (folder / "zoo.json").write_text(json.dumps(description))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (rewritten("layout", "tensors", 0, "shape", value=[10**6, 10**6]), "claims 1,000,000,000,000 numbers"),
        (rewritten("layout", "tensors", 0, "shape", value=[-4, -3]), "which is none"),
        (rewritten("layout", "tensors", 0, "shape", value=[400, 3]), "networks of 1230 parameters, found 42"),
        (rewritten("layout", "tensors", 0, "name", value="../../x"), "is no name of a tensor"),
        (rewritten("layout", "tensors", 0, "name", value=["x"]), "is no name of a tensor"),
        (rewritten("layout", "tensors", 0, "name", value="2.bias"), "stands twice"),
        (rewritten("layout", "tensors", 0, "shape", value=[0, 2**70]), "claims 1,180,591,620,717,411,303,424 numbers"),
        (rewritten("layout", "tensors", 0, "dtype", value="load"), "which is none"),
        (rewritten("layout", "tensors", -1, "dtype", value="quint8"), "which is none"),
        (rewritten("layout", "tensors", 0, "dtype", value="int64"), "cannot be generated"),
        (rewritten("layout", "tensors", 0, "role", value="admin"), "expected generated, frozen or tied"),
        (rewritten("layout", "tensors", 0, "role", value="tied"), "which does not fit it"),
        (rewritten("layout", "tensors", 0, value=7), "has a name, a shape, a dtype and a role"),
        (rewritten("layout", "tensors", value={}), "are a list, not dict"),
        (rewritten("layout", value=None), "damaged"),
        (rewritten("task", value=["x"]), "the task is"),
        (rewritten("networks_per_shard", value=0), "networks_per_shard is 0"),
        (rewritten("networks_per_shard", value="4"), "networks_per_shard is '4'"),
        (rewritten("format_version", value="1"), "format version '1'"),
        (lambda folder: (folder / "zoo.json").write_text("[" * 100_000), r"zoo\.json is damaged"),
        (lambda folder: (folder / "zoo.json").write_bytes(b"\xff\xfe"), r"zoo\.json is damaged"),
        (
            lambda folder: save_file(
                {"networks": torch.zeros(4, 42, dtype=torch.float64)}, folder / "networks-00001-of-00003.safetensors"
            ),
            "expected float32 networks, found F64",
        ),
        (
            lambda folder: save_file({"x": torch.zeros(9)}, folder / "frozen.safetensors"),
            r"frozen\.safetensors does not fit zoo\.json: the shapes of 1\.num_batches_tracked, x differ",
        ),
    ],
)
def test_a_hostile_zoo_is_refused_before_it_is_used(zoo, damage, message):
    damage(zoo.folder)
    with pytest.raises(ZooError, match=message):
        _ = WeightZoo(zoo.folder).layout


def truncate(file):
    file.write_bytes(file.read_bytes()[:-20])


def test_a_folder_without_a_zoo_is_told_from_a_repository(tmp_path):
    with pytest.raises(ZooError, match="holds no zoo"):
        WeightZoo.from_pretrained(tmp_path)
    with pytest.raises(ZooError, match="is no folder here, and no name"):
        WeightZoo.from_pretrained("no/such/folder")


def test_a_crash_while_shards_are_renamed_leaves_a_readable_zoo_that_goes_on(tmp_path, layout):
    zoo = WeightZoo.create(tmp_path / "zoo", layout, networks_per_shard=2)
    with zoo:
        for seed in range(4):
            zoo.append(random_network(seed).state_dict(), seed=seed)
    # What is on disk when the process dies after the first of the renames that a third shard needs.
    (zoo.folder / "networks-00003-of-00003.safetensors.part").write_bytes(b"whatever")
    (zoo.folder / "networks-00001-of-00002.safetensors").rename(zoo.folder / "networks-00001-of-00003.safetensors")
    survivor = WeightZoo(zoo.folder)
    assert len(survivor) == 4
    with survivor:
        survivor.append(random_network(4).state_dict(), seed=4)
    assert [row["seed"] for row in WeightZoo(zoo.folder).metadata] == [0, 1, 2, 3, 4]
    assert not list(zoo.folder.glob("*.part"))


@pytest.mark.parametrize("interrupted", ["networks-00001-of-", "networks-00002-of-", "networks-00003-of-"])
def test_an_interruption_while_shards_are_renamed_leaves_a_readable_zoo(tmp_path, layout, monkeypatch, interrupted):
    zoo = WeightZoo.create(tmp_path / "zoo", layout, networks_per_shard=2)
    with zoo:
        for seed in range(4):
            zoo.append(random_network(seed).state_dict(), seed=seed)
    zoo.append(random_network(4).state_dict(), seed=4)
    replace = Path.replace

    def interrupt(self, target):
        if self.name.startswith(interrupted):
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        zoo.flush()
    monkeypatch.setattr(Path, "replace", replace)
    assert len(WeightZoo(zoo.folder)) == 4
    zoo.flush()
    assert [row["seed"] for row in WeightZoo(zoo.folder).metadata] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_networks_and_statistics_are_float32_whatever_the_default_is(zoo, layout, dtype):
    expected = zoo.vectors()
    layout.fit([expected]).fit_initial(expected)
    drawn = layout.draw_initial([torch.Generator().manual_seed(0)])
    torch.set_default_dtype(dtype)
    try:
        found = WeightZoo(zoo.folder)
        assert found[0].dtype == torch.float32
        assert torch.equal(found.vectors(), expected)
        again = ParameterLayout.from_config(layout.config)
        again.load_state_dict(layout.state_dict())
        assert torch.equal(again.mean, layout.mean)
        assert torch.equal(again.std, layout.std)
        assert torch.equal(again.draw_initial([torch.Generator().manual_seed(0)]), drawn)
    finally:
        torch.set_default_dtype(torch.float32)


def test_metadata_of_networks_that_were_never_written_is_forgotten(zoo):
    with (zoo.folder / "metadata.jsonl").open("a") as file:
        file.write('{"index": 10, "seed": 99}\n{"ind')
    survivor = WeightZoo(zoo.folder)
    with survivor:
        survivor.append(random_network(10).state_dict(), seed=10)
    assert WeightZoo(zoo.folder).metadata[10] == {"index": 10, "seed": 10}


@pytest.mark.slow
def test_a_full_disk_loses_nothing_that_was_flushed(tmp_path):
    script = textwrap.dedent("""
        import resource, sys, torch
        from pdiff_hf import ParameterLayout, PdiffError, WeightZoo
        network = torch.nn.Linear(100, 100)
        zoo = WeightZoo.create(sys.argv[1], ParameterLayout.from_state_dict(network.state_dict()))
        zoo.append(network.state_dict())
        zoo.flush()
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
        zoo.append(network.state_dict())
        try:
            zoo.flush()
        except PdiffError as error:
            print(error)
    """)
    done = run("-c", script, str(tmp_path / "zoo"))
    assert done.returncode == 0, done.stderr
    assert "Cannot write" in done.stdout
    assert "The 1 networks that were flushed before are safe" in done.stdout
    assert len(WeightZoo(tmp_path / "zoo")) == 1
    assert not list((tmp_path / "zoo").glob("*.part"))


@pytest.mark.slow
def test_a_killed_writer_leaves_a_readable_zoo(tmp_path, layout):
    script = textwrap.dedent("""
        import sys
        from pdiff_hf import WeightZoo
        from tests.conftest import random_network
        from pdiff_hf import ParameterLayout
        zoo = WeightZoo.create(sys.argv[1], ParameterLayout.from_state_dict(random_network(0).state_dict()), None, 3)
        for seed in range(10**9):
            zoo.append(random_network(seed).state_dict(), seed=seed)
            zoo.flush()
            print(len(zoo), flush=True)
    """)
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "zoo")], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    flushed = 0
    while flushed < 50:
        flushed = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    process.wait()
    zoo = WeightZoo(tmp_path / "zoo")
    assert len(zoo) >= 50
    for index in (0, len(zoo) - 1):
        assert zoo.metadata[index]["seed"] == index
        assert torch.equal(zoo[index], layout.flatten(random_network(index).state_dict()))


def test_checkpoints_of_all_formats_become_a_zoo(tmp_path):
    networks = [random_network(seed).state_dict() for seed in range(3)]
    files = [tmp_path / "a.safetensors", tmp_path / "b.pt", tmp_path / "c.pth"]
    save_file(networks[0], files[0])
    torch.save(networks[1], files[1])
    torch.save(networks[2], files[2])
    zoo = WeightZoo.from_checkpoints(tmp_path / "zoo", files, task="mine")
    assert [row["source"] for row in zoo.metadata] == ["a.safetensors", "b.pt", "c.pth"]
    for index, network in enumerate(networks):
        assert all(torch.equal(value, network[name]) for name, value in zoo.state_dict(index).items())
    assert WeightZoo(zoo.folder).task == "mine"


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code of a checkpoint ran')",))


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (
            {"0.weight": torch.zeros(2, 2)},
            "b.pt",
            r"b\.pt: `0\.weight`: expected float32 \[4, 3\], found float32 \[2, 2\]",
        ),
        ({"w": torch.zeros(2, 2)}, "b.pt", r"b\.pt: The network has tensors that the layout does not know: w"),
        (Evil(), "b.pt", r"b\.pt cannot be read as a state dict"),
        ([1, 2], "b.pth", r"b\.pth holds no state dict"),
        (None, "missing.pt", r"missing\.pt cannot be read"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_named_and_leaves_no_zoo(tmp_path, content, name, message):
    torch.save(random_network(0).state_dict(), tmp_path / "a.pt")
    if content is not None:
        torch.save(content, tmp_path / name)
    with pytest.raises(ZooError, match=message):
        WeightZoo.from_checkpoints(tmp_path / "zoo", [tmp_path / "a.pt", tmp_path / name])
    assert not (tmp_path / "zoo").exists()


@pytest.mark.slow
def test_one_network_of_a_large_zoo_is_read_alone(tmp_path):
    script = textwrap.dedent("""
        import resource, sys, torch
        from pdiff_hf import ParameterLayout, WeightZoo
        network = {"weight": torch.zeros(1_000_000)}
        with WeightZoo.create(sys.argv[1], ParameterLayout.from_state_dict(network)) as zoo:
            for value in range(60):
                zoo.append(torch.full((1_000_000,), float(value)))
    """)
    read = textwrap.dedent("""
        import resource, sys, time, pdiff_hf.zoo
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        assert pdiff_hf.WeightZoo(sys.argv[1])[42][7] == 42
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """)
    assert run("-c", script, str(tmp_path / "zoo")).returncode == 0
    done = run("-c", read, str(tmp_path / "zoo"))
    assert done.returncode == 0, done.stderr
    # Kilobytes: the zoo holds 240 MB, one network 4 MB.
    assert int(done.stdout) < 40_000


def test_bfloat16_halves_the_files_and_rounds(zoo, tmp_path):
    half = WeightZoo.create(tmp_path / "half", zoo.layout, networks_per_shard=4, dtype="bfloat16")
    with half:
        for index in range(10):
            half.append(zoo[index] if index % 2 else zoo.state_dict(index))
        assert torch.equal(half.vectors(), zoo.vectors().bfloat16().float())
    reopened = WeightZoo(half.folder)
    assert load_file(half.folder / "networks-00001-of-00003.safetensors")["networks"].dtype == torch.bfloat16
    assert reopened[3].dtype == torch.float32
    assert torch.equal(reopened.vectors(), zoo.vectors().bfloat16().float())
    assert torch.equal(reopened.columns(5, 9), reopened.vectors()[:, 5:9])
    with pytest.raises(ZooError, match="finite"):
        reopened.append(torch.full((zoo.vector_size,), 3.4e38))
    with pytest.raises(ZooError, match="float32 or bfloat16, and not float16"):
        WeightZoo.create(tmp_path / "other", zoo.layout, dtype="float16")


def test_a_shard_of_another_dtype_is_refused(zoo):
    description = json.loads((zoo.folder / "zoo.json").read_text())
    (zoo.folder / "zoo.json").write_text(json.dumps({**description, "dtype": "bfloat16"}))
    with pytest.raises(ZooError, match="expected bfloat16 networks, found F32"):
        WeightZoo(zoo.folder)


@pytest.mark.parametrize("every", [1, 2, 3, 7, 20])
def test_columns_of_every_so_manieth_network(zoo, every):
    with WeightZoo(zoo.folder) as reopened:
        for seed in range(10, 13):
            reopened.append(random_network(seed).state_dict())
        assert torch.equal(reopened.columns(2, 6, every), reopened.vectors()[::every, 2:6])


def test_a_full_shard_is_checked_before_its_first_use(zoo):
    shard = zoo.folder / "networks-00002-of-00003.safetensors"
    shard.write_bytes(b"x" * shard.stat().st_size)
    reopened = WeightZoo(zoo.folder)
    assert torch.equal(reopened[0], zoo[0])
    for read in (lambda: reopened[5], reopened.vectors, lambda: reopened.columns(0, 1)):
        with pytest.raises(ZooError, match=r"networks-00002-of-00003\.safetensors is damaged"):
            read()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lines: [*lines[:3], b"{\n", *lines[4:]], r"metadata\.jsonl is damaged"),
        (lambda lines: [*lines[:9], lines[9][:-20]], r"metadata\.jsonl is damaged"),
        (lambda lines: lines[:9], r"metadata\.jsonl has 9 rows for 10 networks"),
        (lambda lines: [b"7\n"] * 10, "each row has to be a JSON object"),
    ],
)
def test_damaged_rows_show_when_they_are_read(zoo, damage, message):
    file = zoo.folder / "metadata.jsonl"
    file.write_bytes(b"".join(damage(file.read_bytes().splitlines(keepends=True))))
    reopened = WeightZoo(zoo.folder)
    assert torch.equal(reopened[3], zoo[3])
    with pytest.raises(ZooError, match=message):
        _ = reopened.metadata


def test_nothing_is_appended_to_rows_that_were_cut_off(zoo):
    file = zoo.folder / "metadata.jsonl"
    truncate(file)
    cut = file.read_bytes()
    reopened = WeightZoo(zoo.folder)
    reopened.append(zoo[0])
    with pytest.raises(ZooError, match=r"metadata\.jsonl is damaged"):
        reopened.flush()
    assert file.read_bytes() == cut


def test_a_write_that_fails_between_shards_leaves_the_rows_of_those_written(zoo, monkeypatch):
    # 10 networks in shards of 4: two more fill the last one, and the next begins another.
    for seed in range(5):
        zoo._pending.append(zoo[0])
        zoo._pending_rows.append({"index": 10 + seed})

    @contextmanager
    def fail_at_the_fourth(file, remedy):
        if file.name.startswith("networks-00004"):
            raise WriteError("no room")
        with whole(file, remedy) as temporary:
            yield temporary

    monkeypatch.setattr(shards, "whole", fail_at_the_fourth)
    for _ in range(2):
        with pytest.raises(WriteError, match="no room"):
            zoo.flush()
        assert len(WeightZoo(zoo.folder).metadata) == 12
    monkeypatch.undo()
    zoo.flush()
    assert [row["index"] for row in WeightZoo(zoo.folder).metadata] == list(range(15))


def test_rows_are_appended_and_not_written_again(zoo):
    file = zoo.folder / "metadata.jsonl"
    # Surplus of a killed process, cut off within a line.
    end = WeightZoo(zoo.folder).rows_end
    with file.open("a") as rows:
        rows.write('{"index": 10}\n{"ind')
    reopened = WeightZoo(zoo.folder)
    assert reopened.rows_end == end
    inode = file.stat().st_ino
    with reopened:
        reopened.append(zoo[0], seed=77)
    assert file.stat().st_ino == inode
    assert [row.get("seed") for row in WeightZoo(zoo.folder).metadata] == [*range(10), 77]
    assert len(file.read_text().splitlines()) == 11


def test_a_slice_gives_the_vectors_of_its_networks(tmp_path):
    zoo = WeightZoo.create(tmp_path / "zoo", ParameterLayout.from_state_dict({"w": torch.zeros(3)}))
    with zoo:
        for index in range(5):
            zoo.append(torch.full((3,), float(index)))
    assert zoo[1:3][:, 0].tolist() == [1, 2]
    assert zoo[::-2][:, 0].tolist() == [4, 2, 0]
    assert zoo[-1][0] == 4
