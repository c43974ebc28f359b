"""Networks that were trained elsewhere: checkpoint files, and model repositories on the Hub."""

import glob
import os
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from ..errors import HubError, ZooError
from ..files import check_opens, is_zoo
from ..hub.client import SUFFIXES, download_file, matching_models, repository_files


StateDict = dict[str, torch.Tensor]
Names = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]
# What files of weights are called.


@dataclass(frozen=True)
class Checkpoint:
    """A file that holds a network, got when it is needed, with the row of the network's metadata."""

    get: Callable[[], Path]
    row: dict[str, Any]
    key: str | None = None

    def read(self) -> StateDict:
        """The state dict in the file."""
        file = self.get()
        if file.name.startswith("adapter_model."):
            raise ZooError(
                f"{self.row['source']} is an adapter, whose tensors mean nothing without its configuration: import it "
                "with WeightZoo.from_adapters, or `pdiff-hf import --adapters`."
            )
        return read_state_dict(file, self.key)


def checkpoints_of_files(files: Iterable[str | os.PathLike[str]], key: str | None) -> list[Checkpoint]:
    """Those in files of this machine: alphabetical order becomes the natural one, in which step_2 precedes step_10;
    any other order of a list stays."""
    if isinstance(files, str | os.PathLike):
        found = checkpoint_files(files)
        if not found and Path(files).is_dir():
            raise ZooError(f"{files} holds no checkpoint: no file that ends in {', '.join(SUFFIXES)}.")
        files = found or [files]
    ordered = isinstance(files, Sequence)
    paths = [Path(file).expanduser() for file in files]
    if not paths:
        raise ZooError("No checkpoints were given.")
    if not ordered or paths == sorted(paths) or paths == sorted(paths, key=str):
        paths.sort(key=lambda path: natural(str(path)))
    home = Path(os.path.commonpath([path.absolute().parent for path in paths]))

    return [
        Checkpoint(partial(Path, path), {"source": path.absolute().relative_to(home).as_posix()}, key)
        for path in paths
    ]


def checkpoint_files(place: str | os.PathLike[str]) -> list[Path]:
    """The files of weights in a folder, or those that a pattern such as `runs/*.pt` matches, in natural order, or a
    file itself; none where it is something else, such as a zoo or a name on the Hub."""
    path = Path(place).expanduser()
    if is_zoo(path):
        return []
    if path.is_dir():
        found = [file for file in path.iterdir() if file.suffix in SUFFIXES]
    elif path.suffix in SUFFIXES and path.is_file():
        found = [path]
    else:
        found = [Path(name) for name in glob.glob(str(path), recursive=True)] if glob.has_magic(str(path)) else []
    return sorted((file for file in found if file.is_file()), key=lambda file: natural(str(file)))


def checkpoints_of_repositories(names: Names, filename: str, token: str | None) -> list[Checkpoint]:
    """Those of the model repositories that names and patterns match, at their present commits, in natural order."""
    if not filename.endswith(".safetensors"):
        raise ZooError(f"{filename}: only safetensors files are read from the Hub.")
    patterns = [names] if isinstance(names, str | os.PathLike) else names
    models = [model for pattern in patterns for model in matched(str(pattern), token)]

    def fetch(name: str, commit: str) -> Path:
        try:
            return Path(download_file(name, "model", commit, token, filename))
        except HubError as error:
            cause = error.__cause__
            if isinstance(cause, EntryNotFoundError) and not isinstance(cause, LocalEntryNotFoundError):
                raise HubError(
                    f"{name} at revision {commit!r} {_instead(repository_files(name, commit, token), filename)}"
                ) from error
            raise

    return [Checkpoint(partial(fetch, name, commit), {"source": name, "revision": commit}) for name, commit in models]


def matched(pattern: str, token: str | None) -> list[tuple[str, str]]:
    """Names and present commits of the model repositories that a pattern matches, one at least, in natural order."""
    models = matching_models(pattern, token)
    if not models:
        raise ZooError(f"No model repository on the Hub matches {pattern!r}.")
    return sorted(models, key=lambda model: natural(model[0]))


def _instead(files: list[str], wanted: str) -> str:
    """What a repository has in the place of a file of weights."""
    if f"{wanted}.index.json" in files:
        return f"has its weights in several files ({wanted}.index.json lists them); networks of one file are read."
    if safe := [name for name in files if name.endswith(".safetensors")]:
        return f"has no {wanted}, and these: {', '.join(safe)[:500]}. Name one with --filename."
    return f"has no {wanted} and no other safetensors file. Formats that can hold code are not read from the Hub."


def natural(name: str) -> list[tuple[int, str]]:
    """A sort key by which numbers in names count."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def twins(checkpoints: Sequence[Checkpoint]) -> dict[str, str]:
    """Names of tensors that have the values of another in all networks, each with that other one's name: they are
    tied, and their files do not say so."""
    first = checkpoints[0].read()
    seen: dict[tuple[Any, ...], str] = {}
    found = {}
    for name, value in first.items():
        # Initial values such as zeros say nothing.
        if not value.is_floating_point() or value.numel() < 2 or (value == value.flatten()[0]).all():
            continue
        owner = seen.setdefault((value.dtype, value.shape, value.double().sum().item()), name)
        if owner != name and torch.equal(value, first[owner]):
            found[name] = owner
    for checkpoint in checkpoints[1:] if found else []:
        state_dict = checkpoint.read()
        found = {
            name: owner
            for name, owner in found.items()
            if name not in state_dict or owner not in state_dict or torch.equal(state_dict[name], state_dict[owner])
        }
    return found


def read_state_dict(file: Path, key: str | None = None) -> StateDict:
    r"""
    The state dict in a file, whatever its name: of safetensors, or of what `torch.save` wrote, tensors alone and never
    code.

    Args:
        file (`Path`): The file.
        key (`str`, *optional*):
            Where in the file, `"model"` or `"ema.model"`; by default the file is one, or holds one only.

    Raises:
        [`ZooError`]: there is none, or there are several.
    """
    try:
        check_opens(file)
        if _is_safetensors(file):
            content: Any = _read_safetensors(file)[0]
        else:
            with file.open("rb") as opened:  # of a path, torch reads the suffix
                content = torch.load(opened, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Its text tells to read the file in a way that runs what is in it.
        other = re.search(r"GLOBAL (\S+)", str(error))
        if other is None:
            raise ZooError(
                f"{file} cannot be read as a state dict: it is damaged, or neither safetensors nor of torch.save."
            ) from error
        raise ZooError(
            f"{file} cannot be read as a state dict: it holds objects of {other[1]}, which may run code. Load it "
            "where you trust it, and save the tensors alone: torch.save(network.state_dict(), file)."
        ) from error
    except Exception as error:
        if "weights_only" in str(error):
            raise ZooError(
                f"{file} cannot be read as a state dict: it is a TorchScript archive, or of torch's old formats. Save "
                "the tensors alone: torch.save(network.state_dict(), file)."
            ) from error
        raise ZooError(f"{file} cannot be read as a state dict: {error}") from error
    found = dict(_state_dicts(content))
    if key is not None:
        if key not in found:
            raise ZooError(f"{file} has no state dict {key!r}: {', '.join(found) or 'it holds none'}.")
        return _dense(file, found[key])
    if len(found) > 1:
        raise ZooError(
            f"{file} holds several state dicts: {', '.join(found)}. --key, of `pdiff-hf import`, or `key=` of "
            "`WeightZoo.from_checkpoints` takes one."
        )
    if not found:
        raise ZooError(f"{file} holds no state dict: expected a mapping from names to tensors.")
    return _dense(file, next(iter(found.values())))


def _dense(file: Path, state_dict: StateDict) -> StateDict:
    """A state dict, or a [`ZooError`] where a tensor in it has no values, or not in the usual order."""
    for name, value in state_dict.items():
        if value.is_meta or value.is_nested or value.layout != torch.strided:
            kind = "without values" if value.is_meta else "sparse or nested"
            raise ZooError(f"{file}: `{name}` is {kind}; dense tensors are read.")
    return state_dict


def _is_safetensors(file: Path) -> bool:
    """By its content: eight bytes that say how long the JSON is that follows."""
    with file.open("rb") as content:
        start = content.read(9)
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") <= file.stat().st_size


def read_safetensors(file: Path) -> tuple[StateDict, dict[str, str]]:
    """The tensors in a file of safetensors, and what it says of itself. Raises [`ZooError`] where it is none."""
    try:
        check_opens(file)
        found = _read_safetensors(file)
    except (OSError, SafetensorError) as error:
        raise ZooError(f"{file} cannot be read as safetensors: {error}") from error
    if not found[0]:
        raise ZooError(f"{file} holds no tensors.")
    return found


def _read_safetensors(file: Path) -> tuple[StateDict, dict[str, str]]:
    with safe_open(file, "pt") as content:
        tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
        said = dict(content.metadata() or {})
    # `save_model` keeps one of several tied names, and notes under the others which.
    for name, kept in said.items():
        if name not in (*tensors, "format") and kept in tensors:
            tensors[name] = tensors[kept]
    return dict(sorted(tensors.items())), said


def _state_dicts(content: Any, path: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, StateDict]]:
    """All mappings from names to tensors in what a file holds, each once, with the keys that lead there."""
    seen = set() if seen is None else seen
    if not isinstance(content, Mapping) or not content or not all(isinstance(name, str) for name in content):
        return
    if id(content) in seen:
        return
    seen.add(id(content))
    if all(isinstance(value, torch.Tensor) for value in content.values()):
        yield path, dict(content)
        return
    for name, value in content.items():
        yield from _state_dicts(value, f"{path}.{name}" if path else name, seen)
