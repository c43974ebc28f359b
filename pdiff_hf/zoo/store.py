"""A zoo: many networks of one architecture, in sharded safetensors files."""

import functools
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import CommitInfo
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from ..errors import ZooError
from ..files import UNFINISHED, write_whole
from ..hub import download, download_file, is_repository, matching_models, push, write_zoo_card
from ..pipelines.neural_network_diffusion import ParameterLayout
from ..pipelines.neural_network_diffusion.layout.parameter_layout import check_tensors


FORMAT_VERSION = 1
SHARD_BYTES = 256 * 2**20
# Parameters of all networks of a batch.
BATCH_VALUES = 2**24
# Of the stored networks: what is read is float32 all the same.
ZooDtype = Literal["float32", "bfloat16"]
STORED_AS = {"float32": "F32", "bfloat16": "BF16"}
SHARD_NAME = re.compile(r"networks-(?!00000)(\d{5})-of-(\d{5})\.safetensors")


class WeightZoo:
    r"""
    Networks of one architecture in a folder, memory-mapped and append-only.

    | file | holds |
    | --- | --- |
    | `zoo.json` | format version, task, layout, networks a shard, their dtype |
    | `networks-00001-of-000NN.safetensors` | parameter vectors `[n, P]`, float32 or bfloat16 |
    | `frozen.safetensors` | all that is not generated |
    | `metadata.jsonl` | one row a network: index, source, seed, step, accuracy, ... |
    | `README.md` | the dataset card |

    A shard is written beside its place and moved there, after the rows of its networks: what a killed process leaves
    is a readable zoo of the networks that were flushed, and appending goes on from there. One process appends at a
    time.

    Attributes:
        task (`str`, *optional*): What the networks do.
        vector_size (`int`): Parameters P that are generated.
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

    def __init__(self, folder: str | os.PathLike, fetch: Callable[[str], Path] | None = None):
        self.folder = Path(folder)
        self._fetch = fetch
        self._checked: set[int] = set()
        self._check_links()
        self._rows: list[dict] | None = None
        self._pending: list[torch.Tensor] = []
        self._pending_rows: list[dict] = []
        self._read_description()
        if fetch is None:
            self._shards = self._find_shards()
            self._sizes = self._find_sizes()
            for shard, size in zip(self._shards, self._sizes, strict=True):
                full = size == self.networks_per_shard
                if not full and (shard is not self._shards[-1] or not 0 < size < self.networks_per_shard):
                    raise ZooError(f"{shard}: expected {self.networks_per_shard} networks, found {size}.")
            if not (self.folder / "metadata.jsonl").is_file():
                raise ZooError(f"{self.folder} lacks metadata.jsonl: copy or download it again.")
        else:
            # Names and sizes of shards follow from the number of networks.
            count = sum(1 for _ in self._lines(None))
            total = -(-count // self.networks_per_shard)
            self._shards = [self._shard_path(number, total) for number in range(1, total + 1)]
            self._sizes = [self.networks_per_shard] * total
            if total:
                self._sizes[-1] = count - (total - 1) * self.networks_per_shard

    @classmethod
    def create(
        cls,
        folder: str | os.PathLike,
        layout: ParameterLayout,
        task: str | None = None,
        networks_per_shard: int | None = None,
        dtype: ZooDtype = "float32",
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
        """
        folder = Path(folder)
        if dtype not in STORED_AS:
            raise ZooError(f"A zoo stores {' or '.join(STORED_AS)}, and not {dtype}.")
        if (folder / "zoo.json").exists():
            raise ZooError(f"{folder} holds a zoo already. Open it with WeightZoo({str(folder)!r}) to append to it.")
        folder.mkdir(parents=True, exist_ok=True)
        if leftover := next(folder.glob("networks-*.safetensors"), None):
            raise ZooError(f"{leftover} is there without a zoo.json. Choose another folder, or move it away.")
        description = {
            "format_version": FORMAT_VERSION,
            "task": task,
            "networks_per_shard": networks_per_shard
            or max(1, SHARD_BYTES // (getattr(torch, dtype).itemsize * layout.vector_size)),
            "dtype": dtype,
            "layout": {"tensors": layout.config["tensors"]},
        }
        frozen = {name: value.contiguous() for name, value in layout.frozen_state_dict().items()}
        save_file(frozen, folder / "frozen.safetensors")
        (folder / "metadata.jsonl").touch()
        # Last, since it is what makes a folder a zoo.
        write_whole(folder / "zoo.json", json.dumps(description, indent=1) + "\n")
        return cls(folder)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | os.PathLike, revision: str | None = None, token: str | None = None
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
        if Path(name_or_path).is_dir():
            return cls(name_or_path)
        if not is_repository(name_or_path):
            raise ZooError(f"{str(name_or_path)!r} is neither a folder nor the name of a repository on the Hub.")
        repo_id = str(name_or_path)
        files = ["zoo.json", "metadata.jsonl", "frozen.safetensors"]
        folder = Path(download(repo_id, "dataset", revision, token, files))
        # The folder is named by the commit: shards come from the same one, whatever is pushed meanwhile.
        return cls(folder, fetch=lambda name: Path(download_file(repo_id, "dataset", folder.name, token, name)))

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> CommitInfo:
        """Makes a dataset repository hold this zoo, card included, in one commit; see [`hub.push`] for arguments."""
        self._writable()
        self.flush()
        if not (self.folder / "README.md").exists():
            write_zoo_card(self, f"{len(self)} networks of one architecture.")
        return push(self.folder, repo_id, **kwargs)

    @classmethod
    def from_checkpoints(
        cls,
        folder: str | os.PathLike,
        checkpoints: Iterable[str | os.PathLike],
        patterns: Sequence[str] = ("*",),
        task: str | None = None,
    ) -> "WeightZoo":
        r"""
        Makes a zoo of checkpoint files of one architecture.

        Args:
            folder (`str` or `os.PathLike`): Where the zoo goes.
            checkpoints (`Iterable[str | os.PathLike]`):
                State dicts in `.safetensors`, `.pt` or `.pth` files (the latter two are read with
                `weights_only=True`: tensors, never code). The first one gives names, shapes, dtypes, order (that of
                a safetensors file is alphabetical) and the frozen tensors.
            patterns (`Sequence[str]`, *optional*, defaults to `("*",)`): What is generated, as for `ParameterLayout`.
            task (`str`, *optional*): What the networks do, as [`load_task`] takes it.

        Raises:
            [`ZooError`]: a file cannot be read or does not match the first; nothing is left behind then.
        """
        files = [Path(checkpoint) for checkpoint in checkpoints]
        if not files:
            raise ZooError("No checkpoints were given.")
        return cls._import(
            folder, [(functools.partial(Path, file), {"source": file.name}) for file in files], patterns, task
        )

    @classmethod
    def from_hub(
        cls,
        folder: str | os.PathLike,
        repositories: str,
        filename: str = "model.safetensors",
        patterns: Sequence[str] = ("*",),
        task: str | None = None,
        token: str | None = None,
    ) -> "WeightZoo":
        r"""
        Makes a zoo of model repositories on the Hub that share an architecture. Each row of its metadata names
        repository and commit.

        Args:
            folder (`str` or `os.PathLike`): Where the zoo goes.
            repositories (`str`): A pattern of their names in one namespace, such as `org/*-digits`.
            filename (`str`, *optional*, defaults to `"model.safetensors"`):
                The file of each that holds its weights; safetensors only.
            patterns (`Sequence[str]`, *optional*, defaults to `("*",)`): What is generated, as for `ParameterLayout`.
            task (`str`, *optional*): What the networks do, as [`load_task`] takes it.
            token (`str`, *optional*): For private repositories; the one of `hf auth login` by default.

        Raises:
            [`HubError`]: a repository cannot be read, or lacks the file.
            [`ZooError`]: nothing matches, or a network does not match the first; nothing is left behind then.
        """
        if not filename.endswith(".safetensors"):
            raise ZooError(f"{filename}: only safetensors files are read from the Hub.")
        models = matching_models(repositories, token)
        if not models:
            raise ZooError(f"No model repository on the Hub matches {repositories!r}.")

        def fetch(name: str, commit: str) -> Path:
            return Path(download_file(name, "model", commit, token, filename))

        sources: list[tuple[Callable[[], Path], dict]] = [
            (functools.partial(fetch, name, commit), {"source": name, "revision": commit}) for name, commit in models
        ]
        return cls._import(folder, sources, patterns, task)

    @classmethod
    def _import(
        cls,
        folder: str | os.PathLike,
        sources: Sequence[tuple[Callable[[], Path], dict]],
        patterns: Sequence[str],
        task: str | None,
    ) -> "WeightZoo":
        """A zoo of files, each got by a function, and their metadata; on an error there is none."""
        zoo = cls.create(folder, make_layout(_read_checkpoint(sources[0][0]()), patterns), task)
        try:
            with zoo:
                for get, row in tqdm(sources, desc="import", unit="network"):
                    zoo.append(_read_checkpoint(get()), **row)
        except BaseException:
            zoo.delete()
            raise
        write_zoo_card(zoo, f"{len(zoo)} networks that were trained elsewhere, imported.")
        return zoo

    def __len__(self) -> int:
        return sum(self._sizes) + len(self._pending)

    def __repr__(self) -> str:
        return f"WeightZoo({str(self.folder)!r}: {len(self)} networks of {self.vector_size} parameters)"

    @cached_property
    def layout(self) -> ParameterLayout:
        """The layout of the networks, with their frozen tensors; its statistics are not fitted."""
        file = self.folder / "frozen.safetensors"
        expected = {tensor["name"]: tensor["shape"] for tensor in self._tensors if tensor["role"] == "frozen"}
        try:
            with safe_open(file, "pt") as header:
                found = {name: header.get_slice(name).get_shape() for name in header.keys()}  # noqa: SIM118
            if found != expected:
                wrong = sorted(
                    name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)
                )
                raise ValueError(f"the shapes of {', '.join(wrong):.500} differ")
            if self._shards:
                # Compares what zoo.json claims with a shard, before it is allocated.
                self._open_shard(0)
            layout = ParameterLayout(tensors=self._tensors)
            layout.load_frozen(load_file(file))
        except (OSError, SafetensorError, ValueError) as error:
            raise ZooError(f"{file} does not fit zoo.json: {error}") from error
        return layout

    @property
    def metadata(self) -> list[dict]:
        """One row a network."""
        if self._rows is None:
            self._rows = list(self._stored_rows())
        return self._rows + self._pending_rows

    def rows(self) -> Iterator[dict]:
        """The same one by one, for zoos with very many networks."""
        yield from self._stored_rows()
        yield from self._pending_rows

    def __getitem__(self, index: int) -> torch.Tensor:
        """The parameter vector of one network, float32 `[P]`; reads no other."""
        return self.vectors([index])[0]

    def vectors(self, indices: Sequence[int] | None = None) -> torch.Tensor:
        """Parameter vectors, float32 `[n, P]`: of all networks, or of these."""
        indices = range(len(self)) if indices is None else indices
        count, stored = len(self), sum(self._sizes)
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
        files = {shard: self._open_shard(shard) for shard in by_shard}
        out = torch.empty(len(indices), self.vector_size)
        for row, place in waiting:
            out[row] = self._pending[place]
        for shard, places in by_shard.items():
            with safe_open(files[shard], "pt") as file:
                stored_vectors = file.get_slice("networks")
                for row, offset in places:
                    out[row] = stored_vectors[offset]
        return out

    def columns(self, start: int, stop: int, every: int = 1) -> torch.Tensor:
        """Some consecutive parameters of all networks, or of every so-manieth, float32 `[N, stop - start]`; reads no
        others."""
        parts = []
        for shard, size in enumerate(self._sizes):
            first = -shard * self.networks_per_shard % every
            with safe_open(self._open_shard(shard), "pt") as file:
                stored = file.get_slice("networks")
                if every == 1:
                    parts.append(stored[:, start:stop])
                else:
                    parts += [stored[offset, start:stop][None] for offset in range(first, size, every)]
        first = -sum(self._sizes) % every
        parts += [vector[None, start:stop] for vector in self._pending[first::every]]
        return torch.cat([part.float() for part in parts])

    def _open_shard(self, shard: int) -> Path:
        """The file of a shard, which is checked before its first use; from the Hub, whether cached or not."""
        file = self._shards[shard]
        if shard not in self._checked:
            if self._fetch is not None and not file.exists():
                file = self._fetch(file.name)
            if self._shard_size(file) != self._sizes[shard]:
                raise ZooError(f"{file} does not hold the {self._sizes[shard]} networks that metadata.jsonl names.")
            self._checked.add(shard)
        return file

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

    def append(self, network: Mapping[str, torch.Tensor] | torch.Tensor, **row: Any) -> None:
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
                if not torch.isfinite(vector).all():
                    raise ValueError(f"a parameter is too large for {self.dtype}.")
            except ValueError as error:
                source = f"{row['source']}: " if "source" in row else ""
                raise ZooError(f"{source}{error}") from error
        try:
            json.dumps(row, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ZooError(f"The metadata of a network has to be JSON: {error}") from error
        self._pending_rows.append({"index": len(self), **row})
        self._pending.append(vector)
        if len(self) % self.networks_per_shard == 0:
            self.flush()

    def flush(self) -> None:
        """Writes what was appended."""
        if not self._pending:
            return
        lines = [json.dumps(row).encode() + b"\n" for row in self._pending_rows]
        self._append_rows(b"".join(lines))
        while self._pending:
            held = self._sizes[-1] % self.networks_per_shard if self._sizes else 0
            new = self._pending[: self.networks_per_shard - held]
            networks = torch.stack(new)
            if held:
                networks = torch.cat([load_file(self._shards[-1])["networks"], networks])
            self._write_last_shard(networks, len(self._shards) + (held == 0))
            if self._rows is not None:
                self._rows += self._pending_rows[: len(new)]
            self.rows_end += sum(map(len, lines[: len(new)]))
            self._pending, self._pending_rows = self._pending[len(new) :], self._pending_rows[len(new) :]
            lines = lines[len(new) :]

    @cached_property
    def rows_end(self) -> int:
        """Bytes of `metadata.jsonl` that belong to stored networks; the rest was never written."""
        end, line = 0, b"{}"
        for line in self._lines(sum(self._sizes)):
            end += len(line)
        self._parse_row(line)  # where the file was cut off, it shows here
        return end

    def _append_rows(self, lines: bytes) -> None:
        """Puts lines behind the rows of the stored networks."""
        file = self.folder / "metadata.jsonl"
        with self._explained(file), file.open("r+b") as rows:
            rows.truncate(self.rows_end)
            rows.seek(max(self.rows_end - 1, 0))
            # The last of them may lack its end.
            before = b"\n" if self.rows_end and rows.read(1) != b"\n" else b""
            rows.write(before + lines)
            rows.flush()
            os.fsync(rows.fileno())
        self.rows_end += len(before)

    def _write_last_shard(self, networks: torch.Tensor, total: int) -> None:
        def rename_shards() -> None:
            for number, shard in enumerate(self._shards, start=1):
                shard.replace(self._shard_path(number, total))
            self._shards = [self._shard_path(number, total) for number in range(1, total + 1)]

        last = self._shard_path(total, total).name
        self._write(last, lambda path: save_file({"networks": networks}, path), rename_shards)
        self._sizes[total - 1 :] = [len(networks)]
        self._checked.add(total - 1)

    def _write(self, name: str, write: Callable[[Path], Any], before_move: Callable[[], None]) -> None:
        """Writes a file beside its place and moves it there, so that it is there whole or not at all."""
        temporary = self.folder / f"{name}.part"
        temporary.unlink(missing_ok=True)
        try:
            with self._explained(self.folder / name):
                write(temporary)
                with temporary.open("rb") as file:
                    os.fsync(file.fileno())
        except ZooError:
            temporary.unlink(missing_ok=True)
            raise
        before_move()
        temporary.replace(self.folder / name)

    @contextmanager
    def _explained(self, file: Path) -> Iterator[None]:
        """Says what a failed write leaves."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise ZooError(
                f"Cannot write {file}: {error}. The {sum(self._sizes)} networks that were flushed before are safe; "
                "make room and run the same command again to go on from there."
            ) from error

    def __enter__(self) -> "WeightZoo":
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Copies the zoo to another folder; what is still on the Hub is downloaded."""
        self.flush()
        for shard in range(len(self._shards)):
            self._open_shard(shard)
        # Links of the cache become files.
        shutil.copytree(
            self.folder, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.part", f"{UNFINISHED}*")
        )

    def delete(self) -> None:
        """Removes the zoo's files, and its folder where nothing else is in it."""
        for file in [*self._shards, *(self.folder / n for n in ("zoo.json", "frozen.safetensors", "metadata.jsonl"))]:
            file.unlink(missing_ok=True)
        for file in self.folder.glob("networks-*.part"):
            file.unlink()
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _check_links(self) -> None:
        """A zoo may come from anywhere: a link in it must not lead out, except into the blobs of the Hub's cache."""
        if not self.folder.is_dir():
            raise ZooError(f"{self.folder} holds no zoo: there is no such folder.")
        if not (self.folder / "zoo.json").exists():
            return  # and say so later
        home = self.folder.resolve()
        roots = [home, *(parent / "blobs" for parent in home.parents[1:2])]
        for file in self.folder.rglob("*"):
            try:
                inside = not file.is_symlink() or any(file.resolve().is_relative_to(root) for root in roots)
            except (OSError, RuntimeError):  # links in a circle
                inside = False
            if not inside:
                raise ZooError(f"{file} is a link that leads out of the zoo.")

    def _read_description(self) -> None:
        file = self.folder / "zoo.json"
        if not file.is_file():
            raise ZooError(f"{self.folder} holds no zoo: there is no zoo.json.")
        try:
            description = json.loads(file.read_text(encoding="utf-8"))
            version = description["format_version"]
            if version != FORMAT_VERSION:
                raise ZooError(f"{file} has format version {version!r}; this pdiff-hf reads {FORMAT_VERSION}.")
            self.task: str | None = description["task"]
            self.networks_per_shard: int = description["networks_per_shard"]
            self._tensors: list[dict] = description["layout"]["tensors"]
            if not isinstance(description["dtype"], str) or description["dtype"] not in STORED_AS:
                raise ValueError(f"the dtype is {description['dtype']!r:.200}")
            self.dtype: torch.dtype = getattr(torch, description["dtype"])
            if not isinstance(self.task, str | None):
                raise ValueError(f"the task is {self.task!r:.200}")
            if type(self.networks_per_shard) is not int or self.networks_per_shard < 1:
                raise ValueError(f"networks_per_shard is {self.networks_per_shard!r:.200}")
            check_tensors(self._tensors)
        except ZooError:
            raise
        except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ZooError(f"{file} is damaged: {error!r:.500}") from error
        self.vector_size = sum(
            torch.Size(tensor["shape"]).numel() for tensor in self._tensors if tensor["role"] == "generated"
        )

    def _shard_path(self, number: int, total: int) -> Path:
        return self.folder / f"networks-{number:05}-of-{total:05}.safetensors"

    def _find_shards(self) -> list[Path]:
        found = {}
        totals = set()
        for file in self.folder.iterdir():
            if match := SHARD_NAME.fullmatch(file.name):
                found[int(match[1])] = file
                totals.add(int(match[2]))
        missing = sorted(set(range(1, max(found, default=0) + 1)) - set(found))
        if not missing and totals and max(totals) > len(found):
            # Shards are renamed one by one while a new one waits under its temporary name.
            waiting = self._shard_path(max(totals), max(totals)).name + ".part"
            if max(totals) > len(found) + 1 or not (self.folder / waiting).exists():
                missing = list(range(len(found) + 1, max(totals) + 1))
        if missing:
            names = f"{missing}" if len(missing) < 10 else f"{missing[0]} to {missing[-1]}"
            raise ZooError(f"{self.folder} lacks the shards {names}: copy or download it again.")
        return [found[number] for number in sorted(found)]

    def _find_sizes(self) -> list[int]:
        """Networks of each shard. All but the last are full: where their files are of one size, one of them stands for
        the others until these are used, since opening hundreds takes time."""
        full, opened = self._shards[:-1], self._shards
        try:
            if len({shard.stat().st_size for shard in full}) == 1:
                opened = [self._shards[0], self._shards[-1]]
        except OSError as error:
            raise ZooError(f"{self.folder} cannot be read: {error}") from error
        sizes = {shard: self._shard_size(shard) for shard in opened}
        self._checked = {index for index, shard in enumerate(self._shards) if shard in sizes}
        return [sizes.get(shard, self.networks_per_shard) for shard in self._shards]

    def _shard_size(self, shard: Path) -> int:
        try:
            with safe_open(shard, "pt") as file:
                networks = file.get_slice("networks")
                rows, columns = networks.get_shape()
                expected = str(self.dtype).removeprefix("torch.")
                if networks.get_dtype() != STORED_AS[expected]:
                    raise ValueError(f"expected {expected} networks, found {networks.get_dtype()}")
        except (OSError, SafetensorError, ValueError) as error:
            raise ZooError(
                f"{shard} is damaged or truncated ({error}). Restore it, or delete it if it is the last shard and "
                "collect its networks again."
            ) from error
        if columns != self.vector_size:
            raise ZooError(f"{shard}: expected networks of {self.vector_size} parameters, found {columns}.")
        return rows

    def _lines(self, count: int | None) -> Iterator[bytes]:
        """The rows of so many networks, as they are written (rows past them belong to networks never written), or all
        rows."""
        file = self.folder / "metadata.jsonl"
        found = 0
        try:
            with file.open("rb") as lines:
                for line in itertools.islice(lines, count):
                    found += 1
                    yield line
        except OSError as error:
            raise ZooError(f"{file} is damaged: {error}") from error
        if count is not None and found < count:
            raise ZooError(f"{file} has {found} rows for {count} networks.")

    def _stored_rows(self) -> Iterator[dict]:
        """The rows of stored networks."""
        return map(self._parse_row, self._lines(sum(self._sizes)))

    def _parse_row(self, line: bytes) -> dict:
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("each row has to be a JSON object")
        except (ValueError, RecursionError) as error:
            raise ZooError(f"{self.folder / 'metadata.jsonl'} is damaged: {error}") from error
        return row


def networks_per_batch(vector_size: int, most: int = 64, values: int = BATCH_VALUES) -> int:
    """How many networks of so many parameters, or of as many outputs, are handled at once."""
    return max(1, min(most, values // max(1, vector_size)))


def make_layout(state_dict: Mapping[str, torch.Tensor], patterns: Sequence[str]) -> ParameterLayout:
    """The layout of a network, or a [`ZooError`] that says why it has none."""
    try:
        return ParameterLayout.from_state_dict(state_dict, patterns)
    except ValueError as error:
        raise ZooError(str(error)) from error


def _read_checkpoint(file: Path) -> dict[str, torch.Tensor]:
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
