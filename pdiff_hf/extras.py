"""Optional dependencies, imported where they are used."""

import importlib
import json
from importlib.metadata import distributions
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from .errors import MissingExtraError


def require(module: str, extra: str) -> ModuleType:
    """Imports a module of an extra, or says which extra to install."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise MissingExtraError(
            f"This needs {error.name}, which comes with an extra: {install(extra)}", name=error.name
        ) from error


def install(extra: str) -> str:
    """The command that installs an extra, from where this package was installed from."""
    notes = (found.read_text("direct_url.json") for found in distributions(name="pdiff-hf"))
    origin: dict[str, Any] = next((json.loads(note) for note in notes if note), {})
    address, fetched = origin.get("url", ""), origin.get("vcs_info")
    if fetched:
        return f"pip install 'pdiff-hf[{extra}] @ {fetched['vcs']}+{address}'"
    if address.startswith("file:"):
        folder = Path(url2pathname(urlsplit(address).path))
        if (folder / "pyproject.toml").is_file():
            return f"pip install '{'.' if folder == Path.cwd() else folder}[{extra}]'"
    return f"pip install 'pdiff-hf[{extra}]'"
