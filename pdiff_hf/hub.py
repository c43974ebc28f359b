"""What goes to the Hub and comes from it: pipelines, zoos and their cards."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
import yaml
from diffusers import DiffusionPipeline
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    DatasetCard,
    DatasetCardData,
    EvalResult,
    HfApi,
    ModelCard,
    ModelCardData,
    RepoCard,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx
from safetensors import safe_open

from .config import UNFINISHED
from .errors import PdiffError
from .pipelines.neural_network_diffusion import (
    NeuralNetworkDiffusionPipeline,
    ParameterAutoencoderKL,
    ParameterLayout,
    ParameterUNet1DModel,
)


if TYPE_CHECKING:
    from .zoo import WeightZoo

# What belongs to a run on one machine and not into a repository.
LOCAL_FILES = (
    "checkpoint-*",
    "*.part",
    "*.state.pt",
    "*.yaml",
    ".*",
    "__pycache__",
    "events.out.tfevents.*",
)
EVALUATION = ("<!-- pdiff-hf: evaluation -->", "<!-- pdiff-hf: evaluation end -->")
# Stands in cards where the name of the repository will be.
PLACEHOLDER = "path/or/name/of/this/repository"
# Far above any schedule; a scheduler allocates several numbers a timestep.
MOST_TIMESTEPS = 10**6
GENERATED = ("<!-- pdiff-hf: what follows is rewritten by every push -->", "<!-- pdiff-hf: end -->")


class HubError(PdiffError, ValueError):
    """A repository that cannot be read or written."""


class PipelineError(PdiffError, ValueError):
    """A pipeline that cannot be loaded."""


def load_pipeline(
    name_or_path: str | os.PathLike, revision: str | None = None, token: str | None = None, **kwargs: Any
) -> NeuralNetworkDiffusionPipeline:
    r"""
    A pipeline from a folder or a model repository, run by the code of this package: none of the repository's own code
    is executed.

    Args:
        name_or_path (`str` or `os.PathLike`): The folder, or the name on the Hub.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        token (`str`, *optional*): For private repositories; the one of `hf auth login` by default.
        kwargs (*optional*): Passed to `from_pretrained`.

    Raises:
        [`PipelineError`]: there is no pipeline, or it is damaged.
        [`HubError`]: the repository cannot be read.
    """
    folder = pipeline_folder(name_or_path, revision, token)
    if not (folder / DiffusionPipeline.config_name).is_file():
        raise PipelineError(f"{name_or_path} holds no pipeline: there is no {DiffusionPipeline.config_name}.")
    try:
        index = NeuralNetworkDiffusionPipeline.load_config(str(folder))
        _check_schedule(folder / "scheduler")
        for component, model_class in (
            ("layout", ParameterLayout),
            ("unet", ParameterUNet1DModel),
            ("vae", ParameterAutoencoderKL),
        ):
            # The class that the loader takes is the one of the index, whatever the config says.
            _check_weights(folder / component, _described(folder / component, index[component][1], model_class))
        pipe = NeuralNetworkDiffusionPipeline.from_pretrained(str(folder), use_safetensors=True, **kwargs)
        statistics = torch.stack([pipe.layout.mean, pipe.layout.std])
        if not torch.isfinite(statistics).all() or (pipe.layout.std < 0).any():
            raise ValueError("the statistics of the layout are no numbers")
    except Exception as error:  # whatever a damaged or hostile folder makes of the loaders
        raise PipelineError(f"The pipeline in {name_or_path} cannot be loaded: {error}") from error
    return pipe


def pipeline_folder(name_or_path: str | os.PathLike, revision: str | None = None, token: str | None = None) -> Path:
    """The folder itself, or that of the repository's commit in the cache, which is named by the commit."""
    if Path(name_or_path).is_dir() or not is_repository(name_or_path):
        return Path(name_or_path)
    # Code, and weights in other formats than safetensors, stay where they are.
    patterns = ["model_index.json", "*/*.json", "*/*.safetensors"]
    return Path(download(str(name_or_path), "model", revision, token, patterns))


def _check_schedule(folder: Path) -> None:
    config = json.loads((folder / "scheduler_config.json").read_text(encoding="utf-8"))
    timesteps = config.get("num_train_timesteps", 1000)
    if type(timesteps) is not int or not 1 <= timesteps <= MOST_TIMESTEPS:
        raise ValueError(f"num_train_timesteps has to be between 1 and {MOST_TIMESTEPS}, and is {timesteps!r:.200}")


def _described(folder: Path, name: str, own_class: Any) -> torch.nn.Module:
    """The component that a config describes, without memory for its weights: of our class or one of diffusers."""
    model_class = own_class if name == own_class.__name__ else getattr(diffusers, name)
    config = model_class.load_config(str(folder))
    with torch.device("meta"):
        return model_class.from_config(config)


def _check_weights(folder: Path, model: torch.nn.Module) -> None:
    """The loaders fill up what a file lacks, and allocate what a config claims: both are compared before."""
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    stored: dict[str, list[int]] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            stored |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    differing = sorted(name for name in stored.keys() | expected.keys() if stored.get(name) != expected.get(name))
    if differing:
        raise ValueError(f"the weights of {folder.name} do not fit its config: {', '.join(differing):.200}")


def is_repository(name_or_path: str | os.PathLike) -> bool:
    """Whether this can be the name of a repository: `namespace/name`."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", str(name_or_path)) is not None


def download(repo_id: str, repo_type: str, revision: str | None, token: str | None, patterns: list[str]) -> str:
    """The folder in the cache that holds these files of a repository."""
    with explained(repo_id, revision):
        return snapshot_download(repo_id, repo_type=repo_type, revision=revision, token=token, allow_patterns=patterns)


def download_file(repo_id: str, repo_type: str, revision: str | None, token: str | None, name: str) -> str:
    """One file of a repository, in the cache."""
    with explained(repo_id, revision):
        return hf_hub_download(repo_id, name, repo_type=repo_type, revision=revision, token=token)


def matching_models(pattern: str, token: str | None) -> list[tuple[str, str]]:
    """Names and present commits of the model repositories that a pattern, such as `org/*-digits`, matches."""
    if re.fullmatch(r"[\w.-]+/[\w.*?\[\]-]+", pattern) is None:
        raise HubError(
            f"{pattern!r} is no pattern of repositories: expected namespace/name, * and ? in the name only."
        )
    with explained(pattern, None):
        found = HfApi(token=token).list_models(author=pattern.partition("/")[0])
        names = sorted(model.id for model in found if fnmatchcase(model.id, pattern))
        return [(name, str(HfApi(token=token).model_info(name).sha)) for name in names]


def push(
    folder: str | os.PathLike,
    repo_id: str,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    license: str | None = None,
) -> CommitInfo:
    r"""
    Makes a repository hold what a folder with a zoo or a pipeline holds, in one commit: all of it or nothing, and no
    commit where nothing changed. Shards and checkpoints that the folder does not have any more are removed; files of
    other kinds in the repository stay, and so does what a person wrote into its card.

    Args:
        folder (`str` or `os.PathLike`): A zoo (pushed as a data set) or a pipeline (pushed as a model).
        repo_id (`str`): `namespace/name`; made where it does not exist.
        private (`bool`, *optional*): Whether a new repository is private; the account's default otherwise.
        token (`str`, *optional*): The one of `hf auth login` by default.
        commit_message (`str`, *optional*): Of the commit.
        create_pr (`bool`, *optional*, defaults to `False`): Whether to open a pull request instead.
        license (`str`, *optional*):
            The Hub's name of a licence, such as `"apache-2.0"`, for the card; one that the card has already stays.

    Raises:
        [`HubError`]: there is neither in the folder, or the repository cannot be written, or it changed meanwhile.
    """
    from .zoo import WeightZoo  # which imports this module

    folder = Path(folder)
    repo_type = _repo_type(folder)
    if any(folder.glob("*.part")) or any(folder.glob(f"{UNFINISHED}*")):
        raise HubError(f"{folder} is unfinished: complete it with the command that makes it, then push.")
    api = HfApi(token=token)
    with explained(repo_id, None):
        repo_id = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True).repo_id
        info = api.repo_info(repo_id, repo_type=repo_type)
        present = set(api.list_repo_files(repo_id, repo_type=repo_type, revision=info.sha))
        operations: list[CommitOperationAdd | CommitOperationDelete] = []
        names = set()
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = path.relative_to(folder)
            if any(part.match(pattern) for part in map(Path, name.parts) for pattern in LOCAL_FILES):
                continue
            if not _stays_inside(path, folder):
                raise HubError(
                    f"{path} is a link that leads out of {folder}: put the file itself there, or remove it."
                )
            names.add(name.as_posix())
            content: bytes | Path = path
            if name.as_posix() == "README.md":
                old = _read_text(api, repo_id, repo_type, info.sha) if "README.md" in present else None
                card = _card_text(path).replace(PLACEHOLDER, repo_id)
                content = merge_cards(card, old, license).encode()
            elif name.as_posix() == "metadata.jsonl" and repo_type == "dataset":
                content = path.read_bytes()[: WeightZoo(folder).rows_end]
            operations.append(CommitOperationAdd(name.as_posix(), content))
        stale = sorted(name for name in present - names if name.endswith(".safetensors"))
        operations += [CommitOperationDelete(name) for name in stale]
        return api.create_commit(
            repo_id,
            operations,
            repo_type=repo_type,
            commit_message=commit_message or f"Upload {'zoo' if repo_type == 'dataset' else 'pipeline'}",
            create_pr=create_pr,
            parent_commit=info.sha,
        )


def _repo_type(folder: Path) -> str:
    if (folder / "zoo.json").is_file():
        return "dataset"
    if (folder / DiffusionPipeline.config_name).is_file():
        return "model"
    raise HubError(f"{folder} holds neither a zoo (zoo.json) nor a pipeline ({DiffusionPipeline.config_name}).")


def _read_text(api: HfApi, repo_id: str, repo_type: str, revision: str | None) -> str:
    file = api.hf_hub_download(repo_id, "README.md", repo_type=repo_type, revision=revision)
    return _card_text(Path(file))


def _card_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise HubError(f"{file} is no text in UTF-8: mend or remove it.") from error


def _stays_inside(file: Path, folder: Path) -> bool:
    """Whether a file is in the folder, or in the blobs of the Hub's cache that the folder is in."""
    home, target = folder.resolve(), file.resolve()
    return target.is_relative_to(home) or (
        home.parent.name == "snapshots" and target.is_relative_to(home.parents[1] / "blobs")
    )


@contextmanager
def explained(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turns the client's errors into ones that say what to do. Tokens and addresses stay out of the message."""
    at = f" at revision {revision!r}" if revision else ""
    try:
        yield
    except RepositoryNotFoundError as error:
        raise HubError(
            f"{repo_id} is no folder here, and is not on the Hub or is private. Check the name, or log in with "
            "`hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise HubError(f"{repo_id} has no revision {revision!r}.") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise HubError(
            f"{repo_id}{at} is no folder here and not in the cache, and the Hub cannot be reached (offline?). Go "
            "online and try again."
        ) from error
    except EntryNotFoundError as error:
        raise HubError(f"{repo_id}{at} lacks a file that it should have: its upload is not complete.") from error
    except HFValidationError as error:
        raise HubError(f"{repo_id!r} is no name of a repository: expected namespace/name.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        reasons = {
            401: "The Hub refused the token. Log in with `hf auth login`.",
            403: "This account may not do that there. Check the namespace and the rights of the token.",
            412: "Somebody else pushed meanwhile. Nothing was changed: pull, and push again.",
            429: "The Hub asks for patience (too many requests). Try again later.",
        }
        reason = reasons.get(status or 0, f"The Hub answered with status {status}. Try again later.")
        raise HubError(f"{repo_id}{at}: {reason}") from error
    except (httpx.LocalProtocolError, UnicodeEncodeError):
        # The client's error quotes it.
        raise HubError(f"{repo_id}{at}: the token holds characters that none has. Copy it again.") from None
    except (httpx.HTTPError, RuntimeError) as error:
        # An upload that loses its connection is a RuntimeError of the client.
        if isinstance(error, RuntimeError) and not isinstance(error.__cause__, httpx.HTTPError):
            raise
        raise HubError(
            f"{repo_id}{at}: the connection to the Hub was lost. Try again: what was transferred is not repeated."
        ) from error


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
    card = ModelCard(_card_text(file), ignore_metadata_errors=True)
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


def push_evaluation(
    name_or_path: str | os.PathLike, repo_id: str, report: dict[str, Any], pictures: list[Path]
) -> None:
    """Pushes a pipeline, of a folder or of the Hub, with the figures of a report in its card."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(name_or_path)
        if not folder.is_dir():
            with explained(str(name_or_path), None):
                snapshot_download(str(name_or_path), local_dir=scratch)
            folder = Path(scratch)
            write_evaluation(folder, report, pictures)
        push(folder, repo_id, commit_message="Evaluation")


def _card(data: dict[str, Any], text: str) -> str:
    return f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True)}---\n{text}"


def _write_card(folder: Path, card: str) -> None:
    file = folder / "README.md"
    old = _card_text(file) if file.exists() else None
    file.write_text(merge_cards(card, old), encoding="utf-8")


def _template(name: str) -> str:
    return (files("pdiff_hf.model_cards") / name).read_text(encoding="utf-8")
