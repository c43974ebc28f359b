"""What a zoo says of itself, in `zoo.json`, and what is believed of it: a zoo may come from anywhere."""

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from ..errors import ZooError
from ..files import check_opens, is_zoo, stays_inside, whole
from ..pipelines.neural_network_diffusion.layout.parameter_layout import check_tensors
from .adapters import check_adapter
from .shards import STORED_AS


FORMAT_VERSION = 1


@dataclass(frozen=True)
class Description:
    """The content of `zoo.json`, but for the format version."""

    task: str | None
    networks_per_shard: int
    dtype: str
    layout: dict[str, Any]
    may_differ: list[str]

    def __post_init__(self) -> None:
        if not isinstance(self.dtype, str) or self.dtype not in STORED_AS:
            raise ValueError(f"the dtype is {self.dtype!r:.200}")
        if not isinstance(self.task, str | None):
            raise ValueError(f"the task is {self.task!r:.200}")
        if type(self.networks_per_shard) is not int or self.networks_per_shard < 1:
            raise ValueError(f"networks_per_shard is {self.networks_per_shard!r:.200}")
        if not isinstance(self.may_differ, list) or not all(isinstance(name, str) for name in self.may_differ):
            raise ValueError(f"may_differ is {self.may_differ!r:.200}")
        check_tensors(self.tensors)
        if self.adapter is not None:
            check_adapter(self.adapter)

    @property
    def tensors(self) -> list[dict[str, Any]]:
        """The tensors of the layout."""
        tensors: list[dict[str, Any]] = self.layout["tensors"]
        return tensors

    def size(self, role: str) -> int:
        """Numbers in all tensors of a role."""
        return sum(math.prod(tensor["shape"]) for tensor in self.tensors if tensor["role"] == role)

    @property
    def adapter(self) -> dict[str, Any] | None:
        """PEFT's configuration, where the networks are adapters."""
        adapter: dict[str, Any] | None = self.layout.get("adapter")
        return adapter

    @property
    def torch_dtype(self) -> torch.dtype:
        """How networks are stored."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def write(self, folder: Path) -> None:
        """Makes a folder a zoo."""
        with whole(folder / "zoo.json") as file:
            content = {"format_version": FORMAT_VERSION, **asdict(self)}
            file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_description(folder: Path) -> Description:
    """That of a zoo, or a [`ZooError`] that says why it is none."""
    if not folder.is_dir():
        raise ZooError(f"{folder} holds no zoo: there is no such folder.")
    if not is_zoo(folder):
        raise ZooError(f"{folder} holds no zoo: there is no zoo.json.")
    _check_links(folder)
    file = folder / "zoo.json"
    try:
        check_opens(file)
    except OSError as error:
        raise ZooError(f"{file} cannot be opened: {error}.") from error
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        version = content["format_version"]
        if version != FORMAT_VERSION:
            raise ZooError(f"{file} has format version {version!r}; this pdiff-hf reads {FORMAT_VERSION}.")
        return Description(**{field.name: content[field.name] for field in fields(Description)})
    except ZooError:
        raise
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ZooError(f"{file} is damaged: {error!r:.500}") from error


def _check_links(folder: Path) -> None:
    """A link in a zoo must not lead out of it, except into the blobs of the Hub's cache."""
    for file in folder.rglob("*"):
        if file.is_symlink() and not stays_inside(file, folder):
            raise ZooError(f"{file} is a link that leads out of the zoo.")
