"""Checkpoints of all kinds become the networks that they are, or are refused with the reason."""

import collections
import io
import shutil
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file, save_model
from torch import nn

from pdiff_hf import WeightZoo, ZooError
from pdiff_hf.cli import main

from ..conftest import random_network, run


def linear(value: float) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((2, 3), value), "bias": torch.arange(2.0) + value}


def imported(folder, files, **arguments) -> WeightZoo:
    return WeightZoo.from_checkpoints(folder / "zoo", files, **arguments)


@pytest.mark.parametrize(
    "name", ["a.bin", "a.ckpt", "a.pth.tar", "a.PT", "checkpoint", "a.safetensors", "a.SAFETENSORS"]
)
@pytest.mark.parametrize("safe", [False, True])
def test_files_are_told_by_their_content(tmp_path, name, safe):
    for value in (1.0, 2.0):
        file = tmp_path / str(value) / name
        file.parent.mkdir()
        save_file(linear(value), file) if safe else torch.save(linear(value), file)
    zoo = imported(tmp_path, sorted(tmp_path.glob(f"*/{name}")))
    assert all(torch.equal(zoo.state_dict(1)[key], value) for key, value in linear(2.0).items())
    assert [row["source"] for row in zoo.metadata] == [f"1.0/{name}", f"2.0/{name}"]


@pytest.mark.parametrize(
    "path", [("state_dict",), ("model_state",), ("model",), ("module",), ("training", "net"), ("anything",)]
)
def test_the_only_state_dict_in_a_file_is_found(tmp_path, path):
    network = random_network(0)
    optimizer = torch.optim.AdamW(network.parameters())
    sum(parameter.sum() for parameter in network.parameters()).backward()
    optimizer.step()
    content = network.state_dict()
    for name in reversed(path):
        content = {name: content}
    content |= {"epoch": 3, "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state(), "args": {"lr": 0.1}}
    torch.save(content, tmp_path / "0.ckpt")
    zoo = imported(tmp_path, [tmp_path / "0.ckpt"])
    assert all(torch.equal(zoo.state_dict(0)[key], value) for key, value in network.state_dict().items())


def test_one_of_several_state_dicts_is_chosen_by_its_key(tmp_path):
    torch.save({"model": linear(1.0), "ema": {"model": linear(2.0)}}, tmp_path / "0.pt")
    with pytest.raises(ZooError, match=r"0\.pt holds several state dicts.*model, ema\.model"):
        imported(tmp_path, [tmp_path / "0.pt"])
    with pytest.raises(ZooError, match=r"has no state dict 'net': model, ema\.model"):
        imported(tmp_path, [tmp_path / "0.pt"], key="net")
    assert torch.equal(imported(tmp_path, [tmp_path / "0.pt"], key="ema.model")[0][-2:], linear(2.0)["bias"])


class Arguments:
    """Of a training script."""


def scripted() -> bytes:
    """What `torch.jit.save` writes."""
    buffer = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 1)), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": linear(1.0), "args": Arguments()}, r"holds objects of .*Arguments.*save the tensors alone"),
        ({"epoch": 3}, "holds no state dict"),
        ({**linear(1.0), "epoch": 3}, "holds no state dict"),
        (torch.ones(3), "holds no state dict"),
        ({"w": torch.eye(3).to_sparse()}, "`w` is sparse or nested; dense tensors are read"),
        ({"w": torch.empty(3, device="meta")}, "`w` is without values; dense"),
        (b"no checkpoint at all", "cannot be read as a state dict: it is damaged"),
        (b"", "cannot be read as a state dict"),
        (b"\xff\xff\xff\xff\xff\xff\xff\x7f{", "cannot be read as a state dict"),
        (b"\x09\0\0\0\0\0\0\0{damaged}", "cannot be read as a state dict"),
        (scripted(), r"it is a TorchScript archive, or of torch's old formats. Save the tensors alone"),
    ],
)
def test_what_holds_no_tensors_alone_is_explained_without_settings_that_run_code(tmp_path, content, message):
    file = tmp_path / "0.pt"
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    with pytest.raises(ZooError, match=message) as caught:
        imported(tmp_path, [file])
    assert "weights_only" not in str(caught.value)
    assert "safe_globals" not in str(caught.value)
    assert not (tmp_path / "zoo").exists()


# ---- order and names


@given(
    steps=st.lists(st.integers(0, 10**6), min_size=2, max_size=12, unique=True),
    kind=st.sampled_from([list, iter, set]),
)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_files_in_alphabetical_order_or_none_are_taken_in_that_of_their_numbers(tmp_path_factory, steps, kind):
    folder = tmp_path_factory.mktemp("steps")
    for step in steps:
        torch.save(linear(float(step)), folder / f"step_{step}.pt")
    files = sorted(folder.glob("*.pt"))
    zoo = imported(folder, files if kind is list else kind(files))
    assert [zoo.state_dict(i)["weight"][0, 0].item() for i in range(len(zoo))] == sorted(steps)
    shutil.rmtree(folder)


def test_an_order_of_ones_own_stays(tmp_path):
    for name in "abc":
        torch.save(linear(float(ord(name))), tmp_path / f"{name}.pt")
    zoo = imported(tmp_path, [tmp_path / f"{name}.pt" for name in "bca"])
    assert [row["source"] for row in zoo.metadata] == ["b.pt", "c.pt", "a.pt"]


def test_files_of_one_name_are_told_apart_in_rows_and_errors(tmp_path):
    for folder, content in (("a/x", linear(1.0)), ("b/x", {"w": torch.ones(1)})):
        (tmp_path / folder).mkdir(parents=True)
        torch.save(content, tmp_path / folder / "model.pt")
    files = sorted(tmp_path.glob("*/*/model.pt"))
    with pytest.raises(ZooError, match=r"^b/x/model\.pt: The network has tensors"):
        imported(tmp_path, files)
    torch.save(linear(2.0), files[1])
    assert [row["source"] for row in imported(tmp_path, files).metadata] == ["a/x/model.pt", "b/x/model.pt"]


def test_one_path_is_one_file_the_files_of_a_folder_or_those_of_a_pattern(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for step in (2, 10):
        torch.save(linear(float(step)), folder / f"step_{step}.pt")
    (folder / "notes.txt").write_text("none")
    sources = ["step_2.pt", "step_10.pt"]
    assert len(imported(tmp_path, folder / "step_2.pt")) == 1
    assert [row["source"] for row in imported(tmp_path / "a", folder).metadata] == sources
    assert [row["source"] for row in imported(tmp_path / "b", f"{folder}/*_*").metadata] == sources
    (tmp_path / "empty").mkdir()
    with pytest.raises(ZooError, match=r"empty holds no checkpoint: no file that ends in \.safetensors, "):
        imported(tmp_path / "c", str(tmp_path / "empty"))


def test_the_command_imports_checkpoints(tmp_path):
    for name in ("a", "b"):
        torch.save(linear(1.0), tmp_path / f"{name}.pt")
    arguments = ["import", "--output-dir", str(tmp_path / "zoo"), "--checkpoints"]
    main([*arguments, str(tmp_path / "*.pt")])
    assert len(WeightZoo(tmp_path / "zoo")) == 2
    shutil.rmtree(tmp_path / "zoo")
    main([*arguments, str(tmp_path / "b.pt"), str(tmp_path / "a.pt")])
    assert [row["source"] for row in WeightZoo(tmp_path / "zoo").metadata] == ["b.pt", "a.pt"]


KILLED = """
import os, sys
from pathlib import Path
from pdiff_hf.cli import main
from pdiff_hf.zoo import WeightZoo, store
store.SHARD_BYTES = 4 * 12 * 4
append, replace = WeightZoo.append, Path.replace
def appending(zoo, *network, **row):
    if len(zoo) == 6 and sys.argv[1] == "built": os._exit(9)
    append(zoo, *network, **row)
def moving(file, target):
    if file.name == "zoo.json" and target.parent.name == "zoo": os._exit(9)
    return replace(file, target)
WeightZoo.append, Path.replace = appending, moving
main(sys.argv[2:])
"""


@pytest.mark.parametrize("while_it_is", [pytest.param("built", marks=pytest.mark.slow), "moved"])
def test_a_killed_import_leaves_no_zoo_and_is_repeated(tmp_path, while_it_is):
    (tmp_path / "checkpoints").mkdir()
    for number in range(10):
        torch.save({"w": torch.full((3, 4), float(number))}, tmp_path / "checkpoints" / f"{number}.pt")
    arguments = ["import", "--checkpoints", str(tmp_path / "checkpoints"), "--output-dir", str(tmp_path / "zoo")]
    assert run("-c", KILLED, while_it_is, *arguments).returncode == 9
    assert [path.name for path in tmp_path.rglob("networks-*")]
    with pytest.raises(ZooError, match=r"there is no zoo\.json"):
        WeightZoo(tmp_path / "zoo")
    shutil.copytree(tmp_path / "zoo", tmp_path / "other")
    main(arguments)
    assert WeightZoo(tmp_path / "zoo").vectors()[:, 0].tolist() == list(range(10))
    with WeightZoo.create(tmp_path / "other", WeightZoo(tmp_path / "zoo").layout) as other:
        other.append(torch.zeros(12))
    assert {path.name for path in (tmp_path / "other").iterdir()} == {
        *("zoo.json", "metadata.jsonl", "frozen.safetensors", "networks-00001-of-00001.safetensors")
    }
    assert {path.name for path in (tmp_path / "zoo").iterdir()} == {
        *("zoo.json", "metadata.jsonl", "frozen.safetensors", "README.md", "networks-00001-of-00001.safetensors"),
        *("import.yaml", "import.facts.json"),
    }


def test_one_pattern_is_not_read_letter_by_letter(tmp_path):
    torch.save(linear(1.0), tmp_path / "0.pt")
    assert list(imported(tmp_path, [tmp_path / "0.pt"], patterns="w*").layout.slices) == ["weight"]


# ---- what is not generated


def test_a_network_whose_frozen_tensors_differ_is_refused_by_name_or_accepted(tmp_path):
    files = []
    for index in range(3):
        files.append(tmp_path / f"{index}.pt")
        torch.save(linear(1.0 if index < 2 else 5.0) | {"bias": torch.full((2,), float(index))}, files[-1])
    with pytest.raises(ZooError, match=r"2\.pt: `weight` is not generated, and differs.*may_differ"):
        imported(tmp_path, files, patterns=["bias"])
    assert not (tmp_path / "zoo").exists()
    zoo = imported(tmp_path, files, patterns=["bias"], may_differ=["weight"])
    assert WeightZoo(zoo.folder).may_differ == ("weight",)
    assert torch.equal(zoo.state_dict(2)["weight"], linear(1.0)["weight"])
    assert torch.equal(zoo.state_dict(2)["bias"], torch.full((2,), 2.0))


@given(
    kind=st.sampled_from([torch.int64, torch.int32, torch.uint8, torch.bool, torch.float64]),
    place=st.integers(0, 3),
    name=st.sampled_from(["permutation", "initialized", "mask", "steps"]),
)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_any_buffer_that_differs_is_named(tmp_path_factory, kind, place, name):
    folder = tmp_path_factory.mktemp("buffers")
    for index in range(2):
        buffer = torch.zeros(4, dtype=kind)
        buffer[place] = index
        torch.save({**linear(1.0 + index), f"flow.{name}": buffer}, folder / f"{index}.pt")
    with pytest.raises(ZooError, match=rf"1\.pt: `flow\.{name}` is not generated, and differs"):
        imported(folder, sorted(folder.glob("*.pt")), patterns=["weight", "bias"])


def test_counts_of_batches_may_differ(tmp_path):
    for index in range(2):
        network = random_network(index)
        network[1].num_batches_tracked += index
        torch.save(network.state_dict(), tmp_path / f"{index}.pt")
    zoo = imported(tmp_path, sorted(tmp_path.glob("*.pt")))
    assert zoo.state_dict(1)["1.num_batches_tracked"] == 0


# ---- tied tensors


class Tied(nn.Module):
    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.out = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
        self.out.weight = self.embed.weight


def saved_by_save_model(network, file):
    save_model(network, str(file))


def saved_under_the_other_name(network, file):
    save_file({"out.weight": network.out.weight.detach()}, file, {"embed.weight": "out.weight"})


def saved_twice(network, file):
    save_file({name: value.clone() for name, value in network.state_dict().items()}, file)


def saved_by_torch(network, file):
    torch.save(network.state_dict(), file)


@pytest.mark.parametrize("first", [saved_by_save_model, saved_under_the_other_name, saved_twice, saved_by_torch])
@pytest.mark.parametrize("second", [saved_by_save_model, saved_under_the_other_name, saved_twice, saved_by_torch])
def test_tied_tensors_stay_tied_however_their_files_hold_them(tmp_path, first, second):
    networks = [Tied(0), Tied(1), Tied(2)]
    for index, save in enumerate((first, second, first)):
        save(networks[index], tmp_path / f"{index}.pt")
    zoo = imported(tmp_path, sorted(tmp_path.glob("*.pt")))
    assert zoo.vector_size == 66
    for index, network in enumerate(networks):
        restored = zoo.state_dict(index)
        assert restored["embed.weight"] is restored["out.weight"]
        assert torch.equal(restored["out.weight"], network.out.weight)
        Tied(9).load_state_dict(restored, strict=True)


def test_tensors_that_are_equal_in_the_first_network_alone_are_not_tied(tmp_path):
    value = torch.arange(3.0)
    save_file({"online": value, "target": value.clone()}, tmp_path / "0.safetensors")
    save_file({"online": value + 1, "target": value}, tmp_path / "1.safetensors")
    zoo = imported(tmp_path, sorted(tmp_path.glob("*.safetensors")))
    assert torch.equal(zoo.state_dict(1)["online"], value + 1)
    assert torch.equal(zoo.state_dict(1)["target"], value)


def test_an_adapter_is_imported_with_its_configuration_or_not_at_all(tmp_path):
    save_file({"lora_A": torch.ones(4, 2), "lora_B": torch.ones(2, 4)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ZooError, match=r"adapter_model\.safetensors is an adapter.* WeightZoo\.from_adapters"):
        imported(tmp_path, [tmp_path / "adapter_model.safetensors"])
    assert not (tmp_path / "zoo").exists()


def test_an_ordered_state_dict_keeps_its_order(tmp_path):
    network = collections.OrderedDict([("z", torch.ones(1)), ("a", torch.zeros(1))])
    torch.save(network, tmp_path / "0.pt")
    assert list(imported(tmp_path, [tmp_path / "0.pt"]).state_dict(0)) == ["z", "a"]
