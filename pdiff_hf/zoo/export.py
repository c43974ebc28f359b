"""Networks of a zoo as files that other libraries load."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import save_file

from ..errors import ZooError
from ..files import whole
from ..pipelines.neural_network_diffusion import ParameterLayout
from .adapters import CONFIG, DIFFUSERS_WEIGHTS, WEIGHTS
from .imports import StateDict


def export(layout: ParameterLayout, networks: Iterable[StateDict], folder: str | os.PathLike[str]) -> None:
    """Writes state dicts of a layout as [`WeightZoo.export`] says."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ZooError(f"{folder} is not empty: networks are exported into a folder of their own.")
    adapter = layout.config.adapter
    name = "model.safetensors" if adapter is None else WEIGHTS if adapter else DIFFUSERS_WEIGHTS
    for index, network in enumerate(networks):
        target = folder / f"{index:05d}"
        target.mkdir(parents=True, exist_ok=True)
        with whole(target / name) as file:
            # Tied tensors too are written under each of their names.
            save_file({key: value.contiguous().clone() for key, value in network.items()}, file, {"format": "pt"})
        if adapter:
            with whole(target / CONFIG) as file:
                # Where PEFT is told nothing, its defaults hold.
                told = {key: value for key, value in adapter.items() if value is not None}
                file.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
