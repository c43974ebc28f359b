"""Training runs of a task's networks: one of them, resumable at every step, or those of many seeds at once."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from torch.nn import functional as F

from ..errors import ZooError
from ..files import own_name, whole
from ..pipelines.neural_network_diffusion import ParameterLayout
from ..runs import generator_at, own_randomness, seed_everything
from ..tasks import Task
from ..tasks.family import is_shared
from .predictor import Predictor, in_float32
from .stacked import NotStackableError, side_by_side, stack


# Optimizer steps that tell whether networks that are trained at once are those that are trained one by one, and by
# how much, relative to what the steps change, rounding may make them differ.
TRIED_STEPS = 3
TRIED_TOLERANCE = 1e-2


class NetworkTrainer:
    r"""
    One training run of a task's network, step by step. What happens in a step depends on the seed, the step and the
    state alone, so that a resumed run is the uninterrupted one.

    Args:
        task (`Task`): Of the network.
        seed (`int`): Of initialization, data order and dropout.
        epochs (`int`, *optional*): Passes over the training data; the task's own number by default.
    """

    def __init__(self, task: Task, seed: int, epochs: int | None = None):
        self.task, self.seed, self.step = task, seed, 0
        self.epochs = task.epochs if epochs is None else epochs
        self._epoch, self._order = -1, torch.empty(0)
        device = PartialState().device
        with own_randomness():
            seed_everything(seed)
            self.network = task.build_network().to(device)
        self.inputs, self.targets = (tensor.to(device) for tensor in task.data("train"))
        self.optimizer = task.optimizer(list(self.network.parameters()))
        self.network.train()
        self.steps_per_epoch = -(-len(self.targets) // task.batch_size)
        self.steps = self.epochs * self.steps_per_epoch

    def freeze(self, layout: ParameterLayout) -> None:
        """From now on trains the generated tensors only: the others, batch-norm statistics included, stay put."""
        generated = {tensor["name"] for tensor in layout.tensors("generated")}
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and name in generated)
            if name not in generated:
                parameter.grad = None
        for name, module in self.network.named_modules():
            if isinstance(module, nn.modules.batchnorm._NormBase) and f"{name}.running_mean" not in generated:
                module.eval()

    def train_step(self) -> None:
        """One optimizer step."""
        epoch, batch = divmod(self.step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch = epoch
            order = torch.randperm(len(self.targets), generator=generator_at(self.seed, epoch))
            self._order = order.to(self.targets.device)
        start = batch * self.task.batch_size
        indices = self._order[start : start + self.task.batch_size]
        with own_randomness():
            generator = generator_at(self.seed, self.step)
            seed_everything(generator.initial_seed())
            inputs = self.task.augment(self.inputs[indices], generator)
            loss = self.task.loss(self.network(inputs), self.targets[indices])
            self.optimizer.zero_grad()
            loss.backward()
            _set_learning_rates(self.optimizer, self.task, self.step, self.steps)
            self.optimizer.step()
        self.step += 1

    def metadata(self, validation: tuple[torch.Tensor, torch.Tensor]) -> dict[str, Any]:
        """What is to be remembered of the network as it is now."""
        inputs, targets = (tensor.to(self.targets.device) for tensor in validation)
        correct = self.task.correct(self.task.predict(self.network, inputs), targets)
        return {"seed": self.seed, "step": self.step, "validation_accuracy": correct.float().mean().item()}

    def trained(self) -> nn.Module:
        """The network after all epochs."""
        while self.step < self.steps:
            self.train_step()
        return self.network

    def train(
        self, layout: ParameterLayout, may_differ: Sequence[str] = ()
    ) -> list[tuple[torch.Tensor, dict[str, Any]]]:
        """Trains from the beginning; the parameter vector, of NaN where it diverged, and what is to be remembered."""
        initial_norm = layout.flatten(self.network.state_dict()).norm().item()
        state_dict = self.trained().state_dict()
        _check_frozen(layout, state_dict, may_differ, self.seed)
        row = self.metadata(self.task.data("validation")) | {"initial_norm": initial_norm}
        return [(flatten(layout, state_dict), row)]

    def save(self, file: Path) -> None:
        """Writes the state, whole or not at all."""
        state = {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "made_by": own_name("state", self.seed),
        }
        remedy = "The networks that were kept are safe; make room and run the same command again to go on."
        with whole(file, remedy) as temporary:
            torch.save(state, temporary)

    def load(self, file: Path) -> None:
        """Goes on from a saved state."""
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
            known = state["made_by"] == own_name("state", self.seed)
            self.network.load_state_dict(state["network"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = int(state["step"]) if known else 0
        except Exception as error:  # whatever a damaged file makes of its readers
            raise ZooError(
                f"{file} is damaged ({type(error).__name__}): training cannot go on. Choose another --output-dir."
            ) from error
        if not known:
            raise ZooError(
                f"{file} was not made here, by this user: nothing is believed of the states of others. Choose another "
                "--output-dir, or set XDG_CONFIG_HOME and HF_HOME as they were."
            )


class StackedTrainer:
    r"""
    The training runs of several seeds at once, with their weights stacked, in a fraction of the time where networks
    are small. They are those of a [`NetworkTrainer`] each up to rounding, which depends on how many are trained at
    once. Long trainings amplify it, as they do that of another library of convolutions (`benchmarks/stacked.py`).

    Args:
        tasks (`Sequence[Task]`):
            One for each network, of one architecture and one schedule; loss, optimizer and inputs are those of
            [`Task`].
        seeds (`list[int]`): One for each network.
        epochs (`int`, *optional*): Passes over the training data; the task's own number by default.

    Raises:
        [`NotStackableError`]: the task or the architecture asks for one run after the other.
    """

    def __init__(self, tasks: Sequence[Task], seeds: list[int], epochs: int | None = None):
        self.tasks, self.task, self.seeds = tasks, tasks[0], seeds
        for kind in {type(task) for task in tasks}:
            if any(getattr(kind, name) is not getattr(Task, name) for name in ("loss", "optimizer", "augment")):
                raise NotStackableError(f"{kind.__name__} trains in a way of its own.")
        if len({_schedule(task) for task in tasks}) > 1:
            raise NotStackableError("Tasks that train for other times or at other rates.")
        self.device = PartialState().device
        networks = []
        with own_randomness():
            for task, seed in zip(tasks, seeds, strict=True):
                seed_everything(seed)
                networks.append(task.build_network().to(self.device).train())
        self.network = side_by_side(networks[0])
        if any(buffer.numel() for buffer in networks[0].buffers()):
            raise NotStackableError("Buffers may change in training.")
        self.empty = dict(networks[0].named_buffers())
        trained = [dict(network.named_parameters()) for network in networks]
        self.weights = {
            name: nn.Parameter(torch.stack([weights[name].detach() for weights in trained]), first.requires_grad)
            for name, first in trained[0].items()
        }
        self.optimizer = self.task.optimizer([weight for weight in self.weights.values() if weight.requires_grad])
        inputs, targets = zip(*data_of(tasks, "train"), strict=True)
        # [1 or N, E, ...]: most often, networks share their examples.
        self.inputs, self.targets = (_stacked(tensors).to(self.device) for tensors in (inputs, targets))
        self.examples = self.targets.shape[1]
        self.steps_per_epoch = -(-self.examples // self.task.batch_size)
        self.steps = (self.task.epochs if epochs is None else epochs) * self.steps_per_epoch

    def train(
        self, layout: ParameterLayout, may_differ: Sequence[str] = ()
    ) -> list[tuple[torch.Tensor, dict[str, Any]]]:
        """Trains from the beginning; the parameter vector of each network and what is to be remembered of it."""
        norms = self._vectors(layout).norm(dim=1).tolist()
        vectors = self.train_steps(self.steps, layout)
        for index, seed in enumerate(self.seeds):
            own = self.empty | {name: values[index] for name, values in self.weights.items()}
            _check_frozen(layout, own, may_differ, seed)
        correct = [
            right.float().mean().item()
            for right in correct_of(self.tasks, vectors, Predictor(self.task, layout, self.device), "validation")
        ]
        rows = [
            {"seed": seed, "step": self.steps, "validation_accuracy": accuracy, "initial_norm": norm}
            for seed, accuracy, norm in zip(self.seeds, correct, norms, strict=True)
        ]
        return list(zip(vectors, rows, strict=True))

    @torch.no_grad()
    def load(self, vectors: torch.Tensor, layout: ParameterLayout) -> None:
        """Starts from other networks, `[N, P]`."""
        for name, values in stack(layout, vectors).items():
            if name in self.weights:
                self.weights[name].copy_(values)

    def train_steps(self, steps: int, layout: ParameterLayout) -> torch.Tensor:
        """The parameter vectors `[N, P]` after the first steps."""
        size, count = self.task.batch_size, self.examples
        for step in range(steps):
            epoch, batch = divmod(step, self.steps_per_epoch)
            if batch == 0:
                orders = [torch.randperm(count, generator=generator_at(seed, epoch)) for seed in self.seeds]
                order = torch.stack(orders).to(self.device)
            _set_learning_rates(self.optimizer, self.task, step, self.steps)
            self.step(order[:, batch * size : (batch + 1) * size])
        return self._vectors(layout)

    def _vectors(self, layout: ParameterLayout) -> torch.Tensor:
        """The networks as they are now, `[N, P]`, on the CPU, of NaN where they diverged."""
        tensors = [self.weights[name].detach().flatten(1).float() for name in layout.slices]
        vectors = torch.cat(tensors, dim=1).cpu()
        vectors[~vectors.isfinite().all(dim=1)] = torch.nan
        return vectors

    def step(self, indices: torch.Tensor) -> None:
        """One optimizer step of each network, on these training examples: `[N, batch size]`."""
        outputs = self.network(self.weights, self._picked(self.inputs, indices))
        if outputs.ndim != 3 or self.targets.ndim != 2:
            raise NotStackableError("Outputs that are no scores of classes.")
        # The mean over a network's examples, and the sum over networks, which leaves their gradients apart.
        targets = self._picked(self.targets, indices).flatten()
        loss = F.cross_entropy(outputs.flatten(0, 1), targets, reduction="sum") / indices.shape[1]
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def _picked(self, examples: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Of examples `[1 or N, E, ...]` those of each network, `[N, batch size, ...]`."""
        if len(examples) == 1:
            return examples[0][indices]
        return examples[torch.arange(len(indices), device=indices.device)[:, None], indices]


def data_of(tasks: Sequence[Task], split: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and targets of each task, made once for each."""
    found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for task in tasks:
        if id(task) not in found:
            found[id(task)] = task.data(split)
    return [found[id(task)] for task in tasks]


def correct_of(tasks: Sequence[Task], vectors: torch.Tensor, predict: Predictor, split: str) -> Iterator[torch.Tensor]:
    """Which examples of its own task each network `[N, P]` gets right, boolean `[E]`."""
    data = data_of(tasks, split)
    own = [predict.of(task) for task in tasks]
    if is_shared([inputs for inputs, _ in data]) and all(one is predict for one in own):
        predictions = list(predict(vectors, data[0][0]))
    else:
        predictions = [one(v[None], inputs)[0] for one, v, (inputs, _) in zip(own, vectors, data, strict=True)]
    for task, prediction, (_, targets) in zip(tasks, predictions, data, strict=True):
        yield task.correct(prediction, targets.cpu())


def _schedule(task: Task) -> tuple[float, ...]:
    """What trainings that are done at once have in common."""
    factors = [task.learning_rate_factor(progress / 8) for progress in range(9)]
    return (task.epochs, task.batch_size, task.learning_rate, *factors)


def _check_frozen(
    layout: ParameterLayout, state_dict: dict[str, torch.Tensor], may_differ: Sequence[str], seed: int
) -> None:
    try:
        layout.check_frozen(state_dict, may_differ)
    except ValueError as error:
        raise ZooError(f"Seed {seed}: {error} Accept it by --may-differ, or generate it too.") from error


def _stacked(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """`[1, E, ...]` where all are the same, `[N, E, ...]` elsewhere."""
    if is_shared(tensors):
        return tensors[0][None]
    if len({tensor.shape for tensor in tensors}) > 1:
        raise NotStackableError("Tasks with different numbers of examples.")
    return torch.stack(list(tensors))


def _set_learning_rates(optimizer: torch.optim.Optimizer, task: Task, step: int, steps: int) -> None:
    """Those of a step: the optimizer's own, times the task's factor."""
    factor = task.learning_rate_factor(min(step / steps, 1.0) if steps else 1.0)
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor


def flatten(layout: ParameterLayout, state_dict: dict[str, torch.Tensor]) -> torch.Tensor:
    """The parameter vector of a network, on the CPU, of NaN where it diverged."""
    if not all(torch.isfinite(state_dict[name]).all() for name in layout.slices):
        return torch.full((layout.vector_size,), torch.nan)
    return layout.flatten(state_dict).cpu()


@in_float32()
def is_stackable(tasks: Sequence[Task], layout: ParameterLayout) -> bool:
    """Whether networks of two tasks that are trained at once are those that are trained one by one."""
    seeds = [0, 1]
    try:
        together = StackedTrainer(tasks, seeds).train_steps(TRIED_STEPS, layout)
    except Exception:  # whatever a network of the user's own makes of the tracer and of stacked weights
        return False
    trainers = [NetworkTrainer(task, seed) for task, seed in zip(tasks, seeds, strict=True)]

    def vectors() -> torch.Tensor:
        return torch.stack([layout.flatten(trainer.network.state_dict()).cpu() for trainer in trainers])

    before = vectors()
    for trainer in trainers:
        for _ in range(TRIED_STEPS):
            trainer.train_step()
    alone = vectors()
    return bool((together - alone).norm() <= TRIED_TOLERANCE * (alone - before).norm())
