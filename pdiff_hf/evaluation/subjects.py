"""What is evaluated: zoos, made of whatever holds or generates networks."""

import glob
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import HubError, ZooError
from ..files import is_pipeline, is_zoo
from ..hub.client import SUFFIXES, is_repository
from ..hub.pipeline_files import pipeline_folder, weights_sha256
from ..hub.pipelines import check_draws, load_pipeline
from ..parallel import processes
from ..pipelines.neural_network_diffusion import NeuralNetworkDiffusionPipeline, ParameterLayout
from ..runs import noted
from ..tasks import Task, TaskFamily, check_task, load_family, load_task
from ..tasks.family import OneTask
from ..tasks.task import trusted_name
from ..text import shown_name
from ..zoo import WeightZoo, check_room_for, make_layout
from ..zoo.adapters import BASE
from ..zoo.imports import checkpoint_files, checkpoints_of_files


# Denoising steps that rows may name.
MOST_STEPS = 1000
# Networks of a chunk: which are sampled together changes their rounding.
SAMPLED_TOGETHER = 100

# A zoo, its folder or its name on the Hub, a folder or a pattern of checkpoints, or state dicts.
NetworksLike = WeightZoo | str | Path | Sequence[Mapping[str, torch.Tensor]]
# A pipeline, or what is called like one.
Sampler = Callable[..., Any]


@dataclass(frozen=True)
class Subjects:
    r"""
    What is evaluated.

    Attributes:
        task (`Task`): What the networks do.
        name (`str`): Of the task.
        trained (`WeightZoo`): What was learned from.
        generated (`WeightZoo`): What came of it.
        fresh (`WeightZoo`, *optional*): Networks of new seeds.
        pipeline (`NeuralNetworkDiffusionPipeline`, *optional*): What generated.
        origin (`str`, *optional*): Its folder, or its name on the Hub.
        scratch (`Path`): A folder that is there as long as the evaluation takes.
    """

    task: Task
    name: str
    trained: WeightZoo
    generated: WeightZoo
    fresh: WeightZoo | None
    pipeline: NeuralNetworkDiffusionPipeline | None
    origin: str | None
    scratch: Path

    def denoising_steps(self, pipeline: NeuralNetworkDiffusionPipeline) -> int:
        """Of the generated networks, as their first row says; where it does not, or names another scheduler, as many
        as by default."""
        row = next(self.generated.rows())
        steps, scheduler = row.get("num_inference_steps"), row.get("scheduler")
        if isinstance(steps, int) and 1 <= steps <= MOST_STEPS and scheduler == type(pipeline.scheduler).__name__:
            return steps
        return pipeline.default_inference_steps

    def __post_init__(self) -> None:
        groups = {"trained": self.trained, "generated": self.generated, "fresh": self.fresh}
        for group, zoo in groups.items():
            least = 2 if group == "trained" else 1
            if zoo is not None and len(zoo) < least:
                raise ZooError(f"There are {len(zoo)} {group} networks; an evaluation needs at least {least}.")
            if zoo is not None:
                check_together(self.trained, zoo.layout, zoo.folder)
        if self.pipeline is not None:
            check_together(self.trained, self.pipeline.layout, "the pipeline")


def check_together(trained: WeightZoo, layout: ParameterLayout, other: str | Path) -> None:
    """Raises [`ZooError`] for other networks than the training networks are. All are scored with the frozen tensors of
    these, or with the base model of these where they are adapters, and are others with others."""
    what = f"{trained.folder} and {other}"
    if layout.architecture != trained.layout.architecture:
        raise ZooError(f"{what} hold networks of different architectures.")
    base, theirs = ((one.config.adapter or {}).get(BASE) for one in (trained.layout, layout))
    if base and theirs and base != theirs:
        raise ZooError(f"{what} do not go together: they hold adapters of {base!r:.200} and of {theirs!r:.200}.")
    try:
        trained.layout.check_frozen(layout.frozen_state_dict(), trained.may_differ)
    except ValueError as error:
        raise ZooError(f"{what} do not go together: {error}") from error


@contextmanager
def opened(
    task: str | Task | None,
    trained: NetworksLike,
    generated: NetworksLike | Sampler,
    fresh: NetworksLike | None,
    pipeline: NeuralNetworkDiffusionPipeline | str | Path | None,
    num_networks: int,
    seed: int,
) -> Iterator[Subjects]:
    """Opens, or makes in a temporary folder, what is evaluated; arguments are those of [`evaluate`]."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        zoo = _open(trained, scratch / "trained")
        if isinstance(task, str | None):
            name = trusted_name(task, zoo.task)
            loaded = load_task(name)
        else:
            name, loaded = type(task).__name__, load_task(task)
        check_task(loaded, processes().device, training=False)
        origin = str(pipeline) if isinstance(pipeline, str | Path) else None
        used: Any = load(pipeline) if isinstance(pipeline, str | Path) else pipeline
        if isinstance(generated, str | Path) and holds_pipeline(generated):
            origin, generated = str(generated), load(generated)
            used = generated
        if callable(generated):
            if used is None and hasattr(generated, "latent_shape"):  # a pipeline, of whatever copy of its code
                used = generated
            made = _sample(generated, zoo, scratch / "generated", num_networks, seed)
        else:
            made = _open(generated, scratch / "generated", like=zoo)
        new = None if fresh is None else _open(fresh, scratch / "fresh", like=zoo)
        subjects = Subjects(loaded, shown_name(name), zoo, made, new, used, origin, scratch)
        if origin is not None:
            source = pipeline_folder(origin)
            _check_origin(made, source)
            # Of files and state dicts it is not known whether they are those of that zoo.
            if zoo.folder != scratch / "trained" and knows_training(source):
                check_learned_from(source, zoo)
        if new is not None:
            _check_new(new, zoo)
        yield subjects


def family_of(task: str | Task | TaskFamily | None, trained: NetworksLike) -> tuple[str, TaskFamily, WeightZoo] | None:
    """Name, family and training zoo where networks are those of a family of tasks."""
    zoo = trained
    if isinstance(trained, str | Path) and not checkpoint_files(trained):
        zoo = _zoo(trained)
    of_zoo = zoo.task if isinstance(zoo, WeightZoo) else None
    if task is None and of_zoo is None:
        return None
    name = trusted_name(task, of_zoo) if isinstance(task, str | None) else type(task).__name__
    family = load_family(name if isinstance(task, str | None) else task)
    if isinstance(family, OneTask):
        return None
    if not isinstance(zoo, WeightZoo):
        raise ZooError(f"{name} is a family of tasks: its networks come in a zoo, whose rows hold their conditions.")
    return shown_name(name), family, zoo


def holds_pipeline(name_or_path: str | Path) -> bool:
    """Whether a folder or a repository holds a pipeline."""
    if Path(name_or_path).is_dir() or not is_repository(name_or_path):
        return is_pipeline(name_or_path)
    try:
        return is_pipeline(pipeline_folder(name_or_path))
    except HubError:
        return False  # it may be a data set


def _check_origin(generated: WeightZoo, pipeline: Path) -> None:
    """Raises [`ZooError`] where a zoo was generated by another pipeline, whose card its figures would get into."""
    weights = noted(generated.folder, "generate", "weights_sha256")
    if weights is not None and weights != weights_sha256(pipeline):
        raise ZooError(
            f"{generated.folder} was not generated by {pipeline} as it is now: it was trained again, or is another. "
            "Generate anew, or pass the pipeline that they are of."
        )


def knows_training(pipeline: Path) -> bool:
    """Whether what a training noted is of the weights beside it."""
    weights = noted(pipeline, "train", "weights_sha256")
    return weights is not None and weights == weights_sha256(pipeline)


def check_learned_from(pipeline: Path, zoo: WeightZoo) -> None:
    """Raises [`ZooError`] where a pipeline notes that it learned from another zoo: of what it has seen, and of what
    baselines have, nothing would be known."""
    learned_from = noted(pipeline, "train", "zoo_sha256")
    if learned_from is not None and learned_from != zoo.sha256():
        raise ZooError(
            f"{pipeline} did not learn from {zoo.folder} as it is now: it has grown or changed, or is another. Pass "
            "--trained ZOO, the one of the training."
        )


def _check_new(fresh: WeightZoo, trained: WeightZoo) -> None:
    """Raises [`ZooError`] where networks of new seeds are of the seeds of training networks."""

    def starts(zoo: WeightZoo) -> set[tuple[Any, Any]]:
        return {(row.get("seed"), row["initial_norm"]) for row in zoo.rows() if "initial_norm" in row}

    if same := starts(fresh) & starts(trained):
        raise ZooError(
            f"{len(same)} networks of {fresh.folder} have seeds of training networks, and are no new ones: collect "
            "others, with --seed."
        )


def load(name_or_path: str | Path) -> NeuralNetworkDiffusionPipeline:
    """A pipeline, on this process's device."""
    return load_pipeline(name_or_path).to(processes().device)


def _open(networks: NetworksLike, scratch: Path, like: WeightZoo | None = None) -> WeightZoo:
    """A zoo of whatever holds networks."""
    if isinstance(networks, WeightZoo):
        return networks
    found: Iterable[tuple[Mapping[str, torch.Tensor], dict[str, Any]]]
    if isinstance(networks, str | Path):
        files = checkpoint_files(networks)
        if not files:
            return _zoo(networks)
        if like is None:
            return WeightZoo.from_checkpoints(scratch, files)
        layout, found = like.layout, ((one.read(), one.row) for one in checkpoints_of_files(files, None))
    elif isinstance(networks, Mapping):
        raise ZooError("Expected a list of state dicts, and one alone was given: put it into a list.")
    else:
        networks = list(networks)
        if not networks:
            raise ZooError("There are no networks: an empty list was given.")
        if other := [network for network in networks if not isinstance(network, Mapping)]:
            raise ZooError(f"Expected a list of state dicts, and it holds {type(other[0]).__name__}.")
        layout = make_layout(networks[0], ("*",)) if like is None else like.layout
        found = ((network, {}) for network in networks)
    with WeightZoo.create(scratch, layout, may_differ=() if like is None else like.may_differ) as zoo:
        for network, row in found:
            zoo.append(network, **row)
    return zoo


def _zoo(place: str | Path) -> WeightZoo:
    """A zoo by its folder or its name on the Hub, where there are no checkpoints."""
    kinds = ", ".join(SUFFIXES)
    if glob.has_magic(str(place)):
        raise ZooError(f"Nothing matches {place}: expected files of networks ({kinds}).")
    if Path(place).expanduser().is_dir() and not is_zoo(Path(place).expanduser()):
        raise ZooError(f"{place} holds neither a zoo nor files of networks ({kinds}).")
    if str(place).endswith(SUFFIXES):
        raise ZooError(f"There is no file {place}.")
    return WeightZoo.from_pretrained(place)


def _sample(sampler: Sampler, trained: WeightZoo, scratch: Path, count: int, seed: int) -> WeightZoo:
    if hasattr(sampler, "set_progress_bar_config"):
        sampler.set_progress_bar_config(disable=True)
    check_draws(sampler)
    seeds = range(seed, seed + count)
    check_room_for(scratch.parent, count, trained.layout, "float32")
    with WeightZoo.create(scratch, trained.layout) as zoo:
        for start in range(0, count, SAMPLED_TOGETHER):
            generators = [torch.Generator().manual_seed(one) for one in seeds[start : start + SAMPLED_TOGETHER]]
            vectors = sampler(num_networks=len(generators), generator=generators, output_type="pt").state_dicts
            for vector in vectors.cpu():
                zoo.append(vector)
    return zoo
