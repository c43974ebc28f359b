"""Many networks at once against one by one: scoring a zoo, and training an independent one.

Prints for each task the seconds of both ways, their ratio, and how far results differ. Both ways take turns, and the
best of several rounds counts, since machines are noisy. Rounding differs, and training amplifies it: hence the mean
accuracy on the test split of the networks that were trained both ways, and, as a measure for their difference, that of
networks trained one by one with and without oneDNN, another library for the same convolutions.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import tyro

from benchmarks import write
from pdiff_hf import ParameterLayout, Task, load_task
from pdiff_hf.networks.predictor import Predictor
from pdiff_hf.networks.trainer import NetworkTrainer, StackedTrainer


@dataclass(frozen=True)
class Config:
    """Measures both ways."""

    tasks: tuple[str, ...] = ("digits-convnet", "digits-mlp", "digits-resnet")
    num_networks: int = 200
    """To score."""
    num_trained: int = 64
    """To train at once; a quarter of them is trained one by one."""
    epochs: tuple[int, ...] = (3, 30)
    """Of the trainings, the fewer in several rounds."""
    rounds: int = 6
    threads: int = 2
    output: str | None = None
    """A JSON file for the figures."""


def main(config: Config) -> None:
    """Measures and prints."""
    torch.set_num_threads(config.threads)
    rows = []
    print("work | task | one by one, s | at once, s | ratio | largest difference", end=" | ")
    print("accuracy: one by one, at once | largest difference of one by one with and without oneDNN")
    for name in config.tasks:
        task = load_task(name)
        rows.append(scoring(config, name, task))
        if name != "digits-resnet":  # batch norm in training has no stacked form
            rows += [training(config, name, task, epochs) for epochs in config.epochs]
    write(config, rows=rows)


def scoring(config: Config, name: str, task: Task) -> dict[str, Any]:
    """Predictions on validation and test split."""
    network = task.build_network().eval()
    layout = ParameterLayout.from_state_dict(network.state_dict(), task.patterns)
    vector = layout.flatten(network.state_dict())
    generator = torch.Generator().manual_seed(0)
    vectors = vector * (1 + 0.05 * torch.randn(config.num_networks, len(vector), generator=generator))
    inputs = torch.cat([task.data(split)[0] for split in ("validation", "test")])
    predict = Predictor(task, layout, torch.device("cpu"))

    def one_by_one() -> torch.Tensor:
        predictions = []
        for state_dict in layout.unflatten(vectors):
            network.load_state_dict(state_dict)
            predictions.append(task.predict(network, inputs))
        return torch.stack(predictions)

    def at_once() -> torch.Tensor:
        return predict(vectors, inputs)

    return compare(f"score {config.num_networks} networks", name, one_by_one, at_once, 1, config.rounds)


def training(config: Config, name: str, task: Task, epochs: int) -> dict[str, Any]:
    """Networks of different seeds, from the beginning."""
    layout = ParameterLayout.from_state_dict(task.build_network().state_dict())
    fewer = config.num_trained // 4

    def one_by_one() -> torch.Tensor:
        return torch.stack([NetworkTrainer(task, seed, epochs).train(layout)[0][0] for seed in range(fewer)])

    def at_once() -> torch.Tensor:
        trained = StackedTrainer([task] * config.num_trained, list(range(config.num_trained)), epochs).train(layout)
        return torch.stack([vector for vector, _ in trained])

    inputs, targets = task.data("test")
    predict = Predictor(task, layout, torch.device("cpu"))

    def accuracy(vectors: torch.Tensor) -> float:
        outputs = predict(vectors, inputs).flatten(0, 1)
        return task.correct(outputs, targets.repeat(len(vectors))).double().mean().item()

    def otherwise(vectors: torch.Tensor) -> dict[str, Any]:
        with torch.backends.mkldnn.flags(enabled=False):
            return {"difference_without_onednn": (one_by_one() - vectors).abs().max().item()}

    work = f"train {config.num_trained} networks, {epochs} epochs"
    rounds = config.rounds if epochs == min(config.epochs) else 1
    return compare(work, name, one_by_one, at_once, config.num_trained / fewer, rounds, accuracy, otherwise)


def compare(
    work: str,
    task: str,
    one_by_one: Callable[[], torch.Tensor],
    at_once: Callable[[], torch.Tensor],
    factor: float,
    rounds: int,
    accuracy: Callable[[torch.Tensor], float] | None = None,
    otherwise: Callable[[torch.Tensor], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Both ways; the first does only a part of the work, and counts `factor` times."""
    seconds: list[list[float]] = [[], []]
    results: list[Any] = [None, None]
    for _ in range(rounds):
        for way, run in enumerate((one_by_one, at_once)):
            start = time.perf_counter()
            results[way] = run()
            seconds[way].append(time.perf_counter() - start)
    slow, fast = factor * min(seconds[0]), min(seconds[1])
    results[1] = results[1][: len(results[0])]
    difference = (results[0] - results[1]).abs().max().item()
    accuracies = [] if accuracy is None else [accuracy(vectors) for vectors in results]
    shown = ", ".join(f"{100 * value:.2f}" for value in accuracies)
    control = {} if otherwise is None else otherwise(results[0])
    shown += "".join(f" | {value:.1e}" for value in control.values())
    print(f"{work} | {task} | {slow:.3f} | {fast:.3f} | {slow / fast:.1f} | {difference:.1e} | {shown}", flush=True)
    return {
        "work": work,
        "task": task,
        "one_by_one_s": slow,
        "at_once_s": fast,
        "ratio": slow / fast,
        "largest_difference": difference,
        "accuracies": accuracies,
        **control,
    }


if __name__ == "__main__":
    main(tyro.cli(Config))
