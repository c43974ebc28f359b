"""A task builds a base network, has the data to train it, and scores it."""

from .check import check_task
from .task import Task, load_task


__all__ = ["Task", "check_task", "load_task"]
