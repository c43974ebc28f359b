"""Families of tasks: their conditions, and what else their networks solve."""

import pytest
import torch

from pdiff_hf import CollectConfig, ParameterLayout, load_task, run_collect
from pdiff_hf.errors import TaskError
from pdiff_hf.tasks import check_family, load_family
from pdiff_hf.tasks.family import with_equivalents
from pdiff_hf.tasks.prototypes import DigitsPrototypes
from pdiff_hf.tasks.subsets import DigitsSubsets

from . import families


FAMILY = families.Sides()


def test_subsets_of_digits_are_all_there_and_complements_together():
    family = DigitsSubsets()
    splits = {split: family.conditions(split) for split in ("train", "validation", "test")}
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 778, "validation": 40, "test": 204}
    every = [tuple(row["classes"]) for rows in splits.values() for row in rows]
    assert len(set(every)) == 1022
    for rows in splits.values():
        subsets = {tuple(row["classes"]) for row in rows}
        assert {tuple(1 - one for one in subset) for subset in subsets} == subsets
    (_, digits), (_, targets) = load_task("digits-mlp").data("test"), family.task(splits["test"][0]).data("test")
    assert targets.tolist() == [splits["test"][0]["classes"][digit] for digit in digits]
    check_family(family)


def test_prototypes_describe_classes_that_no_network_has_seen():
    family = DigitsPrototypes()
    splits = {split: family.conditions(split) for split in ("train", "validation", "test")}
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 8000, "validation": 96, "test": 128}
    images = {
        split: {tuple(row[name]) for row in rows for name in ("first", "second")} for split, rows in splits.items()
    }
    assert images["train"].isdisjoint(images["test"])
    assert len(images["test"]) == 24
    condition = splits["test"][1]
    inputs, targets = family.task(condition).data("test")
    train, classes = family.task(condition).data("train")
    torch.testing.assert_close(
        train[classes == 1].mean(0).flatten(), torch.tensor(condition["second"]), atol=0.2, rtol=0
    )
    (predictions,) = family.rivals(condition, inputs).values()
    assert (predictions.argmax(1) == targets).float().mean() > 0.9
    check_family(family)
    rounded = {name: [pixel + 1e-4 for pixel in condition[name]] for name in condition}
    assert family.task(rounded).classes == family.task(condition).classes
    with pytest.raises(TaskError, match=r"No class of digits has this mean image: .* 0\.3"):
        family.task(condition | {"first": [pixel + 0.3 for pixel in condition["first"]]})


@pytest.mark.parametrize(
    ("family", "forms"),
    [(DigitsSubsets(), 2), (DigitsPrototypes(), 16), (families.Sides(), 2), (families.AdaptersOfSides(), 2)],
    ids=lambda value: type(value).__name__,
)
def test_networks_solve_equivalent_tasks_as_well(family, forms):
    condition = family.conditions("train")[2]
    network = family.task(condition).build_network()
    torch.manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter)
    layout = ParameterLayout.from_state_dict(network.state_dict())
    rows, in_all_forms = with_equivalents(family, layout, [{**condition, "seed": 3}])
    assert len({repr(row) for row in rows}) == forms
    assert {row["seed"] for row in rows} == {3}
    accuracies = set()
    state_dicts = layout.unflatten(in_all_forms(layout.flatten(network.state_dict())[None]))
    for row, state_dict in zip(rows, state_dicts, strict=True):
        network.load_state_dict(state_dict)
        inputs, targets = family.task(row).data("test")
        accuracies.add((network(inputs).argmax(1) == targets).float().mean().item())
    assert len(accuracies) == 1


@pytest.mark.parametrize(
    ("equivalents", "message"),
    [
        (lambda condition, places: [(condition, {})], "gives networks with other tensors than 0.weight"),
        (lambda condition, places: [(condition, {n: v * 0 for n, v in places.items()})], "may only change places"),
        (lambda condition, places: [(condition, {n: v.float() for n, v in places.items()})], "with other tensors"),
        (lambda condition, places: [(condition, None)], "with other tensors than"),
        (lambda condition, places: [({"angle": 0.0}, places)], "as a condition, which has direction"),
        (lambda condition, places: [(None, places)], "gives None as a condition"),
        (
            lambda condition, places: [({"direction": tuple(FAMILY.conditions("test")[0]["direction"])}, places)],
            "leads to the condition .* of 'test'",
        ),
        (lambda condition, places: [(FAMILY.conditions("test")[0], places)], "leads to the condition .* of 'test'"),
        (lambda condition, places: condition["angle"], r"equivalents failed for .*KeyError\('angle'\)"),
    ],
)
def test_equivalents_that_are_none_are_refused(equivalents, message, monkeypatch):
    monkeypatch.setattr(FAMILY, "equivalents", equivalents, raising=False)
    rows = FAMILY.conditions("train")[:2]
    layout = ParameterLayout.from_state_dict(FAMILY.task(rows[0]).build_network().state_dict())
    with pytest.raises(TaskError, match=message):
        with_equivalents(FAMILY, layout, rows)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Overlapping", "has the condition .* in 'train' and in"),
        ("Unnamed", "different keys"),
        ("Taken", "the column 'seed' already"),
        ("Empty", r"conditions\('test'\) is empty"),
    ],
)
def test_a_family_that_cannot_be_judged_by_is_refused(name, message, tmp_path):
    with pytest.raises(TaskError, match=message):
        run_collect(CollectConfig(f"{families.__name__}:{name}", str(tmp_path / "zoo")))


def test_a_family_is_no_task():
    with pytest.raises(TaskError, match="is a family of tasks, and one task is needed here"):
        load_task("digits-subsets")
    assert load_family("digits-mlp").conditions("test") == [{}]
