# Over 400 lines: formats of three libraries become one, and what does not belong together is told apart.
"""LoRA adapters that were trained elsewhere: folders and repositories of PEFT, and files of diffusers and kohya."""

import contextlib
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ..errors import ZooError
from ..extras import require
from ..hub.client import commit_of, download_file, is_repository, repository_files
from ..networks.adapted import FACTORS, MAGNITUDE, PREFIX
from .imports import Names, StateDict, matched, natural, read_safetensors


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
# What kohya notes of the base model in a file.
NOTES = {"ss_base_model_version": "kinds of base models", "ss_new_sd_model_hash": "base models"}
# Of PEFT's configuration, what says where an adapter belongs, and how far it is that of another. The rest is of
# training, or may name files and code.
BASE = "base_model_name_or_path"
TEXTS = (BASE, "revision", "task_type", "bias", "peft_version")
FLAGS = ("fan_in_fan_out", "use_dora", "use_rslora")
NAMES = ("target_modules", "modules_to_save")
PATTERNS = ("rank_pattern", "alpha_pattern")
# By which other tensors, or other layers, come into the update; and initializations that change the base model.
UNREAD = (
    *("lora_bias", "layer_replication", "alora_invocation_tokens", "use_qalora", "use_bdlora"),
    *("trainable_token_indices", "target_parameters", "ensure_weight_tying"),
)
CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
MOST_CONFIG, MOST_NAMES = 2**20, 10_000
COMPARED = {
    BASE: "base models",
    "revision": "revisions of the base model",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
}
# Of the U-Nets of Stable Diffusion, XL too: by it diffusers reads the places that kohya numbers.
LAYERS_PER_BLOCK = 2
PARTS_OF_UNET = (
    *("conv_in", "time_embedding", "add_embedding", "down_blocks", "mid_block", "up_blocks", "conv_norm_out"),
    "conv_out",
)
INSTEAD = (
    "Load it with its own pipeline, and save it with `save_lora_weights(..., unet_lora_adapter_metadata=...)`, "
    "which keeps its scale."
)
# Tensors of scale 1, what PEFT's configuration says, and kohya's notes of the base model.
Read = tuple[StateDict, dict[str, Any], dict[str, str]]


@dataclass(frozen=True)
class Adapter:
    r"""
    An adapter, got when it is needed.

    Attributes:
        source (`str`): What it is called.
        row (`dict`): What the zoo notes of it.
        files (`list[str]`): Those that it lies among.
        get (`Callable[[str], Path]`): One of them.
    """

    source: str
    row: dict[str, Any]
    files: list[str]
    get: Callable[[str], Path]

    def read(self) -> Read:
        r"""
        Its tensors, of scale 1, what PEFT's configuration says of it, and kohya's notes of its base model.

        Raises:
            [`ZooError`]: it is no LoRA adapter, or is damaged.
            [`HubError`]: it cannot be got.
        """
        try:
            if CONFIG in self.files:
                return self._of_peft()
            return self._of_diffusers()
        except ZooError as error:
            raise ZooError(f"{self.source}: {error}") from error

    def _of_peft(self) -> Read:
        if WEIGHTS not in self.files:
            raise ZooError(
                f"it has an {CONFIG} and no {WEIGHTS}: its upload is not complete, or its weights are in a format "
                "that may run code."
            )
        config = read_config(self.get(CONFIG))
        state_dict = {name: _float(name, value) for name, value in read_safetensors(self.get(WEIGHTS))[0].items()}
        known = (*FACTORS, *FACTORS.values())
        if unknown := [n for n in state_dict if ".lora_" in n and not n.endswith(known) and MAGNITUDE not in n]:
            raise ZooError(f"`{unknown[0]}` is no part of a LoRA that is known here.")
        for a, b in FACTORS.items():
            for name in [name for name in state_dict if name.endswith(b)]:
                if (other := name.removesuffix(b) + a) not in state_dict:
                    raise ZooError(f"it has `{name}` and no `{other}`.")
        for name, suffix in [(name, a) for name in state_dict for a in FACTORS if name.endswith(a)]:
            module, rank = name.removesuffix(suffix), _rank(name, state_dict[name])
            said = _of_pattern(config["rank_pattern"], module, config["r"])
            if rank != said:
                raise ZooError(f"its {CONFIG} says rank {said}, and `{name}` has {rank}.")
            other = module + FACTORS[suffix]
            if other not in state_dict:
                raise ZooError(f"it has `{name}` and no `{other}`.")
            _check_factor(other, state_dict[other], rank)
            state_dict[other] = state_dict[other] * _scale(config, module, rank)
        return state_dict, config, {}

    def _of_diffusers(self) -> Read:
        safe = [name for name in self.files if name.endswith(".safetensors")]
        if DIFFUSERS_WEIGHTS not in safe and len(safe) != 1:
            found = ", ".join(safe or self.files)[:300] or "nothing"
            raise ZooError(f"it has neither {CONFIG} nor {DIFFUSERS_WEIGHTS} nor one safetensors file, and {found}.")
        file = self.get(DIFFUSERS_WEIGHTS if DIFFUSERS_WEIGHTS in safe else safe[0])
        state_dict, said = read_safetensors(file)
        if any(name.startswith(PREFIX) for name in state_dict):
            raise ZooError(f"it is one of PEFT, and has no {CONFIG}, without which its scale is not known.")
        notes = {name: said[name] for name in NOTES if said.get(name)}
        return _converted(state_dict, _packed_config(said, file.name)), {}, notes


def read_config(file: Path) -> dict[str, Any]:
    """What PEFT's configuration says where an adapter belongs, of the right types: it may come from anywhere."""
    if file.stat().st_size > MOST_CONFIG:
        raise ZooError(f"its {CONFIG} is larger than {MOST_CONFIG:,} bytes.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise ZooError(f"its {CONFIG} is damaged: {error!s:.200}") from error
    return checked_config(content)


def checked_config(content: dict[str, Any]) -> dict[str, Any]:
    """The known entries of PEFT's configuration, or a [`ZooError`] that says what is wrong with one."""
    if content.get("peft_type") != "LORA":
        raise ZooError(f"it is an adapter of type {content.get('peft_type')!r:.50}; LORA is read.")

    for name in UNREAD:
        if content.get(name):
            raise ZooError(f"its {CONFIG} has {name}, by which its tensors mean something else than those of a LoRA.")
    start = content.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(CHANGING):
        raise ZooError(
            f"it was initialized by {start!r:.50}, which changes the base model: convert it to a LoRA of the one that "
            "is unchanged, as PEFT's `save_pretrained(path_initial_model_for_weight_conversion=...)` does."
        )

    def entry(name: str, fits: Callable[[Any], bool], default: Any) -> Any:
        value = content.get(name)
        if value is None:
            return default
        if not fits(value):
            raise ZooError(f"its {CONFIG} has {name} = {value!r:.100}.")
        return value

    def is_number(value: Any) -> bool:
        return type(value) in (int, float) and 0 < value <= sys.float_info.max

    def is_text(value: Any) -> bool:
        return isinstance(value, str) and len(value) < 500 and value.isprintable()

    def are_names(value: Any) -> bool:
        return is_text(value) or (
            isinstance(value, list) and len(value) <= MOST_NAMES and all(is_text(one) for one in value)
        )

    def is_pattern(value: Any) -> bool:
        # PEFT takes regular expressions, which can take forever; names are what people write.
        return (
            isinstance(value, dict)
            and len(value) <= MOST_NAMES
            and all(re.fullmatch(r"\^?[\w.-]+", key) and is_number(number) for key, number in value.items())
        )

    config: dict[str, Any] = {"peft_type": "LORA"}
    config |= {name: entry(name, is_text, None) for name in TEXTS}
    config |= {name: entry(name, lambda value: isinstance(value, bool), False) for name in FLAGS}
    config |= {name: entry(name, are_names, None) for name in NAMES}
    config |= {name: entry(name, is_pattern, {}) for name in PATTERNS}
    config["r"] = entry("r", lambda value: type(value) is int and value > 0, 8)
    config["lora_alpha"] = entry("lora_alpha", is_number, 8)
    for name in NAMES:
        if isinstance(config[name], list):
            config[name] = sorted(config[name])
    return config


def check_adapter(adapter: Any) -> None:
    """Raises `ValueError` where what a zoo says of its adapters is nothing that PEFT would be given."""
    if not isinstance(adapter, dict):
        raise ValueError(f"the adapter is {adapter!r:.200}")
    try:
        known = checked_config(adapter).keys() | {"inference_mode"} if adapter else set()
        if unknown := sorted(adapter.keys() - known):
            raise ValueError(f"the adapter has the entry {unknown[0]!r:.100}, which that of a zoo does not have")
    except ZooError as error:
        raise ValueError(str(error)) from error


def _of_pattern(pattern: dict[str, Any], module: str, default: Any) -> Any:
    """What a pattern of names says of a module: the first whose last parts it names, or with ^ whose whole name."""
    whole = module.removeprefix(PREFIX)
    for key, value in pattern.items():
        if whole == key.removeprefix("^") or (not key.startswith("^") and whole.endswith(f".{key}")):
            return value
    return default


def _rank(name: str, a: torch.Tensor, remedy: str = "") -> int:
    """That of an A, `[rank, in, ...]`, or a [`ZooError`], with a remedy."""
    if a.ndim < 2:
        raise ZooError(f"`{name}` is {list(a.shape)}, which is no factor of a LoRA that is known here.{remedy}")
    return len(a)


def _check_factor(name: str, b: torch.Tensor, rank: int, remedy: str = "") -> None:
    """Raises [`ZooError`], with a remedy, where a tensor is no B of this rank, `[out, rank, ...]`."""
    if rank == 0 or b.ndim < 2 or b.shape[1] != rank:
        raise ZooError(
            f"`{name}` is {list(b.shape)}, which with rank {rank} is no factor of a LoRA that is known here.{remedy}"
        )


def _float(name: str, value: torch.Tensor) -> torch.Tensor:
    if not value.is_floating_point():
        raise ZooError(f"`{name}` is {value.dtype}, and no floating-point tensor.")
    return value.float()


def _packed_config(said: dict[str, str], name: str) -> dict[str, Any]:
    """What diffusers notes of an adapter in the metadata of its file of this name, by part of the pipeline."""
    packed = said.get("lora_adapter_metadata")
    if packed is None:
        return {}
    try:
        content = json.loads(packed)
        return dict(content.items())
    except (ValueError, AttributeError, RecursionError) as error:
        raise ZooError(f"what {name} says of itself is damaged: {error!s:.200}") from error


def _converted(state_dict: StateDict, packed: dict[str, Any]) -> StateDict:
    """Tensors of a LoRA of diffusers or kohya under PEFT's names, of scale 1."""
    loaders = require("diffusers.loaders.lora_pipeline", "adapters")
    if any("dora_scale" in name for name in state_dict):
        raise ZooError("it has scales of DoRA, which diffusers leaves out: without them it is another adapter.")
    try:
        of_diffusers, alphas = loaders.StableDiffusionLoraLoaderMixin.lora_state_dict(
            dict(state_dict), unet_config=SimpleNamespace(layers_per_block=LAYERS_PER_BLOCK)
        )
    except Exception as error:  # whatever a format of others makes of the converters
        raise ZooError(f"diffusers does not convert it ({type(error).__name__}: {error!s:.200}). {INSTEAD}") from error
    if all(name.startswith("lora_") for name in state_dict):
        # kohya's names have no dots, and diffusers guesses where these were.
        for name in of_diffusers:
            part, _, inner = name.partition(".")
            if part == "unet" and inner.partition(".")[0] not in PARTS_OF_UNET:
                raise ZooError(f"diffusers reads of it `{name}`, which no U-Net of Stable Diffusion has. {INSTEAD}")
    new = _names_of_peft([*of_diffusers, *(name.removesuffix(".alpha") for name in alphas or ())])
    converted = {new[name]: _float(name, value) for name, value in of_diffusers.items()}
    scales = {new[name.removesuffix(".alpha")].partition(".lora_")[0]: alpha for name, alpha in (alphas or {}).items()}
    for name, factor in converted.items():
        module, _, kind = name.partition(".lora_")
        if kind not in ("A.weight", "B.weight"):
            raise ZooError(f"`{name}` is no factor of a LoRA that is known here. {INSTEAD}")
        other = f"{module}.lora_{'B' if kind.startswith('A') else 'A'}.weight"
        if other not in converted:
            raise ZooError(f"it has `{name}` and no `{other}`.")
        if kind == "B.weight":
            rank = _rank(other, converted[other], f" {INSTEAD}")
            _check_factor(name, factor, rank, f" {INSTEAD}")
            part, _, inner = module.partition(".")
            own = {key.removeprefix(f"{part}."): value for key, value in packed.items() if key.startswith(f"{part}.")}
            config = checked_config(own) if own else {"lora_alpha": scales.get(module, rank), "alpha_pattern": {}}
            converted[name] = factor * _scale(config, inner, rank)
    return converted


def _names_of_peft(names: list[str]) -> dict[str, str]:
    """PEFT's names of tensors that diffusers names."""
    converters = require("diffusers.utils.state_dict_utils", "adapters")
    of_text = {name: name for name in names if name.startswith("text_encoder")}
    with contextlib.suppress(ValueError):  # PEFT's own names already
        of_text = converters.convert_state_dict_to_peft(of_text)
    rest = {name: name for name in names if not name.startswith("text_encoder")}
    return {old: new for new, old in converters.convert_unet_state_dict_to_peft(of_text | rest).items()}


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    """By what PEFT multiplies the update of a module."""
    alpha = _of_pattern(config["alpha_pattern"], module, config["lora_alpha"])
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def find_adapters(names: Names, token: str | None) -> list[Adapter]:
    r"""
    The adapters that names stand for.

    Args:
        names (`str`, `os.PathLike` or a list of them):
            Folders and safetensors files of this machine; folders of such folders; names of model repositories on the
            Hub, also as patterns such as `org/*-lora`.
        token (`str`, *optional*): Of the Hub.
    """
    found: list[Adapter] = []
    for name in [names] if isinstance(names, str | os.PathLike) else names:
        path = Path(name).expanduser()
        if path.is_dir():
            found += _of_folder(path)
        elif path.name == WEIGHTS and path.with_name(CONFIG).is_file():
            found += _of_folder(path.absolute().parent)
        elif path.is_file():
            found.append(Adapter(path.name, {"source": path.name}, [path.name], path.parent.joinpath))
        elif any(sign in str(name) for sign in "*?["):
            found += [_of_repository(*model, token) for model in matched(str(name), token)]
        elif is_repository(name):
            found.append(_of_repository(str(name), commit_of(str(name), token), token))
        else:
            raise ZooError(f"{str(name)!r} is no folder or file here, and no name of a repository on the Hub.")
    if not found:
        raise ZooError("No adapters were given.")
    return found


def with_metadata(adapters: list[Adapter], metadata: Iterable[Mapping[str, Any]]) -> list[Adapter]:
    """The adapters with further columns in their rows, by their source."""
    rows = [dict(row) for row in metadata]
    if strange := [row["source"] for row in rows if not isinstance(row.get("source"), str | None)]:
        raise ZooError(f"The metadata have the source {strange[0]!r:.200}, which is no name.")
    by_source = {row.get("source"): row for row in rows}
    if len(by_source) < len(rows):
        twice = Counter(row.get("source") for row in rows).most_common(1)[0][0]
        raise ZooError(f"The metadata have several rows whose source is {twice!r:.200}.")
    if not by_source:
        return adapters
    names = Counter(one.row["source"] for one in adapters)
    if repeated := [name for name, times in names.items() if times > 1]:
        raise ZooError(
            f"Several adapters are called {repeated[0]!r}, and metadata tell them by their names: rename one."
        )
    if lacking := [one.source for one in adapters if one.row["source"] not in by_source]:
        raise ZooError(f"The metadata have no row whose source is {lacking[0]!r}.")
    return [replace(one, row=by_source[one.row["source"]] | one.row) for one in adapters]


def _of_folder(folder: Path) -> list[Adapter]:
    """That in a folder, or those in its folders and files."""
    folder = Path(os.path.abspath(folder))  # of which "." has a name, too
    files = sorted(file.name for file in folder.iterdir() if file.is_file())
    if CONFIG in files or DIFFUSERS_WEIGHTS in files:
        return [Adapter(folder.name, {"source": folder.name}, files, folder.joinpath)]
    found = [
        Adapter(name, {"source": name}, [name], folder.joinpath) for name in files if name.endswith(".safetensors")
    ]
    for inner in sorted(folder.iterdir(), key=lambda path: natural(path.name)):
        if inner.is_dir() and not inner.name.startswith("."):
            own = sorted(file.name for file in inner.iterdir() if file.is_file())
            if CONFIG in own or any(name.endswith(".safetensors") for name in own):
                found.append(Adapter(inner.name, {"source": inner.name}, own, inner.joinpath))
    if not found:
        raise ZooError(f"{folder} holds no adapters: no {CONFIG} and no safetensors files, nor folders of them.")
    return sorted(found, key=lambda one: natural(one.source))


def _of_repository(name: str, commit: str, token: str | None) -> Adapter:
    files = repository_files(name, commit, token)
    return Adapter(name, {"source": name, "revision": commit}, files, partial(_download, name, commit, token))


def _download(name: str, commit: str, token: str | None, file: str) -> Path:
    return Path(download_file(name, "model", commit, token, file))


def check_same(one: Adapter, first: Adapter, ours: Read, theirs: Read) -> None:
    """Raises [`ZooError`] where an adapter is one of another network, or of another form, than the first, which gets
    the notes that it lacks."""
    both = f"{one.source} and {first.source}"
    (state_dict, config, notes), (expected, of_first, their_notes) = ours, theirs
    compared = [(text, config.get(name), of_first.get(name)) for name, text in COMPARED.items()]
    for text, mine, other in compared:
        if mine != other:
            raise ZooError(f"{both} have different {text}: {mine!r:.200} and {other!r:.200}.")
    for name, mine in notes.items():
        if mine != (other := their_notes.setdefault(name, mine)):
            raise ZooError(f"{one.source} and others have different {NOTES[name]}: {mine!r:.200} and {other!r:.200}.")
    with_magnitudes = [any(MAGNITUDE in name for name in tensors) for tensors in (state_dict, expected)]
    if with_magnitudes[0] != with_magnitudes[1]:
        has, lacks = (one, first) if with_magnitudes[0] else (first, one)
        raise ZooError(f"{has.source} has magnitude vectors of DoRA, and {lacks.source} has none.")
    alone, lacking = (sorted(a.keys() - b.keys()) for a, b in ((state_dict, expected), (expected, state_dict)))
    if alone and [list(state_dict[n].shape) for n in alone] == [list(expected[n].shape) for n in lacking]:
        raise ZooError(
            f"{both} have tensors of the same shapes at different paths, such as `{alone[0]}` and `{lacking[0]}`: "
            "they adapt different modules, or were saved with different versions of transformers. Load and save the "
            "older one with the newer."
        )
    if alone or lacking:
        has = one if alone else first
        raise ZooError(f"{both} adapt different modules: {has.source} alone has `{(alone or lacking)[0]}`.")
    for name, value in state_dict.items():
        if value.shape != expected[name].shape:
            axis = 0 if name.endswith(tuple(FACTORS)) else 1
            rank = ".lora_" in name and value.shape[axis] != expected[name].shape[axis]
            raise ZooError(
                f"{both} have different {'ranks' if rank else 'shapes'}: `{name}` is {list(value.shape)} and "
                f"{list(expected[name].shape)}."
            )


def config_of_zoo(config: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """PEFT's configuration of the adapters of a zoo, which have tensors of these names and are all of scale 1."""
    if not config:
        return {}
    # Whatever rules chose them: others, such as which layers to leave out, stay behind.
    adapted = {
        name.removesuffix(suffix).removeprefix(PREFIX) for name in names for suffix in FACTORS if name.endswith(suffix)
    }
    of_scale_1 = {"lora_alpha": config["r"], "alpha_pattern": dict(config["rank_pattern"]), "use_rslora": False}
    return config | of_scale_1 | {"target_modules": sorted(adapted), "inference_mode": True}
