"""A family of tasks: they differ by a condition, and their networks are of one architecture."""

import copy
import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from ..errors import TaskError
from ..pipelines.neural_network_diffusion import ParameterLayout
from .check import check_task, of_user
from .task import Task, completed, load, source_sha256


StateDict = dict[str, torch.Tensor]
# What rows of a zoo say of a network beside its condition.
COLUMNS = {"index", "source", "seed", "step", "validation_accuracy", "initial_norm"}


SPLITS = ("train", "validation", "test")
# Tasks, evenly picked, whose inputs stand for those of all, where they are not the same.
INPUTS_OF = 32
# Conditions that are computed differ by rounding.
DECIMALS = 6


class TaskFamily:
    r"""
    Tasks that differ by a condition. A family of one's own needs both methods; `build_network` of all its tasks builds
    the same architecture, from the same random numbers the same network.
    """

    def conditions(self, split: str) -> list[dict[str, Any]]:
        r"""
        The conditions of `"train"`, `"validation"` or `"test"`: disjoint lists of dicts with the same keys, whose
        values are numbers, lists of numbers of one length, or words. What solves a task of one split must not solve
        one of another, by swapping outputs or the like.
        """
        raise NotImplementedError(f"{type(self).__name__} has to define conditions(split).")

    def task(self, condition: dict[str, Any]) -> Task:
        """The task of a condition, of any split or none."""
        raise NotImplementedError(f"{type(self).__name__} has to define task(condition).")

    def rivals(self, condition: dict[str, Any], inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """What else solves the task of a condition without being trained for it, by name: class probabilities
        `[N, classes]` of inputs `[N, ...]`."""
        return {}

    def equivalents(self, condition: dict[str, Any], state_dict: StateDict) -> list[tuple[dict[str, Any], StateDict]]:
        r"""
        Other tasks that a network solves once its parameters are put elsewhere: each task's condition, and the
        network's parameters there. Where two classes change names, that is the other condition, and the network with
        two outputs swapped. Networks are learned in all these forms. By default there are none.

        Args:
            condition (`dict`): What the network was trained for.
            state_dict (`dict[str, torch.Tensor]`): The place of each of its generated parameters: integers, which may
                be moved, while shapes stay.
        """
        return []


class OneTask(TaskFamily):
    """A task as a family of one, without a condition."""

    def __init__(self, only: Task):
        self.only = only

    def conditions(self, split: str) -> list[dict[str, Any]]:
        return [{}]

    def task(self, condition: dict[str, Any]) -> Task:
        return self.only


def code_sha256(family: TaskFamily) -> str | None:
    """[`source_sha256`] of a family, which has been checked, and of its first task, or of its only one."""
    if isinstance(family, OneTask):
        return source_sha256(family.only)
    return source_sha256(family, family.task(family.conditions("train")[0]))


def load_family(name_or_path: str | Task | TaskFamily) -> TaskFamily:
    """A family, or a task as a family of one, by name or from a file, as [`load_task`] takes them."""
    found = load(name_or_path)
    if isinstance(found, Task):
        return OneTask(found)
    own = completed(copy.copy(found), TaskFamily)
    # Its tasks may lack what a task has, too.
    object.__setattr__(own, "task", lambda condition: completed(found.task(condition), Task))
    return own


def check_family(family: TaskFamily, device: torch.device | str = "cpu", training: bool = True) -> None:
    r"""
    Checks the conditions of a family, and its first task as [`check_task`] does.

    Raises:
        [`TaskError`]: splits that are empty or overlap, conditions with different keys, keys that rows of a zoo have
        already, or a task that does not do what a task does.
    """
    name = type(family).__name__
    seen: dict[str, str] = {}
    conditions = {
        split: of_user(partial(family.conditions, split), f"{name}.conditions({split!r})") for split in SPLITS
    }
    keys = conditions["train"][0].keys() if conditions["train"] else set()
    for split, rows in conditions.items():
        if not rows:
            raise TaskError(f"{name}.conditions({split!r}) is empty.")
        for row in rows:
            if row.keys() != keys:
                raise TaskError(f"Conditions of {name} have different keys: {sorted(keys)} and {sorted(row)}.")
            other = seen.setdefault(key_of(row), split)
            if other != split and keys:
                raise TaskError(f"{name} has the condition {row!r:.200} in {other!r} and in {split!r}.")
    if taken := sorted(keys & COLUMNS):
        raise TaskError(f"Rows of a zoo have the column {taken[0]!r} already: call that of {name} otherwise.")
    check_task(family.task(conditions["train"][0]), device, training)


def with_equivalents(
    family: TaskFamily, layout: ParameterLayout, rows: Sequence[dict[str, Any]]
) -> tuple[list[dict[str, Any]], Callable[[torch.Tensor], torch.Tensor]]:
    r"""
    Networks in all the forms that their family knows.

    Args:
        family (`TaskFamily`): What the networks do.
        layout (`ParameterLayout`): Theirs.
        rows (`Sequence[dict]`): Of N networks, with the conditions.

    Returns:
        `tuple`: M rows, the N of the networks first, with the conditions of their other forms; and a function from
        vectors `[N, P]` to those of all forms, `[M, P]`.

    Raises:
        [`TaskError`]: other forms that lack or repeat parameters, or that solve a task of another split; or an error
            of the family's own.
    """
    names, places = list(family.conditions("train")[0]), _places(layout)
    splits = {key_of(condition, DECIMALS): split for split in SPLITS for condition in family.conditions(split)}
    of: dict[str, list[tuple[dict[str, Any], torch.Tensor]]] = {}
    known: dict[bytes, torch.Tensor] = {}
    found, orders = list(rows), []
    for index, row in enumerate(rows):
        if not names or any(name not in row for name in names):
            continue
        condition = {name: row[name] for name in names}
        if (key := key_of(condition)) not in of:
            of[key] = _forms(family, condition, places, splits)
        for other, order in of[key]:
            found.append({**row, **other})
            # Most forms come from few orders, which are kept once.
            orders.append((index, known.setdefault(order.numpy().tobytes(), order)))

    def in_all_forms(vectors: torch.Tensor) -> torch.Tensor:
        forms = vectors.new_empty(len(found), vectors.shape[1])
        forms[: len(vectors)] = vectors
        for place, (index, order) in enumerate(orders, len(vectors)):
            forms[place] = vectors[index, order]
        return forms

    return found, in_all_forms


def forms_of(family: TaskFamily, layout: ParameterLayout, conditions: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Keys, up to some decimals, of each condition, which comes first, and of those that its networks solve in other
    forms."""
    places, found = _places(layout), []
    for condition in conditions:
        others = (other for other, _ in _forms(family, condition, places, {}))
        found.append([key_of(form, DECIMALS) for form in (condition, *others)])
    return found


def solved_alike(forms: Sequence[Sequence[str]]) -> torch.Tensor:
    r"""
    Which conditions the same networks solve, in other forms: figures on them tell what one of them would.

    Args:
        forms (`Sequence[Sequence[str]]`): Of C conditions, as [`forms_of`] tells them.

    Returns:
        `torch.Tensor`: The group of each, `[C]`, from 0.
    """
    groups: dict[str, int] = {}
    for index, keys in enumerate(forms):
        joined = {groups[key] for key in keys if key in groups}
        groups |= dict.fromkeys([*keys, *(key for key, group in groups.items() if group in joined)], index)
    own = [groups[keys[0]] for keys in forms]
    return torch.tensor(own).unique(return_inverse=True)[1]


def _places(layout: ParameterLayout) -> StateDict:
    """Where each generated parameter is in a vector, in the shapes of the tensors."""
    every = torch.arange(layout.vector_size)
    return {t["name"]: every[layout.slices[t["name"]]].view(t["shape"]) for t in layout.tensors("generated")}


def _forms(
    family: TaskFamily, condition: dict[str, Any], places: StateDict, splits: dict[str, str]
) -> list[tuple[dict[str, Any], torch.Tensor]]:
    """The conditions of the other forms of a network, and where the parameters come from, `[P]`."""
    name = f"{type(family).__name__}.equivalents"
    try:
        forms = [(other, moved) for other, moved in family.equivalents(condition, dict(places))]
    except Exception as error:
        raise TaskError(f"{name} failed for {condition!r:.200}: {error!r:.200}") from error
    found, own_split = [], splits.get(key_of(condition, DECIMALS))
    for other, moved in forms:
        if not isinstance(other, dict) or other.keys() != condition.keys():
            raise TaskError(f"{name} gives {other!r:.200} as a condition, which has {', '.join(condition)}.")
        if not isinstance(moved, dict) or not all(
            isinstance(moved.get(key), torch.Tensor) and (moved[key].shape, moved[key].dtype) == (own.shape, own.dtype)
            for key, own in places.items()
        ):
            raise TaskError(f"{name} gives networks with other tensors than {', '.join(places):.200}.")
        order = torch.cat([moved[key].flatten() for key in places])
        if not torch.equal(order.sort().values, torch.arange(len(order))):
            raise TaskError(f"{name} lacks or repeats parameters: they may only change places.")
        if (split := splits.get(key_of(other, DECIMALS))) not in (None, own_split):
            raise TaskError(f"{name} leads to the condition {other!r:.200} of {split!r}.")
        found.append((json.loads(key_of(other)), order))
    return found


def key_of(condition: dict[str, Any], decimals: int | None = None) -> str:
    """The same for conditions that are the same in the rows of a zoo: of lists and tuples, in any order, 0 and -0; or
    that are up to so many decimals."""

    def plain(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [plain(one) for one in value]
        if isinstance(value, float):
            return (value if decimals is None else round(value, decimals)) + 0.0
        return value

    return json.dumps({name: plain(value) for name, value in condition.items()}, sort_keys=True, default=repr)


def training_inputs(family: TaskFamily) -> torch.Tensor:
    """Training inputs of the tasks of a family, where they differ of some tasks, `[E, ...]`."""
    conditions = family.conditions("train")
    some = conditions[:: max(1, len(conditions) // INPUTS_OF)]
    inputs = [family.task(condition).data("train")[0] for condition in some]
    return inputs[0] if is_shared(inputs) else torch.cat(inputs)


def is_shared(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether all of them are views of the same numbers."""
    first = tensors[0]
    return all(
        one is first
        or (one.data_ptr(), one.shape, one.stride(), one.dtype)
        == (first.data_ptr(), first.shape, first.stride(), first.dtype)
        for one in tensors
    )
