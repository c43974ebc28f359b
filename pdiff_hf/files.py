"""How files are written, and what a folder is."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from .errors import WriteError


# How folders begin that hold, beside a result, what is made and not yet part of it.
UNFINISHED = ".unfinished-"
MAKE_ROOM = "Make room and run the same command again."


def is_zoo(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a zoo."""
    return Path(folder, "zoo.json").is_file()


def is_pipeline(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a pipeline."""
    return Path(folder, "model_index.json").is_file()


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
    except (OSError, RuntimeError, SafetensorError) as error:
        raise WriteError(f"Cannot write {file}: {error}. {remedy}") from error


def sync(file: Path) -> None:
    """Waits until a file is on the disk."""
    with file.open("rb") as written:
        os.fsync(written.fileno())
