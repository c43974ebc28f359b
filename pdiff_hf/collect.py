"""Stage 1: train networks and keep their checkpoints in a zoo."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from .configs import CollectConfig
from .errors import ConfigError, ZooError
from .files import human_size, is_zoo
from .networks.adapted import AdaptedNetwork
from .networks.stacked import NotStackableError
from .networks.trainer import NetworkTrainer, StackedTrainer, data_of, is_stackable
from .parallel import Saving, from_main, processes, wait_for_everyone, written
from .pipelines.neural_network_diffusion import ParameterLayout
from .runs import check_not_fewer, check_same_facts, check_same_run, own_randomness, save_run
from .tasks import Task, TaskFamily, check_family, load_family
from .tasks.family import OneTask, code_sha256, is_shared
from .text import shown_name
from .zoo import WeightZoo, check_room_for, make_layout, networks_per_batch
from .zoo.fill import fill


STATE_FILE = "collect.state.pt"
# What a network that diverged is trained again from: seeds far from those of its neighbours.
RETRIES, FAR = 3, 2**40
# By how much of its norm a network that is trained again may differ, by another order of sums and what is stored.
SAME = 1e-2
# Networks that are trained at once on an accelerator, which steps of few small ones leave idle.
ON_ACCELERATOR = 256


def run_collect(config: CollectConfig) -> WeightZoo:
    r"""
    Makes or completes a zoo. Under `accelerate launch`, the processes share the networks of an independent zoo; a
    trajectory is one run, which the main process trains while the others wait.

    Raises:
        [`ConfigError`]: a number out of range, or a folder with another zoo.
        [`TaskError`]: there is no such task, or it does not do what a task does.
        [`ZooError`]: a network diverged to NaN or infinity. What was kept stays.
        [`WriteError`]: the disk is full, or another process writes the folder.
    """
    with written(config.output_dir, "collect"):
        return _collect(config, Path(config.output_dir))


def _collect(config: CollectConfig, folder: Path) -> WeightZoo:
    state = processes()
    family = load_family(config.task)
    check_family(family, state.device)
    source = code_sha256(family)
    facts = {} if source is None else {"task_sha256": source}
    if is_zoo(folder) or (folder / STATE_FILE).exists():
        more = ("output_dir", "num_networks", "networks_per_task", "push_to_hub")
        check_same_run(folder, "collect", config, but_for=more)
        check_same_facts(folder, "collect", facts)
    conditions = family.conditions(config.split)
    task = family.task(conditions[0])
    asked = config
    if isinstance(family, OneTask) and config.split != "train":
        raise ConfigError(f"{config.task} is one task, without a split {config.split}: --seed gives other networks.")
    if not isinstance(family, OneTask):
        config = replace(config, protocol="independent", num_networks=config.networks_per_task * len(conditions))
    with own_randomness():
        network = task.build_network()
    adapter = network.adapter_config if isinstance(network, AdaptedNetwork) else None
    layout = make_layout(network.state_dict(), config.patterns or task.patterns, adapter)
    present = len(WeightZoo(folder)) if is_zoo(folder) else 0
    check_not_fewer(folder, present, config.num_networks)
    check_room_for(folder, config.num_networks - present, layout, config.dtype)
    trainable = {name for name, value in network.named_parameters() if value.requires_grad}
    left_out = sorted(trainable & layout.frozen_state_dict().keys())
    if config.protocol == "independent" and left_out:
        raise ZooError(
            f"An independent zoo generates whole networks, since each seed has its own {left_out[0]!r}. Pass "
            "--patterns '*', or collect a trajectory."
        )
    if config.protocol == "trajectory":
        check_goes_on(task, config.task)
    wait_for_everyone()
    if state.is_main_process:
        save_run(folder, "collect", asked, **facts)
    if config.protocol == "independent":
        zoo = _collect_independent(config, family, conditions, folder, layout)
    else:
        if state.is_main_process:
            _collect_trajectory(config, task, folder, layout)
        wait_for_everyone()
        zoo = WeightZoo(folder)
    if state.is_main_process:
        what = "task" if isinstance(family, OneTask) else f"{len(conditions)} tasks"
        kind = "An independent" if config.protocol == "independent" else "A trajectory"
        zoo.write_card(f"{kind} zoo of the {what} `{shown_name(config.task)}`, collected with seed {config.seed}.")
        if config.push_to_hub is not None:
            zoo.push_to_hub(config.push_to_hub)
    return zoo


def check_goes_on(task: Task, name: str) -> None:
    """Raises [`ConfigError`] for a task whose networks stay as they are after its epochs."""
    if task.learning_rate_factor(1.0) == 0:
        raise ConfigError(
            f"The learning rate of {name} ends at 0, so that all checkpoints after its epochs would be the same: "
            "collect independent networks of it, with --protocol independent."
        )


def _collect_trajectory(config: CollectConfig, task: Task, folder: Path, layout: ParameterLayout) -> None:
    zoo = WeightZoo(folder) if is_zoo(folder) else None
    if zoo is not None and len(zoo) >= config.num_networks:
        return
    trainer = NetworkTrainer(task, config.seed, config.epochs)
    first = trainer.steps
    total = first + config.num_networks * config.save_every
    if (folder / STATE_FILE).exists():
        trainer.load(folder / STATE_FILE)
    validation = task.data("validation")
    size = human_size(config.num_networks * layout.vector_size * getattr(torch, config.dtype).itemsize)
    with tqdm(total=total, initial=trainer.step, desc=f"collect ({size})", unit="step") as progress:
        for _ in _train(trainer, first, folder, None):
            progress.update()
        if zoo is None:
            layout.load_frozen(trainer.network.state_dict())
            zoo = _created(config, folder, layout)
        trainer.freeze(layout)
        stored = len(zoo)
        with zoo:
            for _ in _train(trainer, total, folder, zoo):
                progress.update()
                index, rest = divmod(trainer.step - first, config.save_every)
                # A resumed run trains the last few networks again, which are in the zoo already.
                if rest == 0 and index == stored:
                    _check_same(zoo, trainer, folder)
                if rest == 0 and index > len(zoo):
                    row = trainer.metadata(validation)
                    zoo.append(trainer.network.state_dict(), source=config.task, **row)
                    progress.set_postfix(networks=len(zoo), refresh=False)
    (folder / STATE_FILE).unlink(missing_ok=True)


def _check_same(zoo: WeightZoo, trainer: NetworkTrainer, folder: Path) -> None:
    """Raises [`ConfigError`] where the training of a zoo, again, does not come to its last network."""
    last, again = zoo.vectors([-1])[0], zoo.layout.flatten(trainer.network.state_dict()).cpu().float()
    if not (last - again).norm() <= SAME * last.norm():
        (folder / STATE_FILE).unlink(missing_ok=True)  # of this other training
        raise ConfigError(
            f"The training that {zoo.folder} is of has another result on this machine, or with these versions or "
            "threads: its networks would go on as those of another. Choose another --output-dir."
        )


def _train(trainer: NetworkTrainer, until: int, folder: Path, zoo: WeightZoo | None) -> Iterator[None]:
    """Trains step by step, and from time to time writes the networks first and then the state to go on from."""

    def save() -> None:
        if zoo is not None:
            zoo.flush()
        trainer.save(folder / STATE_FILE)

    saving = Saving(save)
    while trainer.step < until:
        trainer.train_step()
        yield
        saving.when_due()


def _collect_independent(
    config: CollectConfig,
    family: TaskFamily,
    conditions: list[dict[str, Any]],
    folder: Path,
    layout: ParameterLayout,
) -> WeightZoo:
    """Networks of all conditions in turn, so that more networks come after those that are there."""
    task, last = family.task(conditions[0]), family.task(conditions[-1])
    if any(not name.endswith("num_batches_tracked") for name in layout.frozen_state_dict()):
        # Flags and the like are as they are after training.
        layout.load_frozen(
            from_main(lambda: NetworkTrainer(task, config.seed, config.epochs).trained().cpu().state_dict())
        )
    stackable = from_main(lambda: is_stackable([task, last], layout))

    def train(indices: range) -> list[tuple[torch.Tensor, dict[str, Any]]]:
        seeds = [config.seed + index for index in indices]
        asked = [conditions[index % len(conditions)] for index in indices]
        tasks = [family.task(condition) for condition in asked]
        try:
            together = StackedTrainer(tasks, seeds, config.epochs) if stackable else None
        except NotStackableError:  # tasks between the first and the last may have other examples or schedules
            together = None
        if together is not None:
            trained = together.train(layout, config.may_differ)
        else:
            trained = [alone(one, seed) for one, seed in zip(tasks, seeds, strict=True)]
        return [
            (vector, {"source": config.task, **condition, **row})
            for (vector, row), condition in zip(map(finite, tasks, seeds, trained), asked, strict=True)
        ]

    def alone(one: Task, seed: int) -> tuple[torch.Tensor, dict[str, Any]]:
        return NetworkTrainer(one, seed, config.epochs).train(layout, config.may_differ)[0]

    def finite(one: Task, seed: int, trained: tuple[torch.Tensor, dict[str, Any]]) -> tuple[torch.Tensor, Any]:
        for attempt in range(1, RETRIES + 1):
            if torch.isfinite(trained[0]).all():
                return trained
            other = seed + attempt * FAR
            print(f"The network of seed {seed} diverged; one of seed {other} takes its place.", file=sys.stderr)
            trained = alone(one, other)
        if torch.isfinite(trained[0]).all():
            return trained
        raise ZooError(
            f"The network of seed {seed} diverged, and so did {RETRIES} others in its place. What was kept is safe: "
            "lower the task's learning rate, and choose another --output-dir."
        )

    size = layout.vector_size
    some = [inputs for inputs, _ in data_of([task, last], "train")]
    if not is_shared(some):
        size += some[0].numel()  # the examples of each are held, too
    at_once = (
        networks_per_batch(size) if processes().device.type == "cpu" else networks_per_batch(size, ON_ACCELERATOR)
    )
    return fill(
        folder,
        create=lambda: _created(config, folder, layout),
        num_networks=config.num_networks,
        unit_size=at_once if stackable else 1,
        make=train,
        description="collect",
    )


def _created(config: CollectConfig, folder: Path, layout: ParameterLayout) -> WeightZoo:
    return WeightZoo.create(folder, layout, task=config.task, dtype=config.dtype, may_differ=config.may_differ)
