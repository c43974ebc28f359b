"""Repositories on disk: content-addressed blobs, immutable commits, and one JSON file of refs that is replaced whole.

    DIR/repositories/{models,datasets}/NAMESPACE/NAME/repository.json   visibility, refs, discussions
                                                     /commits/SHA1.json  parent, tree, title, author, date
                                                     /blobs/SHA256       contents

Paths and revisions of requests are only ever keys of these JSON files. What names a file on disk is checked first.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

from .errors import HubError, RepositoryNotFoundError, RevisionNotFoundError


CHUNK_BYTES = 1 << 18
NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?")
SHA256 = re.compile(r"[0-9a-f]{64}")
COMMIT_PREFIX = re.compile(r"[0-9a-f]{7,40}")
# A subset of what git allows.
REF_NAME = re.compile(r"(?!.*(?:\.\.|//|\.lock(?:/|$)|/\.|@\{))[A-Za-z0-9_][A-Za-z0-9_./+@=-]*(?<![./])")
FORBIDDEN_PARTS = ("", ".", "..", ".git")
# What the Hub takes for large whatever its size, in a new repository.
LARGE_TYPES = (
    *(
        "*.7z",
        "*.arrow",
        "*.avro",
        "*.bin",
        "*.bz2",
        "*.ckpt",
        "*.ftz",
        "*.gz",
        "*.h5",
        "*.joblib",
        "*.lfs.*",
        "*.lz4",
    ),
    *("*.mds", "*.mlmodel", "*.model", "*.msgpack", "*.npy", "*.npz", "*.onnx", "*.ot", "*.parquet", "*.pb"),
    *("*.pickle", "*.pkl", "*.pt", "*.pth", "*.rar", "*.safetensors", "saved_model/**/*", "*.tar.*", "*.tar"),
    *("*.tflite", "*.tgz", "*.wasm", "*.xz", "*.zip", "*.zst", "*tfevents*"),
)
GIT_ATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LARGE_TYPES).encode()


def now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def git_hash(kind: str, size: int, chunks: Iterable[bytes]) -> str:
    """The name that git gives to an object."""
    sha1 = hashlib.sha1(f"{kind} {size}\0".encode())
    for chunk in chunks:
        sha1.update(chunk)
    return sha1.hexdigest()


def read_chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def check_path(path) -> str:
    """A path inside a repository: relative, and without parts that mean something to git or to a file system."""
    parts = path.split("/") if isinstance(path, str) else [""]
    if any(part in FORBIDDEN_PARTS for part in parts) or re.search(r"[\x00-\x1f\x7f\\]", path) or len(path) > 1000:
        raise HubError(400, f"Invalid path in repository: {path!r}")
    return path


@dataclass(frozen=True)
class StoredFile:
    """A file of a tree. `oid` is git's name of what git holds: the contents, or the pointer to them if `lfs`."""

    size: int
    sha256: str
    oid: str
    lfs: bool

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid

    @property
    def pointer(self) -> bytes:
        return (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()
            if self.lfs
            else b""
        )


Tree = dict[str, StoredFile]


@dataclass(frozen=True)
class Commit:
    """A snapshot of all files and where it came from."""

    parent: str | None
    tree: Tree
    title: str
    message: str
    author: str
    date: str
    oid: str = ""


class Repository:
    """One repository. Whatever changes its refs happens in `changing()`, one thread at a time."""

    def __init__(self, store: "Store", kind: str, namespace: str, name: str):
        self.store = store
        self.kind = kind
        self.namespace = namespace
        self.id = f"{namespace}/{name}"
        self.folder = store.folder / "repositories" / f"{kind}s" / namespace / name

    def state(self) -> dict:
        try:
            return json.loads((self.folder / "repository.json").read_text())
        except (FileNotFoundError, NotADirectoryError):
            raise RepositoryNotFoundError(user="") from None

    @contextmanager
    def changing(self) -> Iterator[dict]:
        """The state of the repository, written back unless an error is raised."""
        with self.store.lock:
            state = self.state()
            yield state
            self.store.write_json(self.folder / "repository.json", state)

    def find_commit(self, revision: str, state: dict | None = None) -> str:
        """The commit that a branch, a tag, a full ref or a hash of at least seven digits names."""
        refs = (state or self.state())["refs"]
        for ref in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if ref in refs:
                return refs[ref]
        if COMMIT_PREFIX.fullmatch(revision):
            found = [path.stem for path in (self.folder / "commits").glob(f"{revision}*.json")]
            if len(found) == 1:
                return found[0]
        raise RevisionNotFoundError(revision)

    def commit(self, oid: str) -> Commit:
        try:
            content = json.loads((self.folder / "commits" / f"{oid}.json").read_text())
        except FileNotFoundError:  # commits are never removed, repositories are
            raise RepositoryNotFoundError(user="") from None
        tree = {path: StoredFile(**file) for path, file in content.pop("tree").items()}
        return Commit(tree=tree, oid=oid, **content)

    def history(self, oid: str | None) -> Iterator[Commit]:
        """A commit and its ancestors, newest first."""
        while oid is not None:
            commit = self.commit(oid)
            yield commit
            oid = commit.parent

    def add_commit(self, parent: str | None, tree: Tree, title: str, message: str, author: str) -> str:
        content = asdict(Commit(parent, dict(sorted(tree.items())), title, message, author, now()))
        del content["oid"]
        data = json.dumps(content).encode()
        oid = git_hash("commit", len(data), [data])
        self.store.write_json(self.folder / "commits" / f"{oid}.json", content)
        return oid

    def blob(self, sha256: str) -> Path:
        if not SHA256.fullmatch(sha256):
            raise HubError(400, f"Not a SHA-256: {sha256!r}")
        return self.folder / "blobs" / sha256

    def add_file(self, chunks: Iterable[bytes]) -> StoredFile:
        """Keeps the contents of a regular file."""
        sha256, size = self.add_blob(chunks)
        return StoredFile(size, sha256, git_hash("blob", size, read_chunks(self.blob(sha256))), lfs=False)

    def lfs_file(self, sha256: str) -> StoredFile:
        """A large file whose contents were uploaded before."""
        blob = self.blob(sha256)
        if not blob.is_file():
            raise HubError(400, f"The LFS object {sha256} was not uploaded")
        pointer = StoredFile(blob.stat().st_size, sha256, "", lfs=True).pointer
        return StoredFile(blob.stat().st_size, sha256, git_hash("blob", len(pointer), [pointer]), lfs=True)

    def add_blob(self, chunks: Iterable[bytes], expected: tuple[str, int] | None = None) -> tuple[str, int]:
        """Streams contents to disk; returns their SHA-256 and size, which have to be the expected ones."""
        digest, size = hashlib.sha256(), 0
        with self.store.scratch_file() as file:
            for chunk in chunks:
                digest.update(chunk)
                size += len(chunk)
                file.write(chunk)
            file.flush()
            received = (digest.hexdigest(), size)
            if expected is not None and received != expected:
                raise HubError(400, f"Checksum mismatch: expected sha256, size {expected}, received {received}")
            try:
                os.replace(file.name, self.blob(received[0]))
            except FileNotFoundError:  # deleted or moved meanwhile
                raise RepositoryNotFoundError(user="") from None
        return received


class Store:
    """All repositories of a server."""

    def __init__(self, folder: Path):
        self.folder = folder.resolve()
        self.scratch = self.folder / "scratch"
        self.lock = threading.RLock()
        shutil.rmtree(self.scratch, ignore_errors=True)  # what a killed server was receiving
        self.scratch.mkdir(parents=True)

    @contextmanager
    def scratch_file(self):
        """A file that is gone at the end unless it was renamed."""
        with tempfile.NamedTemporaryFile(dir=self.scratch, delete=False) as file:
            try:
                yield file
            finally:
                Path(file.name).unlink(missing_ok=True)

    def write_json(self, path: Path, content: dict) -> None:
        with self.scratch_file() as file:
            file.write(json.dumps(content).encode())
            file.flush()
            os.replace(file.name, path)

    def repository(self, kind: str, namespace: str, name: str) -> Repository:
        """A repository that may not exist; its name is checked, since it names folders."""
        if not NAME.fullmatch(namespace) or not NAME.fullmatch(name) or ".." in name or name.endswith(".git"):
            raise HubError(400, f"Invalid repository name: {f'{namespace}/{name}'!r}")
        return Repository(self, kind, namespace, name)

    def repositories(self, kind: str) -> list[Repository]:
        found = sorted(self.folder.glob(f"repositories/{kind}s/*/*/repository.json"))
        return [Repository(self, kind, path.parts[-3], path.parts[-2]) for path in found]

    def create(self, repository: Repository, private: bool) -> None:
        with self.lock:
            if repository.folder.exists():
                raise HubError(409, f"You already created this {repository.kind} repo: {repository.id}")
            (repository.folder / "blobs").mkdir(parents=True)
            (repository.folder / "commits").mkdir()
            tree = {".gitattributes": repository.add_file([GIT_ATTRIBUTES])}
            main = repository.add_commit(None, tree, "initial commit", "", repository.namespace)
            state = {"private": private, "created": now(), "refs": {"refs/heads/main": main}, "discussions": []}
            self.write_json(repository.folder / "repository.json", state)

    def delete(self, repository: Repository) -> None:
        with self.lock:
            repository.state()  # still there?
            # Renamed first: the repository is gone at once and never seen half deleted.
            grave = Path(tempfile.mkdtemp(dir=self.scratch))
            os.rename(repository.folder, grave / "repository")
        shutil.rmtree(grave)

    def move(self, source: Repository, target: Repository) -> None:
        with self.lock:
            source.state()  # still there?
            if target.folder.exists():
                raise HubError(409, f"{target.id} already exists")
            target.folder.parent.mkdir(parents=True, exist_ok=True)
            os.rename(source.folder, target.folder)
