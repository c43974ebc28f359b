# Over 400 lines: one class, whose documented methods are the face of a zoo.
"""A zoo: many networks of one architecture, read one by one and appended to."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub import CommitInfo
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from ..config import ZooDtype
from ..errors import ZooError
from ..files import (
    LOCK,
    UNFINISHED,
    check_kind,
    check_opens,
    check_room,
    explained,
    human_size,
    is_zoo,
    locked,
    locked_if_writable,
    whole,
)
from ..hub.cards import description_of, write_zoo_card
from ..hub.client import download, download_file, is_repository
from ..hub.push import push
from ..networks.canonical import REFERENCE_NETWORKS
from ..networks.gauge import Gauge
from ..pipelines.neural_network_diffusion import ParameterLayout
from .adapters import Adapter, check_same, config_of_zoo, find_adapters, with_metadata
from .description import Description, read_description
from .export import check_export, export
from .imports import Checkpoint, Names, checkpoints_of_files, checkpoints_of_repositories, twins
from .rows import Rows, column_types
from .shards import STORED_AS, Shards


SHARD_BYTES = 256 * 2**20
# Parameters of all networks of a batch.
BATCH_VALUES = 2**24
# Holds, in its folder, a zoo that is not complete yet.
BUILT = f"{UNFINISHED}zoo"
# Of a layout, a parameter: its mean and deviation, and whether its logarithm is taken.
LAYOUT_BYTES = 9
REMEDY = " Generate it too, or accept by `may_differ`, of `import`, that all networks have that of the first."


class WeightZoo:
    r"""
    Networks of one architecture in a folder, memory-mapped and append-only.

    | file | holds |
    | --- | --- |
    | `zoo.json` | format version, task, layout, networks a shard, their dtype |
    | `networks-00001-of-000NN.safetensors` | parameter vectors `[n, P]`, float32 or bfloat16 |
    | `frozen.safetensors` | all that is not generated |
    | `metadata.jsonl` | one row a network: index, source, seed, step, validation_accuracy, ... |
    | `README.md` | the dataset card |

    A shard is written beside its place and moved there, after the rows of its networks: what a killed process leaves
    is a readable zoo of the networks that were flushed, and appending goes on from there. One process appends at a
    time; a second one gets an error.

    Attributes:
        task (`str`, *optional*): What the networks do.
        may_differ (`tuple[str, ...]`):
            Patterns of tensors that are not generated and all the same differed between the networks: they have those
            of the first.
        adapter (`dict`, *optional*): Where the networks are LoRA adapters: PEFT's configuration, empty for diffusers.
        vector_size (`int`): Parameters P that are generated.
        frozen_size (`int`): Numbers that are the same in all networks.
        dtype (`torch.dtype`): How they are stored; what is read is float32.

    Args:
        folder (`str` or `os.PathLike`): A folder that [`WeightZoo.create`] made.
        fetch (`Callable[[str], Path]`, *optional*):
            Gets a shard by its name where the folder does not hold all of them (see [`WeightZoo.from_pretrained`]).
            Such a zoo is read-only.

    Raises:
        [`ZooError`]: there is no zoo, or it is damaged. The message names the file.

    Example:

    ```py
    >>> zoo = WeightZoo.create("runs/zoo", ParameterLayout.from_state_dict(network.state_dict()))
    >>> with zoo:
    ...     zoo.append(network.state_dict(), seed=0, accuracy=0.97)
    >>> zoo[0].shape, zoo.state_dict(0).keys()
    ```
    """

    def __init__(self, folder: str | os.PathLike[str], fetch: Callable[[str], Path] | None = None):
        self.folder = Path(folder).expanduser()
        self._fetch = fetch
        self._description = read_description(self.folder)
        self.task, self.dtype = self._description.task, self._description.torch_dtype
        self.networks_per_shard = self._description.networks_per_shard
        self.may_differ = tuple(self._description.may_differ)
        self.adapter = self._description.adapter
        self.vector_size, self.frozen_size = (self._description.size(role) for role in ("generated", "frozen"))
        self._rows_read: list[dict[str, Any]] | None = None
        self._pending: list[torch.Tensor] = []
        self._pending_rows: list[dict[str, Any]] = []
        self._rows = Rows(self.folder / "metadata.jsonl")
        count = None if fetch is None else sum(1 for _ in self._rows.lines(None))
        self._shards = Shards(self.folder, self.dtype, self.vector_size, self.networks_per_shard, fetch, count)
        if not self._rows.file.is_file():
            raise ZooError(f"{self.folder} lacks metadata.jsonl: copy or download it again.")

    @classmethod
    def create(
        cls,
        folder: str | os.PathLike[str],
        layout: ParameterLayout,
        task: str | None = None,
        networks_per_shard: int | None = None,
        dtype: ZooDtype = "float32",
        may_differ: Sequence[str] = (),
    ) -> "WeightZoo":
        r"""
        Makes an empty zoo.

        Args:
            folder (`str` or `os.PathLike`): Where; it must not hold a zoo yet.
            layout (`ParameterLayout`): The architecture, with the frozen tensors of the base network.
            task (`str`, *optional*): What the networks do, as [`load_task`] takes it.
            networks_per_shard (`int`, *optional*): Defaults to as many as fit 256 MB.
            dtype (`str`, *optional*, defaults to `"float32"`):
                How networks are stored: `"bfloat16"` halves the files and keeps three digits of each parameter.
            may_differ (`Sequence[str]`, *optional*):
                Shell-style patterns of tensors that are not generated and may differ from those of `layout` all the
                same: what is read back has the layout's.

        Raises:
            [`ZooError`]: there is a zoo already.
            [`ConfigError`]: the folder holds a pipeline or a report.
            [`WriteError`]: it cannot be written.
        """
        folder = Path(folder).expanduser()
        if dtype not in STORED_AS:
            raise ZooError(f"A zoo stores {' or '.join(STORED_AS)}, and not {dtype}.")
        with locked(folder):
            _make_free(folder)
            cls._write(folder, layout, task, networks_per_shard, dtype, may_differ)
        return cls(folder)

    @staticmethod
    def _write(
        folder: Path,
        layout: ParameterLayout,
        task: str | None,
        networks_per_shard: int | None,
        dtype: ZooDtype,
        may_differ: Sequence[str],
    ) -> None:
        adapter = layout.config.adapter
        try:
            description = Description(
                task=task,
                networks_per_shard=networks_per_shard
                or max(1, SHARD_BYTES // (getattr(torch, dtype).itemsize * layout.vector_size)),
                dtype=dtype,
                layout={"tensors": layout.architecture} | ({} if adapter is None else {"adapter": dict(adapter)}),
                may_differ=[may_differ] if isinstance(may_differ, str) else list(may_differ),
            )
        except ValueError as error:  # the layout of a pipeline may come from anywhere
            raise ZooError(f"This layout is none of a zoo: {error}") from error
        frozen = {name: value.contiguous() for name, value in layout.frozen_state_dict().items()}
        with whole(folder / "frozen.safetensors") as file:
            save_file(frozen, file)
        with explained(folder / "metadata.jsonl"):
            (folder / "metadata.jsonl").touch()
        # Last, since it is what makes a folder a zoo.
        description.write(folder)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | os.PathLike[str], revision: str | None = None, token: str | None = None
    ) -> "WeightZoo":
        r"""
        Opens a zoo of a folder, or of a dataset repository on the Hub. Of a repository, a shard is downloaded when a
        network of it is read; what is in the cache already is read from there, offline too.

        Args:
            name_or_path (`str` or `os.PathLike`): The folder, or `namespace/name`.
            revision (`str`, *optional*): Branch, tag or commit on the Hub.
            token (`str`, *optional*): For private repositories; the one of `hf auth login` by default.

        Raises:
            [`ZooError`]: there is no zoo, or it is damaged.
            [`HubError`]: the repository cannot be read.
        """
        if Path(name_or_path).expanduser().is_dir():
            return cls(name_or_path)
        if not is_repository(name_or_path):
            raise ZooError(
                f"{name_or_path} is no folder here, and no name of a repository on the Hub. `pdiff-hf collect` makes "
                "a zoo."
            )
        repo_id = str(name_or_path)
        files = ["zoo.json", "metadata.jsonl", "frozen.safetensors"]
        folder = Path(download(repo_id, "dataset", revision, token, files))
        # The folder is named by the commit: shards come from the same one, whatever is pushed meanwhile.
        return cls(folder, fetch=lambda name: Path(download_file(repo_id, "dataset", folder.name, token, name)))

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> CommitInfo:
        """Makes a dataset repository hold this zoo, card included, in one commit. Takes the
        arguments of `pdiff_hf.hub.push.push`."""
        self._writable()
        self.flush()
        # What it says of the networks may be of fewer ones.
        has_card = (self.folder / "README.md").exists()
        described = description_of(self.folder) if has_card else "Networks of one architecture."
        if described is not None and (not has_card or os.access(self.folder, os.W_OK)):
            self.write_card(described)
        with locked_if_writable(self.folder):
            self._shards.check_unchanged()
            return push(self.folder, repo_id, contents={self._rows.file.name: self._row_bytes()}, **kwargs)

    def sha256(self) -> str:
        """Of its architecture, rows, frozen tensors and networks."""
        found = hashlib.sha256(json.dumps(self.layout.architecture).encode() + self._row_bytes())
        found.update((self.folder / "frozen.safetensors").read_bytes())
        found.update(self.networks_sha256().encode())
        return found.hexdigest()

    def networks_sha256(self) -> str:
        """Of the generated parameters of its networks alone."""
        found = hashlib.sha256()
        for batch in self.batches():
            found.update(batch.numpy().tobytes())
        return found.hexdigest()

    def _row_bytes(self) -> bytes:
        """The rows of stored networks, without what a killed process left behind them."""
        return self._rows.file.read_bytes()[: self.rows_end]

    def repositories(self) -> set[str]:
        """The repositories on the Hub that the networks come from, as far as their rows name them."""
        named = {str(row.get("pipeline", row.get("source"))) for row in self.rows() if "revision" in row}
        return {name for name in named if is_repository(name)}

    def write_card(self, description: str) -> None:
        """Writes the dataset card, keeping what a person wrote into it."""
        features = column_types(self.rows())
        write_zoo_card(self.folder, description, self.task, len(self), self.vector_size, features, self.adapter)

    @classmethod
    def from_checkpoints(
        cls,
        folder: str | os.PathLike[str],
        checkpoints: Iterable[str | os.PathLike[str]],
        patterns: str | Sequence[str] = ("*",),
        task: str | None = None,
        key: str | None = None,
        may_differ: Sequence[str] = (),
    ) -> "WeightZoo":
        r"""
        Makes a zoo of checkpoint files of one architecture.

        Args:
            folder (`str` or `os.PathLike`): Where the zoo goes.
            checkpoints (`Iterable[str | os.PathLike[str]]`, or `str`):
                A folder, a pattern such as `"runs/*.pt"`, or a list of files. They hold state dicts, also as a part of
                a training's state: safetensors, or what `torch.save` wrote (read with `weights_only=True`: tensors,
                never code), in a list whatever their names. The first one gives names, shapes, dtypes, order (that of
                a safetensors file is alphabetical) and what is frozen. Where they come in alphabetical order or in
                none, they are taken in natural order: `step_2`, `step_10`.
            patterns (`str` or `Sequence[str]`, *optional*, defaults to `("*",)`):
                What is generated, as for `ParameterLayout`.
            task (`str`, *optional*): What the networks do, as [`load_task`] takes it.
            key (`str`, *optional*): Of the state dict in files that hold several, such as `"ema"`.
            may_differ (`Sequence[str]`, *optional*):
                Shell-style patterns of frozen tensors that may differ between networks; all get those of the first.

        Raises:
            [`ZooError`]: a file cannot be read or does not match the first; nothing is left behind then.
        """
        return cls._import(folder, checkpoints_of_files(checkpoints, key), patterns, task, may_differ)

    @classmethod
    def from_hub(
        cls,
        folder: str | os.PathLike[str],
        repositories: Names,
        filename: str = "model.safetensors",
        patterns: str | Sequence[str] = ("*",),
        task: str | None = None,
        token: str | None = None,
        may_differ: Sequence[str] = (),
    ) -> "WeightZoo":
        r"""
        Makes a zoo of model repositories on the Hub that share an architecture. Each row of its metadata names
        repository and commit.

        Args:
            folder (`str` or `os.PathLike`): Where the zoo goes.
            repositories (`str` or a list of them): Names, and patterns of them in one namespace: `org/*-digits`.
            filename (`str`, *optional*, defaults to `"model.safetensors"`):
                The file of each that holds its weights; safetensors only.
            patterns (`str` or `Sequence[str]`, *optional*, defaults to `("*",)`):
                What is generated, as for `ParameterLayout`.
            task (`str`, *optional*): What the networks do, as [`load_task`] takes it.
            token (`str`, *optional*): For private repositories; the one of `hf auth login` by default.
            may_differ (`Sequence[str]`, *optional*):
                Shell-style patterns of frozen tensors that may differ between networks; all get those of the first.

        Raises:
            [`HubError`]: a repository cannot be read, or lacks the file.
            [`ZooError`]: nothing matches, or a network does not match the first; nothing is left behind then.
        """
        checkpoints = checkpoints_of_repositories(repositories, filename, token)
        return cls._import(folder, checkpoints, patterns, task, may_differ)

    @classmethod
    def from_adapters(
        cls,
        folder: str | os.PathLike[str],
        adapters: Names,
        task: str | None = None,
        token: str | None = None,
        dtype: ZooDtype = "float32",
        metadata: Iterable[Mapping[str, Any]] = (),
    ) -> "WeightZoo":
        r"""
        Makes a zoo of LoRA adapters of one base model: of folders of PEFT, and of LoRA files of diffusers and kohya,
        which diffusers converts. Their scales (`lora_alpha`, rsLoRA) go into the factors, which are stored in
        canonical form ([`~networks.gauge.Gauge`]) in float32; their products stay what they were. What is generated
        is of scale 1.

        Args:
            folder (`str` or `os.PathLike`): Where the zoo goes.
            adapters (`str`, `os.PathLike` or a list of them):
                Folders and safetensors files, folders of such folders, and names of model repositories on the Hub,
                also as patterns such as `org/*-lora`. The first one gives names and shapes.
            task (`str`, *optional*): What the networks do, as [`load_task`] takes it.
            token (`str`, *optional*): For private repositories; the one of `hf auth login` by default.
            dtype (`str`, *optional*, defaults to `"float32"`): How they are stored, as in [`WeightZoo.create`].
            metadata (`Iterable[Mapping[str, Any]]`, *optional*):
                Further columns of the zoo's rows, such as what each adapter is for: a dict an adapter, whose
                `"source"` is its name on the Hub, or that of its folder or file.

        Raises:
            [`HubError`]: a repository cannot be read.
            [`ZooError`]: one is no LoRA adapter, or has another base model or revision, other ranks or modules than
            the first, or no metadata where others have some; nothing is left behind then.
        """
        found = with_metadata(find_adapters(adapters, token), metadata)
        first, theirs = found[0], found[0].read()
        layout = make_layout(theirs[0], ("*",), theirs[1])
        gauge = Gauge(layout)

        def read(one: Adapter) -> torch.Tensor:
            ours = one.read()
            check_same(one, first, ours, theirs)
            try:
                return layout.flatten(ours[0])
            except ValueError as error:
                raise ZooError(f"{one.source}: {error}") from error

        with locked(folder):
            with built(folder, layout, task, dtype=dtype) as zoo:
                some = evenly(len(found), networks_per_batch(layout.vector_size, REFERENCE_NETWORKS))
                reference = gauge.reference(torch.stack([read(found[place]) for place in some]))
                for one in tqdm(found, desc="import", unit="adapter"):
                    zoo.append(gauge.canonical(read(one)[None], reference)[0], **one.row)
            zoo = cls(folder)
            zoo.write_card("LoRA adapters that were trained elsewhere, imported in canonical form.")
        return zoo

    @classmethod
    def _import(
        cls,
        folder: str | os.PathLike[str],
        checkpoints: Sequence[Checkpoint],
        patterns: str | Sequence[str],
        task: str | None,
        may_differ: Sequence[str],
    ) -> "WeightZoo":
        """A zoo of networks that were trained elsewhere; on an error there is none."""
        tied = twins(checkpoints)

        def read(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
            state_dict = checkpoint.read()
            return state_dict | {name: state_dict[owner] for name, owner in tied.items() if owner in state_dict}

        with locked(folder):
            layout = make_layout(read(checkpoints[0]), patterns)
            with built(folder, layout, task, may_differ=may_differ) as zoo:
                for checkpoint in tqdm(checkpoints, desc="import", unit="network"):
                    zoo.append(read(checkpoint), **checkpoint.row)
            zoo = cls(folder)
            zoo.write_card("Networks that were trained elsewhere, imported.")
        return zoo

    def __len__(self) -> int:
        return self._shards.count + len(self._pending)

    def __repr__(self) -> str:
        return f"WeightZoo({str(self.folder)!r}: {len(self)} networks of {self.vector_size} parameters)"

    @cached_property
    def layout(self) -> ParameterLayout:
        """The layout of the networks, with their frozen tensors; its statistics are not fitted."""
        self.check()
        size, memory = LAYOUT_BYTES * self.vector_size, psutil.virtual_memory().total
        if size > memory:
            raise ZooError(
                f"{self.folder} claims {self.vector_size:,} parameters a network, whose layout takes "
                f"{human_size(size)}; this machine has {human_size(memory)}."
            )
        file = self.folder / "frozen.safetensors"
        try:
            layout = ParameterLayout(tensors=self._description.tensors, adapter=self.adapter)
            layout.load_frozen(load_file(file))
        except (OSError, SafetensorError, ValueError) as error:
            raise ZooError(f"{file} does not fit zoo.json: {error}") from error
        return layout

    def check(self) -> None:
        """Raises [`ZooError`] where zoo.json claims other shapes than the frozen tensors or a shard have; reads their
        headers alone."""
        file = self.folder / "frozen.safetensors"
        try:
            check_opens(file)
        except OSError as error:
            raise ZooError(f"{file} cannot be opened: {error}.") from error
        expected = {
            tensor["name"]: tensor["shape"] for tensor in self._description.tensors if tensor["role"] == "frozen"
        }
        try:
            with safe_open(file, "pt") as header:
                found = {name: header.get_slice(name).get_shape() for name in header.keys()}  # noqa: SIM118
            if found != expected:
                wrong = sorted(
                    name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)
                )
                raise ValueError(f"the shapes of {', '.join(wrong):.500} differ")
            if len(self._shards):
                self._shards.open(0)
        except (OSError, SafetensorError, ValueError) as error:
            raise ZooError(f"{file} does not fit zoo.json: {error}") from error

    @property
    def metadata(self) -> list[dict[str, Any]]:
        """One row a network."""
        if self._rows_read is None:
            self._rows_read = list(self._rows.read(self._shards.count))
        return self._rows_read + self._pending_rows

    def rows(self) -> Iterator[dict[str, Any]]:
        """The same one by one, for zoos with very many networks."""
        yield from self._rows.read(self._shards.count)
        yield from self._pending_rows

    def __getitem__(self, index: int | slice) -> torch.Tensor:
        """The parameter vector of one network, float32 `[P]`, or those of a slice, `[n, P]`; reads no others."""
        if isinstance(index, slice):
            return self.vectors(range(*index.indices(len(self))))
        return self.vectors([index])[0]

    def vectors(self, indices: Sequence[int] | None = None) -> torch.Tensor:
        """Parameter vectors, float32 `[n, P]`: of all networks, or of these."""
        indices = range(len(self)) if indices is None else indices
        count, stored = len(self), self._shards.count
        waiting: list[tuple[int, int]] = []
        by_shard: dict[int, list[tuple[int, int]]] = {}
        for row, index in enumerate(indices):
            if not -count <= index < count:
                raise IndexError(f"Network {index} of a zoo of {count}.")
            shard, offset = divmod(index % count, self.networks_per_shard)
            if index % count >= stored:
                waiting.append((row, index % count - stored))
            else:
                by_shard.setdefault(shard, []).append((row, offset))
        # Opened first: what zoo.json claims is compared with the shards before it is allocated.
        files = {shard: self._shards.open(shard) for shard in by_shard}
        out = torch.empty(len(indices), self.vector_size, dtype=torch.float32)
        for row, place in waiting:
            out[row] = self._pending[place]
        for shard, places in by_shard.items():
            with safe_open(files[shard], "pt") as file:
                stored_vectors = file.get_slice("networks")
                for row, offset in places:
                    out[row] = stored_vectors[offset]
        finite = torch.isfinite(out).all(1)
        if not finite.all():
            raise self._damaged(list(indices)[int(finite.long().argmin())] % count)
        return out

    def _damaged(self, index: int) -> ZooError:
        return ZooError(f"Network {index} of {self.folder} holds NaN or infinite values: its shard is damaged.")

    def columns(self, start: int, stop: int, every: int = 1) -> torch.Tensor:
        """Some consecutive parameters of all N networks, or of each `every`-th, float32
        `[ceil(N / every), stop - start]`; reads no others."""
        parts = []
        for shard, size in enumerate(self._shards.sizes):
            first = -shard * self.networks_per_shard % every
            with safe_open(self._shards.open(shard), "pt") as file:
                stored = file.get_slice("networks")
                if every == 1:
                    parts.append(stored[:, start:stop])
                else:
                    parts += [stored[offset, start:stop][None] for offset in range(first, size, every)]
        first = -self._shards.count % every
        parts += [vector[None, start:stop] for vector in self._pending[first::every]]
        columns = torch.cat([part.float() for part in parts])
        finite = torch.isfinite(columns).all(1)
        if not finite.all():
            raise self._damaged(every * int(finite.long().argmin()))
        return columns

    def _writable(self) -> None:
        if self._fetch is not None:
            raise ZooError(
                "This zoo lies in the cache of the Hub and is read-only: copy it with save_pretrained(folder), and "
                "append to WeightZoo(folder)."
            )

    @property
    def batch_size(self) -> int:
        """Networks that fit memory many times: 64, and fewer where they are large."""
        return networks_per_batch(self.vector_size)

    def batches(self, batch_size: int | None = None) -> Iterator[torch.Tensor]:
        """All parameter vectors in order, `[n, P]` at a time; by default [`~WeightZoo.batch_size`]."""
        batch_size = batch_size or self.batch_size
        for start in range(0, len(self), batch_size):
            yield self.vectors(range(start, min(start + batch_size, len(self))))

    def state_dict(self, index: int) -> dict[str, torch.Tensor]:
        """The complete state dict of one network."""
        return self.layout.unflatten(self.vectors([index]))[0]

    def append(self, network: Mapping[str, torch.Tensor] | torch.Tensor, /, **row: Any) -> None:
        r"""
        Adds a network. It is on disk after [`~WeightZoo.flush`], which comes by itself when a shard is full.

        Args:
            network (`Mapping[str, torch.Tensor]` or `torch.Tensor`): A state dict, or a parameter vector `[P]`.
            row (*optional*): Its metadata, as JSON takes it.

        Raises:
            [`ZooError`]: the network does not fit the layout, or holds NaN or infinite values; the zoo stays as it
            was.
        """
        self._writable()
        if isinstance(network, torch.Tensor):
            vector = network.detach().to("cpu", self.dtype, copy=True)
            finite = torch.isfinite(vector).all()
            if vector.shape != (self.vector_size,) or not finite:
                raise ZooError(
                    f"Expected a finite vector of {self.vector_size} parameters; found shape "
                    f"{list(vector.shape)}{'' if finite else ' with NaN or infinite values'}."
                )
        else:
            try:
                vector = self.layout.flatten(network).to("cpu", self.dtype)
                self.layout.check_frozen(network, self.may_differ)
                if not torch.isfinite(vector).all():
                    raise ValueError(f"a parameter is too large for {self.dtype}.")
            except ValueError as error:
                source = f"{row['source']}: " if "source" in row else ""
                raise ZooError(f"{source}{error}{REMEDY if 'is not generated' in str(error) else ''}") from error
        try:
            json.dumps(row, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ZooError(f"The metadata of a network has to be JSON: {error}") from error
        self._pending_rows.append({"index": 0} | row | {"index": len(self)})
        self._pending.append(vector)
        if len(self) % self.networks_per_shard == 0:
            self.flush()

    def flush(self) -> None:
        """Writes what was appended."""
        if not self._pending:
            return
        remedy = (
            f"The {self._shards.count} networks that were flushed before are safe; make room and run the same command "
            "again to go on from there."
        )
        with locked(self.folder):
            self._shards.check_unchanged()
            self._flush(remedy)

    def _flush(self, remedy: str) -> None:
        # Every row has every key, so that whatever reads the first rows knows the others.
        keys = dict.fromkeys(self._rows.keys(self._shards.count))
        added = [key for row in self._pending_rows for key in row if key not in keys]
        if added and self._shards.count:
            self.rows_end, self._rows_read = self._rows.widen(self._shards.count, added, remedy), None
        keys |= dict.fromkeys(added)
        self._pending_rows = [{key: row.get(key) for key in keys} for row in self._pending_rows]
        lines = [json.dumps(row).encode() + b"\n" for row in self._pending_rows]
        # Rows first: those without networks are known for what they are.
        self.rows_end = self._rows.append(b"".join(lines), self.rows_end, remedy)
        while self._pending:
            room = self.networks_per_shard - self._shards.count % self.networks_per_shard
            new = self._pending[:room]
            self._shards.add(torch.stack(new), remedy)
            if self._rows_read is not None:
                self._rows_read += self._pending_rows[:room]
            self.rows_end += sum(map(len, lines[:room]))
            self._pending, self._pending_rows, lines = (
                self._pending[room:],
                self._pending_rows[room:],
                lines[room:],
            )

    @cached_property
    def rows_end(self) -> int:
        """Bytes of `metadata.jsonl` that belong to stored networks; the rest was never written."""
        return self._rows.end(self._shards.count)

    def __enter__(self) -> "WeightZoo":
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        r"""
        Copies the zoo to another folder; what is still on the Hub is downloaded.

        Args:
            folder (`str` or `os.PathLike`): Where; it must not hold a zoo yet.

        Raises:
            [`ZooError`]: there is a zoo already, or a file that one would replace.
            [`ConfigError`]: the folder holds a pipeline or a report.
            [`WriteError`]: it cannot be written.
        """
        folder = Path(folder).expanduser()
        self.flush()
        for shard in range(len(self._shards)):
            self._shards.open(shard)
        with locked(folder), explained(folder):
            _make_free(folder)
            # Links of the cache become files.
            left = shutil.ignore_patterns("zoo.json", "networks-*.safetensors", "*.part", f"{UNFINISHED}*", LOCK)
            names = [file.name for file in self.folder.iterdir()]
            for name in {*names} - left(str(self.folder), names) - {"metadata.jsonl", "frozen.safetensors"}:
                if (folder / name).exists():
                    raise ZooError(f"{folder} holds {name} already. Choose another folder, or move it away.")
            shutil.copytree(self.folder, folder, dirs_exist_ok=True, ignore=left)
            self._shards.copy(folder)
            with whole(folder / "zoo.json") as file:  # last, since it is what makes a folder a zoo
                shutil.copyfile(self.folder / "zoo.json", file)

    def export(self, folder: str | os.PathLike[str]) -> None:
        r"""
        Writes a folder a network, named by its index: of adapters what `PeftModel.from_pretrained(base, folder)` or,
        where they are of diffusers, `pipe.load_lora_weights(folder)` loads; of other networks `model.safetensors`,
        their complete state dict.

        Args:
            folder (`str` or `os.PathLike`):
                Where the folders go. Of what is there already, such as after an interruption, all has to be the same.

        Raises:
            [`ZooError`]: the folder holds something else, or another network.
            [`WriteError`]: it cannot be written.
        """
        check_export(folder, len(self))
        export(self.layout, (self.state_dict(index) for index in range(len(self))), folder)


@contextmanager
def built(
    folder: str | os.PathLike[str],
    layout: ParameterLayout,
    task: str | None = None,
    dtype: ZooDtype = "float32",
    may_differ: Sequence[str] = (),
) -> Iterator[WeightZoo]:
    r"""
    A new zoo to append to, whose files are moved into the folder in the end: a part of it does not pass for the whole.
    What a killed process left of one is removed.

    Args and raises: as those of [`WeightZoo.create`].
    """
    folder = Path(folder).expanduser()
    place = folder / BUILT
    with locked(folder):
        _make_free(folder)
        try:
            with WeightZoo.create(place, layout, task, dtype=dtype, may_differ=may_differ) as zoo:
                yield zoo
            with explained(folder):
                shards = [file.name for file in place.glob("networks-*.safetensors")]
                # The last is what makes a folder a zoo.
                for name in ("frozen.safetensors", *shards, "metadata.jsonl", "zoo.json"):
                    (place / name).replace(folder / name)
        finally:
            shutil.rmtree(place, ignore_errors=True)


def _make_free(folder: Path) -> None:
    """Removes what a killed process left of a zoo that was built, and raises an error where a folder holds a zoo or a
    part of one, or what is none."""
    place = folder / BUILT
    if (place / "zoo.json").exists() and not (place / "frozen.safetensors").exists():  # it was being moved
        for moved in (*folder.glob("networks-*.safetensors"), folder / "metadata.jsonl"):
            moved.unlink(missing_ok=True)
    shutil.rmtree(place, ignore_errors=True)
    check_kind(folder, "collect")
    if is_zoo(folder):
        raise ZooError(
            f"{folder} holds a zoo already. Choose another folder, or open it with WeightZoo({str(folder)!r}) and "
            "append."
        )
    leftovers, rows = list(folder.glob("networks-*.safetensors")), folder / "metadata.jsonl"
    if rows.exists() and rows.stat().st_size:  # those of a zoo are empty until it is one
        leftovers.append(rows)
    if leftovers:
        raise ZooError(f"{leftovers[0]} is there without a zoo.json. Choose another folder, or move it away.")


def networks_per_batch(vector_size: int, most: int = 64, values: int = BATCH_VALUES) -> int:
    """How many networks of so many parameters, or of as many outputs, are handled at once."""
    return max(1, min(most, values // max(1, vector_size)))


def evenly(count: int, most: int) -> range:
    """Indices of so many things, or of at most so many of them at equal distances."""
    return range(0, count, max(1, -(-count // most)))


def check_room_for(folder: Path, networks: int, layout: ParameterLayout, dtype: ZooDtype) -> None:
    """Raises [`WriteError`] where the disk of a folder has no room for so many networks more."""
    check_room(folder, networks * layout.vector_size * getattr(torch, dtype).itemsize)


def make_layout(
    state_dict: Mapping[str, torch.Tensor], patterns: str | Sequence[str], adapter: dict[str, Any] | None = None
) -> ParameterLayout:
    """The layout of a network, or of an adapter with this configuration, or a [`ZooError`] that says why there is
    none."""
    try:
        layout = ParameterLayout.from_state_dict(state_dict, patterns)
        if adapter is not None:
            layout.register_to_config(adapter=config_of_zoo(adapter, state_dict))
        return layout
    except ValueError as error:
        raise ZooError(str(error)) from error
