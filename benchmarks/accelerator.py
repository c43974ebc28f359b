"""What an accelerator is worth: the stages of the first row of `benchmarks.independent`, shortened, where they run.

Prints, for the device that Accelerate picks, networks a second of `collect --protocol independent` and of `generate`
(20 steps, float32 and bfloat16), optimizer steps a second of `train --family neuron --hidden-size 160`, and networks a
second whose accuracy on 10,000 images is measured. `ACCELERATE_USE_CPU=true` measures the CPU beside it.

Data for Fashion-MNIST: see `pdiff_hf/tasks/images.py`.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
import tyro

from benchmarks import write
from pdiff_hf import (
    CollectConfig,
    GenerateConfig,
    NeuronTrainConfig,
    WeightZoo,
    load_task,
    run_collect,
    run_generate,
    run_train,
)
from pdiff_hf.networks.predictor import Predictor
from pdiff_hf.parallel import processes


TASK = "fashion-mlp"


@dataclass(frozen=True)
class Config:
    """Measures the stages on one device."""

    networks: int = 512
    """Collected, generated and scored."""
    steps: int = 300
    """Of the training, after a hundred that are not counted."""
    threads: int = 1
    """Of torch."""
    output: str | None = None
    """Where the figures go: a JSON file."""


def seconds(work: Callable[[], Any]) -> float:
    """How long something takes."""
    start = time.perf_counter()
    work()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def measure(config: Config, folder: Path) -> dict[str, float]:
    """Things a second of each stage."""
    task, count, zoo = load_task(TASK), config.networks, folder / "zoo"
    collecting = CollectConfig(TASK, output_dir=str(zoo), num_networks=count, protocol="independent")
    figures = {"networks collected": count / seconds(lambda: run_collect(collecting))}

    def train(steps: int) -> float:
        training = NeuronTrainConfig(
            zoo=str(zoo),
            output_dir=str(folder / f"pipeline-{steps}"),
            task=TASK,
            hidden_size=160,
            mixed_precision="bf16",
            transformer_steps=steps,
        )
        return seconds(lambda: run_train(training))

    train(10)  # whatever is done once
    begun = train(100)
    figures["optimizer steps"] = config.steps / (train(100 + config.steps) - begun)

    def generate(precision: Literal["no", "bf16"]) -> float:
        generating = GenerateConfig(
            pipeline=str(folder / "pipeline-100"),
            output_dir=str(folder / f"generated-{precision}"),
            num_networks=count,
            num_inference_steps=20,
            mixed_precision=precision,
            task=TASK,
        )
        return seconds(lambda: run_generate(generating))

    figures |= {"networks generated": count / generate("no"), "the same, bfloat16": count / generate("bf16")}
    predict, vectors = Predictor(task, WeightZoo(zoo).layout, processes().device), WeightZoo(zoo).vectors()
    inputs = task.data("test")[0]
    predict(vectors[:8], inputs)
    figures["networks scored"] = count / seconds(lambda: predict(vectors, inputs))
    return figures


def main(config: Config) -> None:
    """Prints a line a stage."""
    torch.set_num_threads(config.threads)
    device = processes().device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    with TemporaryDirectory() as folder:
        figures = measure(config, Path(folder))
    print(f"On {name}, each second:")
    for what, value in figures.items():
        print(f"{what:>26} {value:.1f}")
    write(config, device=name, figures=figures)


if __name__ == "__main__":
    main(tyro.cli(Config))
