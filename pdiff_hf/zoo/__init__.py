"""A zoo: many networks of one architecture."""

from ..errors import ZooError
from .store import BATCH_VALUES, WeightZoo, built, check_room_for, evenly, make_layout, networks_per_batch


__all__ = [
    "BATCH_VALUES",
    "WeightZoo",
    "ZooError",
    "built",
    "check_room_for",
    "evenly",
    "make_layout",
    "networks_per_batch",
]
