"""One frozen dataclass a stage is its command line, its YAML file and its Python face."""

import json
import platform
import sys
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
import tyro
import yaml

from .errors import PdiffError


Config = TypeVar("Config")
# How folders begin that hold, beside a result, what is made and not yet part of it.
UNFINISHED = ".unfinished-"
PACKAGES = ("pdiff-hf", "torch", "diffusers", "accelerate", "safetensors", "huggingface_hub", "numpy", "scikit-learn")


class ConfigError(PdiffError, ValueError):
    """A YAML file or an argument that does not describe a stage."""


def parse(config_class: type[Config], stage: str, args: Sequence[str] | None = None) -> Config:
    r"""
    The configuration of a stage from the command line. `--config FILE` reads a YAML file first, such as the one that
    every run leaves beside its results; the other arguments override it.
    """
    args = list(sys.argv[1:] if args is None else args)
    defaults: dict[str, Any] = {}
    args = [part for arg in args for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
    if "--config" in args:
        place = args.index("--config")
        if place + 1 == len(args):
            raise SystemExit("--config needs the path of a YAML file.")
        file = args[place + 1]
        del args[place : place + 2]
        try:
            defaults["default"] = load_config(config_class, file)
        except (ConfigError, OSError) as error:
            raise SystemExit(f"pdiff-hf {stage}: {error}") from error
    return tyro.cli(config_class, prog=f"pdiff-hf {stage}", args=args, **defaults)


def stage_main(stage: str, config_class: type[Config], run: Callable[[Config], Any]) -> Callable[..., None]:
    r"""
    The `main` of a stage: parses arguments, runs, prints what is returned where that is text, and ends with one line
    where the user can mend what went wrong.
    """

    def main(args: Sequence[str] | None = None) -> None:
        config = parse(config_class, stage, args)
        try:
            result = run(config)
        except (PdiffError, OSError) as error:
            raise SystemExit(f"pdiff-hf {stage}: {error}") from error
        except KeyboardInterrupt:
            print(f"\npdiff-hf {stage}: interrupted. What was written is whole.", file=sys.stderr)
            raise SystemExit(130) from None
        if isinstance(result, str):
            print(result)

    main.__doc__ = f"`pdiff-hf {stage}`"
    return main


def check_positive(config: Any, *names: str) -> None:
    """Raises [`ConfigError`] where one of these fields is below one."""
    for name in names:
        if getattr(config, name) < 1:
            raise ConfigError(f"{name} has to be at least 1, and is {getattr(config, name)}.")


def load_config(config_class: type[Config], file: str | Path) -> Config:
    """Reads a configuration from a YAML file."""
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is no YAML file: {error}") from error
    known = {field.name: field for field in fields(config_class)}  # type: ignore[arg-type]
    if not isinstance(content, dict) or set(content) - set(known):
        unknown = sorted(set(content) - set(known)) if isinstance(content, dict) else [type(content).__name__]
        raise ConfigError(f"{file}: {', '.join(unknown)} unknown. {config_class.__name__} has: {', '.join(known)}.")
    lacking = [
        name
        for name, field in known.items()
        if name not in content and field.default is MISSING and field.default_factory is MISSING
    ]
    if lacking:
        raise ConfigError(f"{file} lacks {', '.join(lacking)}.")
    hints = typing.get_type_hints(config_class)
    for name, value in content.items():
        allowed = typing.get_args(hints[name]) if _is_union(hints[name]) else (hints[name],)
        if isinstance(value, list) and any(typing.get_origin(option) is tuple for option in allowed):
            content[name] = tuple(value)
        elif isinstance(value, int | str) and not isinstance(value, bool) and allowed == (float,):
            # YAML takes 1e-3, without a dot, for text.
            try:
                content[name] = float(value)
            except ValueError as error:
                raise ConfigError(f"{file}: {name} is {value!r}, and should be {hints[name]}.") from error
        elif not any(_matches(value, option) for option in allowed):
            raise ConfigError(f"{file}: {name} is {value!r}, and should be {hints[name]}.")
    return config_class(**content)


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _matches(value: Any, option: Any) -> bool:
    if typing.get_origin(option) is typing.Literal:
        return value in typing.get_args(option)
    if typing.get_origin(option) is not None:
        return False
    return isinstance(value, option) and (option is bool or not isinstance(value, bool))


def save_run(folder: str | Path, stage: str, config: Any, **facts: Any) -> None:
    r"""
    Writes what is needed to repeat a run: `<stage>.yaml`, which `--config` reads back, and `<stage>.facts.json` with
    versions, platform and threads.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    content = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()}
    write_whole(folder / f"{stage}.yaml", yaml.safe_dump(content, sort_keys=False))
    facts = {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "versions": versions(),
        **facts,
    }
    write_whole(folder / f"{stage}.facts.json", json.dumps(facts, indent=1) + "\n")


def write_whole(file: Path, text: str) -> None:
    """Writes a file, whole or not at all."""
    temporary = file.with_name(f"{file.name}.part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)


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


def check_same_facts(folder: str | Path, stage: str, facts: dict[str, Any]) -> None:
    """Raises [`ConfigError`] where the run to go on with had other facts, such as the number of networks."""
    file = Path(folder, f"{stage}.facts.json")
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
        before = {name: read[name] for name in facts}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} is damaged ({error!r}): the run cannot be resumed.") from error
    for name, value in facts.items():
        if before[name] != value:
            raise ConfigError(f"{folder} holds a run with {before[name]} {name}, not {value}: it cannot be resumed.")


def versions() -> dict[str, str]:
    """The versions of the packages that results depend on, where they are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
