"""What a task is, and how one is found by its name or its file."""

import copy
import hashlib
import importlib
import importlib.util
import inspect
import math
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..errors import MissingExtraError, TaskError


BUILT_IN = {
    "digits-convnet": "pdiff_hf.tasks.digits:DigitsConvNet",
    "digits-mlp": "pdiff_hf.tasks.digits:DigitsMLP",
    "digits-resnet": "pdiff_hf.tasks.digits:DigitsResNet",
    "breast-cancer-mlp": "pdiff_hf.tasks.tabular:BreastCancerMLP",
    "wine-mlp": "pdiff_hf.tasks.tabular:WineMLP",
    "fashion-mlp": "pdiff_hf.tasks.images:FashionMLP",
    "cifar10-convnet": "pdiff_hf.tasks.images:CIFAR10ConvNet",
    "cifar100-resnet18": "pdiff_hf.tasks.cifar100:CIFAR100ResNet18",
    "digits-subsets": "pdiff_hf.tasks.subsets:DigitsSubsets",
    "digits-prototypes": "pdiff_hf.tasks.prototypes:DigitsPrototypes",
    "fashion-subsets": "pdiff_hf.tasks.subsets:FashionSubsets",
}


class Task:
    r"""
    What the networks of a zoo are for. A task of one's own needs `build_network` and `data`; the rest has defaults
    for classification and can be overridden.

    Attributes:
        patterns (`tuple[str, ...]`, defaults to `("*",)`):
            Shell-style patterns of the state-dict names that are generated.
        epochs (`int`, defaults to 30):
            Passes over the training split before the first checkpoint of a trajectory is kept; of independent networks
            in all.
        batch_size (`int`, defaults to 50): Examples a step.
        learning_rate (`float`, defaults to 3e-3): Of AdamW.
    """

    patterns: tuple[str, ...] = ("*",)
    epochs: int = 30
    batch_size: int = 50
    learning_rate: float = 3e-3

    def build_network(self) -> nn.Module:
        """A freshly initialized base network."""
        raise NotImplementedError(f"{type(self).__name__} has to define build_network().")

    def data(self, split: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs `[N, ...]` and targets `[N, ...]` of `"train"`, `"validation"` or `"test"`: fixed and disjoint."""
        raise NotImplementedError(f"{type(self).__name__} has to define data(split).")

    def augment(self, inputs: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """What a batch of training inputs becomes before each step."""
        return inputs

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The training loss, a scalar."""
        return F.cross_entropy(outputs, targets)

    def optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer of the training, used for the kept checkpoints too."""
        return torch.optim.AdamW(parameters, lr=self.learning_rate)

    def learning_rate_factor(self, progress: float) -> float:
        """What the optimizer's learning rates are multiplied by after this share, 0 to 1, of the epochs; checkpoints
        of a trajectory, which come after them, are trained with the last one."""
        return 1.0

    def probabilities(self, outputs: torch.Tensor) -> torch.Tensor:
        """Class probabilities `[N, classes]` of a network's outputs; an ensemble is their mean."""
        return outputs.softmax(-1)

    def correct(self, predictions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Which of the predictions `[N, classes]` are right, boolean `[N]`; accuracy is their mean."""
        return predictions.argmax(-1) == targets

    @torch.no_grad()
    def predict(self, network: nn.Module, inputs: torch.Tensor, batch_size: int = 1000) -> torch.Tensor:
        """What a network, in evaluation mode, predicts for inputs `[N, ...]`: probabilities `[N, classes]`."""
        training = {module: module.training for module in network.modules()}
        network.eval()
        predictions = torch.cat([self.probabilities(network(batch)) for batch in inputs.split(batch_size)])
        for module, mode in training.items():
            module.training = mode
        return predictions


def half_cosine(progress: float) -> float:
    """A learning rate's factor that falls from 1 to 0, by this share of the epochs."""
    return (1 + math.cos(math.pi * progress)) / 2


def trusted_name(given: str | None, of_zoo: str | None) -> str:
    """The name of the task of a zoo or a pipeline: the one that was given, or else its own, if that is no code of its
    owner."""
    if given is not None:
        return given
    if of_zoo is None:
        raise TaskError("Nothing says what these networks do: pass --task, a built-in name or path/to/file.py:MyTask.")
    if of_zoo not in BUILT_IN:
        raise TaskError(
            f"These networks do the task {of_zoo!r}, which is code of its own: pass --task {of_zoo} to run it."
        )
    return of_zoo


def source_sha256(*things: Any) -> str | None:
    """Of the source of the classes of tasks or families, as far as they are the user's own, with which networks
    change; None where they are built in or have no source."""
    sources = []
    for kind in (kind for thing in things for kind in type(thing).__mro__):
        if kind is not object and not kind.__module__.startswith(f"{__package__.partition('.')[0]}."):
            with suppress(OSError, TypeError):
                sources.append(inspect.getsource(kind))
    return hashlib.sha256("".join(sources).encode()).hexdigest() if sources else None


def load_task(name_or_path: str | Task) -> Task:
    r"""
    A task by name or from a file.

    Args:
        name_or_path (`str`):
            A built-in one, `"digits-convnet"` or another name of `BUILT_IN`, or the user's own:
            `"path/to/file.py:MyTask"` or `"package.module:MyTask"`. It runs that code. The class needs the methods
            `build_network` and `data`; what else a [`Task`] has is added where it is missing.

    Raises:
        [`TaskError`]: there is no such task, it lacks one of the two methods, or it is a family of tasks.
    """
    found = load(name_or_path)
    if not isinstance(found, Task):
        raise TaskError(f"{name_or_path} is a family of tasks, and one task is needed here.")
    return found


def load(name_or_path: Any) -> Any:
    """A task, or a family of tasks, by name or from a file, as [`load_task`] describes it, or itself."""
    thing = _built(name_or_path) if isinstance(name_or_path, str) else name_or_path
    return thing if _is_family(thing, type(thing).__name__) else completed(thing, Task)


def _is_family(thing: Any, name: str) -> bool:
    """Whether an object, or those of a class, is a family; raises [`TaskError`] where it is no task either."""
    lacking = [method for method in ("build_network", "data") if not hasattr(thing, method)]
    found = all(hasattr(thing, method) for method in ("conditions", "task"))
    if lacking and not found:
        raise TaskError(f"{name} is no task: it lacks {' and '.join(lacking)}.")
    return found


def _built(name_or_path: str) -> Any:
    """What the class of that name makes."""
    place, _, class_name = BUILT_IN.get(name_or_path, name_or_path).rpartition(":")
    if not place:
        raise TaskError(
            f"There is no task {name_or_path!r}. Built in: {', '.join(BUILT_IN)}; your own: path/to/file.py:MyTask."
        )
    if place.endswith(".py"):
        if not Path(place).is_file():
            raise TaskError(f"The task {name_or_path!r} names a file that does not exist: {Path(place).absolute()}.")
        # Its neighbours can be imported, as where the file is run as a script.
        sys.path.insert(0, str(Path(place).absolute().parent))
        spec = importlib.util.spec_from_file_location(f"pdiff_hf_task_{Path(place).stem}", place)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        # Dataclasses and pickles look their module up.
        sys.modules[module.__name__] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise TaskError(f"The task {name_or_path!r} cannot be loaded: {type(error).__name__}: {error}") from error
    else:
        try:
            module = importlib.import_module(place)
        except MissingExtraError:
            raise
        except Exception as error:
            if isinstance(error, ModuleNotFoundError) and f"{place}.".startswith(f"{error.name}."):
                raise TaskError(f"The task {name_or_path!r} names a module that does not exist: {place}.") from error
            raise TaskError(f"The task {name_or_path!r} cannot be loaded: {type(error).__name__}: {error}") from error
    task_class = getattr(module, class_name, None)
    if not isinstance(task_class, type):
        raise TaskError(f"{place} has no class {class_name!r}.")
    _is_family(task_class, f"{class_name} in {place}")
    try:
        return task_class()
    except TypeError as error:
        raise TaskError(f"{class_name} in {place} has to be built without arguments: {error}.") from error


def completed(thing: Any, base: type) -> Any:
    """The thing, of a class that has what a base class defines where its own lacks it."""
    if isinstance(thing, base):
        return thing
    own = copy.copy(thing)  # the caller's own stays what it is
    object.__setattr__(own, "__class__", type(type(thing).__name__, (type(thing), base), {}))
    return own
