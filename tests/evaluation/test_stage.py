# Over 400 lines: all of it shares a few reports, which take long to make.
import html.parser
import json
import math
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from torch import nn

import pdiff_hf
from pdiff_hf import Baseline, EvaluateConfig, ParameterLayout, Task, WeightZoo, ZooError, load_task, run_evaluate
from pdiff_hf.errors import ConfigError, MissingExtraError, PipelineError, TaskError
from pdiff_hf.evaluation import measures, scoring, stage
from pdiff_hf.evaluation.measures import parameter_statistics
from pdiff_hf.evaluation.report import write_report
from pdiff_hf.evaluation.scoring import Scorer
from pdiff_hf.files import PARTS
from pdiff_hf.tasks.digits import DigitsMLP


# Probabilities are computed in float32: a relative error of 1e-6 or so each, hence of their logarithms and squares.
ROUNDING = 1e-6
FIGURES = ("nll", "brier", "ece", "ece_scaled", "temperature")


@pytest.fixture(scope="module")
def other_zoo(digits_zoo, tmp_path_factory) -> WeightZoo:
    """The even networks of the digits zoo, each with a little noise."""
    zoo = WeightZoo.create(tmp_path_factory.mktemp("evaluate") / "zoo", digits_zoo.layout, task="digits-convnet")
    generator = torch.Generator().manual_seed(0)
    with zoo:
        for vector in digits_zoo.vectors(range(0, 40, 2)):
            zoo.append(vector + 0.05 * torch.randn(vector.shape, generator=generator))
    return zoo


@pytest.fixture(scope="module")
def written(digits_zoo, other_zoo, tmp_path_factory):
    """A report, and the folder that it was written to."""
    folder = tmp_path_factory.mktemp("evaluate") / "report"
    report = pdiff_hf.evaluate(trained=digits_zoo, generated=other_zoo, fresh=other_zoo, output_dir=folder)
    return report, folder


@pytest.fixture(scope="module")
def report(written):
    return written[0]


def config(trained, generated, folder, **changes) -> EvaluateConfig:
    names = {"trained": str(trained.folder), "generated": str(generated.folder), "output_dir": str(folder)}
    return EvaluateConfig(**{**names, **changes})


# A second opinion: NumPy in double precision, one network and one example at a time where that is clearest.


def slow_digits(split):
    inputs, targets = load_task("digits-convnet").data(split)
    return inputs.numpy().astype(np.float64), targets.numpy()


def slow_convolution(images, weight, bias):
    """`[E, I, H, W]` with a 3x3 kernel and a border of zeros."""
    count, _, height, width = images.shape
    padded = np.zeros((count, images.shape[1], height + 2, width + 2))
    padded[:, :, 1:-1, 1:-1] = images
    out = np.zeros((count, len(weight), height, width)) + bias[:, None, None]
    for i in range(3):
        for j in range(3):
            out += np.einsum(
                "ehwo->eohw",
                np.einsum("eihw,oi->ehwo", padded[:, :, i : i + height, j : j + width], weight[:, :, i, j]),
            )
    return out


def slow_pool(images):
    return np.max([images[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)], axis=0)


def slow_probabilities(state, images):
    w1, b1, w2, b2, w3, b3 = (value.numpy().astype(np.float64) for value in state.values())
    hidden = slow_pool(np.maximum(slow_convolution(images, w1, b1), 0))
    hidden = slow_pool(np.maximum(slow_convolution(hidden, w2, b2), 0))
    logits = hidden.reshape(len(images), -1) @ w3.T + b3
    odds = np.exp(logits - logits.max(1, keepdims=True))
    return odds / odds.sum(1, keepdims=True)


def slow_zoo(zoo, split):
    images, _ = slow_digits(split)
    return [slow_probabilities(zoo.state_dict(index), images) for index in range(len(zoo))]


def slow_wrong(predictions, targets):
    return {e for e, p in enumerate(predictions) if max(range(len(p)), key=p.__getitem__) != targets[e]}


def slow_accuracy(predictions, targets):
    return 1 - len(slow_wrong(predictions, targets)) / len(targets)


def slow_overlap(a, b):
    return len(a & b) / len(a | b) if a | b else 1.0


def slow_nll(predictions, targets):
    return sum(-np.log(p[t]) for p, t in zip(predictions, targets, strict=True)) / len(targets)


def slow_brier(predictions, targets):
    total = 0.0
    for p, t in zip(predictions, targets, strict=True):
        total += sum((p[c] - (c == t)) ** 2 for c in range(len(p)))
    return total / len(targets)


def slow_calibration_error(predictions, targets):
    """Guo et al. 2017: bins of equal width of the confidence; absolute gaps, weighted by how many are in a bin."""
    bins = {}
    for p, t in zip(predictions, targets, strict=True):
        place = min(int(max(p) * 15), 14)
        bins.setdefault(place, []).append((max(p), float(np.argmax(p) == t)))
    gaps = [abs(sum(c for c, _ in rows) - sum(right for _, right in rows)) for rows in bins.values()]
    return sum(gaps) / len(targets)


def slow_scaled(predictions, temperature):
    odds = np.asarray(predictions) ** (1 / temperature)
    return odds / odds.sum(1, keepdims=True)


def slow_temperature(predictions, targets):
    """The one of a fine grid at which the likelihood is largest."""
    grid = np.exp(np.arange(-3, 3.0005, 0.002))
    index = np.arange(len(targets))
    scores = [-np.log(np.maximum(slow_scaled(predictions, t)[index, targets], 1e-300)).mean() for t in grid]
    return grid[int(np.argmin(scores))]


@pytest.fixture(scope="module")
def slow(digits_zoo, other_zoo):
    """Predictions of the zoos and their errors."""
    zoos = {"trained": digits_zoo, "generated": other_zoo}
    targets = {split: slow_digits(split)[1] for split in ("validation", "test")}
    predictions = {name: {split: slow_zoo(zoo, split) for split in targets} for name, zoo in zoos.items()}
    wrong = {name: [slow_wrong(p, targets["test"]) for p in of["test"]] for name, of in predictions.items()}
    return predictions, targets, wrong


@pytest.mark.parametrize("group", ["trained", "generated"])
def test_accuracies_agree_with_a_slow_computation(report, slow, group):
    predictions, targets, _ = slow
    accuracies = [slow_accuracy(p, targets["test"]) for p in predictions[group]["test"]]
    validation = [slow_accuracy(p, targets["validation"]) for p in predictions[group]["validation"]]
    figures = report["groups"][group]
    assert figures["count"] == len(accuracies)
    assert figures["not_finite"] == 0
    expected = {
        "mean": sum(accuracies) / len(accuracies),
        "min": min(accuracies),
        "max": max(accuracies),
        "best_on_validation": accuracies[validation.index(max(validation))],
    }
    assert {key: figures["accuracy"][key] for key in expected} == pytest.approx(expected, abs=ROUNDING)
    for key in ("interval_networks", "interval_examples"):
        low, high = figures["accuracy"][key]
        assert low <= expected["mean"] <= high
        assert high - low < 0.06


@pytest.mark.parametrize("group", ["trained", "generated"])
def test_calibration_agrees_with_a_slow_computation(report, slow, group):
    predictions, targets, _ = slow
    figures, test = report["groups"][group], targets["test"]
    of_test, of_validation = predictions[group]["test"], predictions[group]["validation"]
    expected = {
        "nll": np.mean([slow_nll(p, test) for p in of_test]),
        "brier": np.mean([slow_brier(p, test) for p in of_test]),
        # A confidence on the border of two bins may fall into the other one; the gaps change by 1 / 597 each then.
        "ece": np.mean([slow_calibration_error(p, test) for p in of_test]),
    }
    assert {key: figures[key] for key in expected} == pytest.approx(expected, rel=1e-5, abs=ROUNDING)
    temperatures = [slow_temperature(p, targets["validation"]) for p in of_validation]
    assert figures["temperature"] == pytest.approx(np.mean(temperatures), rel=1e-2)
    scaled = [slow_calibration_error(slow_scaled(p, t), test) for p, t in zip(of_test, temperatures, strict=True)]
    # Temperatures from the grid move a few examples to another bin.
    assert figures["ece_scaled"] == pytest.approx(np.mean(scaled), abs=1e-3)


def test_overlaps_of_errors_agree_with_a_slow_computation(report, slow):
    _, _, wrong = slow
    trained, generated = wrong["trained"], wrong["generated"]
    largest = [max(slow_overlap(a, b) for b in trained) for a in generated]
    others = [max(slow_overlap(a, b) for j, b in enumerate(trained) if i != j) for i, a in enumerate(trained)]

    def mean(values):
        return sum(values) / len(values)

    assert report["groups"]["generated"]["maximum_similarity"]["mean"] == pytest.approx(mean(largest), abs=ROUNDING)
    assert report["groups"]["trained"]["maximum_similarity"]["mean"] == pytest.approx(mean(others), abs=ROUNDING)
    expected = {
        name: mean([slow_overlap(a, b) for i, a in enumerate(sets) for j, b in enumerate(sets) if i != j])
        for name, sets in (("trained_trained", trained), ("generated_generated", generated))
    }
    expected["generated_trained"] = mean([slow_overlap(a, b) for a in generated for b in trained])
    expected["maximum_generated_trained"] = max(largest)
    assert report["similarity"] == pytest.approx(expected, abs=ROUNDING)


def test_distances_agree_with_a_slow_computation(report, digits_zoo, other_zoo):
    trained, generated = (zoo.vectors().numpy().astype(np.float64) for zoo in (digits_zoo, other_zoo))
    nearest = [min(np.sqrt(((a - b) ** 2).sum()) for b in trained) for a in generated]
    own = [min(np.sqrt(((a - b) ** 2).sum()) for j, b in enumerate(trained) if i != j) for i, a in enumerate(trained)]
    for name, values in (("generated", nearest), ("trained", own)):
        expected = {"mean": np.mean(values), "min": min(values), "max": max(values)}
        assert report["nearest_l2"][name] == pytest.approx(expected, rel=ROUNDING)
    parents = [int(np.argmin([((a - b) ** 2).sum() for b in trained])) for a in generated]
    copied = np.mean([away <= own[parent] / 3 for away, parent in zip(nearest, parents, strict=True)])
    assert report["verdict"]["copied"] == pytest.approx(copied)
    outside = []
    for network, parent in zip(generated, parents, strict=True):
        way = network - trained[parent]
        basis = np.linalg.qr((trained - trained[parent])[[i for i in range(40) if i != parent]].T)[0]
        outside.append(1 - ((basis.T @ way) ** 2).sum() / (way**2).sum())
    assert report["verdict"]["outside_span"] == pytest.approx(np.mean(outside), abs=1e-5)


@pytest.mark.parametrize("group", ["trained", "generated"])
def test_ensembles_agree_with_a_slow_computation(report, slow, group):
    predictions, targets, _ = slow
    rows = report["ensembles"][group]
    count = len(predictions[group]["test"])
    assert [row["size"] for row in rows] == [*[2**k for k in range(10) if 2**k < count], count]
    average = {split: sum(of) / count for split, of in predictions[group].items()}
    whole, test = average["test"], targets["test"]
    assert rows[-1]["accuracy"] == pytest.approx(slow_accuracy(whole, test), abs=ROUNDING)
    expected = {"nll": slow_nll, "brier": slow_brier, "ece": slow_calibration_error}
    assert {key: rows[-1][key] for key in expected} == pytest.approx(
        {key: figure(whole, test) for key, figure in expected.items()}, rel=1e-5, abs=ROUNDING
    )
    temperature = slow_temperature(average["validation"], targets["validation"])
    assert rows[-1]["temperature"] == pytest.approx(temperature, rel=1e-2)
    alone = [slow_nll(p, test) for p in predictions[group]["test"]]
    # Of one, it is one of them; the likelihood of an average is never worse than the average one.
    assert min(abs(rows[0]["nll"] - nll) for nll in alone) < 1e-5
    assert rows[-1]["nll"] <= np.mean(alone)
    if group == "trained":
        figures = report["groups"]["ensemble"]
        assert figures["accuracy"]["mean"] == rows[-1]["accuracy"]
        assert {key: figures[key] for key in FIGURES} == {key: rows[-1][key] for key in FIGURES}


def test_bands_of_ensembles_are_bootstrapped_over_examples(report, slow):
    """That of the accuracy is as wide as the binomial one; of one sample of all examples there is no width."""
    for rows in report["ensembles"].values():
        for row in rows:
            assert row["intervals"].keys() == {"accuracy", "nll", "ece_scaled"}
            for name in ("accuracy", "nll"):
                low, high = row["intervals"][name]
                assert low <= row[name] <= high
            low, high = row["intervals"]["accuracy"]
            spread = math.sqrt(row["accuracy"] * (1 - row["accuracy"]) / len(slow[1]["test"]))
            assert high - low == pytest.approx(3.92 * spread, rel=0.2)


@pytest.mark.parametrize("sharpness", [1.3, 1.8])
def test_bands_of_the_calibration_error_hold_the_true_one(sharpness):
    generator = torch.Generator().manual_seed(1)

    def drawn(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        logits = 2.5 * torch.randn(count, 10, generator=generator).double()
        answers = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
        return (sharpness * logits).softmax(1), answers

    many, answers = drawn(100_000)
    true = slow_calibration_error(many.numpy(), answers.numpy())
    held = 0
    for _ in range(100):
        predictions, answers = drawn(597)
        scorer = object.__new__(scoring.Scorer)
        scorer.targets = {"test": answers}
        low, high = scorer._bands(predictions, predictions.argmax(1) == answers, 1.0)["ece_scaled"]
        held += low <= true <= high
    assert held >= 85


def test_without_resampling_bands_are_the_figures(monkeypatch):
    networks = [answering(slope, offset) for slope, offset in ((1, 0), (0.2, 1), (-0.1, 0.3), (2, -1))]
    monkeypatch.setattr(scoring, "resample", lambda count, seed: torch.full((3, count), 1 / count).double())
    report = pdiff_hf.evaluate(BlobTask(), trained=networks, generated=networks)
    for row in report["ensembles"]["generated"]:
        assert row["intervals"].keys() == {"accuracy", "nll", "ece_scaled"}
        for name, band in row["intervals"].items():
            assert band == pytest.approx([row[name]] * 2, abs=1e-5)


def test_the_soup_agrees_with_a_slow_computation(report, digits_zoo, slow):
    states = [digits_zoo.state_dict(index) for index in range(40)]
    soup = {name: torch.stack([state[name].double() for state in states]).mean(0) for name in states[0]}
    images, targets = slow_digits("test")
    predictions = slow_probabilities(soup, images)
    figures = report["groups"]["soup"]
    assert figures["count"] == 1
    assert figures["accuracy"]["mean"] == pytest.approx(slow_accuracy(predictions, targets), abs=ROUNDING)
    # The averaged weights themselves are rounded to float32 too.
    assert figures["nll"] == pytest.approx(slow_nll(predictions, targets), rel=1e-4)
    _, _, wrong = slow
    similar = max(slow_overlap(slow_wrong(predictions, targets), b) for b in wrong["trained"])
    assert figures["maximum_similarity"]["mean"] == pytest.approx(similar, abs=ROUNDING)


def test_statistics_of_parameters_agree_with_a_slow_computation(report, digits_zoo, other_zoo):
    row = next(row for row in report["parameters"] if row["tensor"] == "0.bias")
    for name, zoo in (("trained", digits_zoo), ("generated", other_zoo)):
        values = np.array([zoo.state_dict(i)["0.bias"].double().numpy() for i in range(len(zoo))])
        assert row[name] == pytest.approx({"mean": values.mean(), "std": values.std()}, rel=1e-5)
    assert [row["tensor"] for row in report["parameters"]] == list(digits_zoo.state_dict(0))


def test_every_baseline_is_a_curve(report):
    kinds = {}
    for point in report["baselines"]:
        kinds.setdefault(point["kind"], []).append(point)
    assert list(kinds) == ["noise", "soup", "interpolation", "gaussian", "low-rank-gaussian"]
    for points in kinds.values():
        strengths = [point["strength"] for point in points]
        assert strengths == sorted(strengths)
        assert all(0 <= point["maximum_similarity"]["mean"] <= 1 for point in points)
        assert all(point["accuracy"]["min"] <= point["accuracy"]["mean"] + 1e-6 for point in points)
    assert [point["strength"] for point in kinds["soup"]] == [2, 4, 8, 16, 32, 40]
    assert kinds["noise"][0]["maximum_similarity"]["mean"] > 0.95
    assert kinds["noise"][-1]["accuracy"]["mean"] < 0.6


def test_copies_have_similarity_one(digits_zoo):
    report = pdiff_hf.evaluate(trained=digits_zoo, generated=digits_zoo, networks_per_point=5)
    assert report["groups"]["generated"]["maximum_similarity"]["mean"] == 1
    assert report["groups"]["generated"]["accuracy"] == report["groups"]["trained"]["accuracy"]
    assert report["nearest_l2"]["generated"] == {"mean": 0, "min": 0, "max": 0}
    assert report["nearest_l2"]["aligned"]["generated"]["max"] == 0
    assert report["verdict"]["label"] == "memorized"


# What is written.


def without_time(report):
    return {key: value for key, value in report.items() if key != "seconds"}


def test_the_report_is_what_is_in_its_file(written):
    report, folder = written

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    assert json.loads((folder / "report.json").read_text(), parse_constant=refuse) == report
    assert report["task"] == "digits-convnet"
    assert report["examples"] == 597
    assert list(report["groups"]) == ["trained", "soup", "ensemble", "generated", "fresh"]
    assert report["groups"]["fresh"]["accuracy"] == report["groups"]["generated"]["accuracy"]
    assert report["verdict"]["fresh_accuracy_gain"] == pytest.approx(report["verdict"]["accuracy_gain"], abs=1e-6)


def test_every_picture_is_there_for_the_screen_and_for_print(written):
    _, folder = written
    pictures = {"plane", "parameters", "overlap", "calibration", "map"}
    assert {file.stem for file in folder.glob("*.png")} == {file.stem for file in folder.glob("*.svg")} == pictures
    for picture in pictures:
        assert (folder / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (folder / f"{picture}.svg").read_text()


def test_the_text_has_the_verdict_the_figures_and_the_pictures(written):
    report, folder = written
    text = (folder / "report.md").read_text()
    assert f"**{report['verdict']['sentence']}** (`{report['verdict']['label']}`)" in text
    page = (folder / "report.html").read_text()
    for word in (*report["groups"], "similarity", "front"):
        assert re.search(rf"^- \*\*{word}\*\*: \w", text, re.MULTILINE)
        assert re.search(rf"<dt>{word}</dt><dd>\w", page)
    for group in report["groups"].values():
        assert f"| {group['count']} | {100 * group['accuracy']['mean']:.2f} |" in text
    shown = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert sorted(shown) == sorted(file.name for file in folder.glob("*.png"))
    assert "None" not in text
    assert "nan" not in text.split()


class References(html.parser.HTMLParser):
    """All that a browser would fetch, and the tags that are open."""

    def __init__(self):
        super().__init__()
        self.found, self.tags = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        names = ("src", "href", "srcset", "data", "action", "poster")
        self.found += [value for name, value in attrs if name in names and not value.startswith("#")]


def test_the_page_holds_all_it_shows(written):
    report, folder = written
    page = (folder / "report.html").read_text()
    references = References()
    references.feed(page)
    assert len(references.found) == 4
    assert all(reference.startswith("data:image/png;base64,") for reference in references.found)
    assert not {"script", "link", "iframe", "object"} & set(references.tags)
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert report["verdict"]["sentence"] in page
    # Contents lead somewhere, and what one points at has a name.
    for target in re.findall(r'<a href="#(\w+)"', page):
        assert f'<h2 id="{target}">' in page
    plane = page[page.index("<svg") : page.index("</svg>")]
    for group in ("trained", "generated"):
        assert len(re.findall(rf"<title>{group} \d+: [\d.]+ %, similarity [\d.]+</title></use>", plane)) > 1


def test_networks_far_from_the_others_stand_at_the_edge_under_their_own_names(tmp_path, monkeypatch):
    monkeypatch.setattr(measures, "MOST_COMPARED", 6)
    trained = [answering(1, offset / 100) for offset in range(12)]
    generated = [answering(1, 0.5), answering(0.5, 3.0), answering(-1, 0.0)]
    pdiff_hf.evaluate(BlobTask(), trained=trained, generated=generated, output_dir=tmp_path)
    plane = (tmp_path / "plane.svg").read_text()
    places = {name: re.findall(rf"<title>{name} (\d+):", plane) for name in ("trained", "generated")}
    assert places == {"trained": ["0", "2", "4", "6", "8", "10"], "generated": ["0", "1", "2"]}


def test_the_page_has_the_figures_of_the_text(written):
    report, folder = written
    page, text = (" ".join((folder / f"report.{ending}").read_text().split()) for ending in ("html", "md"))
    header = next(
        line for line in (folder / "report.md").read_text().splitlines() if line.startswith("| networks | count")
    )
    for column in header.strip("| ").split(" | "):
        assert f"<th>{column}</th>" in page
    for figure in ("leads out of what weighted sums", "the same, min"):
        assert (figure in page) == (figure in text)
    assert "the same, min" in page
    (folder / "again").mkdir()
    write_report({**report, "timings_s": {"collect": 1.5, "train": 2.0}}, folder / "again", [])
    assert "All stages: collect 1.5 s, train 2.0 s." in " ".join(
        (folder / "again" / "report.html").read_text().split()
    )
    assert "Seconds of the stages: collect 1.5, train 2.0." in (folder / "again" / "report.md").read_text()


def test_what_is_no_network_is_named_and_the_hub_is_not_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", lambda *_, **__: pytest.fail("asked the Hub"))
    Path("theirs").mkdir()
    trained = [answering(1, offset) for offset in (0, 0.1, 0.2)]
    for place, message in (
        ("theirs/*.pth", r"Nothing matches theirs/\*\.pth: expected files of networks \(\.safetensors, \.pt,"),
        ("theirs", "theirs holds neither a zoo nor files of networks"),
        ("theirs/net.pt", r"There is no file theirs/net\.pt"),
        ("./theirs", "holds neither a zoo nor files"),
    ):
        with pytest.raises(ZooError, match=message):
            pdiff_hf.evaluate(BlobTask(), trained=trained, generated=place)
    with pytest.raises(ZooError, match=r"`pdiff-hf collect` makes a zoo"):
        pdiff_hf.evaluate(BlobTask(), trained=trained, generated="../elsewhere")
    torch.save(answering(1, 0.1), "theirs/net.pt")
    report = pdiff_hf.evaluate(BlobTask(), trained=trained, generated="theirs/net.pt")
    assert report["groups"]["generated"]["count"] == 1


@pytest.mark.slow
def test_a_page_does_not_run_what_names_hold(tmp_path):
    class Evil(BlobTask):
        pass

    Evil.__name__ = "<script>alert(1)</script>"
    task = Evil()
    pdiff_hf.evaluate(task, trained=states(task, 3), generated=states(task, 2, seed=9), output_dir=tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_the_same_networks_give_the_same_figures(report, digits_zoo, other_zoo):
    again = pdiff_hf.evaluate(trained=digits_zoo, generated=other_zoo, fresh=other_zoo)
    assert without_time(again) == without_time(report)


def test_nothing_is_written_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pdiff_hf.evaluate(BlobTask(), trained=states(BlobTask(), 3), generated=states(BlobTask(), 2, seed=9))
    assert list(tmp_path.iterdir()) == []


def test_randomness_of_the_caller_is_left_alone():
    networks = states(BlobTask(), 3)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    pdiff_hf.evaluate(BlobTask(), trained=networks, generated=networks)
    assert torch.equal(torch.rand(2), expected)


# What can be passed.


@pytest.mark.slow
@pytest.mark.long
def test_zoos_folders_checkpoints_and_state_dicts_are_the_same_to_it(report, digits_zoo, other_zoo, tmp_path):
    of_folders = pdiff_hf.evaluate(trained=str(digits_zoo.folder), generated=other_zoo.folder)
    lists = [[zoo.state_dict(index) for index in range(len(zoo))] for zoo in (digits_zoo, other_zoo)]
    of_lists = pdiff_hf.evaluate("digits-convnet", trained=lists[0], generated=lists[1])
    for folder, state_dicts in zip(("theirs", "ours"), lists, strict=True):
        (tmp_path / folder).mkdir()
        for index, state_dict in enumerate(state_dicts):
            torch.save(state_dict, tmp_path / folder / f"{index}.pt")
    of_files = pdiff_hf.evaluate("digits-convnet", trained=tmp_path / "theirs", generated=f"{tmp_path}/ours/*.pt")
    for other in (of_folders, of_lists, of_files):
        for key in ("similarity", "nearest_l2", "parameters", "task"):
            assert other[key] == report[key]
        assert other["baselines"] == of_folders["baselines"]
        # With fresh networks, curves are finer where these are, too.
        assert all(point in report["baselines"] for point in other["baselines"])
        assert other["groups"] == {name: group for name, group in report["groups"].items() if name != "fresh"}


@pytest.mark.slow
def test_pipelines_are_sampled(digits_zoo, digits_pipeline, tmp_path):
    pipeline = pdiff_hf.load_pipeline(digits_pipeline)
    settings = {"trained": digits_zoo, "networks_per_point": 5}
    of_folder = pdiff_hf.evaluate(**settings, generated=str(digits_pipeline), num_networks=6, seed=3)
    of_object = pdiff_hf.evaluate(**settings, generated=pipeline, num_networks=6, seed=3, output_dir=tmp_path)
    generators = [torch.Generator().manual_seed(seed) for seed in range(3, 9)]
    states = pipeline(num_networks=6, generator=generators).state_dicts
    of_states = pdiff_hf.evaluate(**settings, generated=states, pipeline=pipeline)
    for other in (of_object, of_states):
        assert without_time(other) == without_time(of_folder)
    assert of_folder["groups"]["generated"]["count"] == 6
    assert of_folder["groups"]["reconstructed"]["count"] == 40
    assert (tmp_path / "denoising.png").exists()
    assert (tmp_path / "training.png").exists()


def test_baselines_are_generators_too(digits_zoo):
    average = Baseline(digits_zoo, "soup", 40)
    report = pdiff_hf.evaluate(trained=digits_zoo, generated=average, num_networks=3, networks_per_point=5)
    generated, soup = (report["groups"][name] for name in ("generated", "soup"))
    assert generated["count"] == 3
    assert generated["accuracy"]["min"] == generated["accuracy"]["max"] == soup["accuracy"]["mean"]
    assert "reconstructed" not in report["groups"]


@pytest.mark.slow
def test_the_stage_prints_and_fills_the_card_of_the_pipeline(digits_zoo, other_zoo, digits_pipeline, tmp_path, capsys):
    shutil.copytree(digits_pipeline, tmp_path / "pipeline")
    for _ in range(2):
        report = run_evaluate(config(digits_zoo, other_zoo, tmp_path / "report", pipeline=str(tmp_path / "pipeline")))
    printed = capsys.readouterr().out
    accuracy = report["groups"]["generated"]["accuracy"]
    assert f"{100 * accuracy['mean']:.2f}" in printed
    assert report["verdict"]["sentence"] in " ".join(printed.split())
    assert json.loads((tmp_path / "report" / "report.json").read_text()) == report
    assert (tmp_path / "report" / "evaluate.yaml").exists()

    card = ModelCard.load(tmp_path / "pipeline" / "README.md")
    assert card.text.count("## Evaluation") == 1
    assert "Not evaluated yet" not in card.text
    assert card.text.count(report["verdict"]["sentence"]) == 1
    assert f"| generated | 20 | {100 * accuracy['mean']:.2f} | {100 * accuracy['min']:.2f} |" in card.text
    shown = re.findall(r"\]\((evaluation/[a-z]+\.png)\)", card.text)
    assert len(shown) == len(set(shown)) == 7
    for picture in shown:
        assert (tmp_path / "pipeline" / picture).read_bytes().startswith(b"\x89PNG")
    values = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert values["mean accuracy of 20 generated networks"] == pytest.approx(accuracy["mean"], abs=1e-6)
    assert card.data.library_name == "diffusers"


def test_the_stage_samples_a_pipeline_and_fills_its_card(digits_zoo, digits_pipeline, tmp_path):
    shutil.copytree(digits_pipeline, tmp_path / "pipeline")
    report = run_evaluate(
        EvaluateConfig(
            trained=str(digits_zoo.folder),
            generated=str(tmp_path / "pipeline"),
            output_dir=str(tmp_path / "report"),
            num_networks=3,
            networks_per_point=5,
        )
    )
    assert report["groups"]["generated"]["count"] == 3
    assert report["verdict"]["sentence"] in ModelCard.load(tmp_path / "pipeline" / "README.md").text


def test_a_pipeline_is_evaluated_with_what_it_learned_from(digits_zoo, digits_pipeline, tmp_path):
    digits_zoo.save_pretrained(tmp_path / "grown")
    with WeightZoo(tmp_path / "grown") as grown:
        grown.append(digits_zoo[0])
    settings = {"generated": str(digits_pipeline), "num_networks": 2, "networks_per_point": 2}
    with pytest.raises(ZooError, match=r"did not learn from .*grown as it is now: it has grown or changed"):
        pdiff_hf.evaluate(trained=grown, **settings)
    # Of files, nobody knows whether they are those of the zoo.
    found = pdiff_hf.evaluate("digits-convnet", trained=[digits_zoo.state_dict(i) for i in range(40)], **settings)
    assert found["groups"]["trained"]["count"] == 40


@pytest.mark.slow
def test_figures_do_not_go_into_the_card_of_a_pipeline_that_changed_meanwhile(
    digits_zoo, digits_pipeline, tmp_path, monkeypatch
):
    folder = tmp_path / "pipeline"
    shutil.copytree(digits_pipeline, folder)
    before = (folder / "README.md").read_bytes()
    names = {"trained": str(digits_zoo.folder), "generated": str(folder), "output_dir": str(tmp_path / "report")}
    settings = EvaluateConfig(**names, num_networks=3, networks_per_point=5)
    write = stage.write_report

    def meanwhile(*arguments):
        pipe = pdiff_hf.load_pipeline(folder)
        with torch.no_grad():
            next(pipe.unet.parameters()).add_(1)
        pipe.save_pretrained(folder)
        write(*arguments)

    monkeypatch.setattr(stage, "write_report", meanwhile)
    with pytest.raises(PipelineError, match="changed since they were evaluated: evaluate them again"):
        run_evaluate(settings)
    assert (folder / "README.md").read_bytes() == before


@pytest.mark.slow
def test_what_is_wrong_with_a_card_is_said_before_the_work(digits_zoo, digits_pipeline, tmp_path, monkeypatch, capsys):
    folder = Path(shutil.copytree(digits_pipeline, tmp_path / "pipeline"))
    (folder / "README.md").write_text("Mine.")
    names = {"trained": str(digits_zoo.folder), "generated": str(folder), "output_dir": str(tmp_path / "report")}
    config = EvaluateConfig(**names, num_networks=2, networks_per_point=2)
    with pytest.raises(PipelineError, match="has no place for figures"):
        run_evaluate(config)
    assert not (tmp_path / "report").exists()
    monkeypatch.setattr(stage.os, "access", lambda place, mode: Path(place) != folder)
    with pytest.raises(ConfigError, match="cannot be written, and --push-to-hub pushes it with its new card"):
        run_evaluate(replace(config, push_to_hub="me/pipeline"))
    run_evaluate(config)
    assert f"{folder} cannot be written: its card will stay as it is." in capsys.readouterr().err
    assert (folder / "README.md").read_text() == "Mine."
    assert (tmp_path / "report" / "report.json").exists()


def test_what_a_report_replaces_is_known(written):
    assert {file.name for file in written[1].glob("*.png")} <= {*PARTS["a report"]}


@pytest.mark.parametrize("name", ["report.md", "map.png"])
def test_a_report_replaces_nothing_but_a_report(digits_zoo, other_zoo, tmp_path, name):
    (tmp_path / name).write_text("mine")
    arguments = {"trained": digits_zoo, "generated": other_zoo, "output_dir": tmp_path}
    for run in (lambda: pdiff_hf.evaluate(**arguments), lambda: run_evaluate(config(digits_zoo, other_zoo, tmp_path))):
        with pytest.raises(ConfigError, match=f"holds {name}, which is none of a report"):
            run()
    with pytest.raises(ConfigError, match="holds a zoo"):
        pdiff_hf.evaluate(**{**arguments, "output_dir": digits_zoo.folder})
    assert [file.name for file in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("count", [50, 30])
def test_statistics_of_large_tensors_are_of_all_their_places(tmp_path, count):
    kernel = torch.zeros(16, 8, 3, 3)
    kernel[..., 0] = 1  # the left column
    with WeightZoo.create(tmp_path / "zoo", ParameterLayout.from_state_dict({"weight": kernel})) as zoo:
        for _ in range(count):
            zoo.append(kernel.flatten())
    (row,) = parameter_statistics(zoo, zoo)
    assert row["trained"]["mean"] == pytest.approx(1 / 3, abs=0.02)
    assert row["wasserstein"] < 0.02


# Bad input, and what is at its edge. Two clouds of points, told apart by a line: cheap and easy to break.


class BlobTask(Task):
    """Two classes of points, which overlap."""

    overlapping = 1.0

    def build_network(self):
        return nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))

    def data(self, split):
        generator = torch.Generator().manual_seed(len(split))
        targets = torch.arange(40) % 2
        inputs = self.overlapping * torch.randn(40, 2, generator=generator)
        return inputs + 3 * targets[:, None] - 1.5, targets


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.bool])
def test_classes_of_any_integers_are_classes(dtype):
    class Small(BlobTask):
        def data(self, split):
            inputs, targets = super().data(split)
            return inputs, targets.to(dtype)

    networks = [answering(slope, offset) for slope, offset in ((1, 0), (0.2, 1), (-0.1, 0.3), (2, -1))]
    found, expected = (pdiff_hf.evaluate(task, trained=networks, generated=networks) for task in (Small(), BlobTask()))
    assert found["groups"] == expected["groups"]
    assert found["ensembles"] == expected["ensembles"]


def answering(sign: float, offset: float = 0.0) -> dict:
    """Answers by the side of a line, right or, of the other sign, wrong."""
    weight = torch.tensor([[1.0, 1], [-1, -1], [0, 0], [0, 0]])
    bias = torch.tensor([offset, -offset, 0.0, 0.0])
    head = sign * torch.tensor([[-1.0, 1, 0, 0], [1, -1, 0, 0]])
    return {"0.weight": weight, "0.bias": bias, "2.weight": head, "2.bias": torch.zeros(2)}


def states(task: Task, count: int, seed: int = 0) -> list[dict]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return [task.build_network().state_dict() for _ in range(count)]


def is_plain_json(report) -> bool:
    return json.loads(json.dumps(report, allow_nan=False)) == report


def test_zoos_of_different_architectures_are_refused(digits_zoo, zoo):
    with pytest.raises(ZooError, match="hold networks of different architectures"):
        pdiff_hf.evaluate(trained=digits_zoo, generated=zoo)
    with pytest.raises(ZooError, match=r"layout does not know|is missing|expected float32"):
        pdiff_hf.evaluate(trained=digits_zoo, generated=states(BlobTask(), 2))


def test_a_task_that_does_not_fit_is_refused_with_the_tensors(digits_zoo, other_zoo, tmp_path):
    with pytest.raises(ZooError, match=r"(?s)do not fit the task.*Missing key.*1\.weight"):
        run_evaluate(config(digits_zoo, other_zoo, tmp_path, task="digits-mlp"))
    with pytest.raises(ZooError, match=r"(?s)do not fit the task"):
        pdiff_hf.evaluate("digits-mlp", trained=digits_zoo, generated=other_zoo)


def test_a_zoo_does_not_choose_the_code_that_runs(digits_zoo, tmp_path):
    (tmp_path / "evil.py").write_text("raise SystemExit('code that a zoo named ran')")
    digits_zoo.save_pretrained(tmp_path / "zoo")
    description = json.loads((tmp_path / "zoo" / "zoo.json").read_text()) | {"task": f"{tmp_path}/evil.py:Evil"}
    (tmp_path / "zoo" / "zoo.json").write_text(json.dumps(description))
    with pytest.raises(TaskError, match=r"which is code of its own: pass --task .*evil\.py:Evil to run it"):
        run_evaluate(config(WeightZoo(tmp_path / "zoo"), digits_zoo, tmp_path / "report"))


def test_copies_are_found_where_each_training_network_is_there_twice():
    task = DigitsMLP()
    networks = states(task, 12)
    copies = [{name: value + 1e-5 * torch.randn_like(value) for name, value in one.items()} for one in networks]
    report = pdiff_hf.evaluate(task, trained=[*networks, *networks], generated=copies, networks_per_point=4)
    assert report["verdict"]["copied"] == 1


def test_copies_whose_units_have_other_scales_are_found():
    networks = states(BlobTask(), 5)
    copies = [
        {
            "0.weight": 3 * one["0.weight"],
            "0.bias": 3 * one["0.bias"],
            "2.weight": one["2.weight"] / 3,
            "2.bias": one["2.bias"],
        }
        for one in networks
    ]
    report = pdiff_hf.evaluate(BlobTask(), trained=networks, generated=copies, networks_per_point=4)
    assert report["verdict"]["copied"] == 1


def test_curves_begin_with_the_training_networks():
    trained = [answering(1, offset / 20) for offset in range(8)]
    generated = [{**one, "2.weight": 1.001 * one["2.weight"]} for one in trained]
    verdict = pdiff_hf.evaluate(BlobTask(), trained=trained, generated=generated, networks_per_point=4)["verdict"]
    assert verdict["gain_over_noise"] <= 1e-6
    assert verdict["gain_over_averaging"] <= 1e-6


def test_copies_in_another_order_are_found_where_all_networks_err_alike():
    """Nothing but the values of the weights tells of which network each is one."""
    generator = torch.Generator().manual_seed(0)
    networks = [
        {name: value * (1 + 0.1 * torch.rand(value.shape, generator=generator)) for name, value in one.items()}
        for one in [answering(1)] * 24
    ]
    order = torch.tensor([2, 0, 3, 1])
    copies = [
        {"0.weight": one["0.weight"][order], "0.bias": one["0.bias"][order], "2.weight": one["2.weight"][:, order]}
        | {"2.bias": one["2.bias"]}
        for one in networks[:12]
    ]
    report = pdiff_hf.evaluate(BlobTask(), trained=networks, generated=copies, networks_per_point=4)
    assert report["similarity"]["trained_trained"] > 0.99
    assert report["verdict"]["copied"] == 1


def test_where_guessing_is_right_networks_that_do_as_well_work():
    trained = [answering(1, offset) for offset in (0, 0.1, 0.2)]
    report = pdiff_hf.evaluate(OneClass(), trained=trained, generated=trained)
    assert report["verdict"]["label"] != "not-working"


def test_weights_as_large_as_numbers_go_are_drawn(tmp_path):
    huge = {name: value * 3e38 if value.ndim == 2 else value for name, value in answering(1).items()}
    pdiff_hf.evaluate(BlobTask(), trained=[answering(1), answering(2)], generated=[huge], output_dir=tmp_path)
    assert (tmp_path / "report.json").exists()


def test_too_few_networks_are_refused(digits_zoo, tmp_path):
    empty = WeightZoo.create(tmp_path / "empty", digits_zoo.layout)
    with pytest.raises(ZooError, match="There are 0 generated networks; an evaluation needs at least 1"):
        run_evaluate(config(digits_zoo, empty, tmp_path))
    with pytest.raises(ZooError, match="There are no networks: an empty list was given"):
        pdiff_hf.evaluate(trained=digits_zoo, generated=[])
    with pytest.raises(ZooError, match="There are no networks: an empty list was given"):
        pdiff_hf.evaluate("digits-convnet", trained=[], generated=digits_zoo)
    with pytest.raises(ZooError, match="There are 1 trained networks; an evaluation needs at least 2"):
        pdiff_hf.evaluate("digits-convnet", trained=[digits_zoo.state_dict(0)], generated=digits_zoo)


def test_networks_of_an_unknown_task_need_one(zoo, layout, tmp_path):
    with WeightZoo.create(tmp_path / "zoo2", ParameterLayout(tensors=layout.config["tensors"])) as unnamed:
        unnamed.append(zoo[0])
    with pytest.raises(TaskError, match="pass --task"):
        run_evaluate(config(unnamed, zoo, tmp_path))


def test_what_is_neither_zoo_nor_pipeline_is_refused(digits_zoo, tmp_path):
    with pytest.raises(ZooError, match="is no folder here, and no name of a repository"):
        pdiff_hf.evaluate(trained=digits_zoo, generated=str(tmp_path / "nothing" / "here"))
    with pytest.raises(ZooError, match="holds neither a zoo nor files of networks"):
        pdiff_hf.evaluate(trained=digits_zoo, generated=tmp_path)


def test_a_single_generated_network_has_its_figures(tmp_path):
    trained = [answering(1, offset) for offset in (0, 0.1, 0.2)]
    report = pdiff_hf.evaluate(BlobTask(), trained=trained, generated=[answering(1, 0.5)], output_dir=tmp_path)
    figures = report["groups"]["generated"]
    assert figures["count"] == 1
    accuracy = figures["accuracy"]
    assert accuracy["mean"] == accuracy["min"] == accuracy["max"] == accuracy["best_on_validation"]
    assert report["similarity"]["generated_generated"] is None
    assert [row["size"] for row in report["ensembles"]["generated"]] == [1]
    assert is_plain_json(report)


@pytest.mark.slow
def test_networks_that_are_always_right_are_alike(tmp_path):
    task = BlobTask()
    task.overlapping = 0.1
    trained = [answering(1, offset) for offset in (0, 0.1, 0.2)]
    report = pdiff_hf.evaluate(task, trained=trained, generated=trained[:2], output_dir=tmp_path)
    assert report["groups"]["trained"]["accuracy"]["min"] == 1
    assert report["groups"]["generated"]["maximum_similarity"]["mean"] == 1
    assert report["similarity"]["trained_trained"] == 1
    assert report["verdict"]["label"] == "memorized"
    assert is_plain_json(report)


@pytest.mark.slow
def test_networks_that_are_always_wrong_do_not_work(tmp_path):
    task = BlobTask()
    task.overlapping = 0.1
    trained = [answering(1, offset) for offset in (0, 0.1, 0.2)]
    wrong = [answering(-1, offset) for offset in (0, 0.1)]
    report = pdiff_hf.evaluate(task, trained=trained, generated=wrong, output_dir=tmp_path / "generated")
    assert report["groups"]["generated"]["accuracy"]["max"] == 0
    assert report["groups"]["generated"]["maximum_similarity"]["mean"] == 0
    assert report["verdict"]["label"] == "not-working"
    assert is_plain_json(report)
    report = pdiff_hf.evaluate(task, trained=wrong, generated=wrong, output_dir=tmp_path / "both")
    assert report["groups"]["trained"]["maximum_similarity"]["mean"] == 1
    assert report["verdict"]["label"] == "not-working"
    assert is_plain_json(report)


@pytest.mark.slow
def test_identical_training_networks_can_be_evaluated(tmp_path):
    trained = [answering(1)] * 3
    other = [answering(1, 0.5)]
    report = pdiff_hf.evaluate(BlobTask(), trained=trained, generated=other, output_dir=tmp_path)
    assert report["nearest_l2"]["trained"] == {"mean": 0, "min": 0, "max": 0}
    assert report["verdict"]["copied"] == 0
    assert is_plain_json(report)


@pytest.mark.slow
@pytest.mark.parametrize("broken", [1, 3])
def test_outputs_that_are_no_numbers_are_counted_and_wrong(tmp_path, broken):
    trained = [answering(1, offset) for offset in (0, 0.1, 0.2)]
    overflowing = {**answering(1), "2.weight": torch.full((2, 4), 3e38), "0.weight": torch.full((4, 2), 3e38)}
    generated = [overflowing] * broken + trained[broken:]
    report = pdiff_hf.evaluate(BlobTask(), trained=trained, generated=generated, output_dir=tmp_path)
    figures = report["groups"]["generated"]
    assert figures["count"] == 3
    assert figures["not_finite"] == broken
    assert figures["accuracy"]["min"] == 0
    assert is_plain_json(report)
    if broken == 3:
        assert figures["accuracy"]["max"] == 0
        assert figures["nll"] is None
        assert report["ensembles"]["generated"][-1]["accuracy"] == 0
        assert report["verdict"]["label"] == "not-working"
    else:
        assert figures["nll"] > 0
        # The ensemble is that of the others.
        of_others = pdiff_hf.evaluate(BlobTask(), trained=trained, generated=trained[broken:])
        nll = [r["ensembles"]["generated"][-1]["nll"] for r in (report, of_others)]
        assert nll[0] == pytest.approx(nll[1], rel=1e-6)


def test_training_networks_whose_outputs_are_no_numbers(tmp_path):
    overflowing = {**answering(1), "2.weight": torch.full((2, 4), 3e38), "0.weight": torch.full((4, 2), 3e38)}
    report = pdiff_hf.evaluate(
        BlobTask(), trained=[overflowing, overflowing], generated=[answering(1)], output_dir=tmp_path
    )
    assert report["groups"]["trained"]["not_finite"] == 2
    assert "ensemble" not in report["groups"]
    assert is_plain_json(report)


class OneClass(BlobTask):
    """All that is asked is of one class."""

    def data(self, split):
        inputs, targets = super().data(split)
        return (inputs, targets) if split == "train" else (inputs[targets == 0], targets[targets == 0])


def test_a_test_split_of_one_class_has_defined_figures(tmp_path):
    task = OneClass()
    trained = [answering(1, offset) for offset in (0, 0.1, 0.2)]
    report = pdiff_hf.evaluate(task, trained=trained, generated=trained[:1], output_dir=tmp_path)
    assert report["examples"] == 20
    assert report["chance"] == 1
    assert report["groups"]["generated"]["nll"] > 0
    # Guessing is right always, so nothing can be said to work.
    assert is_plain_json(report)


class OneOutput(BlobTask):
    """A logistic regression: one probability an example."""

    def build_network(self):
        return nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))

    def probabilities(self, outputs):
        return outputs.sigmoid()

    def correct(self, predictions, targets):
        return (predictions[:, 0] > 0.5) == (targets == 1)


@pytest.mark.slow
def test_predictions_that_are_no_distribution_are_averaged_as_they_are(tmp_path):
    """An ensemble is their mean: that of copies of one network is that network."""
    head = torch.tensor([[1.0, -1, 0, 0]])
    network = {**answering(1), "2.weight": head, "2.bias": torch.zeros(1)}
    report = pdiff_hf.evaluate(OneOutput(), trained=[network] * 3, generated=[network] * 2, output_dir=tmp_path)
    accuracy = report["groups"]["trained"]["accuracy"]["mean"]
    assert accuracy > 0.9
    assert [row["accuracy"] for row in report["ensembles"]["trained"]] == pytest.approx([accuracy] * 3)
    assert "nll" not in report["groups"]["trained"]
    assert is_plain_json(report)


class Regression(OneOutput):
    """The sum of two numbers, to be met within 0.1."""

    def data(self, split):
        inputs = torch.randn(40, 2, generator=torch.Generator().manual_seed(len(split)))
        return inputs, inputs.sum(1)

    def probabilities(self, outputs):
        return outputs

    def correct(self, predictions, targets):
        return (predictions[:, 0] - targets).abs() < 0.1


def test_a_regression_can_be_evaluated(tmp_path):
    head = torch.tensor([[1.0, -1, 0, 0]])
    trained = [{**answering(1), "2.weight": head * scale, "2.bias": torch.zeros(1)} for scale in (1.0, 1.01, 0.99)]
    report = pdiff_hf.evaluate(Regression(), trained=trained, generated=trained[:2], output_dir=tmp_path)
    assert report["chance"] == 0
    assert report["groups"]["trained"]["accuracy"]["mean"] == 1
    assert report["ensembles"]["trained"][-1]["accuracy"] == 1
    assert is_plain_json(report)


def test_a_pipeline_of_another_architecture_is_refused(digits_zoo, digits_pipeline, zoo):
    with pytest.raises(ZooError, match="and the pipeline hold networks of different architectures"):
        pdiff_hf.evaluate("digits-convnet", trained=zoo, generated=zoo, pipeline=str(digits_pipeline))


def test_the_path_of_a_task_stays_here(digits_zoo, tmp_path):
    (tmp_path / "mine.py").write_text("from pdiff_hf.tasks.digits import DigitsConvNet as Mine\n")
    networks = {"trained": digits_zoo, "generated": digits_zoo}
    report = pdiff_hf.evaluate(f"{tmp_path}/mine.py:Mine", **networks, networks_per_point=2)
    assert report["task"] == "mine.py:Mine"


@pytest.mark.parametrize("module", ["scipy.optimize", "torchmetrics.functional.classification", "matplotlib.figure"])
def test_a_missing_extra_is_named_before_anything_is_scored(digits_zoo, tmp_path, monkeypatch, module):
    package = module.partition(".")[0]

    class Missing:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == package:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    parts = module.split(".")
    for length in range(1, len(parts) + 1):
        monkeypatch.delitem(sys.modules, ".".join(parts[:length]), raising=False)
    monkeypatch.setattr(sys, "meta_path", [Missing, *sys.meta_path])
    with pytest.raises(MissingExtraError, match=r"pip install '.*\[report\]'"):
        pdiff_hf.evaluate(trained=digits_zoo, generated=digits_zoo, output_dir=tmp_path)
    assert not list(tmp_path.iterdir())


class Swapped(type(load_task("digits-convnet"))):
    """Takes what is wrong for right."""

    def correct(self, outputs, targets):
        return ~super().correct(outputs, targets)


def scores_of(zoo: WeightZoo, task: Task, parts, key=None):
    scorer = Scorer(task, zoo, torch.device("cpu"), parts)
    return scorer(zoo.vectors, len(zoo), "trained", key, calibrate=True)


def test_what_was_scored_is_used_for_the_same_code_only(digits_zoo, tmp_path):
    task = load_task("digits-convnet")
    scores = scores_of(digits_zoo, task, tmp_path)
    parts = {part: part.stat().st_mtime_ns for part in tmp_path.iterdir()}
    assert len(parts) == 3
    assert torch.equal(scores_of(digits_zoo, task, tmp_path).wrong, scores.wrong)
    assert {part: part.stat().st_mtime_ns for part in tmp_path.iterdir()} == parts
    torch.testing.assert_close(scores_of(digits_zoo, Swapped(), tmp_path).test, 1 - scores.test)
    assert len(list(tmp_path.iterdir())) == 6


@pytest.mark.parametrize("content", [b"", b"damaged", b"PK\x03\x04"])
def test_damaged_scores_are_named(digits_zoo, tmp_path, content):
    task = load_task("digits-convnet")
    scores_of(digits_zoo, task, tmp_path, torch.zeros(3, dtype=torch.bfloat16))
    part = sorted(tmp_path.iterdir())[0]
    part.write_bytes(content)
    with pytest.raises(ZooError, match=rf"{part.name} is damaged. Delete it"):
        scores_of(digits_zoo, task, tmp_path, torch.zeros(3, dtype=torch.bfloat16))


def test_names_that_a_typesetter_would_read_are_shown_as_they_are(tmp_path):
    names = {"0.weight": "a$b_{", "0.bias": "$\\frac$", "2.weight": "x<!-- -->", "2.bias": "\x1b[2J"}

    class Renamed(nn.Module):
        def __init__(self):
            super().__init__()
            for name, value in answering(1).items():
                self.register_parameter(names[name], nn.Parameter(value.clone()))

        def forward(self, inputs):
            own = {name: self.get_parameter(given) for name, given in names.items()}
            hidden = nn.functional.linear(inputs, own["0.weight"], own["0.bias"]).relu()
            return nn.functional.linear(hidden, own["2.weight"], own["2.bias"])

    task = type("Task$_{1}", (BlobTask,), {"build_network": lambda self: Renamed()})()
    networks = [{names[n]: value for n, value in answering(1, k / 10).items()} for k in range(3)]
    report = pdiff_hf.evaluate(task, trained=networks, generated=networks, output_dir=tmp_path, networks_per_point=2)
    assert report["groups"]["generated"]["count"] == 3
    assert (tmp_path / "parameters.png").stat().st_size > 1000
    assert "\x1b" not in (tmp_path / "report.md").read_text()
