"""Networks of a zoo as files that other libraries load."""

import json
import os
from pathlib import Path

from safetensors.torch import save_file

from ..errors import ZooError
from ..files import whole
from .adapters import CONFIG, DIFFUSERS_WEIGHTS, WEIGHTS
from .store import WeightZoo


def export(zoo: WeightZoo, folder: str | os.PathLike[str]) -> None:
    r"""
    Writes a folder a network, named by its index: of adapters what `PeftModel.from_pretrained(base, folder)` or, where
    they are of diffusers, `pipe.load_lora_weights(folder)` loads; of other networks `model.safetensors`, their
    complete state dict.

    Args:
        zoo (`WeightZoo`): The networks.
        folder (`str` or `os.PathLike`): Where the folders go; it must not hold anything yet.

    Raises:
        [`ZooError`]: the folder is not empty.
        [`WriteError`]: it cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ZooError(f"{folder} is not empty: networks are exported into a folder of their own.")
    adapter = zoo.layout.config.adapter
    name = "model.safetensors" if adapter is None else WEIGHTS if adapter else DIFFUSERS_WEIGHTS
    for index in range(len(zoo)):
        # Tied tensors too are written under each of their names.
        state_dict = {key: value.contiguous().clone() for key, value in zoo.state_dict(index).items()}
        target = folder / f"{index:05d}"
        target.mkdir(parents=True, exist_ok=True)
        with whole(target / name) as file:
            save_file(state_dict, file, {"format": "pt"})
        if adapter:
            with whole(target / CONFIG) as file:
                file.write_text(json.dumps(dict(adapter), indent=1) + "\n", encoding="utf-8")
