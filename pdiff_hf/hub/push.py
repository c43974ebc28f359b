"""A folder with a zoo or a pipeline becomes a repository."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    EvalResult,
    HfApi,
    snapshot_download,
)

from ..errors import HubError
from ..files import UNFINISHED, is_pipeline, is_zoo, locked_if_writable, stays_inside
from .cards import PLACEHOLDER, card_text, merge_cards, write_evaluation
from .client import check_card, explained
from .pipeline_files import FACTS, check_weights


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


def push(
    folder: str | os.PathLike[str],
    repo_id: str,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    license: str | None = None,
    contents: Mapping[str, bytes] | None = None,
) -> CommitInfo:
    r"""
    Makes a repository hold what a folder with a zoo or a pipeline holds, in one commit: all of it or nothing, and no
    commit where nothing changed. Shards, weights and pictures that the folder does not have any more are removed;
    files of other kinds in the repository stay. What a person wrote around the marked part of the folder's card goes
    up; where nobody did, what the repository's card has there stays. A card without marks goes up as it is.

    Args:
        folder (`str` or `os.PathLike`): A zoo (pushed as a data set) or a pipeline (pushed as a model).
        repo_id (`str`): `namespace/name`; made where it does not exist.
        private (`bool`, *optional*): Whether a new repository is private; the account's default otherwise.
        token (`str`, *optional*): The one of `hf auth login` by default.
        commit_message (`str`, *optional*): Of the commit.
        create_pr (`bool`, *optional*, defaults to `False`): Whether to open a pull request instead.
        license (`str`, *optional*):
            The Hub's name of a licence, such as `"apache-2.0"`, for the card; without it, one that the card has
            already stays.
        contents (`Mapping[str, bytes]`, *optional*): What goes up in the place of what files of these names hold.

    Raises:
        [`HubError`]: there is neither in the folder, or the repository holds something else, cannot be written, or
            changed meanwhile.
    """
    folder = Path(folder)
    with locked_if_writable(folder):
        return _push(folder, repo_id, private, token, commit_message, create_pr, license, contents or {})


def _push(
    folder: Path,
    repo_id: str,
    private: bool | None,
    token: str | None,
    commit_message: str | None,
    create_pr: bool,
    license: str | None,
    contents: Mapping[str, bytes],
) -> CommitInfo:
    repo_type = _repo_type(folder)
    if any(folder.glob("*.part")) or any(folder.glob(f"{UNFINISHED}*")):
        raise HubError(f"{folder} is unfinished: complete it with the command that makes it, then push.")
    files = _files(folder)
    api = HfApi(token=token)
    with explained(repo_id, None):
        if "README.md" in files:
            check_card(merge_cards(card_text(files["README.md"]), None, license), repo_type)
        repo_id = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True).repo_id
        info = api.repo_info(repo_id, repo_type=repo_type)
        if private is not None and info.private != private:
            raise HubError(
                f"{repo_id} exists and is {'private' if info.private else 'public'}, which a push does not change. "
                "Change it in the repository's settings, or leave `private` out."
            )
        present = set(api.list_repo_files(repo_id, repo_type=repo_type, revision=info.sha))
        index = "zoo.json" if repo_type == "dataset" else "model_index.json"
        if index not in present and any(name.endswith(".safetensors") for name in present):
            raise HubError(
                f"{repo_id} holds weights of something else, which a push would remove: safetensors files and no "
                f"{index}. Choose another repository."
            )
        operations: list[CommitOperationAdd | CommitOperationDelete] = []
        for name, path in files.items():
            content: bytes | Path = contents.get(name, path)
            if name == "README.md":
                old = _read_text(api, repo_id, repo_type, info.sha) if "README.md" in present else None
                card = card_text(path).replace(PLACEHOLDER, repo_id)
                merged = merge_cards(card, old, license)
                if old is not None:  # with metadata that nobody has checked
                    check_card(merged, repo_type)
                content = merged.encode()
            operations.append(CommitOperationAdd(name, content))
        stale = sorted(
            name
            for name in present - files.keys()
            if name == FACTS
            or name.endswith(".safetensors")
            or (name.startswith("evaluation/") and name.endswith(".png"))
        )
        operations += [CommitOperationDelete(name) for name in stale]
        return api.create_commit(
            repo_id,
            operations,
            repo_type=repo_type,
            commit_message=commit_message or f"Upload {'zoo' if repo_type == 'dataset' else 'pipeline'}",
            create_pr=create_pr,
            parent_commit=info.sha,
        )


def push_evaluation(
    name_or_path: str | os.PathLike[str],
    repo_id: str,
    section: str,
    results: list[EvalResult],
    pictures: Mapping[Path, str],
    weights: str,
) -> None:
    r"""
    Pushes a pipeline, of a folder or of the Hub, with an evaluation in its card.

    Raises:
        [`PipelineError`]: it has other weights now than those (their SHA-256) that were evaluated.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(name_or_path)
        if not folder.is_dir():
            with explained(str(name_or_path), None):
                snapshot_download(str(name_or_path), local_dir=scratch)
            folder = Path(scratch)
            write_evaluation(folder, section, results, pictures)
        check_weights(folder, weights, name_or_path)
        push(folder, repo_id, commit_message="Evaluation")


def _repo_type(folder: Path) -> str:
    if is_zoo(folder) and is_pipeline(folder):
        raise HubError(f"{folder} holds both a zoo and a pipeline: move one of them away.")
    if is_zoo(folder):
        return "dataset"
    if is_pipeline(folder):
        return "model"
    raise HubError(f"{folder} holds neither a zoo (zoo.json) nor a pipeline (model_index.json).")


def _files(folder: Path) -> dict[str, Path]:
    """What of a folder goes into a repository, by its name there."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder)
        if any(part.match(pattern) for part in map(Path, name.parts) for pattern in LOCAL_FILES):
            continue
        if not stays_inside(path, folder):
            raise HubError(f"{path} is a link that leads out of {folder}: put the file itself there, or remove it.")
        try:
            found[name.as_posix().encode().decode()] = path
        except UnicodeEncodeError as error:
            raise HubError(f"{path} has a name that is no UTF-8, as the Hub needs it: rename it.") from error
    return found


def _read_text(api: HfApi, repo_id: str, repo_type: str, revision: str | None) -> str:
    file = api.hf_hub_download(repo_id, "README.md", repo_type=repo_type, revision=revision)
    return card_text(Path(file))
