"""The files that a pipeline consists of, in a folder or a repository of the Hub."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import PipelineError
from .client import download, is_repository


# What its training noted: of an audit that knows it, what generators are compared with has as much.
FACTS = "train.facts.json"
COMPONENTS = ("layout", "vae", "unet", "transformer", "condition_encoder")


def pipeline_folder(
    name_or_path: str | os.PathLike[str], revision: str | None = None, token: str | None = None
) -> Path:
    """The folder itself, or that of the repository's commit in the cache, which is named by the commit."""
    folder = Path(name_or_path).expanduser()
    if folder.is_dir() or not is_repository(name_or_path):
        return folder
    # Code, and weights in other formats than safetensors, stay where they are.
    patterns = ["model_index.json", "README.md", FACTS, "*/*.json", "*/*.safetensors"]
    return Path(download(str(name_or_path), "model", revision, token, patterns))


def weight_files(folder: Path) -> list[Path]:
    """Those of the components of a pipeline, whatever lies beside them, such as checkpoints."""
    return sorted(file for name in COMPONENTS for file in folder.glob(f"{name}/*.safetensors"))


def weights_sha256(folder: Path) -> str:
    """What tells a pipeline from another one in the same place."""
    digest = hashlib.sha256()
    for file in weight_files(folder):
        with file.open("rb") as content:
            while chunk := content.read(2**20):
                digest.update(chunk)
    return digest.hexdigest()


def settings_sha256(folder: Path) -> str:
    """Of what else decides what a pipeline generates: the classes and the configurations of its parts."""
    files = [folder / "model_index.json", *sorted(folder.glob("*/*config.json"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def check_weights(folder: Path, expected: str, name: str | os.PathLike[str] | None = None) -> None:
    """Raises [`PipelineError`] where a pipeline, of this name, has other weights than these."""
    if weights_sha256(folder) != expected:
        raise PipelineError(f"The weights of {name or folder} changed since they were evaluated: evaluate them again.")


def pipeline_files(index: Mapping[str, Any]) -> list[str]:
    """Patterns of the files that a pipeline consists of, from its `model_index.json`: its code and evaluation too."""
    found = ["model_index.json", "README.md", FACTS, "evaluation/*.png"]
    for name, value in index.items():
        if isinstance(value, list) and len(value) == 2 and name.isidentifier():
            folder = "" if name == "_class_name" else f"{name}/"
            if isinstance(value[0], str) and value[0].isidentifier():
                found.append(f"{folder}{value[0]}.py")
            if folder:
                found += [f"{folder}*{end}" for end in ("config.json", ".safetensors", ".safetensors.index.json")]
    return found
