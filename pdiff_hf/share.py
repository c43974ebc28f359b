"""`pdiff-hf push`, `pull` and `import`: folders to the Hub and back."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi, snapshot_download

from .errors import HubError
from .files import is_pipeline, is_zoo
from .hub.client import explained
from .hub.push import push
from .zoo import WeightZoo


@dataclass(frozen=True)
class PushConfig:
    """Makes a repository on the Hub hold a zoo or a pipeline, in one commit."""

    folder: str
    """A zoo (becomes a dataset repository) or a pipeline (becomes a model repository)."""
    repo: str
    """Its name on the Hub: namespace/name."""
    private: bool | None = None
    """Whether a new repository is private; the account's default otherwise."""
    commit_message: str | None = None
    """Of the commit."""
    create_pr: bool = False
    """Open a pull request instead of committing."""
    license: str | None = None
    """The Hub's name of a licence for the card, such as apache-2.0."""


@dataclass(frozen=True)
class PullConfig:
    """Downloads a zoo or a pipeline from the Hub into a folder."""

    repo: str
    """Its name on the Hub: namespace/name."""
    output_dir: str
    """Where it goes."""
    kind: Literal["pipeline", "zoo"] = "pipeline"
    """A model repository with a pipeline, or a dataset repository with a zoo."""
    revision: str | None = None
    """Branch, tag or commit."""


@dataclass(frozen=True)
class ImportConfig:
    """Makes a zoo of model repositories on the Hub that share an architecture."""

    repositories: str
    """A pattern of their names in one namespace: 'org/*-digits'."""
    output_dir: str
    """Folder of the zoo."""
    filename: str = "model.safetensors"
    """The file of each that holds its weights; safetensors only."""
    patterns: tuple[str, ...] = ("*",)
    """Shell-style patterns of the tensors that are generated."""
    task: str | None = None
    """What the networks do: a built-in task, or path/to/file.py:MyTask."""


def run_import(config: ImportConfig) -> str:
    """Imports, and says what is there."""
    return repr(
        WeightZoo.from_hub(
            config.output_dir, config.repositories, config.filename, patterns=config.patterns, task=config.task
        )
    )


def run_push(config: PushConfig) -> str:
    """Pushes, and returns the address of the commit."""
    push_it = WeightZoo(config.folder).push_to_hub if is_zoo(config.folder) else partial(push, config.folder)
    info = push_it(
        config.repo,
        private=config.private,
        commit_message=config.commit_message,
        create_pr=config.create_pr,
        license=config.license,
    )
    return info.pr_url or info.commit_url


def run_pull(config: PullConfig) -> str:
    """Downloads, and returns the folder."""
    folder = Path(config.output_dir)
    # Where the client notes what it downloaded into a folder.
    notes = folder / ".cache" / "huggingface" / "download"
    if (is_zoo(folder) or is_pipeline(folder)) and not notes.is_dir():
        raise HubError(f"{folder} holds a zoo or a pipeline that was not pulled. Choose another --output-dir.")
    repo_type = "dataset" if config.kind == "zoo" else "model"
    with explained(config.repo, config.revision):
        commit = HfApi().repo_info(config.repo, repo_type=repo_type, revision=config.revision).sha
        snapshot_download(config.repo, repo_type=repo_type, revision=commit, local_dir=folder)
        names = set(HfApi().list_repo_files(config.repo, repo_type=repo_type, revision=commit))
    for shard in folder.glob("networks-*.safetensors"):
        # Of an earlier pull: shards are named by how many there are.
        if shard.name not in names and (notes / f"{shard.name}.metadata").exists():
            shard.unlink()
    return str(folder)
