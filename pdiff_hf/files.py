"""How files are written, what a folder is, and who writes it."""

import hashlib
import hmac
import os
import secrets
import shutil
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout
from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError

from .errors import ConfigError, WriteError


# How folders begin that hold, beside a result, what is made and not yet part of it.
UNFINISHED = ".unfinished-"
LOCK = ".pdiff-hf.lock"
MAKE_ROOM = "Make room and run the same command again."
# What tells what a folder holds, and which stages write such folders.
KINDS = {
    "a zoo": (("zoo.json", "collect.yaml", "generate.yaml"), ("collect", "generate", "align", "import")),
    "a pipeline": (("model_index.json", "train.yaml"), ("train",)),
    "a report": (("report.json", "evaluate.yaml"), ("evaluate",)),
}
# What a stage replaces where there is its result already.
PARTS = {
    "a pipeline": (
        *("layout", "scheduler", "vae", "unet", "transformer", "condition_encoder", "pipeline.py", "evaluation"),
    ),
    "a report": (
        *("report.md", "report.html", "conditions.png", "plane.png", "parameters.png", "overlap.png"),
        *("calibration.png", "map.png", "denoising.png", "training.png"),
    ),
}


def is_zoo(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a zoo."""
    return Path(folder, "zoo.json").is_file()


def is_pipeline(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a pipeline."""
    return Path(folder, "model_index.json").is_file()


def check_kind(folder: str | os.PathLike[str], stage: str) -> None:
    """Raises [`ConfigError`] where a folder holds what another stage makes."""
    for kind, (names, stages) in KINDS.items():
        if stage not in stages and any(Path(folder, name).is_file() for name in names):
            raise ConfigError(f"{folder} holds {kind}. Choose another --output-dir.")


def check_parts(folder: str | os.PathLike[str], kind: str) -> None:
    """Raises [`ConfigError`] where a folder, in which no stage has begun, holds what one would replace."""
    if any(Path(folder, name).is_file() for name in KINDS[kind][0]) or any(Path(folder).glob(f"{UNFINISHED}*")):
        return
    for place in (Path(folder, part) for part in PARTS[kind]):
        if any(place.iterdir()) if place.is_dir() else place.exists():
            raise ConfigError(f"{folder} holds {place.name}, which is none of {kind}. Choose another --output-dir.")


def locked_if_writable(folder: str | os.PathLike[str]) -> AbstractContextManager[None]:
    """[`locked`], but where nobody can write."""
    return locked(folder) if os.access(folder, os.W_OK) else nullcontext()


@contextmanager
def locked(folder: str | os.PathLike[str]) -> Iterator[None]:
    r"""
    Holds a folder, which is made where it lacks, against other processes that would write it. Those that hold it
    already may do so again.

    Raises:
        [`WriteError`]: another process writes it.
    """
    folder = Path(folder).expanduser()
    made = not folder.exists()
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = folder.resolve() / LOCK
        lock: BaseFileLock = FileLock(file, is_singleton=True)
        try:
            try:
                lock.acquire(timeout=0)
            except NotImplementedError:  # a file system without locks of its own
                lock = SoftFileLock(file, is_singleton=True)
                lock.acquire(timeout=0)
            while not file.exists():  # whoever held it removed it meanwhile
                lock.release()
                lock.acquire(timeout=0)
        except Timeout:
            raise WriteError(
                f"Another process writes {folder}. Wait until it is done, or choose another folder."
            ) from None
    try:
        yield
    finally:
        if lock.lock_counter == 1:
            with suppress(OSError):  # Windows keeps what is open
                file.unlink()
        lock.release()
        if made:  # what was refused leaves nothing behind
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def whole(file: Path, remedy: str = MAKE_ROOM) -> Iterator[Path]:
    r"""
    A path to write to; what is there in the end becomes the file, which is on the disk whole or not at all.

    Args:
        file (`Path`): The file; its folder is made where it lacks.
        remedy (`str`, *optional*): What to say of a write that fails: what is safe, and what to do.

    Raises:
        [`WriteError`]: it could not be written.
    """
    temporary = file.with_name(f"{file.name}.part")
    try:
        with explained(file, remedy):
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary.unlink(missing_ok=True)  # it may be a link, which writers would follow
            yield temporary
            sync(temporary)
            temporary.replace(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def explained(file: Path, remedy: str = MAKE_ROOM) -> Iterator[None]:
    """Turns what writers raise where a disk is full or protected into a [`WriteError`]."""
    try:
        yield
    except WriteError:
        raise
    except PermissionError as error:
        raise WriteError(f"Cannot write {file}: {error}. Check who may write there.") from error
    except (OSError, RuntimeError, SafetensorError) as error:
        raise WriteError(f"Cannot write {file}: {error}. {remedy}") from error


def sync(file: Path) -> None:
    """Waits until a file is on the disk."""
    with file.open("rb") as written:
        os.fsync(written.fileno())


def human_size(size: float) -> str:
    """A size as one reads it: 46.6 MB."""
    for unit in ("kB", "MB", "GB"):
        size /= 1000
        if size < 999.5 or unit == "GB":
            break
    return f"{size:,.1f} {unit}"


def check_room(folder: Path, size: int) -> None:
    """Raises [`WriteError`] where a disk has less room than so many bytes."""
    place = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if size > free:
        raise WriteError(f"{folder} would take {human_size(size)}, and its disk has {human_size(free)} free.")


def check_opens(file: Path) -> None:
    """Raises `OSError` where a file cannot even be opened, which says nothing of what is in it."""
    try:
        os.fsencode(file).decode()
    except UnicodeError as error:
        raise OSError("its path is no UTF-8, in which readers of safetensors name files") from error
    file.open("rb").close()


def stays_inside(file: Path, folder: Path) -> bool:
    """Whether a file is in the folder, or in the blobs of the Hub's cache that it is in; links are followed."""
    try:
        home, target = folder.resolve(), file.resolve()
    except (OSError, RuntimeError):  # links in a circle
        return False
    return target.is_relative_to(home) or (
        home.parent.name == "snapshots" and target.is_relative_to(home.parents[1] / "blobs")
    )


def own_name(*parts: Any) -> str:
    """A name that only this user's processes can give to a file: of files of others nothing is believed."""
    return hmac.new(_secret(), repr(parts).encode(), hashlib.sha256).hexdigest()


@cache
def _secret() -> bytes:
    """In the folder of the user's settings, or else in the cache, which may be a job's own or shared by many."""
    settings = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    for folder in (settings, HF_HOME):
        file = Path(folder, "pdiff-hf", "secret")
        if not file.is_absolute():  # nobody's home
            continue
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(file.with_name("secret.lock")):
                if not file.exists():
                    with whole(file) as temporary:
                        temporary.touch(mode=0o600)
                        temporary.write_bytes(secrets.token_bytes(32))
                return file.read_bytes()
        except (OSError, NotImplementedError):
            continue
    warnings.warn(
        f"Neither {settings} nor HF_HOME can be written: what is interrupted now cannot be gone on with.", stacklevel=2
    )
    return secrets.token_bytes(32)
