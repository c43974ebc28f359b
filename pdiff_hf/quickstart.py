"""The whole story on scikit-learn's digits, in about a minute."""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from .collect import CollectConfig, run_collect
from .config import check_seed
from .errors import ConfigError
from .evaluation import EvaluateConfig, run_evaluate
from .files import locked
from .generate import GenerateConfig, run_generate
from .parallel import processes
from .runs import save_run
from .tasks import load_task
from .train import TrainConfig, run_train


Result = TypeVar("Result")
STAGES = ("zoo", "pipeline", "generated", "report")


@dataclass(frozen=True)
class QuickstartConfig:
    """Trains a ConvNet on digits, keeps checkpoints, learns their distribution, samples new networks, compares."""

    output_dir: str = "runs/quickstart"
    """Where zoo/, pipeline/, generated/ and report/ go; what an earlier quickstart left in them is removed."""
    task: str = "digits-convnet"
    """A built-in task, or a class of your own: path/to/file.py:MyTask."""
    seed: int = 0
    """Of everything."""

    def __post_init__(self) -> None:
        check_seed(self)


def run_quickstart(config: QuickstartConfig) -> dict[str, Any]:
    """Runs the four stages with their defaults, and returns the report with the seconds that each took."""
    if processes().num_processes > 1:
        raise ConfigError("`pdiff-hf quickstart` runs in one process; its stages, one by one, run in several.")
    with locked(config.output_dir):
        return _quickstart(config, Path(config.output_dir))


def _quickstart(config: QuickstartConfig, folder: Path) -> dict[str, Any]:
    present = [stage for stage in STAGES if (folder / stage).exists()]
    if present and not (folder / "quickstart.yaml").exists():
        raise ConfigError(
            f"{folder} holds {', '.join(present)}, which no quickstart made. Choose another --output-dir."
        )
    load_task(config.task)
    save_run(folder, "quickstart", config)
    for stage in STAGES:
        with locked(folder / stage):
            shutil.rmtree(folder / stage, ignore_errors=True)
    zoo, pipeline, generated, report_dir = (str(folder / stage) for stage in STAGES)
    print(f"Running on {torch.get_num_threads()} threads.")

    timings: dict[str, float] = {}

    def timed(stage: str, run: Callable[[], Result]) -> Result:
        start = time.perf_counter()
        result = run()
        timings[stage] = round(time.perf_counter() - start, 2)
        return result

    timed("collect", lambda: run_collect(CollectConfig(task=config.task, output_dir=zoo, seed=config.seed)))
    # No checkpoints: an interrupted quickstart starts anew.
    train_config = TrainConfig(zoo=zoo, output_dir=pipeline, seed=config.seed, checkpointing_steps=10**9)
    timed("train", lambda: run_train(train_config))
    generate_config = GenerateConfig(pipeline=pipeline, output_dir=generated, seed=config.seed, task=config.task)
    timed("generate", lambda: run_generate(generate_config))
    evaluate_config = EvaluateConfig(
        task=config.task, trained=zoo, generated=generated, output_dir=report_dir, pipeline=pipeline
    )
    report = timed("evaluate", lambda: run_evaluate(evaluate_config))

    report["timings_s"] = timings
    Path(report_dir, "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print("Seconds: " + ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in timings.items()))
    print(f"Everything is in {folder}. Load the pipeline anywhere with\n")
    print(f'    DiffusionPipeline.from_pretrained("{pipeline}", trust_remote_code=True)\n')
    return report
