"""Optional dependencies, imported where they are used."""

import importlib
from types import ModuleType

from .errors import MissingExtraError


def require(module: str, extra: str) -> ModuleType:
    """Imports a module of an extra, or says which extra to install."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise MissingExtraError(
            f"This needs {error.name}, which comes with an extra: pip install 'pdiff-hf[{extra}]'", name=error.name
        ) from error
