"""The rows of a zoo: `metadata.jsonl`, one JSON object a network."""

import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import ZooError
from ..files import explained, whole


def column_types(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]] | None:
    r"""
    The columns of rows as the Hub's `dataset_info` names them, since whoever reads the first rows alone takes a column
    that begins without values for one that never has any. None where a column holds what has no type there.
    """
    kinds: dict[str, set[str]] = {}
    for row in rows:
        for key, value in row.items():
            kinds.setdefault(key, set()).update(_kinds(value))
    found = []
    for key, kind in kinds.items():
        kind = {"float64"} if kind == {"int64", "float64"} else kind or {"string"}
        if len(kind) > 1 or "" in kind:
            return None
        name = next(iter(kind))
        found.append({"name": key, "list": name[5:]} if name.startswith("list ") else {"name": key, "dtype": name})
    return found


def _kinds(value: Any) -> set[str]:
    if value is None:
        return set()
    if isinstance(value, list):
        inner = set().union(*map(_kinds, value)) or {"float64"}
        if inner <= {"int64", "float64"}:
            return {"list float64"}
        return {"" if not kind or kind.startswith("list ") else f"list {kind}" for kind in inner}
    return {{bool: "bool", int: "int64", float: "float64", str: "string"}.get(type(value), "")}


class Rows:
    r"""
    The file of the rows of a zoo, read line by line and appended to. What a killed process left in it beyond the rows
    of stored networks was never written.

    Args:
        file (`Path`): `metadata.jsonl`.
    """

    def __init__(self, file: Path):
        self.file = file

    def lines(self, count: int | None) -> Iterator[bytes]:
        """The rows of so many networks, as they are written, or all rows."""
        found = 0
        try:
            with self.file.open("rb") as lines:
                for line in itertools.islice(lines, count):
                    found += 1
                    yield line
        except OSError as error:
            raise ZooError(f"{self.file} cannot be read: {error}.") from error
        if count is not None and found < count:
            raise ZooError(f"{self.file} has {found} rows for {count} networks.")

    def read(self, count: int) -> Iterator[dict[str, Any]]:
        """The rows of so many networks."""
        return map(self._parse, self.lines(count))

    def end(self, count: int) -> int:
        """Bytes that the rows of so many networks take."""
        end, line = 0, b"{}"
        for line in self.lines(count):
            end += len(line)
        self._parse(line)  # where the file was cut off, it shows here
        return end

    def keys(self, count: int) -> list[str]:
        """Of the rows of so many networks: every row has all of them."""
        return list(next(self.read(min(count, 1)), {}))

    def widen(self, count: int, keys: Sequence[str], remedy: str) -> int:
        """Gives the rows of so many networks these keys, of no value where they lack them, and returns the bytes that
        they take."""
        with whole(self.file, remedy) as temporary, temporary.open("wb") as rows:
            for row in self.read(count):
                rows.write(json.dumps(row | {key: row.get(key) for key in keys}).encode() + b"\n")
        return self.file.stat().st_size

    def append(self, lines: bytes, end: int, remedy: str) -> int:
        """Puts lines behind the first bytes of the file, and returns where the bytes before them end."""
        with explained(self.file, remedy), self.file.open("r+b") as rows:
            rows.truncate(end)
            rows.seek(max(end - 1, 0))
            # The last of them may lack its end.
            before = b"\n" if end and rows.read(1) != b"\n" else b""
            rows.write(before + lines)
            rows.flush()
            os.fsync(rows.fileno())
        return end + len(before)

    def _parse(self, line: bytes) -> dict[str, Any]:
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("each row has to be a JSON object")
        except (ValueError, RecursionError) as error:
            raise ZooError(f"{self.file} is damaged: {error}") from error
        return row
