"""What a folder or a repository is said to hold."""

import json
import re
import shutil

import pytest
import torch

from pdiff_hf import EvaluateConfig, GenerateConfig, ParameterLayout, WeightZoo, ZooError, run_evaluate
from pdiff_hf.cli import main
from pdiff_hf.configs import InfoConfig
from pdiff_hf.errors import ConfigError
from pdiff_hf.info import run_info
from pdiff_hf.runs import save_run

from .conftest import random_network


def test_a_zoo_says_how_large_and_how_good_it_is(digits_zoo, capsys):
    main(["info", str(digits_zoo.folder)])
    said = capsys.readouterr().out
    accuracies = torch.tensor([row["validation_accuracy"] for row in digits_zoo.rows()]).double()
    assert f"A zoo of {len(digits_zoo)} networks of 1,898 generated parameters, float32" in said
    assert f"validation_accuracy: mean {100 * accuracies.mean():.2f} %" in said
    assert "Task: digits-convnet." in said
    assert "Made by `pdiff-hf collect` with task=digits-convnet" in said


def test_a_zoo_that_claims_more_than_memory_holds_costs_none(tmp_path):
    layout = ParameterLayout.from_state_dict({"w": torch.zeros(3), "n": torch.zeros(2, dtype=torch.long)}, "w")
    WeightZoo.create(tmp_path, layout)
    content = json.loads((tmp_path / "zoo.json").read_text())
    content["layout"]["tensors"][0]["shape"] = [10**11 - 2]
    (tmp_path / "zoo.json").write_text(json.dumps(content))
    said = run_info(InfoConfig(str(tmp_path)))
    assert "A zoo of 0 networks of 99,999,999,998 generated parameters" in said
    assert "2 numbers more are the same" in said
    zoo = WeightZoo(tmp_path)
    with pytest.raises(ZooError, match=r"claims 99,999,999,998 parameters a network, whose layout takes 900\.0 GB"):
        _ = zoo.layout


def test_a_pipeline_and_its_report_say_the_verdict(digits_zoo, digits_pipeline, tmp_path):
    shutil.copytree(digits_pipeline, tmp_path / "pipeline")
    before = run_info(InfoConfig(str(tmp_path / "pipeline")))
    assert "A pipeline that samples networks of 1,898 generated parameters, by DDPMScheduler" in before
    assert "unet of " in before.partition("Trained parts: ")[2]
    assert "Not evaluated yet" in before
    assert f"\nLearned from {len(digits_zoo)} networks.\n" in before
    (tmp_path / "pipeline" / "train.yaml").unlink()
    card = (tmp_path / "pipeline" / "README.md").read_text()
    (tmp_path / "pipeline" / "README.md").write_text(card.replace("the task `networks`", "the task `digits-convnet`"))
    assert "\nTask: digits-convnet.\n" in run_info(InfoConfig(str(tmp_path / "pipeline")))
    report = run_evaluate(
        EvaluateConfig(
            "digits-convnet",
            str(digits_zoo.folder),
            str(tmp_path / "pipeline"),
            output_dir=str(tmp_path / "report"),
            num_networks=4,
            networks_per_point=3,
        )
    )
    sentence = report["verdict"]["sentence"]
    assert sentence in run_info(InfoConfig(str(tmp_path / "report")))
    assert sentence in run_info(InfoConfig(str(tmp_path / "pipeline")))


def test_figures_that_are_whole_numbers_and_settings_of_zero_are_said(tmp_path, layout):
    with WeightZoo.create(tmp_path, layout) as zoo:
        for seed, accuracy in enumerate((0.5, 1, True)):
            zoo.append(random_network(seed).state_dict(), accuracy=accuracy)
    save_run(tmp_path, "generate", GenerateConfig(guidance_scale=0.0, condition='{"a": 1}'))
    said = run_info(InfoConfig(str(tmp_path)))
    assert "accuracy: mean 75.00 %, 50.00 to 100.00." in said
    assert "guidance_scale=0.0" in said
    assert "seed=0" in said
    assert "False" not in said


def test_what_holds_nothing_and_what_is_damaged_is_said(tmp_path):
    with pytest.raises(ConfigError, match="holds no zoo, no pipeline and no report"):
        run_info(InfoConfig(str(tmp_path)))
    with pytest.raises(ConfigError, match="holds no zoo, no pipeline and no report"):
        run_info(InfoConfig("runs/nothing"))
    for content in ("{", "[]", '{"verdict": 3}', "[" * 100_000):
        (tmp_path / "report.json").write_text(content)
        with pytest.raises(ConfigError, match="is damaged"):
            run_info(InfoConfig(str(tmp_path)))


def test_an_imported_zoo_says_from_what(tmp_path, capsys):
    for seed in range(2):
        torch.save({"weight": torch.full((3,), float(seed))}, tmp_path / f"step-{seed}.pt")
    main(
        [
            "import",
            "--checkpoints",
            str(tmp_path / "step-0.pt"),
            str(tmp_path / "step-1.pt"),
            "--output-dir",
            str(tmp_path / "zoo"),
        ]
    )
    capsys.readouterr()
    main(["info", str(tmp_path / "zoo")])
    assert re.search(r"Made by `pdiff-hf import` with .*checkpoints=.*step-0", capsys.readouterr().out)
    assert "versions" in json.loads((tmp_path / "zoo" / "import.facts.json").read_text())


def test_what_a_stranger_wrote_is_harmless_in_a_terminal(tmp_path):
    (tmp_path / "report.json").write_text(json.dumps({"verdict": {"sentence": "\x1b[2Jgone"}}))
    (tmp_path / "evaluate.yaml").write_text("task: !!python/object/apply:os.system [x]\n")
    assert run_info(InfoConfig(str(tmp_path))) == "A report. \\x1b[2Jgone"
