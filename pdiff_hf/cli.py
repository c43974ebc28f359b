"""The `pdiff-hf` command: a name for each stage."""

import difflib
import importlib
import importlib.metadata
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any


# Name: the function that runs it, its configuration, and what it is for.
STAGES = {
    "collect": ("collect:run_collect", "CollectConfig", "train networks and keep their checkpoints in a zoo"),
    "align": ("align:run_align", "AlignConfig", "give hidden units one order and scale, ranks of adapters one basis"),
    "train": ("train.stage:run_train", "AnyTrainConfig", "learn the distribution of a zoo's networks"),
    "generate": ("generate:run_generate", "GenerateConfig", "sample networks from a pipeline into a zoo"),
    "evaluate": ("evaluation.stage:run_evaluate", "EvaluateConfig", "compare generated networks with trained ones"),
    "quickstart": ("quickstart:run_quickstart", "QuickstartConfig", "all of it on scikit-learn's digits"),
    "play": ("play:run_play", "PlayConfig", "a page to ask for networks, and to try them out"),
    "info": ("info:run_info", "InfoConfig", "say what a folder or a repository holds, and how good it is"),
    "import": ("share:run_import", "ImportConfig", "make a zoo of checkpoints, model repositories or LoRA adapters"),
    "push": ("share:run_push", "PushConfig", "put a zoo or a pipeline on the Hub"),
    "pull": ("share:run_pull", "PullConfig", "get a zoo or a pipeline from the Hub"),
}
# After an interruption.
AGAIN = " The same command goes on from there."
GO_ON = {
    "collect": AGAIN,
    "evaluate": f"{AGAIN} The audit of a family of tasks starts anew.",
    "generate": AGAIN,
    "train": " With --resume-from-checkpoint latest, the same command goes on from the last checkpoint.",
}


def main(args: Sequence[str] | None = None) -> None:
    r"""
    Runs a stage, prints what it returns where that is text, and ends with one line where the user can mend what went
    wrong.

    Args:
        args (`Sequence[str]`, *optional*): The name of the stage and its arguments; those of the process by default.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        # Torch's threads wait for each other by spinning. A sixth of GNU's default is as fast where nothing else runs,
        # and twice as fast where something does. It is read as torch is imported.
        os.environ.setdefault("GOMP_SPINCOUNT", "50000")
    stage, *rest = (sys.argv[1:] if args is None else args) or ["--help"]
    lines = ["usage: pdiff-hf STAGE [--config FILE] [arguments]", ""]
    lines += [f"  {name:<11} {purpose}" for name, (*_, purpose) in STAGES.items()]
    lines += [
        "",
        "Start with: pdiff-hf quickstart",
        "",
        "  STAGE --help   the arguments of a stage",
        "  --quiet        no progress bars, and no last line on the result and what comes next",
        "  --traceback    where an error came from",
        "  --version      which pdiff-hf this is",
        "",
        "Completion of what you type:",
        '    eval "$(pdiff-hf --completion bash)"    (or zsh)',
    ]
    if stage == "--version":
        print(f"pdiff-hf {importlib.metadata.version('pdiff-hf')}", flush=True)
        return
    if stage == "--completion":
        from .config import completion

        print(completion({name: config_class(name) for name in STAGES}, *rest[:1]), flush=True)
        return
    if stage not in (*STAGES, "-h", "--help"):
        near = difflib.get_close_matches(stage, STAGES, 1)
        meant = f" Did you mean {near[0]}?" if near else ""
        raise SystemExit(f"pdiff-hf: there is no stage {stage!r}.{meant}\n\n" + "\n".join(lines))
    try:
        if stage in STAGES:
            with _interruptible(stage):
                _run(stage, rest)
        else:
            print("\n".join(lines), flush=True)
    except BrokenPipeError:
        # Whoever read the output has enough. Nothing more can be written to it, at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None


@contextmanager
def _interruptible(stage: str) -> Iterator[None]:
    """Ends in one line where the user interrupts. In the middle of an import it ends the process at once: C++ that
    imports ends it on exceptions, and packages make other errors of them."""
    line = f"\npdiff-hf {stage}: interrupted. What was written is whole.{GO_ON.get(stage, '')}\n"

    def interrupt(_: int, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
                os.write(2, line.encode())
                os._exit(130)
            frame = frame.f_back
        raise KeyboardInterrupt

    # Others may have a handler of their own, and only the main thread may set one.
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ours &= threading.current_thread() is threading.main_thread()
    try:
        if ours:
            signal.signal(signal.SIGINT, interrupt)
        yield
    except KeyboardInterrupt:
        print(line, end="", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def config_class(stage: str) -> Any:
    """The class of a stage's configuration, or the union of several."""
    return getattr(importlib.import_module(".configs", __package__), STAGES[stage][1])


def stage_function(stage: str) -> Callable[[Any], Any]:
    """The function of a stage."""
    module, _, name = STAGES[stage][0].partition(":")
    run: Callable[[Any], Any] = getattr(importlib.import_module(f".{module}", __package__), name)
    return run


def _run(stage: str, args: Sequence[str]) -> None:
    show_all, quiet = "--traceback" in args, "--quiet" in args
    if quiet:
        os.environ["TQDM_DISABLE"] = "1"  # read when the bars' package is imported, as that of a stage is
    try:
        from .config import parse

        arguments = [arg for arg in args if arg not in ("--traceback", "--quiet")]
        config: Any = parse(config_class(stage), stage, arguments)
        run = stage_function(stage)
        started = time.perf_counter()
        result = run(config)
        if quiet and stage not in ("info", "push"):  # whose results are what they say
            result = None
        elif not isinstance(result, str):
            result = _outcome(stage, config, result, started)
        if result:
            print(result, flush=True)
    except BrokenPipeError:
        raise
    except Exception as error:
        if show_all:
            raise
        from .text import printable

        raise SystemExit(printable(f"pdiff-hf {stage}: {_explanation(error)}")) from error


def _outcome(stage: str, config: Any, result: Any, started: float) -> str | None:
    """Where the result of a stage is, how much it is, how long it took, and what comes next; of one process of all."""
    from .info import trained_parts
    from .parallel import processes
    from .runs import zoo_of_training
    from .tasks.task import BUILT_IN
    from .text import own_task, time_since
    from .zoo import WeightZoo

    if not processes().is_main_process or stage not in ("collect", "train", "generate", "evaluate"):
        return None
    folder = shlex.quote(config.output_dir)
    took = time_since(started)
    if config.push_to_hub is not None:
        from .hub.client import address

        took += f"; on the Hub, {address(config.push_to_hub, stage in ('collect', 'generate'))}"
    if stage in ("collect", "generate"):
        what = f"{len(result)} networks of {result.vector_size:,} parameters are in {folder} ({took})."
        if stage == "collect" and config.split != "train":
            return f"{what} Next: pdiff-hf evaluate --trained ZOO --generated PIPELINE --fresh {folder}"
        if stage == "collect":
            return f"{what} Next: pdiff-hf train{_family_of(result, config.task)} --zoo {folder}"
        # What can be asked for networks is audited itself.
        asked = config.condition or config.conditions
        evaluated = shlex.quote(config.pipeline) if asked else folder
        own = own_task(config.task)
        zoo = zoo_of_training(config.pipeline)
        trained = "ZOO" if zoo is None else shlex.quote(zoo)
        return f"{what} Next: pdiff-hf evaluate --trained {trained} --generated {evaluated}{own}"
    if stage == "train":
        count = sum(trained_parts(result).values())
        what = f"The pipeline, of {count:,} trained parameters, is in {folder} ({took}). Next: pdiff-hf"
        task = getattr(config, "task", None)
        # Only what does a known thing can be audited, and code that a zoo names is not run unasked.
        if config.condition and (task or WeightZoo.from_pretrained(config.zoo).task in BUILT_IN):
            return f"{what} evaluate --trained {shlex.quote(config.zoo)} --generated {folder}{own_task(task)}"
        return f"{what} generate --pipeline {folder}{own_task(task)}"
    shown = config.pipeline or (config.generated if "conditions" in result else None)
    following = "" if shown is None else f" Next: pdiff-hf play --pipeline {shlex.quote(shown)}{own_task(config.task)}"
    return f"The report is in {folder} ({took}): report.html, report.md, and pictures.{following}"


def _family_of(zoo: Any, task: str) -> str:
    """The options that training needs for a zoo that was collected."""
    from .tasks.family import COLUMNS
    from .text import own_task

    row = next(zoo.rows())
    if "initial_norm" not in row:
        return ""
    return (
        " --family neuron" + own_task(task) + "".join(f" --condition {name}" for name in sorted(row.keys() - COLUMNS))
    )


def _explanation(error: Exception) -> str:
    """What to say of an error in one line."""
    from .errors import PdiffError

    text = str(error).strip() or repr(error)
    if isinstance(error, PdiffError | OSError):
        return text
    if isinstance(error, MemoryError) or "allocate" in text or "out of memory" in text:
        return f"there is not enough memory. Make networks, latents or batches smaller. ({text.splitlines()[0]:.300})"
    addresses = importlib.metadata.metadata("pdiff-hf").get_all("Project-URL") or []
    issues = dict(address.split(", ", 1) for address in addresses).get("Issues")
    return (
        f"this is a bug of pdiff-hf: {type(error).__name__}: {text.splitlines()[0]:.500}. Please report it at "
        f"{issues} with what --traceback prints."
    )
