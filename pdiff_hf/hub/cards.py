"""The cards of zoos and pipelines: what is generated anew, and what a person wrote around it."""

import os
import shutil
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData, RepoCard

from ..errors import HubError, PipelineError
from .client import is_repository


if TYPE_CHECKING:
    from ..zoo import WeightZoo

EVALUATION = ("<!-- pdiff-hf: evaluation -->", "<!-- pdiff-hf: evaluation end -->")
# Stands in cards where the name of the repository will be.
PLACEHOLDER = "path/or/name/of/this/repository"
GENERATED = ("<!-- pdiff-hf: what follows is rewritten by every push -->", "<!-- pdiff-hf: end -->")


def merge_cards(new: str, old: str | None, license: str | None = None) -> str:
    r"""
    The card to push: the generated part of `new` in the place of that of `old`, and everything that a person wrote
    around it. Metadata that only the old card has stays; tags are united; a licence is set where one is given.
    """
    fresh = _parsed_card(new)
    present = fresh if old is None else _parsed_card(old)
    start, end = GENERATED
    section = start + fresh.text.partition(start)[2].partition(end)[0] + end
    before, marker, rest = present.text.partition(start)
    text = before + section + rest.partition(end)[2] if marker else f"{present.text.rstrip()}\n\n{section}\n"
    old_data, new_data = present.data.to_dict(), fresh.data.to_dict()
    data = old_data | new_data
    data["tags"] = sorted({*_tags(old_data), *_tags(new_data)})
    if license is not None:
        data["license"] = license
    return _card(data, text)


def _parsed_card(content: str) -> RepoCard:
    try:
        return RepoCard(content, ignore_metadata_errors=True)
    except (TypeError, ValueError, yaml.YAMLError) as error:
        raise HubError(
            f"The metadata of README.md cannot be read; mend them and push again: {error!s:.300}"
        ) from error


def _tags(data: dict[str, Any]) -> list[str]:
    tags = data.get("tags") or []
    return [str(tag) for tag in (tags if isinstance(tags, list) else [tags]) if tag is not None]


def write_zoo_card(zoo: "WeightZoo", description: str) -> None:
    """Writes the dataset card of a zoo, keeping what a person wrote into it."""
    card_data = DatasetCardData(
        tags=["neural-network-diffusion", "model-zoo", "weights"],
        configs=[{"config_name": "default", "data_files": "metadata.jsonl"}],
    )
    card = DatasetCard.from_template(
        card_data,
        template_str=_template("zoo.md"),
        title=f"Weight zoo: {zoo.task or 'networks'}",
        description=description,
        count=len(zoo),
        parameters=zoo.vector_size,
        markers=GENERATED,
        placeholder=PLACEHOLDER,
    )
    _write_card(zoo.folder, str(card))


def write_pipeline_card(
    folder: str | os.PathLike, zoo: "WeightZoo", facts: dict[str, Any], dataset: str | None = None
) -> None:
    r"""
    Writes the model card of a pipeline that was trained on a zoo, keeping what a person wrote into it.

    Args:
        folder (`str` or `os.PathLike`): The pipeline.
        zoo (`WeightZoo`): What it was trained on.
        facts (`dict[str, Any]`): Of the training.
        dataset (`str`, *optional*): The zoo's repository, where it came from the Hub.
    """
    sources = {str(row.get("pipeline", row.get("source"))) for row in zoo.rows() if "revision" in row}
    card_data = ModelCardData(
        base_model=sorted(name for name in sources if is_repository(name)) or None,
        datasets=None if dataset is None else [dataset],
        library_name="diffusers",
        tags=["neural-network-diffusion", "weight-generation", "diffusers:NeuralNetworkDiffusionPipeline"],
    )
    card = ModelCard.from_template(
        card_data,
        template_str=_template("pipeline.md"),
        title=f"Neural network diffusion: {zoo.task or 'networks'}",
        task=zoo.task,
        count=len(zoo),
        parameters=zoo.vector_size,
        facts=facts,
        markers=GENERATED,
        placeholder=PLACEHOLDER,
        evaluation=EVALUATION,
    )
    _write_card(Path(folder), str(card))


def write_evaluation(folder: str | os.PathLike, report: dict[str, Any], pictures: list[Path]) -> None:
    r"""
    Puts verdict and figures of a report into the card of a pipeline, as text and as the Hub's evaluation results, and
    the pictures beside it.
    """
    file = Path(folder) / "README.md"
    start, end = EVALUATION
    card = ModelCard(card_text(file), ignore_metadata_errors=True)
    before, marker, rest = card.text.partition(start)
    if not marker:
        raise PipelineError(f"{file} has no place for figures: it lacks the line {start!r}.")
    verdict = report["verdict"]
    lines = [
        f"**{verdict['label']}**: {verdict['sentence']}",
        "",
        "| networks | count | mean | min | best on validation | similarity |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for group, figures in report["groups"].items():
        accuracy = figures["accuracy"]
        cells = [f"{100 * accuracy[key]:.2f}" for key in ("mean", "min", "best_on_validation")]
        similarity = f"{figures['maximum_similarity']['mean']:.3f}"
        lines.append(f"| {group} | {figures['count']} | {' | '.join(cells)} | {similarity} |")
    for picture in pictures:
        target = Path(folder) / "evaluation" / picture.name
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(picture, target)
        lines += ["", f"![{picture.stem}](evaluation/{picture.name})"]
    text = before + "\n".join([start, "", *lines, "", end]) + rest.partition(end)[2]
    generated = report["groups"]["generated"]
    values = {
        ("accuracy", "mean accuracy"): generated["accuracy"]["mean"],
        ("accuracy", "minimum accuracy"): generated["accuracy"]["min"],
        ("iou", "mean maximum similarity of errors to a training network"): generated["maximum_similarity"]["mean"],
    }
    results = [
        EvalResult(
            task_type="weight-generation",
            dataset_type=report["task"],
            dataset_name=report["task"],
            dataset_split="test",
            metric_type=kind,
            metric_name=f"{name} of {generated['count']} generated networks",
            metric_value=round(value, 6),
        )
        for (kind, name), value in values.items()
    ]
    data = card.data.to_dict() | ModelCardData(model_name="pdiff", eval_results=results).to_dict()
    file.write_text(_card(data, text), encoding="utf-8")


def _card(data: dict[str, Any], text: str) -> str:
    return f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True)}---\n{text}"


def _write_card(folder: Path, card: str) -> None:
    file = folder / "README.md"
    old = card_text(file) if file.exists() else None
    file.write_text(merge_cards(card, old), encoding="utf-8")


def card_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise HubError(f"{file} is no text in UTF-8: mend or remove it.") from error


def _template(name: str) -> str:
    return (files("pdiff_hf.model_cards") / name).read_text(encoding="utf-8")
