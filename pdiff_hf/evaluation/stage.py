"""Stage 4: what generated networks are worth, against those they were learned from and against what costs nothing."""

import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..config import check_positive
from ..errors import ConfigError, HubError, ZooError
from ..extras import require
from ..hub import is_repository, load_pipeline, pipeline_folder, push_evaluation, write_evaluation
from ..parallel import processes
from ..runs import save_run, versions
from ..tasks import Task, load_task
from ..tasks.task import BUILT_IN
from ..zoo import WeightZoo, make_layout
from .baselines import Baseline
from .report import table, write_report
from .study import PARTS, Study


REPORT_VERSION = 2

Networks = WeightZoo | str | Path | Sequence[Mapping[str, torch.Tensor]]
Generator = Callable[..., Any]


@dataclass(frozen=True)
class EvaluateConfig:
    """Scores trained and generated networks and all trivial baselines, audits memorization, and gives a verdict."""

    task: str | None = None
    """A built-in task, or a class of your own: path/to/file.py:MyTask. The trained zoo's own by default."""
    trained: str = "runs/zoo"
    """The zoo that was learned from: a folder, or its name on the Hub."""
    generated: str = "runs/generated"
    """The generated zoo, or the pipeline to sample from: a folder, or a name on the Hub."""
    fresh: str | None = None
    """A zoo of networks that were trained from new seeds: the gold standard."""
    output_dir: str = "runs/report"
    """Folder of the report: report.json, report.md, report.html and pictures."""
    pipeline: str | None = None
    """The pipeline that generated, where `generated` is a zoo: adds its denoising and training to the report. The card
    of a folder gets figures and pictures."""
    num_networks: int = 100
    """Networks to sample where `generated` is a pipeline."""
    seed: int = 0
    """Of the networks to sample."""
    networks_per_point: int = 50
    """Networks of each baseline at each strength; fewer are faster, and make wider intervals."""
    push_to_hub: str | None = None
    """Name of the model repository that the pipeline, with its card, is pushed to in the end."""


def evaluate(
    task: str | Task | None = None,
    *,
    trained: Networks,
    generated: Networks | Generator,
    output_dir: str | Path | None = None,
    fresh: Networks | None = None,
    pipeline: Any = None,
    num_networks: int = 100,
    seed: int = 0,
    networks_per_point: int = 50,
) -> dict[str, Any]:
    r"""
    Measures generated networks against the networks they were learned from and against trivial baselines.

    Args:
        task (`str` or `Task`, *optional*):
            What the networks do, as [`load_task`] takes it. The trained zoo's own by default, if it is a built-in one.
        trained (`WeightZoo`, `str`, `Path` or list of state dicts):
            The training networks: a zoo, its folder, its name on the Hub, or state dicts. At least two.
        generated (the same, or a pipeline):
            The generated networks, or what generates them: a pipeline, its folder or its name on the Hub, or a
            [`Baseline`].
        output_dir (`str` or `Path`, *optional*): Where `report.json`, `report.md`, `report.html` and pictures go.
        fresh (as `trained`, *optional*): Networks trained from new seeds.
        pipeline (`NeuralNetworkDiffusionPipeline`, `str` or `Path`, *optional*):
            What generated the networks. Adds what its autoencoder reconstructs, and pictures of what it learned.
        num_networks (`int`, *optional*, defaults to 100): Networks to sample where `generated` is a pipeline.
        seed (`int`, *optional*, defaults to 0): Of the networks to sample.
        networks_per_point (`int`, *optional*, defaults to 50): Networks of each baseline at each strength.

    Returns:
        `dict`: what is in `report.json` (see `docs/report.md`).

    Raises:
        [`ZooError`]: fewer than two networks, different architectures, or a task that does not fit.
    """
    report, _ = _evaluate(
        task, trained, generated, output_dir, fresh, pipeline, num_networks, seed, networks_per_point
    )
    return report


def _evaluate(
    task: str | Task | None,
    trained: Networks,
    generated: Networks | Generator,
    output_dir: str | Path | None,
    fresh: Networks | None,
    pipeline: Any,
    num_networks: int,
    seed: int,
    networks_per_point: int,
) -> tuple[dict[str, Any], list[Path]]:
    """The report, and its pictures."""
    started = time.perf_counter()
    # What is missing is said before hours of work, and not after.
    needed = ["scipy.optimize", "torchmetrics.functional.classification"]
    for module in needed if output_dir is None else [*needed, "matplotlib.figure"]:
        require(module, "report")
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        zoo = _open(trained, scratch / "trained")
        name = _task_name(task, zoo)
        loaded = load_task(task if task is not None else name)
        state = processes()
        if isinstance(generated, (str, Path)) and _is_pipeline(generated):
            generated = pipeline = load_pipeline(generated).to(state.device)
        elif isinstance(pipeline, (str, Path)):
            pipeline = load_pipeline(pipeline).to(state.device)
        if callable(generated):
            pipeline = pipeline or (None if isinstance(generated, Baseline) else generated)
            made = _sample(generated, zoo, scratch / "generated", num_networks, seed)
        else:
            made = _open(generated, scratch / "generated", like=zoo)
        groups = {"trained": zoo, "generated": made}
        if fresh is not None:
            groups["fresh"] = _open(fresh, scratch / "fresh", like=zoo)
        for group, networks in groups.items():
            least = 2 if group == "trained" else 1
            if len(networks) < least:
                raise ZooError(f"There are {len(networks)} {group} networks; an evaluation needs at least {least}.")
            if networks.layout.config["tensors"] != zoo.layout.config["tensors"]:
                raise ZooError(f"{zoo.folder} and {networks.folder} hold networks of different architectures.")
        if pipeline is not None and pipeline.layout.config["tensors"] != zoo.layout.config["tensors"]:
            raise ZooError(f"The pipeline generates another architecture than that of {zoo.folder}.")

        parts = None if output_dir is None else Path(output_dir, PARTS)
        study = Study(loaded, zoo, made, groups.get("fresh"), pipeline, networks_per_point, parts)
        place, _, class_name = name.rpartition(":")
        if place.endswith(".py"):
            name = f"{Path(place).name}:{class_name}"  # its path says nothing to anyone else
        report = {"report_version": REPORT_VERSION, "task": name, **study.figures()}
        report["versions"] = versions()
        report["seconds"] = round(time.perf_counter() - started, 2)
        files: list[Path] = []
        if output_dir is not None:
            folder = Path(output_dir)
            denoising = study.denoising()
            if state.is_main_process:
                folder.mkdir(parents=True, exist_ok=True)
                files = study.draw(report, denoising, folder)
                report["seconds"] = round(time.perf_counter() - started, 2)
                write_report(report, folder, [file for file in files if file.suffix == ".png"])
                shutil.rmtree(folder / PARTS, ignore_errors=True)
            state.wait_for_everyone()
    return report, files


def _open(networks: Any, scratch: Path, like: WeightZoo | None = None) -> WeightZoo:
    """A zoo of whatever holds networks."""
    if isinstance(networks, WeightZoo):
        return networks
    if isinstance(networks, (str, Path)):
        return WeightZoo.from_pretrained(networks)
    networks = list(networks)
    if not networks:
        raise ZooError("There are no networks: an empty list was given.")
    layout = make_layout(networks[0], ("*",)) if like is None else like.layout
    with WeightZoo.create(scratch, layout) as zoo:
        for network in networks:
            zoo.append(network)
    return zoo


def _is_pipeline(name_or_path: str | Path) -> bool:
    if Path(name_or_path).is_dir() or not is_repository(name_or_path):
        return (Path(name_or_path) / "model_index.json").is_file()
    try:
        return (pipeline_folder(name_or_path) / "model_index.json").is_file()
    except HubError:
        return False  # it may be a data set


def _sample(generator: Generator, trained: WeightZoo, scratch: Path, count: int, seed: int) -> WeightZoo:
    if hasattr(generator, "set_progress_bar_config"):
        generator.set_progress_bar_config(disable=True)
    with WeightZoo.create(scratch, trained.layout) as zoo:
        for start in range(seed, seed + count, 100):
            generators = [torch.Generator().manual_seed(s) for s in range(start, min(start + 100, seed + count))]
            vectors = generator(num_networks=len(generators), generator=generators, output_type="pt").state_dicts
            for vector in vectors.cpu():
                zoo.append(vector)
    return zoo


def _task_name(task: str | Task | None, trained: WeightZoo) -> str:
    if isinstance(task, str):
        return task
    if task is not None:
        return type(task).__name__
    if trained.task is None:
        raise ZooError(f"{trained.folder} does not say what its networks do: pass --task.")
    if trained.task not in BUILT_IN:
        raise ZooError(
            f"The zoo names the task {trained.task!r}, which is code of its own: pass --task {trained.task} to run it."
        )
    return trained.task


def run_evaluate(config: EvaluateConfig) -> dict[str, Any]:
    r"""
    Evaluates, writes the report, prints a table, and puts the figures into the card of the pipeline.

    Returns:
        `dict`: as [`evaluate`].

    Raises:
        [`ConfigError`]: there is no pipeline to push.
        [`ZooError`]: as [`evaluate`].
    """
    check_positive(config, "num_networks", "networks_per_point")
    is_pipeline = config.pipeline is None and _is_pipeline(config.generated)
    pipeline = config.generated if is_pipeline else config.pipeline
    if config.push_to_hub is not None and pipeline is None:
        raise ConfigError("--push-to-hub pushes a pipeline with its card: name it with --pipeline.")
    generated = load_pipeline(config.generated).to(processes().device) if is_pipeline else config.generated
    report, files = _evaluate(
        config.task,
        config.trained,
        generated,
        config.output_dir,
        config.fresh,
        config.pipeline,
        config.num_networks,
        config.seed,
        config.networks_per_point,
    )
    if not processes().is_main_process:
        return report
    save_run(config.output_dir, "evaluate", config)
    Console().print(table(report))
    Console().print(report["verdict"]["sentence"], highlight=False)
    shown = [file for file in files if file.suffix == ".png"]
    if pipeline is not None and (Path(pipeline) / "README.md").is_file():
        write_evaluation(pipeline, report, shown)
    if config.push_to_hub is not None and pipeline is not None:
        push_evaluation(pipeline, config.push_to_hub, report, shown)
    return report
