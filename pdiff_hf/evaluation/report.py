"""A report for people: a table for the terminal, report.json, report.md and one self-contained report.html."""

import base64
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from rich.table import Table


LABELS = {
    "trained": "original",
    "soup": "soup",
    "ensemble": "ensemble",
    "generated": "generated",
    "fresh": "fresh",
    "reconstructed": "reconstructed",
}
CAPTIONS = {
    "plane": "Accuracy against similarity to the most similar training network, with the baselines as curves",
    "parameters": "Values of the parameters of each tensor",
    "overlap": "Overlap of errors between networks",
    "calibration": "Ensembles: accuracy and calibration against their size",
    "map": "The networks on the first two principal components of the training networks",
    "denoising": "Accuracy of the networks while they are denoised",
    "training": "What the denoiser learned: the scale of each latent, and its loss",
}


def table(report: dict[str, Any]) -> Table:
    """The groups of a report, accuracies in percent."""
    result = Table(title=f"{report['task']}: accuracy on the test split, %")
    for column in ("networks", "count", "mean", "min", "best on validation", "similarity"):
        result.add_column(column, justify="left" if column == "networks" else "right")
    for row in rows(report):
        result.add_row(*row)
    return result


def rows(report: dict[str, Any]) -> list[list[str]]:
    """The cells of that table."""
    cells = []
    for group, figures in report["groups"].items():
        accuracies = (figures["accuracy"][key] for key in ("mean", "min", "best_on_validation"))
        cells.append(
            [
                LABELS[group],
                str(figures["count"]),
                *(f"{100 * accuracy:.2f}" for accuracy in accuracies),
                f"{figures['maximum_similarity']['mean']:.3f}",
            ]
        )
    return cells


def write_report(report: dict[str, Any], folder: Path, shown: list[Path]) -> None:
    """Writes `report.json`, `report.md` and `report.html`; the latter holds the pictures itself."""
    (folder / "report.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["percent"] = lambda value: "-" if value is None else f"{100 * value:.2f}"
    environment.filters["number"] = lambda value: "-" if value is None else f"{value:.4g}"
    captions = [(file, CAPTIONS[file.stem]) for file in shown]
    for name, escape in (("report.md", False), ("report.html", True)):
        environment.autoescape = escape
        template = environment.from_string((files("pdiff_hf.evaluation") / name).read_text(encoding="utf-8"))
        pictures = [
            (base64.b64encode(file.read_bytes()).decode() if escape else file.name, caption)
            for file, caption in captions
        ]
        text = template.render(report=report, labels=LABELS, rows=rows(report), pictures=pictures)
        (folder / name).write_text(text, encoding="utf-8")
