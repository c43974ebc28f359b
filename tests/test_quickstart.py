import json
import textwrap

import pytest
import torch

from pdiff_hf import WeightZoo
from pdiff_hf.quickstart import QuickstartConfig, run_quickstart

from .conftest import run


@pytest.mark.slow
def test_the_quickstart_keeps_its_promises(tmp_path):
    done = run("-m", "pdiff_hf.cli", "quickstart", "--output-dir", str(tmp_path), OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr
    assert "best on validation" in done.stdout
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    groups = report["groups"]
    assert {name: group["count"] for name, group in groups.items()} == {
        "trained": 200,
        "soup": 1,
        "ensemble": 1,
        "generated": 100,
    }
    trained, generated = groups["trained"]["accuracy"], groups["generated"]["accuracy"]
    assert generated["mean"] >= trained["mean"]
    assert generated["min"] >= trained["min"] - 0.01
    assert list(report["timings_s"]) == ["collect", "train", "generate", "evaluate"]
    assert sum(report["timings_s"].values()) < 180
    assert len(WeightZoo(tmp_path / "zoo")) == 200
    generated_zoo = WeightZoo(tmp_path / "generated")

    script = textwrap.dedent("""
        import sys, torch
        from diffusers import DiffusionPipeline
        pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
        seeds = [torch.Generator().manual_seed(seed) for seed in range(100)]
        torch.save(pipe(generator=seeds, output_type="pt").state_dicts, sys.argv[2])
    """)
    done = run("-c", script, str(tmp_path / "pipeline"), str(tmp_path / "vectors.pt"), OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "vectors.pt"), generated_zoo.vectors())


def test_the_quickstart_removes_nothing_but_its_own_folders(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo" / "old").touch()
    with pytest.raises(ValueError, match="no task"):
        run_quickstart(QuickstartConfig(output_dir=str(tmp_path), task="no-such-task"))
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    assert not (tmp_path / "zoo" / "old").exists()
