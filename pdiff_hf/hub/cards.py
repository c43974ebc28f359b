"""The cards of zoos and pipelines: what is generated anew, and what a person wrote around it."""

import re
import shutil
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData, RepoCard
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from ..errors import HubError, PipelineError
from ..files import stays_inside, whole
from ..text import load_yaml, plain, shown_name
from .client import is_model, license_of


EVALUATION = ("<!-- pdiff-hf: evaluation -->", "<!-- pdiff-hf: evaluation end -->")
# Of the results of an evaluation, in the metadata.
TASK_TYPE = "weight-generation"
# Stands in cards where the name of the repository will be.
PLACEHOLDER = "path/or/name/of/this/repository"
# In a card, where nothing says what its networks do.
UNKNOWN_TASK = "networks"
# By which the Hub finds adapters.
ADAPTER_TAGS, ADAPTER_OF = ("lora", "peft"), "base_model:adapter:"
GENERATED = ("<!-- pdiff-hf: what follows is rewritten by every push -->", "<!-- pdiff-hf: end -->")


def merge_cards(new: str, old: str | None, license: str | None = None) -> str:
    r"""
    The card to push: the generated part of `new`, which is between the marks, and around it what a person wrote there
    in `new`, or else in `old`. A new card without marks is a person's own, and its text stays as it is. Metadata that
    only the old card has stay; tags are united; a licence is set where one is given.
    """
    fresh = _parsed_card(new)
    present = fresh if old is None else _parsed_card(old)
    text = _merged_texts(fresh.text, present.text)
    old_data, new_data = present.data.to_dict(), fresh.data.to_dict()
    # What was made of the content that was there before.
    tags = {*_tags(old_data), *_tags(new_data)}
    if GENERATED[0] in present.text:
        old_data.pop("dataset_info", None)
        tags = {tag for tag in tags if not tag.startswith(ADAPTER_OF) or tag in _tags(new_data)}
        if not set(ADAPTER_TAGS) & {*_tags(new_data)}:
            if set(ADAPTER_TAGS) <= tags:
                old_data.pop("base_model", None)
                old_data.pop("library_name", None)
            tags -= set(ADAPTER_TAGS)
    data = old_data | new_data
    # Of what `pdiff-hf evaluate` measured, the old card has that of what was there before.
    ours = [one for one in _results(new_data) if _is_ours(one)]
    _set_results(data, [*_results(old_data), *_results(new_data)], ours)
    data["tags"] = sorted(tags)
    if license is not None:
        data["license"] = license
    return _card(data, text)


def _merged_texts(new: str, old: str) -> str:
    start, end = GENERATED
    before, marker, rest = new.partition(start)
    section, _, after = rest.partition(end)
    if not marker or before.strip() or after.strip():
        return new
    before, marker, rest = old.partition(start)
    if not marker:
        before, rest = f"{old.rstrip()}\n\n", f"{end}\n"
    _, marker, after = rest.partition(end)
    if not marker:
        raise HubError(f"The card lacks the line {end!r} after {start!r}: where its generated part ends is not known.")
    return before + start + section + end + after


def _results(data: dict[str, Any]) -> list[Any]:
    """The entries of the model index."""
    return _list(data.get("model-index"))


def _list(value: Any) -> list[Any]:
    """A list that may be something else, of which nothing is taken."""
    return value if isinstance(value, list) else []


def _set_results(data: dict[str, Any], entries: list[Any], ours: list[Any]) -> None:
    """Makes the model index those entries that others measured, each once, and these."""
    data.pop("model-index", None)
    others = [one for place, one in enumerate(entries) if not _is_ours(one) and one not in entries[:place]]
    if others or ours:
        data["model-index"] = [*others, *ours]


def _is_ours(model: Any) -> bool:
    """Whether an entry of a model index holds what `pdiff-hf evaluate` measured."""
    results = model.get("results") if isinstance(model, dict) else None
    tasks = [one.get("task") if isinstance(one, dict) else None for one in _list(results)]
    return bool(tasks) and all(isinstance(task, dict) and task.get("type") == TASK_TYPE for task in tasks)


def _parsed_card(content: str) -> RepoCard:
    try:
        if block := REGEX_YAML_BLOCK.search(content):
            load_yaml(block[2])
        return RepoCard(content, ignore_metadata_errors=True)
    except (TypeError, ValueError, yaml.YAMLError) as error:
        raise HubError(
            f"The metadata of README.md cannot be read; mend them and push again: {error!s:.300}"
        ) from error


def _tags(data: dict[str, Any]) -> list[str]:
    tags = data.get("tags") or []
    return [str(tag) for tag in (tags if isinstance(tags, list) else [tags]) if tag is not None]


def write_zoo_card(
    folder: Path,
    description: str,
    task: str | None,
    count: int,
    parameters: int,
    features: list[dict[str, Any]] | None = None,
    adapter: dict[str, Any] | None = None,
) -> None:
    """Writes the dataset card of a zoo of so many networks of so many parameters, whose rows have these columns and
    which may be adapters of this configuration, and keeps what a person wrote into it."""
    base = _base_model(adapter)
    card_data = DatasetCardData(
        library_name="peft" if adapter else None,
        dataset_info=None if features is None else {"features": features},
        tags=["neural-network-diffusion", "model-zoo", "weights", *_adapter_tags(adapter)],
        base_model=base,
        configs=[{"config_name": "default", "data_files": "metadata.jsonl"}],
        size_categories=_size_category(count),
    )
    card = DatasetCard.from_template(
        card_data,
        template_str=_template("zoo.md"),
        title=f"Weight zoo: {plain(shown_name(task or 'networks'))}",
        description=description,
        count=count,
        parameters=parameters,
        adapter=_of_adapter(adapter, base),
        markers=GENERATED,
        placeholder=PLACEHOLDER,
    )
    _write_card(folder, str(card))


def description_of(folder: Path) -> str | None:
    """What the card of a zoo says first in its generated part; None of a card that has none."""
    section = card_text(folder / "README.md").partition(GENERATED[0])[2]
    found = re.match(r"\s*# [^\n]*\n\n(.*?)\n\n\d+ networks of \d+ generated", section, re.DOTALL)
    return None if found is None else found[1]


def _size_category(count: int) -> str:
    """The Hub's name for so many rows."""
    bounds = {"n<1K": 10**3, "1K<n<10K": 10**4, "10K<n<100K": 10**5, "100K<n<1M": 10**6, "1M<n<10M": 10**7}
    return next((name for name, bound in bounds.items() if count < bound), "n>10M")


def _base_model(adapter: dict[str, Any] | None) -> str | None:
    """The name on the Hub of what networks are adapters of."""
    name = (adapter or {}).get("base_model_name_or_path")
    return name if name is not None and is_model(name) else None


def _adapter_tags(adapter: dict[str, Any] | None) -> list[str]:
    """By which adapters are found, and those of a base model; none of other networks."""
    base = _base_model(adapter)
    return [*(ADAPTER_TAGS if adapter is not None else ()), *([f"{ADAPTER_OF}{base}"] if base else [])]


def adapter_card(adapter: dict[str, Any]) -> str:
    """The card of one adapter of this configuration, by which the Hub and PEFT find its base model. The Hub is not
    asked for a licence: the card of the zoo has it."""
    tags = sorted(["weight-generation", *_adapter_tags(adapter)])
    data = ModelCardData(base_model=_base_model(adapter), library_name="peft" if adapter else "diffusers", tags=tags)
    return _card(data.to_dict(), f"\n# A LoRA adapter\n\n{_of_adapter(adapter, None)}\n")


def _of_adapter(adapter: dict[str, Any] | None, base: str | None) -> str | None:
    """What a card says of adapters; nothing of other networks."""
    if adapter is None:
        return None
    if not adapter:
        return "The networks are LoRA adapters, for `pipe.load_lora_weights` of diffusers."
    named = plain(str(adapter.get("base_model_name_or_path") or "a model that their files do not name"))
    revision = f" at revision {plain(adapter['revision'])}" if adapter.get("revision") else ""
    license = None if base is None else license_of(base)
    licensed = f" The licence of the base model is {plain(license)}." if license else ""
    return f"The networks are LoRA adapters of `{named}`{revision}, of rank {adapter['r']} and scale 1.{licensed}"


def write_pipeline_card(
    folder: Path,
    recipe: dict[str, Any],
    task: str | None,
    count: int,
    parameters: int,
    sources: Iterable[str] = (),
    dataset: str | None = None,
    asked: str | None = None,
    adapter: dict[str, Any] | None = None,
) -> None:
    r"""
    Writes the model card of a pipeline, keeping what a person wrote into it.

    Args:
        folder (`Path`): The pipeline.
        recipe (`dict[str, Any]`): Of the training.
        task (`str`, *optional*): What the networks do.
        count (`int`): Networks that it was trained on.
        parameters (`int`): Of each.
        sources (`Iterable[str]`, *optional*): The repositories that the networks came from.
        dataset (`str`, *optional*): The zoo's repository, where it came from the Hub.
        asked (`str`, *optional*): A sentence that says what it can be asked for.
        adapter (`dict[str, Any]`, *optional*): PEFT's configuration, where the networks are adapters.
    """
    base = _base_model(adapter)
    card_data = ModelCardData(
        base_model=sorted({*sources, *([base] if base else [])}) or None,
        datasets=None if dataset is None else [dataset],
        library_name="diffusers",
        tags=[
            *("neural-network-diffusion", "weight-generation", "diffusers:NeuralNetworkDiffusionPipeline"),
            *_adapter_tags(adapter),
        ],
    )
    card = ModelCard.from_template(
        card_data,
        template_str=_template("pipeline.md"),
        title=f"Neural network diffusion: {plain(shown_name(task or UNKNOWN_TASK))}",
        task=plain(shown_name(task or UNKNOWN_TASK)),
        count=count,
        parameters=parameters,
        facts={name: plain(str(value)) for name, value in recipe.items()},
        asked=None if asked is None else plain(asked),
        adapter=_of_adapter(adapter, base),
        markers=GENERATED,
        placeholder=PLACEHOLDER,
        evaluation=EVALUATION,
    )
    _write_card(folder, str(card))


def around_evaluation(folder: Path) -> tuple[RepoCard, str, str]:
    """The card of a pipeline, and its text before and after the place for figures. Raises [`PipelineError`] where
    there is none."""
    file = folder / "README.md"
    _check_inside(file, folder)
    start, end = EVALUATION
    card = _parsed_card(card_text(file))
    before, marker, rest = card.text.partition(start)
    if not marker:
        raise PipelineError(
            f"{file} has no place for figures: it lacks the line {start!r}, and {end!r} after it. Put them in."
        )
    _, marker, after = rest.partition(end)
    if not marker:
        raise PipelineError(f"{file} has no end of the place for figures: it lacks the line {end!r}. Put it in.")
    return card, before, after


def write_evaluation(folder: Path, section: str, results: list[EvalResult], pictures: Mapping[Path, str]) -> None:
    r"""
    Puts an evaluation into the card of a pipeline.

    Args:
        folder (`Path`): The pipeline.
        section (`str`): What the card says, in Markdown.
        results (`list[EvalResult]`): The same for the Hub.
        pictures (`Mapping[Path, str]`): Put beside it and shown, each above its caption.

    Raises:
        [`PipelineError`]: the card has no place for it, or the folder has pictures elsewhere, by links.
    """
    start, end = EVALUATION
    card, before, after = around_evaluation(folder)
    lines, beside = [section.strip()], folder / "evaluation"
    for path in (beside, *beside.rglob("*")):
        _check_inside(path, folder)
    for picture, caption in pictures.items():
        with whole(beside / picture.name) as target:
            shutil.copyfile(picture, target)
        lines += ["", f"![{picture.stem}](evaluation/{picture.name})", "", caption]
    text = before + "\n".join([start, "", *lines, "", end]) + after
    data = card.data.to_dict()
    ours = ModelCardData(model_name=PLACEHOLDER, eval_results=results).to_dict()["model-index"] if results else []
    _set_results(data, _results(data), ours)
    with whole(folder / "README.md") as temporary:
        temporary.write_text(_card(data, text), encoding="utf-8")


def _card(data: dict[str, Any], text: str) -> str:
    return f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True)}---\n{text}"


def _write_card(folder: Path, card: str) -> None:
    file = folder / "README.md"
    _check_inside(file, folder)
    old = card_text(file) if file.exists() else None
    with whole(file) as temporary:
        temporary.write_text(merge_cards(card, old), encoding="utf-8")


def _check_inside(path: Path, folder: Path) -> None:
    if not stays_inside(path, folder):
        raise PipelineError(f"{path} is a link that leads out of {folder}: remove it.")


def card_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise HubError(f"{file} is no text in UTF-8: mend or remove it.") from error


def _template(name: str) -> str:
    return (files("pdiff_hf.model_cards") / name).read_text(encoding="utf-8")
