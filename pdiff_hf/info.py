"""`pdiff-hf info`: what a folder or a repository holds, of what it was made, and how good it is."""

import json
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from .configs import InfoConfig
from .errors import ConfigError, HubError
from .files import is_pipeline, is_zoo
from .hub.cards import EVALUATION, UNKNOWN_TASK
from .hub.client import is_repository
from .hub.pipeline_files import pipeline_folder, weight_files
from .hub.pipelines import load_pipeline
from .text import load_yaml, printable, with_front
from .zoo import WeightZoo


# Columns of a zoo that hold a measure of its networks.
MEASURES = ("validation_accuracy", "accuracy")


def run_info(config: InfoConfig) -> str:
    r"""
    Some lines of text.

    Raises:
        [`ConfigError`]: it holds neither a zoo nor a pipeline nor a report.
        [`HubError`]: the repository cannot be read.
    """
    return printable(_said(config.place))


def _said(place: str) -> str:
    folder = Path(place).expanduser()
    if (folder / "report.json").is_file():
        return _of_report(folder)
    if is_zoo(folder):
        return _of_zoo(WeightZoo(folder))
    if is_pipeline(folder):
        return _of_pipeline(folder)
    if folder.exists() or not is_repository(place):
        raise ConfigError(f"{place} holds no zoo, no pipeline and no report.")
    try:
        found = pipeline_folder(place)
    except HubError:
        found = None
    if found is not None and is_pipeline(found):
        return _of_pipeline(found)
    try:
        return _of_zoo(WeightZoo.from_pretrained(place))  # a data set may have the name, too
    except HubError as error:
        if found is None:
            raise
        raise ConfigError(f"{place} holds no pipeline: there is no model_index.json.") from error


def _of_zoo(zoo: WeightZoo) -> str:
    zoo.check()
    of = f"{len(zoo)} networks of {zoo.vector_size:,} generated parameters, {zoo.dtype}".replace("torch.", "")
    lines = [f"A zoo of {of}, {_size(zoo.folder.glob('*.safetensors'))}."]
    if zoo.adapter is not None:
        unnamed = "a model that their files do not name" if zoo.adapter else "a diffusion model"
        lines.append(f"They are LoRA adapters of {zoo.adapter.get('base_model_name_or_path') or unnamed}.")
    if zoo.frozen_size:
        lines.append(f"{zoo.frozen_size:,} numbers more are the same in all of them.")
    if zoo.task is not None:
        lines.append(f"Task: {zoo.task}.")
    rows = zoo.metadata
    for name in MEASURES:
        values = [row[name] for row in rows if type(row.get(name)) in (int, float)]
        if values:
            mean = sum(values) / len(values)
            lines.append(f"{name}: mean {100 * mean:.2f} %, {100 * min(values):.2f} to {100 * max(values):.2f}.")
    if rows:
        lines.append(f"Columns: {', '.join(rows[0])}.")
    return "\n".join(lines + _made(zoo.folder, ("collect", "import", "align", "generate")))


def _of_pipeline(folder: Path) -> str:
    pipe = load_pipeline(folder)
    parts = trained_parts(pipe)
    lines = [
        f"A pipeline that samples networks of {pipe.layout.vector_size:,} generated parameters, by "
        f"{type(pipe.scheduler).__name__}, {_size(weight_files(folder))}.",
        "Trained parts: " + ", ".join(f"{name} of {count:,} parameters" for name, count in parts.items()) + ".",
    ]
    if pipe.condition_encoder is not None:
        lines.append(f"It can be asked for networks of a condition. {pipe.condition_encoder.known()}")
    return "\n".join(lines + _of_card(folder) + _made(folder, ("train",)) + verdict_of_card(folder))


def trained_parts(pipe: Any) -> dict[str, int]:
    """Parameters of the components of a pipeline that have some, by name."""
    return {
        name: sum(parameter.numel() for parameter in part.parameters())
        for name, part in pipe.components.items()
        if hasattr(part, "parameters") and any(True for _ in part.parameters())
    }


def _of_report(folder: Path) -> str:
    try:
        sentence = json.loads((folder / "report.json").read_text(encoding="utf-8"))["verdict"]["sentence"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{folder / 'report.json'} is damaged: {error!r:.200}") from error
    return "\n".join([*with_front(f"A report. {sentence}"), *_made(folder, ("evaluate",))])


def _size(files: Iterable[Path]) -> str:
    """What weights take here; of a zoo on the Hub, those that were downloaded."""
    return f"{sum(file.stat().st_size for file in files) / 1e6:.1f} MB of weights here"


def _of_card(folder: Path) -> list[str]:
    """What the networks of a pipeline do, and from how many it learned, as its card says."""
    card = " ".join(_card(folder).split())
    task = re.search(r"Generates networks for the task `([^`]{1,200})`", card)
    count = re.search(r"learned from (\d+) trained networks", card)
    lines = [f"Task: {task[1]}."] if task is not None and task[1] != UNKNOWN_TASK else []
    return lines + ([f"Learned from {int(count[1]):,} networks."] if count is not None else [])


def _card(folder: Path) -> str:
    file = folder / "README.md"
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""


def _made(folder: Path, stages: tuple[str, ...]) -> list[str]:
    """The settings of the run that made a folder, but for those that are nothing."""
    for stage in stages:
        with suppress(OSError, ValueError, AttributeError, yaml.YAMLError):
            settings = load_yaml((folder / f"{stage}.yaml").read_text(encoding="utf-8")).items()
            said = ", ".join(
                f"{name}={value}"[:200] for name, value in settings if value is not False and value not in (None, [])
            )
            return [f"Made by `pdiff-hf {stage}` with {said}."]
    return []


def verdict_of_card(folder: Path) -> list[str]:
    """The first sentence of the evaluation in the card, where there is one."""
    start, end = EVALUATION
    section = _card(folder).partition(start)[2].partition(end)[0]
    lines = [line for line in section.splitlines() if line.strip()][:1]
    return with_front(lines[0]) if lines else []
