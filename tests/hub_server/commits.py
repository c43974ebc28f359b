"""Commits: the lines in which the client describes them, and what they do to a tree."""

import base64
import binascii
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader

from .cards import InvalidCardError, card_metadata
from .errors import EntryNotFoundError, HubError
from .storage import CHUNK_BYTES, Repository, StoredFile, Tree, check_path


MAXIMUM_LINE = 1 << 20
CONTENT = re.compile(rb'"content"\s*:\s*"')
DELETIONS = ("deletedFile", "deletedFolder")


@dataclass(frozen=True)
class Operation:
    """A file that is written, or, without one, a path that is deleted."""

    key: str
    path: str
    file: StoredFile | None = None


def read_commit(repository: Repository, revision: str, lines: BufferedReader) -> tuple[dict, list[Operation]]:
    """Reads the header and the operations of a commit; contents go to disk as they arrive."""
    header, operations = {}, []
    while line := lines.readline(MAXIMUM_LINE):
        try:
            if line.endswith(b"\n") or len(line) < MAXIMUM_LINE:
                item, file = json.loads(line), None
            else:
                item, file = read_long_line(repository, line, lines)
            key, value = item["key"], item["value"]
            if key == "header":
                header = value
            else:
                operations.append(read_operation(repository, revision, key, value, file))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise HubError(400, f"Invalid line in commit: {error!r}") from error
    if not isinstance(header.get("summary"), str) or not header["summary"]:
        raise HubError(400, "A commit needs a summary")
    return header, operations


def read_operation(repository: Repository, revision: str, key: str, value: dict, file: StoredFile | None) -> Operation:
    path = check_path(value["path"].rstrip("/") if key == "deletedFolder" else value["path"])
    if key in DELETIONS:
        return Operation(key, path)
    if key == "lfsFile":
        return Operation(key, path, repository.lfs_file(value["oid"]))
    if key == "copyFile":
        source = repository.commit(repository.find_commit(value.get("srcRev") or revision)).tree
        if value["srcPath"] not in source:
            raise EntryNotFoundError(f"Cannot copy {value['srcPath']}: it does not exist")
        return Operation(key, path, source[value["srcPath"]])
    if key == "file":
        encoded = value["content"].encode()
        is_base64 = value.get("encoding", "utf-8") == "base64"
        return Operation(key, path, file or repository.add_file([decode_base64(encoded) if is_base64 else encoded]))
    raise ValueError(f"unknown operation {key!r}")


def read_long_line(repository: Repository, start: bytes, lines: BufferedReader) -> tuple[dict, StoredFile]:
    """Reads a line that is too long to be held in memory, which only a file's contents may be."""
    content = CONTENT.search(start)
    if content is None:
        raise ValueError("a line without contents is too long")
    rest = bytearray()
    file = repository.add_file(read_base64_string(start[content.end() :], lines, rest))
    if not rest.endswith(b"\n"):
        rest += lines.readline(MAXIMUM_LINE)
    item = json.loads(start[: content.end()] + rest)
    if item["value"].get("encoding") != "base64":
        raise ValueError("long contents have to be encoded as base64")
    return item, file


def read_base64_string(buffer: bytes, lines: BufferedReader, rest: bytearray) -> Iterator[bytes]:
    """Decodes up to the closing quotation mark, from which on what was read goes to `rest`."""
    while (end := buffer.find(b'"')) < 0:
        whole = len(buffer) // 4 * 4
        yield decode_base64(buffer[:whole])
        chunk = lines.readline(CHUNK_BYTES)  # never into the next line
        if not chunk:
            raise ValueError("contents without an end")
        buffer = buffer[whole:] + chunk
    yield decode_base64(buffer[:end])
    rest += buffer[end:]


def decode_base64(text: bytes) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"invalid base64: {error}") from error


def apply(tree: Tree, operations: list[Operation]) -> Tree:
    """The tree after a commit."""
    tree = dict(tree)
    for operation in operations:
        path = operation.path
        if operation.file is not None:
            tree[path] = operation.file
        elif operation.key == "deletedFile":
            if path not in tree:
                raise EntryNotFoundError(f"A file with this name doesn't exist: {path}")
            del tree[path]
        else:
            inside = [name for name in tree if name.startswith(f"{path}/")]
            if not inside:
                raise EntryNotFoundError(f"A folder with this name doesn't exist: {path}")
            for name in inside:
                del tree[name]
    for path in tree:
        parents = [path[:end] for end, character in enumerate(path) if character == "/"]
        if any(parent in tree for parent in parents):
            raise HubError(400, f"{path} cannot be inside of a file")
    return tree


def check_card(repository: Repository, tree: Tree) -> None:
    """Refuses a `README.md` whose metadata is invalid."""
    try:
        read_card(repository, tree)
    except InvalidCardError as error:
        raise HubError(400, f"Invalid metadata in README.md: {error}") from error


def read_card(repository: Repository, tree: Tree) -> dict:
    """The metadata of a repository."""
    if "README.md" not in tree:
        return {}
    with repository.blob(tree["README.md"].sha256).open("rb") as card:
        return card_metadata(card.read(MAXIMUM_LINE).decode(errors="replace")) or {}
