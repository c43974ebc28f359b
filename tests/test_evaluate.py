import json
import shutil

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard

from pdiff_hf import EvaluateConfig, ParameterLayout, WeightZoo, ZooError, load_task, run_evaluate
from pdiff_hf.evaluate import _similarity


@pytest.fixture(scope="module")
def other_zoo(digits_zoo, tmp_path_factory) -> WeightZoo:
    """The even networks of the digits zoo, each with a little noise."""
    zoo = WeightZoo.create(tmp_path_factory.mktemp("evaluate") / "zoo", digits_zoo.layout, task="digits-convnet")
    generator = torch.Generator().manual_seed(0)
    with zoo:
        for vector in digits_zoo.vectors(range(0, 40, 2)):
            zoo.append(vector + 0.05 * torch.randn(vector.shape, generator=generator))
    return zoo


def config(trained, generated, folder, **changes) -> EvaluateConfig:
    names = {"trained": str(trained.folder), "generated": str(generated.folder), "output_dir": str(folder)}
    return EvaluateConfig(**{**names, **changes})


def slow_predictions(zoo, split):
    """Probabilities `[N, E, classes]` of a plain loop, without the library."""
    inputs, targets = load_task("digits-convnet").data(split)
    outputs = []
    for index in range(len(zoo)):
        w1, b1, w2, b2, w3, b3 = (value.double() for value in zoo.state_dict(index).values())
        hidden = torch.relu(torch.conv2d(inputs.double(), w1, b1, padding=1))
        hidden = torch.nn.functional.max_pool2d(hidden, 2)
        hidden = torch.relu(torch.conv2d(hidden, w2, b2, padding=1))
        hidden = torch.nn.functional.max_pool2d(hidden, 2)
        outputs.append((hidden.flatten(1) @ w3.T + b3).softmax(1).numpy())
    return np.stack(outputs), targets.numpy()


def test_the_report_agrees_with_an_independent_slow_computation(digits_zoo, other_zoo, tmp_path):
    report = run_evaluate(config(digits_zoo, other_zoo, tmp_path))
    trained, targets = slow_predictions(digits_zoo, "test")
    generated, _ = slow_predictions(other_zoo, "test")
    wrong_trained, wrong = trained.argmax(2) != targets, generated.argmax(2) != targets
    validation, validation_targets = slow_predictions(other_zoo, "validation")
    best = (validation.argmax(2) == validation_targets).mean(1).argmax()

    figures = report["groups"]["generated"]
    assert figures["count"] == 20
    assert figures["accuracy"] == pytest.approx(
        {
            "mean": 1 - wrong.mean(),
            "min": 1 - wrong.mean(1).max(),
            "max": 1 - wrong.mean(1).min(),
            "best_on_validation": 1 - wrong[best].mean(),
        },
        abs=1e-6,
    )
    similarity = np.mean([max((a & b).sum() / (a | b).sum() for b in wrong_trained) for a in wrong])
    assert figures["maximum_similarity"]["mean"] == pytest.approx(similarity, abs=1e-6)
    similarity = np.mean(
        [
            max((a & b).sum() / (a | b).sum() for j, b in enumerate(wrong_trained) if i != j)
            for i, a in enumerate(wrong_trained)
        ]
    )
    assert report["groups"]["trained"]["maximum_similarity"]["mean"] == pytest.approx(similarity, abs=1e-6)
    ensemble = (trained.mean(0).argmax(1) == targets).mean()
    assert report["groups"]["ensemble"]["accuracy"]["mean"] == pytest.approx(ensemble, abs=1e-6)


def test_the_soup_is_the_average_network(digits_zoo, other_zoo, tmp_path):
    report = run_evaluate(config(digits_zoo, other_zoo, tmp_path / "report"))
    with WeightZoo.create(tmp_path / "soup", digits_zoo.layout) as soup:
        soup.append(digits_zoo.vectors().mean(0))
    probabilities, targets = slow_predictions(soup, "test")
    assert report["groups"]["soup"]["count"] == 1
    assert report["groups"]["soup"]["accuracy"]["mean"] == pytest.approx(
        (probabilities[0].argmax(1) == targets).mean(), abs=1e-6
    )


def test_copies_have_similarity_one(digits_zoo, tmp_path):
    report = run_evaluate(config(digits_zoo, digits_zoo, tmp_path))
    assert report["groups"]["generated"]["maximum_similarity"]["mean"] == 1
    assert report["groups"]["generated"]["accuracy"] == report["groups"]["trained"]["accuracy"]


def test_the_report_its_configuration_and_its_picture_are_written(digits_zoo, other_zoo, tmp_path, capsys):
    report = run_evaluate(config(digits_zoo, other_zoo, tmp_path))
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert list(report["groups"]) == ["trained", "soup", "ensemble", "generated"]
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "evaluate.yaml").exists()
    printed = capsys.readouterr().out
    assert f"{100 * report['groups']['generated']['accuracy']['mean']:.2f}" in printed


def test_the_figures_go_into_the_card_of_the_pipeline(digits_zoo, other_zoo, digits_pipeline, tmp_path):
    shutil.copytree(digits_pipeline, tmp_path / "pipeline")
    for _ in range(2):
        report = run_evaluate(config(digits_zoo, other_zoo, tmp_path / "report", pipeline=str(tmp_path / "pipeline")))
    card = ModelCard.load(tmp_path / "pipeline" / "README.md")
    accuracy = report["groups"]["generated"]["accuracy"]
    assert card.text.count("## Evaluation") == 1
    assert "Not evaluated yet" not in card.text
    assert f"| generated | 20 | {100 * accuracy['mean']:.2f} | {100 * accuracy['min']:.2f} |" in card.text
    assert "![Accuracy against similarity](accuracy.png)" in card.text
    assert (tmp_path / "pipeline" / "accuracy.png").exists()
    values = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert values["mean accuracy of 20 generated networks"] == pytest.approx(accuracy["mean"], abs=1e-6)
    assert card.data.library_name == "diffusers"


def test_two_networks_without_errors_are_alike():
    none, some = torch.zeros(1, 5, dtype=torch.bool), torch.tensor([[True, False, False, True, False]])
    assert _similarity(none, none).item() == 1
    assert _similarity(none, some).item() == 0
    assert _similarity(some, torch.tensor([[True, True, False, False, False]])).item() == pytest.approx(1 / 3)


def test_zoos_of_different_architectures_are_refused(digits_zoo, zoo, tmp_path):
    with pytest.raises(ZooError, match="hold networks of different architectures"):
        run_evaluate(config(digits_zoo, zoo, tmp_path))


def test_a_task_that_does_not_fit_is_refused_with_the_tensors(digits_zoo, other_zoo, tmp_path):
    with pytest.raises(ZooError, match=r"(?s)do not fit the task.*Missing key.*1\.weight"):
        run_evaluate(config(digits_zoo, other_zoo, tmp_path, task="digits-mlp"))


def test_a_zoo_does_not_choose_the_code_that_runs(digits_zoo, tmp_path):
    (tmp_path / "evil.py").write_text("raise SystemExit('code that a zoo named ran')")
    digits_zoo.save_pretrained(tmp_path / "zoo")
    description = json.loads((tmp_path / "zoo" / "zoo.json").read_text()) | {"task": f"{tmp_path}/evil.py:Evil"}
    (tmp_path / "zoo" / "zoo.json").write_text(json.dumps(description))
    with pytest.raises(ZooError, match=r"which is code of its own: pass --task .*evil\.py:Evil to run it"):
        run_evaluate(config(WeightZoo(tmp_path / "zoo"), digits_zoo, tmp_path / "report"))


def test_an_empty_zoo_is_refused(digits_zoo, tmp_path):
    empty = WeightZoo.create(tmp_path / "empty", digits_zoo.layout)
    with pytest.raises(ZooError, match="Nothing to compare: 40 trained and 0 generated networks"):
        run_evaluate(config(digits_zoo, empty, tmp_path))


def test_networks_of_an_unknown_task_need_one(zoo, layout, tmp_path):
    with WeightZoo.create(tmp_path / "zoo2", ParameterLayout(tensors=layout.config["tensors"])) as unnamed:
        unnamed.append(zoo[0])
    with pytest.raises(ZooError, match="pass --task"):
        run_evaluate(config(unnamed, zoo, tmp_path))
