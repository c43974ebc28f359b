"""How files are written, and what a folder is."""

from pathlib import Path


# How folders begin that hold, beside a result, what is made and not yet part of it.
UNFINISHED = ".unfinished-"


def write_whole(file: Path, text: str) -> None:
    """Writes a file, whole or not at all."""
    temporary = file.with_name(f"{file.name}.part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)
