"""Every error that a user can cause and mend."""

from .text import printable


class PdiffError(Exception):
    """Something is wrong with what was given; the message says what was found, what was expected and what to do."""

    def __str__(self) -> str:
        # It may quote a stranger, and will be shown in a terminal.
        return printable(super().__str__())


class ConfigError(PdiffError, ValueError):
    """A YAML file or an argument that does not describe a stage."""


class WriteError(PdiffError, OSError):
    """A file that cannot be written: the disk is full or protected, or another process writes the folder."""


class ZooError(PdiffError, ValueError):
    """A zoo that cannot be read or written, or a network that does not belong into it."""


class HubError(PdiffError, ValueError):
    """A repository that cannot be read or written."""


class PipelineError(PdiffError, ValueError):
    """A pipeline that cannot be loaded."""


class TrainingError(PdiffError, ValueError):
    """A training that cannot start or go on."""


class TaskError(PdiffError, ValueError):
    """A task that cannot be found, or does not do what a task does."""


class MissingExtraError(PdiffError, ModuleNotFoundError):
    """A package of an extra is not installed."""
