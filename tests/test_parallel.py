"""Several processes make what one makes, and what a killed one leaves is gone on with."""

import itertools
import json
import textwrap
import time
from pathlib import Path

import pytest
import torch

from pdiff_hf import WeightZoo, ZooError, parallel
from pdiff_hf.evaluation.study import PARTS as SCORES
from pdiff_hf.files import own_name
from pdiff_hf.zoo import fill
from pdiff_hf.zoo.fill import PARTS

from .conftest import kill_one_process, launch


COLLECT = ["--task", "digits-mlp", "--protocol", "independent", "--epochs", "1", "--num-networks", "150"]
GENERATE = ["--num-networks", "45", "--batch-size", "4", "--num-inference-steps", "20"]


def assert_same_zoo(folder: Path, expected: Path) -> None:
    zoo, other = WeightZoo(folder), WeightZoo(expected)
    # Equal but for rounding, which on some processors depends on where memory lies.
    torch.testing.assert_close(zoo.vectors(), other.vectors(), rtol=0, atol=1e-6)
    assert zoo.metadata == other.metadata
    assert not (folder / PARTS).exists()


def test_saving_takes_a_share_of_the_time(monkeypatch):
    monkeypatch.setattr(parallel, "SECONDS_BETWEEN_SAVES", 0.01)
    times = []
    saving = parallel.Saving(lambda: times.append(time.monotonic()) or time.sleep(0.03))
    end = time.monotonic() + 1
    while time.monotonic() < end:
        saving.when_due()
    assert 1 <= len(times) <= 1 / 0.3 + 1
    assert all(later - earlier >= 0.3 for earlier, later in itertools.pairwise(times))


@pytest.fixture(scope="module")
def generated(digits_pipeline, tmp_path_factory) -> Path:
    """What one process generates."""
    folder = tmp_path_factory.mktemp("generated") / "one"
    launch(1, "-m", "pdiff_hf", "generate", "--pipeline", str(digits_pipeline), "--output-dir", str(folder), *GENERATE)
    return folder


@pytest.mark.slow
def test_two_processes_generate_the_zoo_of_one(digits_pipeline, generated, tmp_path):
    folder = tmp_path / "zoo"
    launch(2, "-m", "pdiff_hf", "generate", "--pipeline", str(digits_pipeline), "--output-dir", str(folder), *GENERATE)
    assert_same_zoo(folder, generated)
    assert [row["seed"] for row in WeightZoo(folder).metadata] == list(range(45))


@pytest.mark.slow
@pytest.mark.long
def test_four_processes_extend_what_one_generated(digits_pipeline, generated, tmp_path):
    folder = tmp_path / "zoo"
    arguments = ["--pipeline", str(digits_pipeline), "--output-dir", str(folder), *GENERATE]
    launch(1, "-m", "pdiff_hf", "generate", *arguments, "--num-networks", "12")
    launch(4, "-m", "pdiff_hf", "generate", *arguments)
    assert_same_zoo(folder, generated)


@pytest.mark.slow
@pytest.mark.long
def test_processes_share_the_seeds_of_an_independent_zoo(tmp_path):
    for processes in (1, 4):
        folder = tmp_path / f"{processes}"
        launch(processes, "-m", "pdiff_hf", "collect", "--output-dir", str(folder), *COLLECT)
        assert_same_zoo(folder, tmp_path / "1")
    assert [row["seed"] for row in WeightZoo(folder).metadata] == list(range(150))


@pytest.mark.slow
@pytest.mark.long
def test_the_main_process_collects_a_trajectory(tmp_path):
    for processes in (1, 2):
        arguments = ["--task", "digits-mlp", "--epochs", "1", "--num-networks", "12"]
        launch(processes, "-m", "pdiff_hf", "collect", "--output-dir", str(tmp_path / f"{processes}"), *arguments)
    assert_same_zoo(tmp_path / "2", tmp_path / "1")


@pytest.mark.slow
def test_a_program_runs_one_stage_after_the_other_in_two_processes(digits_zoo, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent("""
            import sys
            from pdiff_hf import GenerateConfig, TrainConfig, run_generate, run_train

            zoo, pipeline, generated = sys.argv[1:]
            run_train(TrainConfig(zoo=zoo, output_dir=pipeline, autoencoder="linear", unet_steps=10))
            run_generate(GenerateConfig(pipeline, output_dir=generated, num_networks=6, num_inference_steps=2))
        """)
    )
    launch(2, str(program), str(digits_zoo.folder), str(tmp_path / "pipeline"), str(tmp_path / "generated"))
    assert len(WeightZoo(tmp_path / "generated")) == 6


def evaluate_arguments(zoo: WeightZoo, pipeline: Path, generated: Path, folder: Path) -> list[str]:
    arguments = ["--trained", str(zoo.folder), "--generated", str(generated), "--pipeline", str(pipeline)]
    return ["-m", "pdiff_hf", "evaluate", *arguments, "--networks-per-point", "20", "--output-dir", str(folder)]


def report_of(folder: Path) -> dict:
    report = json.loads((folder / "report.json").read_text())
    del report["seconds"]
    return report


def assert_close(found, expected) -> None:
    """Equal, but for the rounding of networks that run one by one in one report and at once in the other."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_close(found[key], value)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    else:
        assert found == expected


@pytest.fixture(scope="module")
def report(digits_zoo, digits_pipeline, generated, tmp_path_factory) -> dict:
    """What one process finds."""
    folder = tmp_path_factory.mktemp("evaluated") / "one"
    launch(1, *evaluate_arguments(digits_zoo, digits_pipeline, generated, folder))
    return report_of(folder)


@pytest.mark.slow
def test_processes_share_an_evaluation(digits_zoo, digits_pipeline, generated, report, tmp_path):
    folder = tmp_path / "report"
    launch(3, *evaluate_arguments(digits_zoo, digits_pipeline, generated, folder))
    assert_close(report_of(folder), report)
    assert not (folder / SCORES).exists()
    assert (folder / "report.html").exists()


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rerun_completes_what_a_killed_process_left(digits_pipeline, tmp_path, rank):
    folder = tmp_path / "zoo"
    command = ["-m", "pdiff_hf", "generate", "--pipeline", str(digits_pipeline)]
    command += ["--num-networks", "120", "--batch-size", "4", "--num-inference-steps", "50"]
    launch(1, *command, "--output-dir", str(tmp_path / "one"))
    kill_one_process(
        [*command, "--output-dir", str(folder)],
        lambda: len(list((folder / PARTS).glob("*.safetensors"))) > 2,
        rank,
    )
    left = WeightZoo(folder)
    kept = len(left) + sum(1 for _ in (folder / PARTS).glob("*.safetensors"))
    assert 0 < kept < 120
    assert torch.equal(left.vectors(), WeightZoo(tmp_path / "one").vectors(range(len(left))))
    launch(1, *command, "--output-dir", str(folder))
    assert_same_zoo(folder, tmp_path / "one")


@pytest.mark.slow
@pytest.mark.long
def test_a_rerun_completes_what_a_killed_process_collected(tmp_path):
    arguments = [*COLLECT, "--epochs", "4", "--num-networks", "640", "--output-dir"]
    launch(1, "-m", "pdiff_hf", "collect", *arguments, str(tmp_path / "one"))
    folder = tmp_path / "zoo"
    kill_one_process(
        ["-m", "pdiff_hf", "collect", *arguments, str(folder)],
        lambda: len(list((folder / PARTS).glob("*.safetensors"))) > 1,
    )
    kept = len(WeightZoo(folder))
    # What was kept is taken over, and not made again: a part that is marked stays so.
    last = max((folder / PARTS).glob("*.safetensors"), key=lambda part: int(part.name.split("-")[1]))
    start, stop = int(last.name.split("-")[1]), int(last.stem.split("-")[3])
    assert kept <= start
    fill._write_part(last, [(torch.zeros_like(vector), row) for vector, row in fill._read_part(last)])
    launch(2, "-m", "pdiff_hf", "collect", *arguments, str(folder))
    expected = WeightZoo(tmp_path / "one").vectors()
    expected[start:stop] = 0
    assert torch.equal(WeightZoo(folder).vectors(), expected)
    assert WeightZoo(folder).metadata == WeightZoo(tmp_path / "one").metadata
    assert not (folder / PARTS).exists()


def test_a_part_that_never_shows_is_an_error_and_no_short_zoo(tmp_path, monkeypatch):
    monkeypatch.setattr(fill, "SECONDS_TO_SEE", 0.1)
    with pytest.raises(ZooError, match=r"networks-0-to-4\.safetensors is not there: on all hosts"):
        fill._wait_for(tmp_path / "networks-0-to-4.safetensors")


@pytest.mark.slow
@pytest.mark.long
def test_an_evaluation_goes_on_where_it_was_killed(digits_zoo, digits_pipeline, generated, report, tmp_path):
    folder = tmp_path / "report"
    arguments = evaluate_arguments(digits_zoo, digits_pipeline, generated, folder)
    kill_one_process(arguments, lambda: len(list((folder / SCORES).glob("*.pt"))) > 20)
    assert not (folder / "report.json").exists()
    # Were they scored again, these would be written again.
    parts = sorted((folder / SCORES).glob("*.pt"))
    for part in parts:
        part.chmod(0o444)
    written = {part.name: part.stat().st_mtime_ns for part in parts}
    kill_one_process(arguments, lambda: len(list((folder / SCORES).glob("*.pt"))) > len(parts) + 10)
    assert all((folder / SCORES / name).stat().st_mtime_ns == time for name, time in written.items())
    launch(2, *arguments)
    assert_close(report_of(folder), report)


@pytest.mark.slow
def test_a_damaged_part_is_named(digits_pipeline, generated, tmp_path):
    zoo = WeightZoo(generated)
    folder = tmp_path / "zoo"
    zoo.save_pretrained(folder)
    (folder / PARTS).mkdir()
    part = folder / PARTS / f"networks-44-to-48-{own_name('networks')[:16]}.safetensors"
    part.write_bytes(b"damaged")
    arguments = ["--pipeline", str(digits_pipeline), "--output-dir", str(folder), *GENERATE, "--num-networks", "48"]
    with pytest.raises(AssertionError, match=r"networks-44-to-48-\w+\.safetensors is damaged"):
        launch(1, "-m", "pdiff_hf", "generate", *arguments)
    part.unlink()
    launch(1, "-m", "pdiff_hf", "generate", *arguments)
    assert len(WeightZoo(folder)) == 48
