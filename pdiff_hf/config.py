"""One frozen dataclass a stage is its command line, its YAML file and its Python face."""

import io
import json
import math
import os
import reprlib
import types
import typing
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union

import tyro
import yaml

from .errors import ConfigError, MissingExtraError
from .extras import install
from .text import load_yaml


Config = TypeVar("Config")
CONFIG_HELP = (
    "--config FILE reads settings from a YAML file, such as the one that every run leaves beside its results; "
    "arguments override them."
)
MOST = 2**31
# Seeds count up from it, and are drawn from it.
MOST_SEED = 2**62
# How networks are stored.
ZooDtype = Literal["float32", "bfloat16"]


def parse(config_class: type[Config], stage: str, args: Sequence[str]) -> Config:
    r"""
    The configuration of a stage from its arguments. `--config FILE` reads a YAML file first, such as the one that
    every run leaves beside its results; the other arguments override it.

    Raises:
        [`ConfigError`]: the file cannot be read, or does not describe the stage.
    """
    defaults: dict[str, Any] = {}
    families, file = _families(config_class), None
    args = [part for arg in args for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
    if "--config" in args:
        place = args.index("--config")
        if place + 1 == len(args):
            raise ConfigError("--config needs the path of a YAML file.")
        file = os.path.expanduser(args[place + 1])
        del args[place : place + 2]
    if families:
        config_class = _chosen(families, args, file)
    if file is not None:
        default: Any = load_config(config_class, file)
        named = {arg.partition("=")[0] for arg in args}
        if "--task" not in named:
            _check_origin(getattr(default, "task", None), file)
        if "--condition" in named and hasattr(default, "condition"):  # which would be added to those of the file
            default = replace(default, condition=())
        defaults["default"] = default
    described = f"{config_class.__doc__}\n\n{CONFIG_HELP}"
    return tyro.cli(config_class, prog=f"pdiff-hf {stage}", description=described, args=args, **defaults)


def completion(stages: dict[str, Any], shell: str = "bash") -> str:
    """The script that completes the names of stages and their arguments in a shell, `bash` or `zsh`."""
    if shell not in ("bash", "zsh"):
        raise SystemExit(f"pdiff-hf: {shell!r} is no shell that can be completed in: bash or zsh.")
    commands = []
    for stage, config_class in stages.items():
        several = tuple(_families(config_class).values())
        whole = dataclass(frozen=True)(type(stage, several, {})) if several else config_class  # of all families
        commands.append(Annotated[whole, tyro.conf.subcommand(stage)])
    with redirect_stdout(io.StringIO()) as script, suppress(SystemExit):
        every: Any = Union[tuple(commands)]  # noqa: UP007
        tyro.cli(every, prog="pdiff-hf", args=["--tyro-print-completion", shell])
    # For zsh, the script is one to be loaded when it is called; evaluated, it has to say what it is for.
    return script.getvalue().replace('\n_tyro_pdiff_hf "$@"\n', "\ncompdef _tyro_pdiff_hf pdiff-hf\n")


def _families(config_class: Any) -> dict[str, Any]:
    """The classes of a stage that has several, by their `family`."""
    classes = typing.get_args(config_class) if _is_union(config_class) else ()
    return {one.family: one for one in classes}


def _chosen(families: dict[str, Any], args: Sequence[str], file: str | None) -> Any:
    """The class of the family that the arguments, or else the file, name; the first one where none does."""
    parts = [part for arg in args for part in arg.split("=", 1)]
    name: Any = next(iter(families))
    if "--family" in parts[:-1]:
        name = parts[parts.index("--family") + 1]
    elif file is not None:
        name = _content(file).get("family", name)
    if name not in families:
        raise ConfigError(f"There is no family {name!r:.100}: {', '.join(families)}.")
    return families[name]


def _check_origin(task: str | None, file: str) -> None:
    """Raises [`ConfigError`] where a file, which may come from anywhere, names code that is not built in."""
    if task is not None and ":" in task:
        raise ConfigError(f"{file} names the task {task!r}, which is code of its own: pass --task {task} to run it.")


def check_positive(config: Any, *names: str) -> None:
    """Raises [`ConfigError`] where one of these fields is no size: below one, or above all that memory holds."""
    for name in names:
        value = getattr(config, name)
        if value < 1:
            raise ConfigError(f"{name} has to be at least 1, and is {value}.")
        if value > MOST:
            raise ConfigError(f"{name} has to be at most {MOST:,}, and is {value}.")


def check_seed(config: Any) -> None:
    """Raises [`ConfigError`] where the seed is none that every generator takes."""
    if not 0 <= config.seed < MOST_SEED:
        raise ConfigError(f"seed has to be at least 0 and below 2**62, and is {config.seed}.")


def check_above_zero(config: Any, *names: str) -> None:
    """Raises [`ConfigError`] where one of these fields is not above zero, or not finite."""
    for name in names:
        if not 0 < getattr(config, name) < math.inf:
            raise ConfigError(f"{name} has to be above 0, and is {getattr(config, name)}.")


def check_not_negative(config: Any, *names: str) -> None:
    """Raises [`ConfigError`] where one of these fields is below zero or not finite."""
    for name in names:
        if not 0 <= getattr(config, name) < math.inf:
            raise ConfigError(f"{name} has to be at least 0, and is {getattr(config, name)}.")


def check_tracker(name: str | None) -> None:
    """Raises [`ConfigError`] or [`MissingExtraError`] for a tracker that cannot be used."""
    if name is None:
        return
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import LoggerType

    if name == "all":
        if not get_available_trackers():
            raise MissingExtraError(f"No tracker is installed: {install('trackers')}")
        return
    known = sorted(kind.value for kind in LoggerType if kind is not LoggerType.ALL)
    if name not in known:
        raise ConfigError(f"report_to is {name!r}; accelerate knows all, {', '.join(known)}.")
    if name not in {str(tracker) for tracker in get_available_trackers()}:
        command = install("trackers") if name == "tensorboard" else f"pip install {name}"
        raise MissingExtraError(f"The tracker {name} is not installed: {command}")


def load_config(config_class: type[Config], file: str | Path) -> Config:
    """Reads a configuration from a YAML file."""
    content = _content(file)
    known = {field.name: field for field in fields(config_class)}  # type: ignore[arg-type]
    if set(content) - set(known):
        unknown = sorted(str(name)[:100] for name in set(content) - set(known))[:10]
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
        elements = [typing.get_args(option)[0] for option in allowed if typing.get_origin(option) is tuple]
        if isinstance(value, list) and any(all(_matches(one, element) for one in value) for element in elements):
            content[name] = tuple(value)
        elif isinstance(value, int | str) and not isinstance(value, bool) and allowed == (float,):
            # YAML takes 1e-3, without a dot, for text.
            try:
                content[name] = float(value)
            except ValueError as error:
                raise ConfigError(f"{file}: {name} is {value!r:.200}, and should be {hints[name]}.") from error
        elif not any(_matches(value, option) for option in allowed):
            raise ConfigError(f"{file}: {name} is {reprlib.repr(value)}, and should be {hints[name]}.")
    return config_class(**content)


def read_objects(file: str | Path, what: str) -> list[dict[str, Any]]:
    """The JSON objects in a file, one a line."""
    try:
        lines = Path(file).read_text(encoding="utf-8").split("\n")  # JSON may hold other ends of lines
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{what}: {file} cannot be read: {error}.") from error
    found = [json_object(line, f"line {number} of {file}") for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise ConfigError(f"{what}: {file} is empty.")
    return found


def json_object(text: str, where: str) -> dict[str, Any]:
    """The JSON object that a text is, or a [`ConfigError`] that says where it stands."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is no JSON: {error}: {text!r:.200}.") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{where} has to be a JSON object, and is {text!r:.200}.")
    return value


def _content(file: str | Path) -> dict[str, Any]:
    try:
        content = load_yaml(Path(file).read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is no YAML file: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} holds a {type(content).__name__}, and no settings by name.")
    return content


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _matches(value: Any, option: Any) -> bool:
    if typing.get_origin(option) is typing.Literal:
        return value in typing.get_args(option)
    if typing.get_origin(option) is not None:
        return False
    return isinstance(value, option) and (option is bool or not isinstance(value, bool))
