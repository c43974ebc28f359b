"""Stage 4: what generated networks are worth, against those they were learned from and against what costs nothing."""

import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console

from ..configs import EvaluateConfig
from ..errors import ConfigError, ZooError
from ..extras import require
from ..files import check_parts, locked
from ..hub.cards import around_evaluation, write_evaluation
from ..hub.pipeline_files import check_weights, pipeline_folder, weights_sha256
from ..hub.push import push_evaluation
from ..parallel import from_main, processes, wait_for_everyone, written
from ..pipelines.neural_network_diffusion import NeuralNetworkDiffusionPipeline
from ..runs import noted, save_run, versions
from ..tasks import Task, TaskFamily, check_family
from ..text import with_front
from ..zoo import WeightZoo
from ..zoo.imports import checkpoint_files
from . import pictures
from .conditions import ConditionAudit, Seen
from .quality import asked_quality
from .report import captioned, card_results, card_section, table, write_report
from .study import PARTS, Study
from .subjects import (
    NetworksLike,
    Sampler,
    Subjects,
    check_learned_from,
    family_of,
    holds_pipeline,
    knows_training,
    load,
    opened,
)


REPORT_VERSION = 2
# More than any training sees, so that facts from elsewhere make no audit endless.
MOST_SEEN = {"networks": 10**8, "inputs": 10**4, "weight": 1e6}


def evaluate(
    task: str | Task | TaskFamily | None = None,
    *,
    trained: NetworksLike,
    generated: NetworksLike | Sampler,
    output_dir: str | Path | None = None,
    fresh: NetworksLike | None = None,
    pipeline: NeuralNetworkDiffusionPipeline | str | Path | None = None,
    num_networks: int = 100,
    seed: int = 0,
    networks_per_point: int = 50,
) -> dict[str, Any]:
    r"""
    Measures generated networks against the networks they were learned from and against trivial baselines.

    Args:
        task (`str`, `Task` or `TaskFamily`, *optional*):
            What the networks do, as [`load_task`] takes it. The trained zoo's own by default, if it is a built-in one.
            Of a family, `generated` is a pipeline, which is asked for conditions that no training network had.
        trained (`WeightZoo`, `str`, `Path` or list of state dicts):
            The training networks, at least two: a zoo, its folder, its name on the Hub, a folder of checkpoints, a
            pattern of them such as `"runs/*.pt"`, or state dicts.
        generated (the same, or a pipeline):
            The generated networks, or what generates them: a pipeline, its folder or its name on the Hub, a
            [`Baseline`], or any callable that takes `num_networks`, `generator` (a list of them) and
            `output_type="pt"`, and returns an object whose `state_dicts` are vectors `[n, P]` in the order of the
            training zoo's layout.
        output_dir (`str` or `Path`, *optional*): Where `report.json`, `report.md`, `report.html` and pictures go.
        fresh (as `trained`, *optional*): Networks trained from new seeds.
        pipeline (`NeuralNetworkDiffusionPipeline`, `str` or `Path`, *optional*):
            What generated the networks. Adds what its autoencoder reconstructs, and pictures of what it learned; not
            for families.
        num_networks (`int`, *optional*, defaults to 100):
            Networks to sample where `generated` is a pipeline; of a family, 16 are of each condition.
        seed (`int`, *optional*, defaults to 0): Of the networks to sample.
        networks_per_point (`int`, *optional*, defaults to 50):
            Networks of each baseline at each strength; not for families.

    Returns:
        `dict`: what is in `report.json` (see `docs/report.md`).

    Raises:
        [`ZooError`]: fewer than two networks, different architectures, or a task that does not fit.
        [`TaskError`]: there is no such task.
        [`ConfigError`]: the folder holds what is no report.
    """
    require_extras(output_dir)
    output_dir = None if output_dir is None else Path(output_dir).expanduser()
    with nullcontext() if output_dir is None else _written(output_dir):
        if found := family_of(task, trained):
            return _audit(found, generated, fresh, seed, output_dir)[0]
        assert not isinstance(task, TaskFamily)
        with opened(task, trained, generated, fresh, pipeline, num_networks, seed) as subjects:
            return _write(subjects, networks_per_point, output_dir)[0]


def run_evaluate(config: EvaluateConfig) -> dict[str, Any]:
    r"""
    Evaluates, writes the report, prints a table, and puts the figures into the card of the pipeline.

    Returns:
        `dict`: as [`evaluate`].

    Raises:
        [`ConfigError`]: there is no pipeline to push, or the folder holds what is no report.
        [`PipelineError`]: the pipeline got other weights meanwhile.
        [`ZooError`]: as [`evaluate`].
    """
    require_extras(config.output_dir)
    with _written(config.output_dir):
        return _evaluate(config)


@contextmanager
def _written(folder: str | Path) -> Iterator[None]:
    """Holds the folder of a report, whose files replace those of an earlier one and no others."""
    with written(folder, "evaluate"):
        check_parts(folder, "a report")
        yield


def _evaluate(config: EvaluateConfig) -> dict[str, Any]:
    origin: str | None
    weights = {
        name: weights_sha256(pipeline_folder(name))
        for name in (config.generated, config.pipeline)
        if name is not None and holds_pipeline(name)
    }
    cards = [name for name in weights if _has_card(name, config.push_to_hub is not None)]
    for name in cards:
        around_evaluation(Path(name))  # what is wrong with it is said before the work
    if found := family_of(config.task, config.trained):
        origin = config.generated
        report, files = _audit(found, config.generated, config.fresh, config.seed, config.output_dir)
    else:
        with opened(
            *(config.task, config.trained, config.generated, config.fresh, config.pipeline),
            num_networks=config.num_networks,
            seed=config.seed,
        ) as subjects:
            origin = subjects.origin
            if config.push_to_hub is not None and origin is None:
                raise ConfigError("--push-to-hub pushes a pipeline with its card: name it with --pipeline.")
            report, files = _write(subjects, config.networks_per_point, config.output_dir)
    if not processes().is_main_process:
        return report
    save_run(config.output_dir, "evaluate", config)
    Console().print(table(report))
    Console().print(*with_front(report["verdict"]["sentence"]), sep="\n", highlight=False)
    if origin is not None:
        evaluation = (card_section(report), card_results(report), captioned(files))
        if origin in cards:
            with locked(origin):
                check_weights(Path(origin), weights[origin])
                write_evaluation(Path(origin), *evaluation)
        if config.push_to_hub is not None:
            push_evaluation(origin, config.push_to_hub, *evaluation, weights=weights[origin])
    return report


def _has_card(pipeline: str, push: bool) -> bool:
    """Whether a pipeline is in a folder with a card that can be written. Raises [`ConfigError`] where it cannot, and
    is pushed."""
    if not (Path(pipeline) / "README.md").is_file():
        return False
    if os.access(pipeline, os.W_OK):
        return True
    if push:
        raise ConfigError(
            f"{pipeline} cannot be written, and --push-to-hub pushes it with its new card: copy it first."
        )
    if processes().is_main_process:
        print(f"{pipeline} cannot be written: its card will stay as it is.", file=sys.stderr)
    return False


def require_extras(output_dir: str | Path | None) -> None:
    """What is missing is said before hours of work, and not after."""
    needed = ["scipy.optimize", "torchmetrics.functional.classification"]
    for module in needed if output_dir is None else [*needed, "matplotlib.figure"]:
        require(module, "report")


def _audit(
    found: tuple[str, TaskFamily, WeightZoo],
    generated: Any,
    fresh: NetworksLike | None,
    seed: int,
    output_dir: str | Path | None,
) -> tuple[dict[str, Any], list[Path]]:
    """The report on the conditions of a family of tasks, and its pictures."""
    name, family, zoo = found
    seen = Seen()
    started = time.perf_counter()
    if isinstance(generated, str | Path):
        if not holds_pipeline(generated):
            raise ConfigError(
                f"{name} is a family of tasks, and {generated} holds no pipeline to ask for some of them: pass "
                "--generated PIPELINE."
            )
        folder = pipeline_folder(generated)
        if knows_training(folder):
            check_learned_from(folder, zoo)
            seen = seen_in_training(folder)
        generated = load(generated)
    if not hasattr(generated, "condition_encoder"):
        raise ZooError(
            f"{name} is a family of tasks: what is audited is a pipeline, which is asked for some of them, and not "
            f"{type(generated).__name__}."
        )
    if not isinstance(fresh, WeightZoo | str | Path | None) or (
        isinstance(fresh, str | Path) and checkpoint_files(fresh)
    ):
        raise ZooError(f"{name} is a family of tasks: fresh networks come in a zoo, whose rows hold their conditions.")
    gold = fresh if isinstance(fresh, WeightZoo | None) else WeightZoo.from_pretrained(str(fresh))
    check_family(family, processes().device, training=False)
    figures = from_main(lambda: ConditionAudit(family, zoo, generated, gold, seed, seen).figures())
    report = {"report_version": REPORT_VERSION, "task": name, **figures, "versions": versions()}
    report["seconds"] = round(time.perf_counter() - started, 2)
    files: list[Path] = []
    if output_dir is not None and processes().is_main_process:
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        files = [file for file in pictures.conditions(report, folder) if file.suffix == ".png"]
        write_report(report, folder, files)
    wait_for_everyone()
    return report, files


def seen_in_training(pipeline: Path) -> Seen:
    """What the training of a pipeline noted that it saw, in numbers that one may believe."""
    found = noted(pipeline, "train", "seen")
    known = {
        name: number
        for name, number in (found.items() if isinstance(found, dict) else ())
        if name in MOST_SEEN and type(number) in (int, type(MOST_SEEN[name])) and 0 < number <= MOST_SEEN[name]
    }
    return Seen(**known)


def _write(
    subjects: Subjects, networks_per_point: int, output_dir: str | Path | None
) -> tuple[dict[str, Any], list[Path]]:
    """The report, and its pictures."""
    started = time.perf_counter()
    folder = None if output_dir is None else Path(output_dir)
    study = Study(subjects, networks_per_point, None if folder is None else folder / PARTS)
    figures = study.figures()
    if (pipeline := subjects.pipeline) is not None:
        steps = subjects.denoising_steps(pipeline)
        figures["quality"] = asked_quality(study.scorer, subjects.trained, pipeline, steps)
    report = {"report_version": REPORT_VERSION, "task": subjects.name, **figures, "versions": versions()}
    report["seconds"] = round(time.perf_counter() - started, 2)
    files: list[Path] = []
    if folder is not None:
        denoising = study.denoising()
        if processes().is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            files = [file for file in study.draw(report, denoising, folder) if file.suffix == ".png"]
            report["seconds"] = round(time.perf_counter() - started, 2)
            write_report(report, folder, files)
            shutil.rmtree(folder / PARTS, ignore_errors=True)
        wait_for_everyone()
    return report, files
