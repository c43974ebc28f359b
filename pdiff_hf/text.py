"""Text that several stages show, and what strangers wrote, made harmless."""

import re
import shlex
import time
from pathlib import Path
from typing import Any

import yaml


# More metadata than any card or configuration has; reading them takes seconds.
MOST_YAML = 2**19


def printable(text: str) -> str:
    """Text for a terminal: escape sequences, half characters and what turns the direction of writing are spelt out."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def time_since(start: float) -> str:
    """How long it is since a reading of `time.perf_counter()`: to a tenth of a second, or to a minute."""
    seconds = time.perf_counter() - start
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def plain(text: str) -> str:
    """One line for a card: letters, digits and the punctuation of names, a ? for what may be Markdown or HTML."""
    return re.sub(r"[^\w ./:@+,()=-]", "?", text[:200])


def load_yaml(text: str) -> Any:
    r"""
    The content of a YAML document that may come from anywhere.

    Raises:
        `yaml.YAMLError`: it is none, is longer than half a megabyte, or has aliases, by which a few lines become
        gigabytes.
    """
    if len(text) > MOST_YAML:
        raise yaml.YAMLError(f"{len(text):,} characters are more than the {MOST_YAML:,} that are read")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text, loader)):
        raise yaml.YAMLError("aliases (*name) are not read; write out what they stand for")
    try:
        return yaml.load(text, loader)
    except (ValueError, RecursionError) as error:  # dates that do not exist; many levels, without libyaml
        raise yaml.YAMLError(str(error)) from error


def with_front(sentence: str) -> list[str]:
    """The sentence of a verdict, and what the front is where it is said."""
    explained = "(The front: the best that noise, averages and Gaussians reach there, for nothing.)"
    return [sentence, explained] if " front" in sentence else [sentence]


def shown_name(task: str) -> str:
    """The name of a task without the path of its file, which says nothing to anyone else."""
    place, _, class_name = task.rpartition(":")
    return f"{Path(place).name}:{class_name}" if place.endswith(".py") else task


def own_task(task: str | None) -> str:
    """The option that names code of one's own in a command, which is not run unasked; nothing of a built-in task."""
    return f" --task {shlex.quote(task)}" if task and ":" in task else ""
