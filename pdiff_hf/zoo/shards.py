"""The shards of a zoo: `networks-00001-of-000NN.safetensors`, each full but the last."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ..errors import ZooError
from ..files import check_opens, sync, whole


# Of the stored networks: what is read is float32 all the same.
STORED_AS = {"float32": "F32", "bfloat16": "BF16"}
NAME = re.compile(r"networks-(?!00000)(\d{5})-of-(\d{5})\.safetensors")


class Shards:
    r"""
    The files of the networks of a zoo. All but the last are full; where their files are of one size, one of them
    stands for the others until these are used, since opening hundreds takes time.

    Args:
        folder (`Path`): Of the zoo.
        dtype (`torch.dtype`): How networks are stored.
        vector_size (`int`): Parameters of a network.
        capacity (`int`): Networks of a full shard.
        fetch (`Callable[[str], Path]`, *optional*): Gets a shard by its name where the folder lacks it.
        count (`int`, *optional*): Networks of all shards, where the folder need not hold them.

    Attributes:
        sizes (`list[int]`): Networks of each shard.
    """

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype,
        vector_size: int,
        capacity: int,
        fetch: Callable[[str], Path] | None = None,
        count: int | None = None,
    ):
        self.folder, self.dtype, self.vector_size, self.capacity = folder, dtype, vector_size, capacity
        self._fetch = fetch
        self._checked: set[int] = set()
        if count is None:
            self.files = self._find()
            self.sizes = self._find_sizes()
            self._seen = self._state()
        else:
            # Names and sizes follow from the number of networks.
            total = -(-count // capacity)
            self.files = [self._path(number, total) for number in range(1, total + 1)]
            self.sizes = [min(capacity, count - start) for start in range(0, count, capacity)]

    def __len__(self) -> int:
        return len(self.files)

    @property
    def count(self) -> int:
        """Networks of all shards."""
        return sum(self.sizes)

    def open(self, shard: int) -> Path:
        """The file of a shard, which is checked before its first use; from the Hub, whether cached or not."""
        file = self.files[shard]
        if shard not in self._checked:
            if self._fetch is not None and not file.exists():
                file = self._fetch(file.name)
            if self._size(file) != self.sizes[shard]:
                raise ZooError(f"{file} does not hold the {self.sizes[shard]} networks that metadata.jsonl names.")
            self._checked.add(shard)
        return file

    def _state(self) -> tuple[list[str], tuple[int, ...]]:
        """What tells whether somebody else added networks."""
        files = self._find()
        last = files[-1].stat() if files else None
        # File systems give the inode of a file that was replaced to the next one.
        return [file.name for file in files], (last.st_ino, last.st_size, last.st_mtime_ns) if last else ()

    def check_unchanged(self) -> None:
        """Raises [`ZooError`] where somebody else added networks."""
        if self._state() != self._seen:
            raise ZooError(f"{self.folder} was changed by somebody else meanwhile. Open it again.")

    def add(self, networks: torch.Tensor, remedy: str) -> None:
        """Puts networks `[n, P]`, no more than the last shard has room for, or where it is full a new one, behind the
        others."""
        held = self.sizes[-1] % self.capacity if self.sizes else 0
        if held:
            networks = torch.cat([load_file(self.files[-1])["networks"], networks])
        total = len(self.files) + (held == 0)
        before, after = self.files, [self._path(number, total) for number in range(1, total + 1)]
        try:
            with whole(after[-1], remedy) as temporary:
                save_file({"networks": networks}, temporary)
                sync(temporary)
                for old, new in zip(before, after, strict=False):
                    old.replace(new)
        except BaseException:
            if not after[-1].exists():  # the others' names promise it
                for old, new in zip(before, after, strict=False):
                    if new.exists():
                        new.replace(old)
            raise
        self.files = after
        self.sizes[total - 1 :] = [len(networks)]
        self._checked.add(total - 1)
        self._seen = self._state()

    def _path(self, number: int, total: int) -> Path:
        return self.folder / f"networks-{number:05}-of-{total:05}.safetensors"

    def copy(self, folder: Path) -> None:
        """Into a folder, under the names of a finished zoo."""
        for shard in range(len(self)):
            shutil.copyfile(self.open(shard), folder / self._path(shard + 1, len(self)).name)

    def _find(self) -> list[Path]:
        found: dict[int, Path] = {}
        totals = set()
        for file in self.folder.iterdir():
            if match := NAME.fullmatch(file.name):
                other = found.get(int(match[1]))
                if other is not None and other.exists() and file.exists():  # while it is renamed, only one of them is
                    raise ZooError(
                        f"{self.folder} holds {other.name} and {file.name}, of two zoos: remove those of one of them."
                    )
                found[int(match[1])] = file
                totals.add(int(match[2]))
        missing = sorted(set(range(1, max(found, default=0) + 1)) - set(found))
        if not missing and totals and max(totals) > len(found):
            # Shards are renamed one by one while a new one waits under its temporary name.
            waiting = self._path(max(totals), max(totals)).name + ".part"
            if max(totals) > len(found) + 1 or not (self.folder / waiting).exists():
                missing = list(range(len(found) + 1, max(totals) + 1))
        if missing:
            names = f"{missing}" if len(missing) < 10 else f"{missing[0]} to {missing[-1]}"
            raise ZooError(f"{self.folder} lacks the shards {names}: copy or download it again.")
        return [found[number] for number in sorted(found)]

    def _find_sizes(self) -> list[int]:
        full, opened = self.files[:-1], self.files
        try:
            if len({shard.stat().st_size for shard in full}) == 1:
                opened = [self.files[0], self.files[-1]]
        except OSError as error:
            raise ZooError(f"{self.folder} cannot be read: {error}") from error
        known = {shard: self._size(shard) for shard in opened}
        self._checked = {index for index, shard in enumerate(self.files) if shard in known}
        sizes = [known.get(shard, self.capacity) for shard in self.files]
        for shard, size in zip(self.files, sizes, strict=True):
            if size != self.capacity and (shard is not self.files[-1] or not 0 < size < self.capacity):
                raise ZooError(f"{shard}: expected {self.capacity} networks, found {size}.")
        return sizes

    def _size(self, shard: Path) -> int:
        try:
            check_opens(shard)
        except OSError as error:
            raise ZooError(f"{shard} cannot be opened: {error}.") from error
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
        return int(rows)
