"""A task builds a base network, has the data to train it, and scores it."""

from .task import Task, load_task


__all__ = ["Task", "load_task"]
