import json
import textwrap
from pathlib import Path

import diffusers
import pytest
import torch

from pdiff_hf import WeightZoo, load_pipeline, load_task
from pdiff_hf.configs import QuickstartConfig
from pdiff_hf.errors import ConfigError
from pdiff_hf.quickstart import run_quickstart

from .conftest import run


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory) -> Path:
    """The folder that `pdiff-hf quickstart` leaves."""
    folder = tmp_path_factory.mktemp("quickstart")
    done = run("-m", "pdiff_hf", "quickstart", "--output-dir", str(folder), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert "chosen on validation" in done.stdout
    return folder


@pytest.fixture(scope="module")
def accuracies(quickstart) -> dict[str, dict[str, float]]:
    """Accuracy of the groups, from the report."""
    report = json.loads((quickstart / "report" / "report.json").read_text())
    return {name: group["accuracy"] for name, group in report["groups"].items()}


@pytest.mark.slow
def test_generated_networks_are_as_good_as_the_originals_and_none_is_bad(accuracies):
    # As good means: by less than a third of a test example, which is more than the error of a mean of 100 networks.
    assert accuracies["generated"]["mean"] >= accuracies["trained"]["mean"] - 0.0005
    assert accuracies["generated"]["min"] >= accuracies["trained"]["min"] - 0.01


@pytest.mark.slow
def test_everything_lands_in_its_folder_in_under_three_minutes(quickstart):
    report = json.loads((quickstart / "report" / "report.json").read_text())
    counts = {name: group["count"] for name, group in report["groups"].items()}
    assert counts == {"trained": 200, "soup": 1, "ensemble": 1, "generated": 100, "reconstructed": 200}
    assert list(report["timings_s"]) == ["collect", "train", "generate", "evaluate"]
    assert sum(report["timings_s"].values()) < 180
    assert len(WeightZoo(quickstart / "zoo")) == 200
    assert len(WeightZoo(quickstart / "generated")) == 100


@pytest.mark.slow
def test_a_fresh_process_makes_the_same_networks_bit_by_bit(quickstart, tmp_path):
    script = textwrap.dedent("""
        import sys, torch
        from diffusers import DiffusionPipeline
        pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
        seeds = [torch.Generator().manual_seed(seed) for seed in range(100)]
        torch.save(pipe(generator=seeds, output_type="pt").state_dicts, sys.argv[2])
    """)
    output = str(tmp_path / "vectors.pt")
    done = run("-c", script, str(quickstart / "pipeline"), output, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(output), WeightZoo(quickstart / "generated").vectors())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheduler", "steps"),
    [
        ("DDPMScheduler", 200),
        ("DDIMScheduler", 50),
        ("DPMSolverMultistepScheduler", 10),
        ("UniPCMultistepScheduler", 10),
        ("EulerDiscreteScheduler", 20),
        ("HeunDiscreteScheduler", 20),
    ],
)
def test_other_schedulers_are_as_good(quickstart, accuracies, scheduler, steps):
    pipe = load_pipeline(quickstart / "pipeline")
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    task = load_task("digits-convnet")
    network, (inputs, targets) = task.build_network(), task.data("test")
    scores = []
    for state_dict in pipe(50, num_inference_steps=steps, generator=torch.Generator().manual_seed(0)).state_dicts:
        network.load_state_dict(state_dict)
        scores.append(task.correct(task.predict(network, inputs), targets).double().mean().item())
    assert sum(scores) / len(scores) >= accuracies["trained"]["mean"] - 0.003
    assert min(scores) >= accuracies["trained"]["min"] - 0.01


def test_the_quickstart_removes_nothing_that_it_did_not_make(tmp_path):
    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds zoo, which no quickstart made"):
        run_quickstart(QuickstartConfig(output_dir=str(tmp_path)))
    assert (tmp_path / "zoo" / "thesis.txt").read_text() == "mine"


def test_a_single_task_has_no_story_of_conditions(tmp_path):
    (tmp_path / "zoo").mkdir()
    for file in (tmp_path / "quickstart.yaml", tmp_path / "zoo" / "zoo.json"):
        file.write_text("{}")
    with pytest.raises(ConfigError, match="digits-mlp is one task, and this story needs a family"):
        run_quickstart(QuickstartConfig(output_dir=str(tmp_path), story="subsets", task="digits-mlp"))
    assert (tmp_path / "zoo" / "zoo.json").exists()


def test_a_task_without_a_trajectory_is_refused_before_an_earlier_quickstart_is_removed(tmp_path):
    (tmp_path / "zoo").mkdir()
    for file in (tmp_path / "quickstart.yaml", tmp_path / "zoo" / "zoo.json"):
        file.write_text("{}")
    with pytest.raises(ConfigError, match="The learning rate of fashion-mlp ends at 0"):
        run_quickstart(QuickstartConfig(output_dir=str(tmp_path), task="fashion-mlp"))
    assert (tmp_path / "zoo" / "zoo.json").exists()
