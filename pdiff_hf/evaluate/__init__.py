"""Stage 4: compare generated networks with those that they were learned from."""

import importlib.util
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from .config import one_process, save_run, stage_main, versions
from .extras import require
from .hub import write_evaluation
from .tasks import Task, TaskError, load_task
from .tasks.task import BUILT_IN
from .zoo import WeightZoo, ZooError


REPORT_VERSION = 1
GROUPS = ("trained", "soup", "ensemble", "generated")
LABELS = {"trained": "original", "soup": "soup", "ensemble": "ensemble", "generated": "generated"}


@dataclass(frozen=True)
class EvaluateConfig:
    """Scores trained and generated networks, and the cheap ways to make one network of the trained ones."""

    task: str | None = None
    """A built-in task, or a class of your own: path/to/file.py:MyTask. The trained zoo's own by default."""
    trained: str = "runs/zoo"
    """Folder of the zoo that was learned from."""
    generated: str = "runs/generated"
    """Folder of the generated zoo."""
    output_dir: str = "runs/report"
    """Folder of the report: report.json and accuracy.png."""
    pipeline: str | None = None
    """Folder of the pipeline that generated; its card gets the figures and the picture."""


@dataclass(frozen=True)
class Group:
    r"""
    How the networks of a group do.

    Attributes:
        validation (`torch.Tensor`): Accuracy on the validation split, from 0 to 1, `[N]`.
        wrong (`torch.Tensor`): Which test examples a network gets wrong, boolean `[N, E]`.
        similarity (`torch.Tensor`):
            Largest intersection over union of a network's wrong predictions with those of a training network (of
            another one, for training networks), `[N]`. Two networks without errors have similarity 1.
    """

    validation: torch.Tensor
    wrong: torch.Tensor
    similarity: torch.Tensor

    @property
    def test(self) -> torch.Tensor:
        """Accuracy on the test split, `[N]`."""
        return 1 - self.wrong.double().mean(1)

    def summary(self) -> dict[str, Any]:
        """The figures of the group."""
        test = self.test
        return {
            "count": len(test),
            "accuracy": {
                "mean": test.mean().item(),
                "min": test.min().item(),
                "max": test.max().item(),
                "best_on_validation": test[self.validation.argmax()].item(),
            },
            "maximum_similarity": {"mean": self.similarity.mean().item()},
        }


def run_evaluate(config: EvaluateConfig) -> dict[str, Any]:
    r"""
    Scores the groups, prints a table, writes `report.json` and `accuracy.png`, and returns what is in the former:
    `groups.trained|soup|ensemble|generated`, each with `count`, `accuracy.mean|min|max|best_on_validation` as
    fractions of the test split, and `maximum_similarity.mean`, which says copy where it is near 1. The soup is the
    average of the trained weights, the ensemble that of the trained networks' predictions; the best network is chosen
    on the validation split.

    Raises:
        [`ZooError`]: the zoos are empty, or hold different architectures, or not the task's.
    """
    one_process("evaluate")
    trained, generated = WeightZoo.from_pretrained(config.trained), WeightZoo.from_pretrained(config.generated)
    name = config.task or trained.task
    if name is None:
        raise ZooError(f"{config.trained} does not say what its networks do: pass --task.")
    if config.task is None and name not in BUILT_IN:
        raise ZooError(f"The zoo names the task {name!r}, which is code of its own: pass --task {name} to run it.")
    if not len(trained) or not len(generated):
        raise ZooError(f"Nothing to compare: {len(trained)} trained and {len(generated)} generated networks.")
    if trained.layout.config["tensors"] != generated.layout.config["tensors"]:
        raise ZooError(f"{config.trained} and {config.generated} hold networks of different architectures.")
    task = load_task(name)

    predictions = {
        "trained": _predict(task, trained, trained.batches(), len(trained), "trained"),
        "generated": _predict(task, generated, generated.batches(), len(generated), "generated"),
    }
    soup = torch.stack([batch.double().sum(0) for batch in trained.batches()]).sum(0) / len(trained)
    predictions["soup"] = _predict(task, trained, [soup.float()[None]], 1, "soup")
    predictions["ensemble"] = {split: [torch.stack(p).mean(0)] for split, p in predictions["trained"].items()}
    groups = _groups(task, predictions)

    report = {
        "report_version": REPORT_VERSION,
        "task": name,
        "groups": {group: groups[group].summary() for group in GROUPS},
        "versions": versions(),
    }
    save_run(config.output_dir, "evaluate", config)
    write_report(report, config.output_dir)
    Console().print(table(report))
    picture = None
    if importlib.util.find_spec("matplotlib"):
        picture = Path(config.output_dir) / "accuracy.png"
        plot(groups, name, picture)
    else:
        print("No picture without matplotlib: pip install 'pdiff-hf[plots]'")
    if config.pipeline is not None:
        write_evaluation(config.pipeline, report, picture)
    return report


def write_report(report: dict[str, Any], folder: str | Path) -> None:
    """Writes `report.json`."""
    Path(folder, "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def table(report: dict[str, Any]) -> Table:
    """The groups of a report, accuracies in percent."""
    result = Table(title=f"{report['task']}: accuracy on the test split, %")
    for column in ("networks", "count", "mean", "min", "best on validation", "similarity"):
        result.add_column(column, justify="left" if column == "networks" else "right")
    for group, figures in report["groups"].items():
        accuracies = (figures["accuracy"][key] for key in ("mean", "min", "best_on_validation"))
        result.add_row(
            LABELS[group],
            str(figures["count"]),
            *(f"{100 * accuracy:.2f}" for accuracy in accuracies),
            f"{figures['maximum_similarity']['mean']:.3f}",
        )
    return result


def plot(groups: dict[str, Group], task: str, file: Path) -> None:
    """Draws each network in the plane of similarity and accuracy."""
    figure_module = require("matplotlib.figure", "plots")
    figure = figure_module.Figure(figsize=(6.4, 4.4), dpi=150, layout="constrained")
    axes = figure.subplots()
    # Okabe and Ito's colours, which the colour-blind can tell apart. Many networks share a point: area counts them.
    styles = {
        "trained": {"marker": "o", "facecolor": "#56B4E9", "edgecolor": "#0072B2", "alpha": 0.7},
        "generated": {"marker": "^", "facecolor": "none", "edgecolor": "#D55E00", "linewidth": 1.5},
        "soup": {"marker": "s", "facecolor": "#009E73", "edgecolor": "black", "linewidth": 0.5},
        "ensemble": {"marker": "*", "facecolor": "#F0E442", "edgecolor": "black", "linewidth": 0.5},
    }
    for group, style in styles.items():
        points = torch.stack([groups[group].similarity, 100 * groups[group].test], dim=1)
        places, counts = points.unique(dim=0, return_counts=True)
        size = 400 * counts / counts.sum() + 12 if len(points) > 1 else 80
        label = f"{LABELS[group]} ({len(points)} networks)" if len(points) > 1 else LABELS[group]
        axes.scatter(places[:, 0], places[:, 1], s=size, **style)
        axes.scatter([], [], s=60, label=label, **style)
    axes.set_xlabel("similarity of the errors to the most similar training network")
    axes.set_ylabel("accuracy on the test split, %")
    axes.set_title(task)
    axes.grid(alpha=0.3)
    axes.legend(loc="best", framealpha=0.9)
    figure.savefig(file)


Predictions = dict[str, list[torch.Tensor]]


def _predict(task: Task, zoo: WeightZoo, batches: Iterable[torch.Tensor], count: int, name: str) -> Predictions:
    """Each network's probabilities `[E, classes]` on the validation and the test split."""
    device = PartialState().device
    network = task.build_network().to(device)
    inputs = {split: task.data(split)[0].to(device) for split in ("validation", "test")}
    predictions: Predictions = {split: [] for split in inputs}
    state_dicts = (state_dict for batch in batches for state_dict in zoo.layout.unflatten(batch))
    for state_dict in tqdm(state_dicts, total=count, desc=f"score {name}", unit="network"):
        try:
            network.load_state_dict(state_dict, strict=True)
        except RuntimeError as error:
            raise ZooError(f"The networks of {zoo.folder} do not fit the task: {error}") from error
        for split in inputs:
            predictions[split].append(task.predict(network, inputs[split]).cpu())
    return predictions


def _groups(task: Task, predictions: dict[str, Predictions]) -> dict[str, Group]:
    targets = {split: task.data(split)[1].cpu() for split in ("validation", "test")}

    def wrong(group: str, split: str) -> torch.Tensor:
        correct = torch.stack([task.correct(p, targets[split]) for p in predictions[group][split]])
        if correct.dtype != torch.bool or correct.shape[1:] != (len(targets[split]),):
            raise TaskError(
                f"{type(task).__name__}.correct() has to give a boolean for each of {len(targets[split])} examples; "
                f"found {correct.dtype} of shape {list(correct.shape[1:])}."
            )
        return ~correct

    trained = wrong("trained", "test")
    groups = {}
    for group in GROUPS:
        of_test = wrong(group, "test")
        similarity = _similarity(of_test, trained)
        if group == "trained" and len(trained) > 1:
            similarity.fill_diagonal_(0)
        groups[group] = Group(1 - wrong(group, "validation").double().mean(1), of_test, similarity.amax(1))
    return groups


def _similarity(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Intersection over union of wrong predictions: boolean `[N, E]` and `[M, E]` to `[N, M]`."""
    a, b = a.double(), b.double()
    intersection = a @ b.T
    union = a.sum(1)[:, None] + b.sum(1)[None] - intersection
    return torch.where(union == 0, 1.0, intersection / union.clamp_min(1))


main = stage_main("evaluate", EvaluateConfig, run_evaluate)

if __name__ == "__main__":
    main()
