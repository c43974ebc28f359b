"""A task builds a base network, has the data to train it, and scores it."""

from .check import check_task
from .family import TaskFamily, check_family, load_family
from .task import Task, half_cosine, load_task


__all__ = ["Task", "TaskFamily", "check_family", "check_task", "half_cosine", "load_family", "load_task"]
