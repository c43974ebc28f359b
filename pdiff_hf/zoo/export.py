"""Networks of a zoo as files that other libraries load."""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..errors import ZooError
from ..files import whole
from ..hub.cards import adapter_card
from ..pipelines.neural_network_diffusion import ParameterLayout
from .adapters import CONFIG, DIFFUSERS_WEIGHTS, WEIGHTS
from .imports import StateDict


def check_export(folder: str | os.PathLike[str], count: int) -> None:
    """Raises [`ZooError`] where a folder holds something else than some of so many networks that were exported."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ZooError(f"{folder} is a file: networks are exported into a folder of their own.")
    for entry in sorted(folder.iterdir()) if folder.is_dir() else []:
        known = re.fullmatch("[0-9]{5,}", entry.name) and int(entry.name) < count
        if not known or entry.is_symlink() or not entry.is_dir():
            raise ZooError(
                f"{folder} is not empty: {entry.name} is none of these {count} networks, which are exported into a "
                "folder of their own."
            )


def export(layout: ParameterLayout, networks: Iterable[StateDict], folder: str | os.PathLike[str]) -> None:
    """Writes state dicts of a layout as [`WeightZoo.export`] says."""
    adapter = layout.config.adapter
    card = "" if adapter is None else adapter_card(adapter)
    name = "model.safetensors" if adapter is None else WEIGHTS if adapter else DIFFUSERS_WEIGHTS
    for index, network in enumerate(networks):
        target = Path(folder, f"{index:05d}")
        if (target / name).exists():
            _check_same(target / name, network)
        else:
            with whole(target / name) as file:
                # Tied tensors too are written under each of their names.
                tensors = {key: value.contiguous().clone() for key, value in network.items()}
                said = {"lora_adapter_metadata": json.dumps(_packed(network))} if adapter == {} else {}
                save_file(tensors, file, {"format": "pt", **said})
        if adapter:
            with whole(target / CONFIG) as file:
                # Where PEFT is told nothing, its defaults hold.
                told = {key: value for key, value in adapter.items() if value is not None}
                file.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        if adapter is not None:
            with whole(target / "README.md") as file:
                file.write_text(card, encoding="utf-8")


def _packed(network: StateDict) -> dict[str, Any]:
    """What diffusers notes of an adapter, of scale 1: PEFT's configuration of each part of the pipeline."""
    ranks: dict[str, dict[str, int]] = {}
    for name, a in network.items():
        module, found, _ = name.partition(".lora_A.")
        if found:
            part, _, inner = module.partition(".")
            ranks.setdefault(part, {})[inner] = len(a)
    said: dict[str, Any] = {}
    for part, own in ranks.items():
        rank = next(iter(own.values()))
        pattern = {f"^{module}": other for module, other in own.items() if other != rank}
        config = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": rank,
            "rank_pattern": pattern,
            "alpha_pattern": pattern,
            "target_modules": sorted(own),
        }
        said |= {f"{part}.{key}": value for key, value in config.items()}
    return said


def _check_same(file: Path, network: StateDict) -> None:
    """Raises [`ZooError`] where a file holds another network."""
    try:
        found = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ZooError(f"{file} cannot be read: {error}. Remove it, and export again.") from error
    same = found.keys() == network.keys() and all(
        found[key].dtype == value.dtype and torch.equal(found[key], value) for key, value in network.items()
    )
    if not same:
        raise ZooError(f"{file} holds another network. Choose another folder, or remove it.")
