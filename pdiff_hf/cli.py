"""The `pdiff-hf` command: a name for each stage."""

import importlib
import sys
import typing
from collections.abc import Callable, Sequence
from typing import Any


# Name: the function that runs it, whose argument is its configuration, and what it is for.
STAGES = {
    "collect": ("collect:run_collect", "train networks and keep their checkpoints in a zoo"),
    "train": ("train.stage:run_train", "learn the distribution of a zoo's networks"),
    "generate": ("generate:run_generate", "sample networks from a pipeline into a zoo"),
    "evaluate": ("evaluation.stage:run_evaluate", "compare generated networks with those that they were learned from"),
    "quickstart": ("quickstart:run_quickstart", "all of it on scikit-learn's digits"),
    "import": ("share:run_import", "make a zoo of model repositories on the Hub"),
    "push": ("share:run_push", "put a zoo or a pipeline on the Hub"),
    "pull": ("share:run_pull", "get a zoo or a pipeline from the Hub"),
}


def main(args: Sequence[str] | None = None) -> None:
    r"""
    Runs a stage, prints what it returns where that is text, and ends with one line where the user can mend what went
    wrong.

    Args:
        args (`Sequence[str]`, *optional*): The name of the stage and its arguments; those of the process by default.
    """
    stage, *rest = (sys.argv[1:] if args is None else args) or ["--help"]
    lines = ["usage: pdiff-hf STAGE [--config FILE] [arguments]", ""]
    lines += [f"  {name:<11} {purpose}" for name, (_, purpose) in STAGES.items()]
    lines += ["", "`pdiff-hf STAGE --help` lists a stage's arguments."]
    if stage in ("-h", "--help"):
        print("\n".join(lines))
    elif stage not in STAGES:
        raise SystemExit(f"pdiff-hf: there is no stage {stage!r}.\n\n" + "\n".join(lines))
    else:
        _run(stage, rest)


def stage_function(stage: str) -> tuple[Callable[[Any], Any], type]:
    """The function of a stage, and the class of its configuration."""
    module, _, name = STAGES[stage][0].partition(":")
    run = getattr(importlib.import_module(f".{module}", __package__), name)
    return run, typing.get_type_hints(run)["config"]


def _run(stage: str, args: Sequence[str]) -> None:
    from .config import parse
    from .errors import PdiffError

    run, config_class = stage_function(stage)
    try:
        result = run(parse(config_class, stage, args))
    except (PdiffError, OSError) as error:
        raise SystemExit(f"pdiff-hf {stage}: {error}") from error
    except KeyboardInterrupt:
        print(f"\npdiff-hf {stage}: interrupted. What was written is whole.", file=sys.stderr)
        raise SystemExit(130) from None
    if isinstance(result, str):
        print(result)
