"""Whole real networks through all four stages: seconds, peak memory, and whether what is generated works.

Every tensor is generated, the statistics of batch norm included: an MLP of a million parameters on MNIST (see
`pdiff_hf/tasks/images.py` for where that is read from), and a ResNet-18 of eleven million on scikit-learn's digits,
enlarged to 32x32, whose zoo is stored in bfloat16. Each stage runs in a process of its own. Peak memory is the largest
resident set of that process, where pages of memory-mapped files count too; beside it stands that of the published
autoencoder, a parameter. Stages whose figures are in the work folder are not run again; one that was interrupted goes
on, and its seconds are those of the last process.
"""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import nn
from torch.nn import functional as F

from benchmarks import peak_memory_gb, write
from pdiff_hf import (
    CollectConfig,
    EvaluateConfig,
    GenerateConfig,
    TrainConfig,
    run_collect,
    run_evaluate,
    run_generate,
    run_train,
)
from pdiff_hf.config import ZooDtype
from pdiff_hf.tasks.digits import DigitsConvNet
from pdiff_hf.tasks.resnet import ResNet


class ResNet18(DigitsConvNet):
    """A batch-norm ResNet-18 on digits of 32x32 pixels; fewer examples are scored than there are, to save time."""

    epochs = 4
    learning_rate = 1e-3
    examples = {"train": 1000, "validation": 100, "test": 300}

    def build_network(self) -> nn.Module:
        return ResNet(in_channels=1, channels=(64, 128, 256, 512), num_classes=10)

    def data(self, split: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels between -1 and 1, `[N, 1, 32, 32]`, and classes `[N]`."""
        inputs, targets = (tensor[: self.examples[split]] for tensor in super().data(split))
        return F.interpolate(inputs, size=(32, 32), mode="bilinear"), targets


@dataclass(frozen=True)
class Setting:
    """A network, and how it is measured."""

    task: str
    networks_per_point: int
    goal_gb: float
    dtype: ZooDtype = "float32"


SETTINGS = {
    "mlp-1m": Setting("benchmarks.images:MNISTMLP1M", networks_per_point=20, goal_gb=3),
    "resnet18": Setting("benchmarks.whole_networks:ResNet18", networks_per_point=2, goal_gb=8, dtype="bfloat16"),
}
STAGES = ("collect", "train", "generate", "evaluate")
GROUPS = {"trained": "original", "reconstructed": "reconstructed", "generated": "generated", "soup": "soup"}
MOST_LOST = 0.01
# The autoencoder of the published implementation at 300,288 parameters.
PUBLISHED_BYTES = 45e9 / 300_288


@dataclass(frozen=True)
class Config:
    """Runs the stages for each network."""

    networks: tuple[str, ...] = tuple(SETTINGS)
    num_networks: int = 50
    """Consecutive checkpoints, and generated networks."""
    threads: int = 2
    work_dir: str = "runs/whole"
    """Where everything goes; what is there already is not made again."""
    output: str | None = None
    """A JSON file for the figures."""
    only: tuple[str, str] | None = None
    """Run this stage of this network in this process: resnet18 collect, for example."""


def main(config: Config) -> None:
    """Measures each stage in a process of its own."""
    if config.only is not None:
        run_stage(config, *config.only)
        return
    rows = []
    for name in config.networks:
        print(f"\n{name}: stage | seconds | peak memory, GB")
        stages = {stage: measured(config, name, stage) for stage in STAGES}
        rows.append(summary(config, name, stages))
    write(config, rows=rows)


def measured(config: Config, name: str, stage: str) -> dict[str, Any]:
    """Seconds and peak memory of a stage, which is run where they are not known."""
    file = Path(config.work_dir, name, f"{stage}.json")
    if not file.exists():
        arguments = ["--work-dir", config.work_dir, "--num-networks", str(config.num_networks)]
        arguments += ["--threads", str(config.threads), "--only", name, stage]
        subprocess.run([sys.executable, "-m", "benchmarks.whole_networks", *arguments], check=True)
    figures = json.loads(file.read_text(encoding="utf-8"))
    print(f"{stage} | {figures['seconds']:.1f} | {figures['peak_memory_gb']:.2f}", flush=True)
    return figures


def run_stage(config: Config, name: str, stage: str) -> None:
    """Runs a stage and writes what it took."""
    torch.set_num_threads(config.threads)
    setting, folder = SETTINGS[name], Path(config.work_dir, name)
    zoo, pipeline, generated, report = (str(folder / part) for part in ("zoo", "pipeline", "generated", "report"))
    count, task = config.num_networks, setting.task
    start = time.perf_counter()
    if stage == "collect":
        run_collect(CollectConfig(task=task, output_dir=zoo, num_networks=count, dtype=setting.dtype))
    elif stage == "train":
        run_train(TrainConfig(zoo=zoo, output_dir=pipeline, autoencoder="linear", resume_from_checkpoint="latest"))
    elif stage == "generate":
        run_generate(GenerateConfig(pipeline=pipeline, output_dir=generated, num_networks=count, task=task))
    else:
        points = setting.networks_per_point
        run_evaluate(
            EvaluateConfig(
                task=task,
                trained=zoo,
                generated=generated,
                pipeline=pipeline,
                output_dir=report,
                networks_per_point=points,
            )
        )
    figures = {
        "date": time.strftime("%Y-%m-%d"),
        "seconds": time.perf_counter() - start,
        "peak_memory_gb": peak_memory_gb(),
    }
    (folder / f"{stage}.json").write_text(json.dumps(figures) + "\n", encoding="utf-8")


def summary(config: Config, name: str, stages: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """All figures of a network, printed."""
    folder, goal = Path(config.work_dir, name), SETTINGS[name].goal_gb
    report = json.loads((folder / "report" / "report.json").read_text(encoding="utf-8"))
    layout = json.loads((folder / "zoo" / "zoo.json").read_text(encoding="utf-8"))["layout"]
    groups = {
        label: {key: report["groups"][group]["accuracy"][key] for key in ("mean", "min")}
        for group, label in GROUPS.items()
    }
    verdict = {key: report["verdict"][key] for key in ("label", "accuracy_gain", "interval")}
    parameters = sum(torch.Size(t["shape"]).numel() for t in layout["tensors"] if t["role"] == "generated")
    peak = max(figures["peak_memory_gb"] for figures in stages.values())
    row = {
        "network": name,
        "parameters": parameters,
        "zoo_gb": sum(file.stat().st_size for file in (folder / "zoo").glob("*.safetensors")) / 1e9,
        "networks_per_point": SETTINGS[name].networks_per_point,
        "stages": stages,
        "accuracy": groups,
        "similarity": report["groups"]["generated"]["maximum_similarity"]["mean"],
        "verdict": verdict,
        "goal_gb": goal,
        "bytes_per_parameter": 1e9 * peak / parameters,
        "published_bytes_per_parameter": PUBLISHED_BYTES,
        "memory_reached": peak < goal,
        "accuracy_reached": groups["generated"]["mean"] >= groups["original"]["mean"] - MOST_LOST,
    }
    print(f"{row['parameters']:,} parameters | mean | min, accuracy on {report['examples']} test examples in %")
    for label, accuracy in groups.items():
        print(f"{label} | {100 * accuracy['mean']:.2f} | {100 * accuracy['min']:.2f}")
    gain = verdict["accuracy_gain"]
    print(f"{verdict['label']}, gain {'-' if gain is None else f'{100 * gain:+.2f}'}, {verdict['interval']}")
    print(
        f"{row['bytes_per_parameter']:,.0f} bytes a parameter at most; the published autoencoder "
        f"{PUBLISHED_BYTES:,.0f}: "
        f"{PUBLISHED_BYTES / row['bytes_per_parameter']:.0f} times less"
    )
    print(f"below {goal} GB: {row['memory_reached']}; within a point: {row['accuracy_reached']}", flush=True)
    return row


if __name__ == "__main__":
    main(tyro.cli(Config))
