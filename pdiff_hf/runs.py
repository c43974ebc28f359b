"""What repeats or resumes a run: its configuration, and the facts that it found."""

import json
import platform
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml

from .config import load_config
from .errors import ConfigError
from .files import whole
from .text import load_yaml


PACKAGES = (
    *("pdiff-hf", "torch", "diffusers", "accelerate", "safetensors", "huggingface_hub", "numpy", "scikit-learn"),
    *("peft", "transformers"),  # of adapters
)


def save_run(folder: str | Path, stage: str, config: Any, **facts: Any) -> None:
    r"""
    Writes what is needed to repeat a run: `<stage>.yaml`, which `--config` reads back, and `<stage>.facts.json` with
    versions, platform and threads.
    """
    folder = Path(folder)
    content = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()}
    _write(folder / f"{stage}.yaml", yaml.safe_dump(content, sort_keys=False))
    facts = {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "versions": versions(),
        **facts,
    }
    _write(folder / f"{stage}.facts.json", json.dumps(facts, indent=1) + "\n")


def _write(file: Path, text: str) -> None:
    with whole(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def check_same_run(folder: str | Path, stage: str, config: Any, but_for: Sequence[str]) -> None:
    """Raises [`ConfigError`] where a folder's unfinished run has another configuration than the one to go on with."""
    file = Path(folder) / f"{stage}.yaml"
    if not file.exists():
        raise ConfigError(f"{folder} holds results but no {file.name}: `pdiff-hf {stage}` did not make them.")
    before, now = asdict(load_config(type(config), file)), asdict(config)
    for name in now.keys() - set(but_for):
        if now[name] != before[name]:
            raise ConfigError(
                f"{folder} holds a run with {name} {before[name]!r}, not {now[name]!r}. Choose another --output-dir, "
                "or delete it."
            )


def check_not_fewer(folder: str | Path, present: int, wanted: int) -> None:
    """Raises [`ConfigError`] where a zoo holds more networks than are asked for."""
    if present > wanted:
        raise ConfigError(
            f"{folder} holds {present} networks, and num_networks is {wanted}. Choose another --output-dir, or delete "
            "it."
        )


def check_same_facts(folder: str | Path, stage: str, facts: dict[str, Any]) -> None:
    """Raises [`ConfigError`] where the run to go on with had other facts, such as the number of networks."""
    file = Path(folder, f"{stage}.facts.json")
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
        before = {name: read[name] for name in facts}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"{file} is damaged ({error!r}): the run cannot be resumed. Choose another --output-dir."
        ) from error
    for name, value in facts.items():
        if before[name] == value:
            continue
        if name.endswith("_sha256"):
            raise ConfigError(
                f"The {name.removesuffix('_sha256')} of the run in {folder} changed meanwhile: it cannot be resumed. "
                "Choose another --output-dir."
            )
        raise ConfigError(
            f"{folder} holds a run with {before[name]} {name}, not {value}: it cannot be resumed. Choose another "
            "--output-dir."
        )


def zoo_of_training(pipeline: str | Path) -> str | None:
    """The zoo, a folder or a name, that a pipeline in a folder here was trained on; None where nothing says it."""
    try:
        zoo = load_yaml(Path(pipeline, "train.yaml").read_text(encoding="utf-8"))["zoo"]
    except (OSError, KeyError, TypeError, ValueError, yaml.YAMLError):
        return None
    return zoo if isinstance(zoo, str) else None


def noted(folder: str | Path, stage: str, name: str) -> Any:
    """A fact that a run noted; None in a folder that came without it, or whose facts are damaged."""
    try:
        return json.loads(Path(folder, f"{stage}.facts.json").read_text(encoding="utf-8")).get(name)
    except (OSError, ValueError, AttributeError, RecursionError):
        return None


def generator_at(seed: int, position: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The randomness of a step of a run, which depends on the run's seed and the step alone."""
    return torch.Generator(device).manual_seed((seed * 1_000_003 + position) % 2**63)


def seed_everything(seed: int) -> None:
    """What `torch.manual_seed` does. Where there is no accelerator, it notes the stack of each call for one that may
    come, which takes as long as a training step of a small network."""
    (torch.manual_seed if torch.accelerator.is_available() else torch.default_generator.manual_seed)(seed)


def own_randomness() -> AbstractContextManager[None]:
    """What is drawn inside leaves the caller's randomness as it was, on the CPU and on the GPU in use."""
    # Of several GPUs torch would save the state of each, and warn.
    return torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.device_count() > 1 else None)


def versions() -> dict[str, str]:
    """The versions of the packages that results depend on, where they are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
