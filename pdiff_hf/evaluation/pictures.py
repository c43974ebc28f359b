"""The pictures of a report, in one style: legible in print, in Okabe and Ito's colours, which all can tell apart."""

import json
import re
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from ..extras import require
from ..text import plain
from ..zoo import WeightZoo, evenly
from .baselines import KINDS
from .measures import columns, picked, similarity, tensor_values


BLUE, ORANGE, GREEN, YELLOW, PURPLE, SKY, RED = (
    *("#0072B2", "#E69F00", "#009E73", "#F0E442", "#CC79A7", "#56B4E9", "#D55E00"),
)
WINE, TEAL = "#882255", "#44AA99"  # Paul Tol's, for what is left
COLOURS = {"trained": BLUE, "generated": RED, "fresh": GREEN, "gaussian": ORANGE, "soup": "black"}
CURVES = {
    "noise": (PURPLE, ":"),
    "soup": ("black", "-"),
    "interpolation": (GREEN, "--"),
    "gaussian": (ORANGE, "-."),
    "low-rank-gaussian": (SKY, (0, (5, 1, 1, 1, 1, 1))),
    "shrinking": ("grey", "-"),
    "difference": (WINE, ":"),
    "nearest-interpolation": (TEAL, "--"),
}
MOST_TENSORS = 12
MOST_ROWS = 60
# By how much of an axis single networks are moved, at most to both sides together.
JITTER = 0.012
# Points below the best that an axis shows.
SHOWN_POINTS = 15


def _figure(width: float = 6.4, height: float = 4.4, **arguments: Any) -> tuple[Any, Any]:
    figure = require("matplotlib.figure", "report").Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(**arguments)
    for ax in axes.flat if hasattr(axes, "flat") else [axes]:
        ax.grid(alpha=0.3)
    return figure, axes


def _title(ax: Any, report: dict[str, Any]) -> None:
    """The task, and the verdict in words."""
    words = re.split(r": | \(", report["verdict"]["sentence"])[0]
    task = plain(report["task"]).rpartition(":")[2]  # of a task in a file, the class
    ax.set_title(f"{task}\n{words}", fontsize=10, parse_math=False)


def _save(figure: Any, folder: Path, name: str) -> list[Path]:
    files = [folder / f"{name}.png", folder / f"{name}.svg"]
    for file in files:
        # No date, so that the same report has the same pictures.
        figure.savefig(file, dpi=150, metadata={"Date": None} if file.suffix == ".svg" else None)
        figure.set_layout_engine(None)  # found once, the layout holds for both
    return files


def conditions(report: dict[str, Any], folder: Path) -> list[Path]:
    """The accuracy of each group on held-out conditions, of single networks and of ensembles."""
    groups = report["groups"]
    names = sorted(groups, key=lambda name: groups[name]["single"]["mean"])
    figure, ax = _figure(6.4, 0.8 + 0.32 * len(names))
    kinds = {"single": "o", **{kind: "D" for kind in groups["generated"] if kind.startswith("ensemble")}}
    for place, name in enumerate(names):
        colour = RED if name == "generated" else GREEN if name.startswith("trained") else "black"
        low, high = (100 * value for value in groups[name]["single"]["interval"])
        ax.plot((low, high), (place, place), color=colour, linewidth=1.5)
        for size, (kind, marker) in enumerate(kinds.items()):
            if kind in groups[name]:
                fill = colour if size == 0 else "none"
                ax.plot(
                    100 * groups[name][kind]["mean"],
                    place,
                    marker,
                    color=colour,
                    fillstyle="full" if fill == colour else "none",
                    markersize=5 + size,
                )
    ax.set_yticks(range(len(names)), names)
    # What does not work would squeeze the rest: its figure stands at the edge.
    means = [100 * groups[name]["single"]["mean"] for name in names]
    left = min(mean for mean in means if mean > means[-1] - SHOWN_POINTS) - 1
    ax.set_xlim(left, min(100, means[-1] + 2))
    for place, mean in enumerate(means):
        if mean < left:
            ax.annotate(f" ← {mean:.1f}", (left, place), va="center")
    ax.set_xlabel(
        f"accuracy on {report['conditions']} held-out conditions, %\n"
        "full: single networks, 95 % intervals\n"
        "open: ensembles of 4 and 16; as long: as generating takes",
        fontsize=9,
    )
    _title(ax, report)
    return _save(figure, folder, "conditions")


def plane(
    report: dict[str, Any], networks: dict[str, tuple[list[int], torch.Tensor, torch.Tensor]], folder: Path
) -> list[Path]:
    """Some networks of each group, by their places, similarity and accuracy, its mean, the baselines as curves, and
    the front with its interval, which is marked where the generated networks are."""
    figure, ax = _figure(8.4, 4.8)
    groups = report["groups"]
    shown = {
        name: (groups[name]["maximum_similarity"]["mean"], 100 * groups[name]["accuracy"]["mean"]) for name in networks
    }
    # The networks that are drawn and what surrounds them; averages of independent ones are far away, and curves lead
    # to chance.
    drawn = [name for name in ("trained", "generated", "fresh") if name in networks]
    means = [shown[name][1] for name in drawn]
    spread = max(0.5, 3 * max(100 * networks[name][2].std(correction=0).item() for name in drawn))
    (left, right), (low, high) = limits = (
        (max(0.0, min(shown[name][0] for name in drawn) - 0.15), 1.01),
        (min(means) - spread, min(100.5, max(means) + spread)),
    )
    for name, marker, size in (("trained", "o", 190), ("generated", "^", 130), ("fresh", "D", 70)):
        if name in networks:
            # Moved a little, as accuracies have few values; those that lie outside stand at the edge.
            moved = JITTER * (torch.rand(2, len(networks[name][1]), generator=torch.Generator().manual_seed(0)) - 0.5)
            x = (networks[name][1] + (right - left) * moved[0]).clamp(left, right)
            y = (100 * networks[name][2] + (high - low) * moved[1]).clamp(low, high)
            ax.scatter(x, y, s=8, marker=marker, color=COLOURS[name], alpha=0.25, linewidths=0, gid=f"networks-{name}")
            label = f"{name}: mean of {groups[name]['count']}"
            ax.scatter(
                *shown[name], s=size, marker=marker, color=COLOURS[name], edgecolor="black", zorder=4, label=label
            )
    if report["front"]:
        x, best, least, most = torch.tensor(
            [[at["similarity"], at["accuracy"], *at["interval"]] for at in report["front"]]
        ).T
        ax.plot(x, 100 * best, color="0.4", linewidth=1, zorder=3)  # as the band, and unlike the curve of soups
        ax.fill_between(
            x, 100 * least, 100 * most, color="black", alpha=0.18, linewidth=0, label="front of the baselines, 99 %"
        )
    verdict, (similar, accurate) = report["verdict"], shown["generated"]
    least, most = (accurate - 100 * gain for gain in verdict["interval"][::-1])
    there = accurate - 100 * verdict["accuracy_gain"]
    errors = [[max(there - least, 0)], [max(most - there, 0)]]
    ax.errorbar(
        *(similar, there, errors), color="black", capsize=4, marker="_", zorder=5, label="front at the generated ones"
    )
    for kind, (colour, line) in CURVES.items():
        points = [point for point in report["baselines"] if point["kind"] == kind]
        curve = [(point["maximum_similarity"]["mean"], 100 * point["accuracy"]["mean"]) for point in points]
        if any(left <= x <= right and low <= y <= high for x, y in curve):
            label = KINDS[kind].label
            ax.plot(*zip(*curve, strict=True), color=colour, linestyle=line, marker=".", markersize=4, label=label)
    ax.set(xlim=limits[0], ylim=limits[1])
    ax.set_xlabel("similarity of the errors to the most similar training network (IoU)")
    ax.set_ylabel("accuracy on the test split, %")
    _title(ax, report)
    # Beside the networks: inside, it hides some of them.
    ax.legend(
        loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=7.5, frameon=False, labelspacing=0.9, markerscale=0.7
    )
    files = _save(figure, folder, "plane")
    svg = files[1].read_text(encoding="utf-8")
    for name, (places, x, y) in networks.items():
        svg = _named(svg, f"networks-{name}", name, places, x.tolist(), (100 * y).tolist())
    files[1].write_text(svg, encoding="utf-8")
    return files


def _named(
    svg: str, group: str, label: str, places: list[int], similarities: list[float], accuracies: list[float]
) -> str:
    """The picture with a title, which browsers show where one points, in each mark of a group of networks."""
    start = svg.find(f'<g id="{group}">')
    end = svg.find("<g id=", start + 1)
    marks = re.split(r"(<use [^>]*)/>", svg[start:end])
    if start < 0 or len(marks) != 2 * len(accuracies) + 1:
        return svg
    for index, (place, similar, accuracy) in enumerate(zip(places, similarities, accuracies, strict=True)):
        marks[2 * index + 1] += f"><title>{label} {place}: {accuracy:.2f} %, similarity {similar:.3f}</title></use>"
    return svg[:start] + "".join(marks) + svg[end:]


def parameters(trained: WeightZoo, generated: WeightZoo, folder: Path) -> list[Path]:
    """Histograms of the values of the first tensors."""
    values = list(tensor_values(trained, generated).items())
    values = [values[index] for index in evenly(len(values), MOST_TENSORS)]
    columns = min(3, len(values))
    lines = -(-len(values) // columns)
    figure, axes = _figure(2.6 * columns, 1.9 * lines + 0.4, nrows=lines, ncols=columns, squeeze=False)
    for ax, (name, (a, b)) in zip(axes.flat, values, strict=False):
        low, high = torch.quantile(torch.cat([a, b]).double(), torch.tensor([0.001, 0.999]).double()).tolist()
        edges = torch.linspace(low, high if high > low else low + 1e-6, 41, dtype=torch.float64).numpy()
        ax.hist(a.numpy(), edges, density=True, color=BLUE, alpha=0.5, label="trained")
        ax.hist(b.numpy(), edges, density=True, histtype="step", color=RED, linewidth=1.3, label="generated")
        ax.set_title(plain(name), fontsize=8, parse_math=False)
        ax.tick_params(labelsize=7)
        ax.locator_params(axis="x", nbins=4)
    for ax in list(axes.flat)[len(values) :]:
        ax.set_visible(False)
    axes.flat[0].legend(fontsize=7)
    figure.supxlabel("value of the parameter", fontsize=9)
    figure.supylabel("density", fontsize=9)
    return _save(figure, folder, "parameters")


def overlap(trained: torch.Tensor, generated: torch.Tensor, folder: Path) -> list[Path]:
    """A heat map of the overlap of wrong predictions, training networks first, evenly picked, and sorted."""
    parts = [wrong[list(evenly(len(wrong), MOST_ROWS))] for wrong in (trained, generated)]
    # Those that err like many others first.
    parts = [part[similarity(part, part).mean(1).argsort(descending=True)] for part in parts]
    figure, ax = _figure(5.4, 4.6)
    both = torch.cat(parts)
    overlaps = similarity(both, both).numpy()
    image = ax.imshow(overlaps, cmap="cividis", vmin=overlaps.min(), vmax=1, interpolation="nearest")
    border = len(parts[0]) - 0.5
    ax.axhline(border, color="white", linewidth=1)
    ax.axvline(border, color="white", linewidth=1)
    places = [len(parts[0]) / 2, len(parts[0]) + len(parts[1]) / 2]
    ax.set_xticks(places, ["trained", "generated"])
    ax.set_yticks(places, ["trained", "generated"])
    ax.grid(False)
    figure.colorbar(image, ax=ax, label="intersection over union of wrong predictions")
    return _save(figure, folder, "overlap")


def calibration(report: dict[str, Any], folder: Path) -> list[Path]:
    """Accuracy, NLL and calibration error of ensembles against their size, and their intervals over test examples."""
    measures = {"accuracy": "accuracy, %", "nll": "NLL, nats", "ece_scaled": "ECE after scaling"}
    measures = {key: label for key, label in measures.items() if key in report["ensembles"]["trained"][0]}
    figure, axes = _figure(2.9 * len(measures), 2.9, ncols=len(measures), squeeze=False)
    for ax, (key, label) in zip(axes.flat, measures.items(), strict=True):
        for (name, rows), marker in zip(report["ensembles"].items(), "o^D", strict=False):
            shown = [row for row in rows if row.get(key) is not None]
            scale, x = 100 if key == "accuracy" else 1, [row["size"] for row in shown]
            low, high = ([scale * row["intervals"][key][end] for row in shown] for end in (0, 1))
            ax.fill_between(x, low, high, color=COLOURS[name], alpha=0.12, linewidth=0)
            ax.plot(
                x,
                [scale * row[key] for row in shown],
                marker=marker,
                markersize=4,
                color=COLOURS[name],
                label=name,
            )
        ax.set_xscale("log", base=2)
        ax.set_xlabel("networks in the ensemble", fontsize=8)
        ax.set_ylabel(label, fontsize=8)
        ax.tick_params(labelsize=7)
    axes.flat[0].legend(fontsize=7)
    return _save(figure, folder, "calibration")


def weight_map(trained: WeightZoo, groups: dict[str, Iterator[torch.Tensor]], folder: Path) -> list[Path]:
    """All networks, `[n, P]` at a time, on the first two principal components of the training networks."""
    some = picked(len(trained))
    centred = (x - x.mean(0) for (x,) in columns(trained, some=some))
    values, vectors = torch.linalg.eigh(reduce(torch.add, (x @ x.T for x in centred)))
    scaled = vectors[:, [-1, -2]] / values[[-1, -2]].clamp_min(1e-12).sqrt()
    blocks = [((x - x.mean(0)).T @ scaled, x.mean(0)) for (x,) in columns(trained, some=some)]
    axes_, mean = (torch.cat(parts).float() for parts in zip(*blocks, strict=True))
    shares = values.clamp_min(0)[[-1, -2]] / values.clamp_min(1e-12).sum()
    figure, ax = _figure(5.6, 4.6)
    styles = (
        ("gaussian", "x", 14),
        ("soup", "s", 14),
        ("trained", "o", 14),
        ("fresh", "D", 14),
        ("generated", "^", 20),
    )
    names = {"gaussian": "per-parameter Gaussian", "soup": "soups"}
    for name, marker, size in styles:
        if name in groups:
            x, y = torch.cat([(vectors - mean) @ axes_ for vectors in groups[name]]).T.numpy()
            colour = {"color": COLOURS[name]} if marker == "x" else {"facecolor": COLOURS[name], "linewidths": 0}
            steps = _steps(trained) if name == "trained" else []
            if steps and len(steps) == len(x):
                colour = {"c": steps, "cmap": "winter", "linewidths": 0}
            points = ax.scatter(x, y, s=size, marker=marker, alpha=0.6, label=names.get(name, name), **colour)
            if "cmap" in colour:
                figure.colorbar(points, ax=ax, label="training step of the training networks")
    ax.set_xlabel(f"first principal component ({100 * shares[0]:.0f} % of the variance)")
    ax.set_ylabel(f"second principal component ({100 * shares[1]:.0f} %)")
    figure.legend(loc="outside upper center", ncols=3, fontsize=8)
    return _save(figure, folder, "map")


def _steps(zoo: WeightZoo) -> list[int]:
    """At which step of one training each network was kept; nothing of networks of several."""
    steps = [row.get("step") for row in zoo.rows()]
    return [step for step in steps if isinstance(step, int)] if len(set(steps)) == len(steps) > 1 else []


def denoising(steps: list[int], accuracies: list[torch.Tensor], report: dict[str, Any], folder: Path) -> list[Path]:
    """Accuracy of networks while they are denoised: mean, and from worst to best."""
    figure, ax = _figure(5.4, 3.8)
    mean, low, high = ([100 * float(f(values)) for values in accuracies] for f in (torch.mean, torch.min, torch.max))
    ax.plot(steps, mean, color=RED, marker="^", markersize=4, label="generated, mean")
    ax.fill_between(steps, low, high, color=RED, alpha=0.2, linewidth=0, label="worst to best")
    trained = 100 * report["groups"]["trained"]["accuracy"]["mean"]
    ax.axhline(trained, color=BLUE, linestyle="--", label="trained, mean")
    ax.locator_params(axis="x", integer=True)
    ax.set_xlabel("denoising steps done")
    ax.set_ylabel("accuracy if decoded here, %")
    ax.legend(fontsize=8, loc="lower right")
    return _save(figure, folder, "denoising")


def training(
    pipeline: Any, trained: torch.Tensor, generated: torch.Tensor, report: dict[str, Any], folder: Path
) -> list[Path]:
    """The spread of each latent over both zoos, and the losses where the pipeline is a folder that holds their log."""
    log = Path(str(pipeline.config.get("_name_or_path") or ""), "train.losses.jsonl")
    try:
        rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        losses = torch.tensor([float(row["loss"]) for row in rows if row["objective"] != "autoencoder"])
    except (OSError, ValueError, KeyError, TypeError):
        losses = torch.empty(0)  # no log, or a damaged one, which says nothing of the pipeline
    figure, axes = _figure(6.8, 3.2, ncols=2, squeeze=False)
    spread, loss = axes.flat
    for name, latents, marker in (("trained", trained, "o"), ("generated", generated, "^")):
        values = latents.flatten(1).float().std(0).numpy()
        spread.plot(range(1, len(values) + 1), values, marker, markersize=3, color=COLOURS[name], label=name)
    low, high = spread.get_ylim()
    if not 0 < high < 5 * low:
        spread.set_yscale("log")
    spread.set_xlabel("latent" if pipeline.vae is not None else "parameter, normalized")
    spread.set_ylabel("standard deviation over networks", fontsize=9)
    spread.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    if len(losses):
        window = max(1, len(losses) // 50)
        smooth = losses[: len(losses) // window * window].view(-1, window).mean(1)
        loss.plot(losses.numpy(), color=SKY, linewidth=0.5, alpha=0.6, label="each step")
        loss.plot(
            ((torch.arange(len(smooth)) + 0.5) * window).numpy(), smooth.numpy(), color=BLUE, label="running mean"
        )
        loss.set_yscale("log")
        loss.set_xlabel("training step of the denoiser")
        loss.set_ylabel("loss")
        loss.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    else:
        loss.set_visible(False)
    shown = [name for name in ("trained", "reconstructed", "generated") if name in report["groups"]]
    accuracies = [f"{100 * report['groups'][name]['accuracy']['mean']:.2f} % {name}" for name in shown]
    figure.suptitle("accuracy on the test split: " + ", ".join(accuracies), fontsize=9)
    return _save(figure, folder, "training")
