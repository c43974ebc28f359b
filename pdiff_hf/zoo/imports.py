"""Networks that were trained elsewhere: checkpoint files, and model repositories on the Hub."""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ..errors import ZooError
from ..hub.client import download_file, matching_models


@dataclass(frozen=True)
class Checkpoint:
    """A file that holds a network, got when it is needed, and the metadata of the network."""

    get: Callable[[], Path]
    row: dict[str, Any]

    def read(self) -> dict[str, torch.Tensor]:
        """The state dict in the file."""
        return read_state_dict(self.get())


def checkpoints_of_files(files: Iterable[str | os.PathLike[str]]) -> list[Checkpoint]:
    """Those in files of this machine."""
    found = [Checkpoint(partial(Path, file), {"source": Path(file).name}) for file in files]
    if not found:
        raise ZooError("No checkpoints were given.")
    return found


def checkpoints_of_repositories(pattern: str, filename: str, token: str | None) -> list[Checkpoint]:
    """Those of the model repositories that a pattern matches, at their present commits."""
    if not filename.endswith(".safetensors"):
        raise ZooError(f"{filename}: only safetensors files are read from the Hub.")
    models = matching_models(pattern, token)
    if not models:
        raise ZooError(f"No model repository on the Hub matches {pattern!r}.")

    def fetch(name: str, commit: str) -> Path:
        return Path(download_file(name, "model", commit, token, filename))

    return [Checkpoint(partial(fetch, name, commit), {"source": name, "revision": commit}) for name, commit in models]


def read_state_dict(file: Path) -> dict[str, torch.Tensor]:
    """The state dict of a `.safetensors`, `.pt` or `.pth` file; of the latter two tensors alone, never code."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        if file.suffix in (".pt", ".pth"):
            content = torch.load(file, map_location="cpu", weights_only=True)
        else:
            raise ZooError(f"{file}: expected a .safetensors, .pt or .pth file.")
    except ZooError:
        raise
    except Exception as error:
        raise ZooError(f"{file} cannot be read as a state dict: {error}") from error
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ZooError(f"{file} holds no state dict: expected a mapping from names to tensors.")
    return dict(content)
