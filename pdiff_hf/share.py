"""`pdiff-hf push`, `pull` and `import`: folders to the Hub and back."""

import json
import shlex
import time
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]

from .config import read_objects
from .configs import ImportConfig, PullConfig, PushConfig
from .errors import HubError
from .files import check_kind, is_pipeline, is_zoo, locked
from .hub.client import explained
from .hub.pipeline_files import pipeline_files
from .hub.push import push
from .runs import save_run
from .text import time_since
from .zoo import WeightZoo


# Beside the client's notes, while a folder is pulled.
PULLED = "pdiff-hf-unfinished"
# What a zoo consists of.
ZOO_FILES = ("zoo.json", "metadata.jsonl", "frozen.safetensors", "networks-*-of-*.safetensors", "README.md")


def run_import(config: ImportConfig) -> str:
    """Imports, and says what is there."""
    started = time.perf_counter()
    common: Any = {"patterns": config.patterns, "task": config.task, "may_differ": config.may_differ}
    if config.adapters:
        rows = [] if config.metadata is None else read_objects(config.metadata, "metadata")
        zoo = WeightZoo.from_adapters(config.output_dir, config.adapters, task=config.task, metadata=rows)
    elif config.checkpoints:
        one, *more = config.checkpoints
        zoo = WeightZoo.from_checkpoints(
            config.output_dir, config.checkpoints if more else one, key=config.key, **common
        )
    else:
        zoo = WeightZoo.from_hub(config.output_dir, config.repositories, config.filename, **common)
    save_run(config.output_dir, "import", config)
    train = f"pdiff-hf train --zoo {shlex.quote(config.output_dir)}"
    what = f"{len(zoo)} networks of {zoo.vector_size:,} parameters are in {zoo.folder} ({time_since(started)})."
    if config.adapters:
        return f"{what} Next: {train}"
    task = shlex.quote(config.task or "TASK")
    return (
        f"{what} Next, of checkpoints of one run: {train}; of different seeds: {train} --family neuron --no-initial "
        f"--task {task}"
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
    """Downloads, and says where it is."""
    started = time.perf_counter()
    with locked(config.output_dir):
        kind, next_command = _pull(config, Path(config.output_dir))
    return f"The {kind} is in {config.output_dir} ({time_since(started)}). Next: pdiff-hf {next_command}"


def _pull(config: PullConfig, folder: Path) -> tuple[str, str]:
    """Downloads, and tells what it is, and what comes next."""
    kind = config.kind or _found(config)
    check_kind(folder, "generate" if kind == "zoo" else "train")
    # Where the client notes what it downloaded into a folder.
    notes = folder / ".cache" / "huggingface" / "download"
    if (is_zoo(folder) or is_pipeline(folder)) and not notes.is_dir():
        raise HubError(f"{folder} holds a zoo or a pipeline that was not pulled. Choose another --output-dir.")
    repo_type = "dataset" if kind == "zoo" else "model"
    index = "zoo.json" if kind == "zoo" else "model_index.json"
    with explained(config.repo, config.revision):
        commit = HfApi().repo_info(config.repo, repo_type=repo_type, revision=config.revision).sha
        arguments: dict[str, Any] = {"repo_type": repo_type, "revision": commit}
        described = Path(hf_hub_download(config.repo, index, **arguments))
        patterns = [*ZOO_FILES] if kind == "zoo" else pipeline_files(_read_index(described))
        names = set(HfApi().list_repo_files(config.repo, **arguments))
        noted = {note.relative_to(notes).with_suffix("").as_posix(): note for note in notes.rglob("*.metadata")}
        of_earlier = noted.keys() - names
        replaced = {*filter_repo_objects(names, allow_patterns=patterns), *of_earlier}
        if kind == "zoo":
            replaced |= {shard.name for shard in folder.glob("networks-*.safetensors")}
        unfinished = notes.parent / PULLED
        if not unfinished.exists() or is_zoo(folder) or is_pipeline(folder):
            for name in sorted(replaced):
                _check_pulled(folder / name, noted.get(name))
        # Of a pull that was interrupted, files may be there in part, and without a note.
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        unfinished.touch()
        # First gone and last there: what an interrupted pull leaves is no mixture of two commits.
        (folder / index).unlink(missing_ok=True)
        snapshot_download(config.repo, local_dir=folder, allow_patterns=patterns, ignore_patterns=index, **arguments)
        for name in filter_repo_objects(names, allow_patterns=patterns, ignore_patterns=index):
            _check_commit(notes / f"{name}.metadata", name, str(commit))
        for name in of_earlier:
            (folder / name).unlink(missing_ok=True)
            noted[name].unlink()
        hf_hub_download(config.repo, index, local_dir=folder, **arguments)
        unfinished.unlink()
    stage = "generate --pipeline" if kind == "pipeline" else "info"
    return kind, f"{stage} {shlex.quote(str(folder))}"


def _check_commit(note: Path, name: str, commit: str) -> None:
    """Raises [`HubError`] where a file is of another commit: the client keeps what is there where the Hub fails."""
    if not note.is_file() or note.read_text(encoding="utf-8").partition("\n")[0] != commit:
        raise HubError(f"{name} could not be downloaded: the connection to the Hub was lost. Pull again.")


def _check_pulled(file: Path, note: Path | None) -> None:
    """Raises [`HubError`] where a file is there that is not as it was pulled; the client's note has commit, hash and
    time, a line each."""
    if not file.exists():
        return
    try:
        if note is not None and file.stat().st_mtime <= float(note.read_text(encoding="utf-8").splitlines()[2]) + 1:
            return
        happened = "was not pulled" if note is None else "was changed since it was pulled"
    except (OSError, ValueError, IndexError):
        happened = "was not pulled"
    raise HubError(f"{file} {happened}, and a pull would replace it. Choose another --output-dir.")


def _found(config: PullConfig) -> str:
    """What a repository of this name holds."""
    with explained(config.repo, config.revision):
        if HfApi().file_exists(config.repo, "model_index.json", revision=config.revision):
            return "pipeline"
        if not HfApi().repo_exists(config.repo, repo_type="dataset") and HfApi().repo_exists(config.repo):
            HfApi().repo_info(config.repo, revision=config.revision)  # which may lack
            raise HubError(f"{config.repo} holds no pipeline: there is no model_index.json.")
    return "zoo"


def _read_index(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")).items())
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise HubError(f"{file.name} of the repository is damaged: {error!r:.300}") from error
