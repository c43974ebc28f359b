"""A report for people: a table for the terminal, report.json, report.md and one self-contained report.html."""

import base64
import json
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult
from rich.table import Table
from rich.text import Text

from ..files import whole
from ..hub.cards import TASK_TYPE
from ..text import plain, printable, with_front
from .baselines import KINDS


# Columns of the table of groups in the terminal and in cards; reports have all of them.
SHORT = ("networks", "count", "mean", "min", "chosen on validation", "similarity")
# What the groups are.
MEANINGS = {
    "trained": "the training networks, which were learned from",
    "soup": "the average of their weights",
    "ensemble": "the average of their predictions",
    "generated": "what is judged here",
    "fresh": "networks trained from new seeds, the gold standard",
    "reconstructed": "training networks, encoded and decoded by the autoencoder",
}
# What the words of the columns and of the verdict mean.
WORDS = {
    "min": "the accuracy of the worst network",
    "chosen on validation": "the accuracy of the network that is best on the validation split",
    "similarity": "how much of its errors a network shares with the training network that is most like it, itself "
    "excluded (intersection over union of the errors; 1 is all); the mean over the networks",
    "95 %": "the interval of the mean, by bootstrap, over networks and over test examples",
    "NLL, Brier, ECE": "negative log-likelihood in nats, Brier score, and expected calibration error in 15 bins; "
    "scaled: with the temperature that fits the validation split best; less is better",
    "baselines": "what needs no generator: training networks with noise, their averages, Gaussians of their weights",
    "front": "at a similarity, the best accuracy that any baseline reaches there or below",
}
# What baselines may work on.
CANONICAL = "of networks in canonical form, whose hidden units have one order and scale"
# The rows of a report on conditions.
CONDITION_MEANINGS = {
    "generated": "what is judged here",
    "shuffled condition": "the same generator, asked for another held-out condition",
    "majority class": "always the class that is the most frequent in training",
    "mean network": "the average of all training networks",
    "one network for all tasks": "one that was trained on many training tasks together, without being told of which",
    "nearest condition": "a training network of the nearest condition",
    "mean of the nearest": "the average of training networks of the nearest conditions",
    "mix of the nearest": "the mean update of the adapters of the nearest conditions",
    "ridge regression": "from the numbers of the condition to the weights, linear",
    "ridge, pairs": "the same with products of two of the numbers",
    "ridge, triples": "the same with products of three",
    "hypernetwork": "a perceptron from the condition to the weights, trained on the same with the same losses",
    "trained on the task": "networks that were trained on the held-out tasks, the gold standard",
    "training from scratch, as long": "trained on the held-out task for as long as generating a network takes",
    "training from scratch, twice as long": "the same, for twice that time",
    "generated, then trained as long": "a generated network, trained on for that time",
}
# What the generator is compared with, the best of each kind.
AGAINST = {
    "shuffled": "itself, asked for another condition",
    "retrieval": "looking up, without learning",
    "regression": "regression, from the condition to the weights",
}
# What a report asks.
ABOUT = {
    "report": "A generator has learned the weights of trained networks, and made new ones. Are these as accurate? Do "
    "they differ from what was learned from? And are they better than what is had for nothing, by noise on trained "
    "networks, or by averages?",
    "conditions": "A generator is asked for networks by a condition, which says what they are to do. It is asked here "
    "for what no training network was trained for. Do its networks do that, does the condition matter, and is there a "
    "simpler way to such networks?",
}
# What is to be seen, and what a good and a bad one looks like.
CAPTIONS = {
    "plane": "Accuracy against similarity to the most similar training network. Large marks: means; small: single "
    "networks, some 2,000 of a group at most, moved a little, so that equal ones do not hide each other; those that "
    "lie outside stand at the edge. The curves are what needs no generator, and the grey band is the 99 % interval "
    "of their front, the best that any of them reaches there or further left; the bar marks it where the generated "
    "networks are. Good: the generated networks are above the bar. Bad: on or below the band, which costs nothing, "
    "or at similarity 1, where errors are those of a training network",
    "parameters": "Values of the parameters of each tensor, under its name in the network. Good: the outline follows "
    "the filled histogram. Bad: it is narrower, since generated networks are nearly one network, or has tails of its "
    "own",
    "overlap": "Which networks err on the same test examples; in each group, those come first that err like many "
    "others. Good: the generated square looks like that of the trained ones. Bad: it is brighter, since generated "
    "networks are nearly alike, or the squares of both groups have bright spots, where a generated network errs as "
    "a training network does",
    "calibration": "Ensembles against their size: higher accuracy, lower NLL and lower calibration error are better. "
    "Bands are 95 % intervals over test examples, which all groups share; size 1 is one random network. Good: the "
    "generated curve follows that of fresh networks, or else of the trained ones. Bad: it is flat where that of the "
    "trained ones improves, since more networks add nothing",
    "map": "The networks on the first two principal components of the training networks, which say little where they "
    "hold little of the variance. Good: the generated ones are where the trained ones are, and spread as these. Bad: "
    "they cluster at the centre, or lie elsewhere",
    "denoising": "Accuracy of some networks, 20 at most, if their denoising ended after a step; early steps give "
    "nearly the mean network, which may be good. Good: it reaches that of the trained ones by the last step. Bad: it "
    "ends below, or rises steeply to the end, so that more steps may help",
    "training": "Left: how much each latent, or without an autoencoder each parameter, varies over networks. Good: "
    "generated ones vary as the trained ones. Bad: they vary less, often in late latents. Right: the loss of the "
    "denoiser. Bad: it still falls at the end, so that more training may help",
    "conditions": "Accuracy on conditions that no training network had, the mean and its 95 % interval; rows share "
    "conditions, and often images, so that differences are surer than that. Good: the generator lies right of all "
    "that needs none, and near networks trained on the task. Bad: left of retrieval or regression, or as its shuffled "
    "condition, which then means nothing",
}


CARD = """**{{ report.verdict.label }}**: {{ said }}

| {{ columns | join(" | ") }} |
|{{ " --- |" * columns | length }}
{% for row in rows %}
| {% for column in columns %}{{ row[column] }} | {% endfor %}

{% endfor %}

{% for group in report.groups if group in meanings %}
- **{{ group }}**: {{ meanings[group] }}
{% endfor %}
{% if "conditions" not in report %}
- **similarity**: {{ words.similarity }}
{% endif %}
"""


def group_table(report: dict[str, Any]) -> list[dict[str, str]]:
    """The groups of a report, a row each: accuracies in percent, by the titles of their columns."""
    rows = []
    for group, figures in report["groups"].items():
        accuracy = figures["accuracy"]
        row = {
            "networks": group,
            "count": str(figures["count"]),
            "mean": percent(accuracy["mean"]),
            "95 % over networks": _ends(accuracy["interval_networks"]),
            "95 % over examples": _ends(accuracy["interval_examples"]),
            "min": percent(accuracy["min"]),
            "chosen on validation": percent(accuracy["best_on_validation"]),
            "similarity": f"{figures['maximum_similarity']['mean']:.3f}",
        }
        measures = {"NLL": "nll", "Brier": "brier", "ECE": "ece", "ECE, scaled": "ece_scaled"}
        rows.append(row | {title: number(figures.get(key)) for title, key in measures.items()})
    return rows


def condition_table(report: dict[str, Any]) -> list[dict[str, str]]:
    """The groups of a report on conditions, a row each: accuracies in percent, by the titles of their columns."""
    kinds = [kind for kind in report["groups"]["generated"] if kind != "min"]
    rows = []
    for group, figures in report["groups"].items():
        row = {"networks": group}
        for kind in kinds:
            found = figures.get(kind)
            row[kind] = percent(None if found is None else found["mean"])
            if kind == "single":
                row["95 % interval"] = _ends(figures["single"]["interval"])
                row["least"] = percent(figures["min"])
        rows.append(row)
    return rows


def _ends(interval: list[float] | None) -> str:
    """Of an interval of shares."""
    return "-" if interval is None else " to ".join(map(percent, interval))


def percent(value: float | None) -> str:
    """Of a share."""
    return "-" if value is None else f"{100 * value:.2f}"


def number(value: float | None) -> str:
    """In four digits."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def table(report: dict[str, Any]) -> Table:
    """The table of groups for the terminal."""
    result = Table(title=Text(printable(f"{report['task']}: accuracy on the test split, %"), "table.title"))
    columns, rows = _short(report)
    for column in columns:
        result.add_column(column, justify="left" if column == "networks" else "right")
    for row in rows:
        result.add_row(*(row[column] for column in columns))
    return result


def _short(report: dict[str, Any]) -> tuple[tuple[str, ...], list[dict[str, str]]]:
    """The columns that stand everywhere, and the rows."""
    if "conditions" not in report:
        return SHORT, group_table(report)
    rows = condition_table(report)
    return tuple(rows[0]), rows


def card_section(report: dict[str, Any]) -> str:
    """Verdict and groups, for the card of a pipeline."""
    columns, rows = _short(report)
    said = "\n".join(with_front(report["verdict"]["sentence"]))
    template = _environment(escape=False).from_string(CARD)
    meanings = _meanings(report)
    return template.render(report=report, said=said, columns=columns, rows=rows, meanings=meanings, words=WORDS)


def _meanings(report: dict[str, Any]) -> dict[str, str]:
    """What the groups of a report are."""
    return CONDITION_MEANINGS if "conditions" in report else MEANINGS


def card_results(report: dict[str, Any]) -> list[EvalResult]:
    """The figures of generated networks, as the Hub's evaluation results."""
    generated = report["groups"]["generated"]
    if "conditions" in report:
        count = report["conditions"] * report["networks_per_condition"]
        values = {
            ("accuracy", "mean accuracy on conditions that no training network had"): generated["single"]["mean"],
            ("accuracy", "minimum accuracy on conditions that no training network had"): generated["min"],
        }
        return _results(report["task"], count, values)
    values = {
        ("accuracy", "mean accuracy"): generated["accuracy"]["mean"],
        ("accuracy", "minimum accuracy"): generated["accuracy"]["min"],
        ("iou", "mean maximum similarity of errors to a training network"): generated["maximum_similarity"]["mean"],
    }
    return _results(report["task"], generated["count"], values)


def _results(task: str, count: int, values: dict[tuple[str, str], float]) -> list[EvalResult]:
    return [
        EvalResult(
            task_type=TASK_TYPE,
            dataset_type=task,
            dataset_name=task,
            dataset_split="test",
            metric_type=kind,
            metric_name=f"{name} of {count} generated networks",
            metric_value=round(value, 6),
        )
        for (kind, name), value in values.items()
    ]


def _environment(escape: bool) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=escape,
    )
    environment.filters |= {"percent": percent, "number": number}
    return environment


def _embedded(file: Path) -> str:
    """A picture for a page: the plane as SVG, whose networks have names to hover over, and others in base64."""
    if file.stem != "plane":
        return base64.b64encode(file.read_bytes()).decode()
    svg = file.with_suffix(".svg").read_text(encoding="utf-8")
    return svg[svg.index("<svg") :]


def pictures_in(folder: Path) -> list[Path]:
    """Those of a report that was written into a folder."""
    return [file for name in CAPTIONS if (file := folder / f"{name}.png").is_file()]


def captioned(pictures: list[Path]) -> dict[Path, str]:
    """What is to be seen in each of a report's pictures."""
    return {file: f"{CAPTIONS[file.stem]}." for file in pictures}


def write_report(report: dict[str, Any], folder: Path, shown: list[Path]) -> None:
    """Writes `report.json`, `report.md` and `report.html`; the latter holds the pictures itself."""
    rows, kind = (condition_table(report), "conditions") if "conditions" in report else (group_table(report), "report")
    captions, canonical = captioned(shown).items(), report["baselines_on"] == "canonical form"
    texts = {"report.json": json.dumps(report, indent=1, allow_nan=False) + "\n"}
    for ending in ("md", "html"):
        escape = ending == "html"
        pictures = [(_embedded(file) if escape else file.name, caption) for file, caption in captions]
        template = _environment(escape).get_template(f"{kind}.{ending}")
        texts[f"report.{ending}"] = template.render(
            report=report if escape else {**report, "task": plain(report["task"])},
            meanings=_meanings(report),
            words=WORDS | ({"baselines": f"{WORDS['baselines']}; {CANONICAL}"} if canonical else {}),
            about=ABOUT[kind],
            against=AGAINST,
            kinds={kind: KINDS[kind] for kind in {point["kind"]: 0 for point in report.get("baselines", ())}},
            columns=tuple(rows[0]),
            rows=rows,
            pictures=pictures,
        )
    for name, text in texts.items():
        with whole(folder / name) as file:
            file.write_text(text, encoding="utf-8")
