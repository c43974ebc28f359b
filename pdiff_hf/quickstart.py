"""The whole story on scikit-learn's digits: the published method's in about a minute, and that of conditions."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from .collect import check_goes_on, run_collect
from .configs import CollectConfig, EvaluateConfig, GenerateConfig, NeuronTrainConfig, QuickstartConfig, TrainConfig
from .errors import ConfigError
from .evaluation import run_evaluate
from .evaluation.report import pictures_in, write_report
from .evaluation.stage import require_extras
from .extras import require
from .files import locked
from .generate import run_generate
from .parallel import processes
from .runs import save_run
from .tasks import load_family, load_task
from .train import run_train


Result = TypeVar("Result")
STAGES = ("zoo", "fresh", "pipeline", "generated", "report")
# Networks of a task to learn from, and of one that is held out; steps of the generator.
SUBSETS_EACH, FRESH_EACH, SUBSETS_STEPS = 6, 2, 1000
# What networks of unseen tasks do matters more than which of many that do it they are.
SUBSETS_WEIGHT = 256.0
# Seeds of held-out networks, far from those of the others.
FAR = 10**6


def run_quickstart(config: QuickstartConfig) -> dict[str, Any]:
    """Runs the stages of a story, `checkpoints` with their defaults, and returns the report with the seconds that each
    took."""
    if processes().num_processes > 1:
        raise ConfigError("`pdiff-hf quickstart` runs in one process; its stages, one by one, run in several.")
    threads = torch.get_num_threads()
    if config.story == "checkpoints" and "OMP_NUM_THREADS" not in os.environ:
        # So small networks are trained as fast by one, and on a busy machine three times as fast.
        torch.set_num_threads(1)
    try:
        with locked(config.output_dir):
            return _quickstart(config, Path(config.output_dir))
    finally:
        torch.set_num_threads(threads)


def _quickstart(config: QuickstartConfig, folder: Path) -> dict[str, Any]:
    present = [stage for stage in STAGES if (folder / stage).exists()]
    if present and not (folder / "quickstart.yaml").exists():
        raise ConfigError(
            f"{folder} holds {', '.join(present)}, which no quickstart made. Choose another --output-dir."
        )
    if config.task is None:
        require("sklearn.datasets", "digits,report")  # both at once, where both lack
    require_extras(folder)
    subsets = config.story == "subsets"
    task = config.task or ("digits-subsets" if subsets else "digits-convnet")
    conditions = load_family(task).conditions("train") if subsets else []
    if subsets and not conditions[0]:
        raise ConfigError(f"{task} is one task, and this story needs a family of tasks: leave out --story, or --task.")
    if not subsets:
        check_goes_on(load_task(task), task)
    save_run(folder, "quickstart", config)
    for stage in STAGES:
        with locked(folder / stage):
            shutil.rmtree(folder / stage, ignore_errors=True)
    zoo, fresh, pipeline, generated, report_dir = (str(folder / stage) for stage in STAGES)
    print(f"Using {torch.get_num_threads()} of {os.cpu_count()} CPU threads; set OMP_NUM_THREADS=N to use N.")

    timings: dict[str, float] = {}

    def timed(stage: str, run: Callable[[], Result]) -> Result:
        start = time.perf_counter()
        result = run()
        timings[stage] = round(time.perf_counter() - start, 2)
        return result

    # No checkpoints: an interrupted quickstart starts anew.
    settings: dict[str, Any] = {
        "zoo": zoo,
        "output_dir": pipeline,
        "seed": config.seed,
        "checkpointing_steps": 10**9,
    }
    if subsets:
        networks = [
            CollectConfig(task, output_dir=zoo, networks_per_task=SUBSETS_EACH, seed=config.seed),
            CollectConfig(task, output_dir=fresh, networks_per_task=FRESH_EACH, seed=config.seed + FAR, split="test"),
        ]
        timed("collect", lambda: [run_collect(one) for one in networks])
        columns = tuple(conditions[0])
        train_config: Any = NeuronTrainConfig(
            **settings,
            task=task,
            condition=columns,
            behaviour_weight=SUBSETS_WEIGHT,
            transformer_steps=SUBSETS_STEPS,
            mixed_precision="bf16",
        )
        timed("train", lambda: run_train(train_config))
        evaluate_config = EvaluateConfig(task, zoo, pipeline, fresh=fresh, output_dir=report_dir, seed=config.seed)
    else:
        timed("collect", lambda: run_collect(CollectConfig(task, output_dir=zoo, seed=config.seed)))
        timed("train", lambda: run_train(TrainConfig(**settings)))
        generate_config = GenerateConfig(pipeline, output_dir=generated, seed=config.seed, task=task)
        timed("generate", lambda: run_generate(generate_config))
        evaluate_config = EvaluateConfig(task, zoo, generated, output_dir=report_dir, pipeline=pipeline)
    report = timed("evaluate", lambda: run_evaluate(evaluate_config))

    report["timings_s"] = timings
    write_report(report, Path(report_dir), pictures_in(Path(report_dir)))
    print("Seconds: " + ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in timings.items()))
    print(
        f"Everything is in {folder}; open {Path(report_dir, 'report.html')}. From here, anyone loads the pipeline by\n"
    )
    print(f'    DiffusionPipeline.from_pretrained("{pipeline}", trust_remote_code=True)\n')
    return report
