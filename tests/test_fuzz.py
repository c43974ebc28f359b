"""Whatever bytes a zoo or a layout holds, reading it ends in success or in an error of our own."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pdiff_hf import ParameterLayout, WeightZoo, ZooError

from .conftest import random_network


FILES = ("zoo.json", "metadata.jsonl", "frozen.safetensors", "networks-00001-of-00002.safetensors")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=8,
)
MANY = settings(max_examples=2000, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> WeightZoo:
    layout = ParameterLayout.from_state_dict(random_network(0).state_dict(), ("0.*", "1.*"))
    zoo = WeightZoo.create(tmp_path_factory.mktemp("fuzz") / "zoo", layout, task="none", networks_per_shard=3)
    with zoo:
        for seed in range(5):
            zoo.append(random_network(seed).state_dict() | layout.frozen_state_dict(), seed=seed)
    return zoo


def read(folder: Path) -> None:
    """Reads everything that a zoo has."""
    try:
        zoo = WeightZoo(folder)
        assert zoo.vectors().shape == (len(zoo), zoo.vector_size)
        assert len(zoo.metadata) == len(zoo)
        if len(zoo):
            assert len(zoo.state_dict(len(zoo) - 1)) == len(zoo.layout.config["tensors"])
    except ZooError:
        pass


@pytest.fixture
def copy(original, tmp_path) -> Path:
    return Path(shutil.copytree(original.folder, tmp_path / "zoo"))


@pytest.mark.slow
@MANY
@given(
    name=st.sampled_from(FILES),
    edits=st.lists(
        st.tuples(st.integers(0, 10**4), st.integers(0, 16), st.binary(max_size=16)), min_size=1, max_size=4
    ),
    cut=st.none() | st.integers(0, 10**4),
)
def test_mutated_bytes(copy, original, name, edits, cut):
    content = bytearray((original.folder / name).read_bytes())
    for start, length, replacement in edits:
        start %= len(content) + 1
        content[start : start + length] = replacement
    (copy / name).write_bytes(content[:cut])
    read(copy)
    shutil.copyfile(original.folder / name, copy / name)


@pytest.mark.slow
@MANY
@given(data=st.data())
def test_mutated_descriptions(copy, original, data):
    root = {"": json.loads((original.folder / "zoo.json").read_text())}
    place, key = root, ""
    for _ in range(data.draw(st.integers(0, 5))):
        inside = place[key]
        keys = (
            list(inside) if isinstance(inside, dict) else list(range(len(inside))) if isinstance(inside, list) else []
        )
        if keys:
            place, key = inside, data.draw(st.sampled_from(keys))
    place[key] = data.draw(JSON)
    (copy / "zoo.json").write_text(json.dumps(root[""]))
    read(copy)


@pytest.mark.slow
@MANY
@given(
    tensors=st.lists(st.dictionaries(st.sampled_from(["name", "shape", "dtype", "role", "tied_to"]), JSON), max_size=3)
)
def test_arbitrary_layouts(tensors):
    try:
        layout = ParameterLayout(tensors=tensors)
    except ValueError:
        return
    assert torch.isfinite(layout.mean).all()
