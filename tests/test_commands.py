"""What commands say beside errors: versions, hints, where the result is, and what comes next."""

import importlib.metadata
import re
import shutil
import subprocess
import sys

import pytest

from pdiff_hf.cli import main

from . import families
from .documents import run_here
from .test_cli import line_of


def test_a_misspelt_stage_is_recognized():
    assert line_of("colect").startswith("pdiff-hf: there is no stage 'colect'. Did you mean collect?")
    assert "Did you mean" not in line_of("xyz")


def completed(line: str) -> list[str]:
    """What bash would offer at the end of a line."""
    words = line.split(" ")
    script = f"""
        eval "$({sys.executable} -m pdiff_hf --completion bash)"
        COMP_WORDS=({line}) COMP_CWORD={len(words) - 1} COMP_LINE="{line}" COMP_POINT={len(line)}
        $(complete -p pdiff-hf | sed 's/.*-F \\([^ ]*\\).*/\\1/') pdiff-hf "{words[-1]}" "{words[-2]}"
        printf '%s\n' "${{COMPREPLY[@]}}"
    """
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("pdiff-hf tr", ["train"]),
        ("pdiff-hf train --transformer-s", ["--transformer-steps"]),
        ("pdiff-hf train --unet-s", ["--unet-steps"]),
        ("pdiff-hf generate --num-inf", ["--num-inference-steps"]),
    ],
)
def test_a_shell_completes_stages_and_arguments(line, offered):
    assert completed(line) == offered


def test_zsh_gets_a_script_that_registers_itself(capsys):
    main(["--completion", "zsh"])
    assert capsys.readouterr().out.rstrip().endswith("\ncompdef _tyro_pdiff_hf pdiff-hf")


def test_a_shell_that_cannot_be_completed_in_is_named():
    with pytest.raises(SystemExit, match="'fish' is no shell that can be completed in: bash or zsh"):
        main(["--completion", "fish"])


def test_the_version_is_said(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"pdiff-hf {importlib.metadata.version('pdiff-hf')}\n"


@pytest.mark.parametrize(("stage", "before"), [("train", "collect"), ("evaluate", "collect"), ("generate", "train")])
def test_outside_of_the_folder_of_the_runs_no_stranger_is_asked(tmp_path, monkeypatch, stage, before):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", lambda *_, **__: pytest.fail("asked the Hub"))
    assert f"`pdiff-hf {before}` makes" in line_of(stage)


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("digits-mlp", "--family neuron"),
        (f"{families.__name__}:Sides", f"--family neuron --task {families.__name__}:Sides --condition direction"),
    ],
)
def test_of_independent_networks_the_next_command_names_the_family(task, options, tmp_path, capsys):
    again = ["--task", task, "--protocol", "independent", "--num-networks", "1", "--networks-per-task", "1"]
    main(["collect", "--output-dir", str(tmp_path / "zoo"), "--epochs", "1", *again])
    said = capsys.readouterr()
    assert f"Next: pdiff-hf train {options} --zoo " in said.out
    assert re.search(r"collect \([\d.]+ kB\): 100%", said.err)
    if "condition" in options:
        zoo, fresh, pipeline = (str(tmp_path / name) for name in ("zoo", "fresh", "pipeline"))
        main(["collect", "--output-dir", fresh, "--epochs", "1", *again, "--split", "test"])
        assert f"Next: pdiff-hf evaluate --trained ZOO --generated PIPELINE --fresh {fresh}" in capsys.readouterr().out
        main(["train", "--zoo", zoo, "--output-dir", pipeline, *options.split(), "--transformer-steps", "2"])
        said = f"Next: pdiff-hf evaluate --trained {zoo} --generated {pipeline} --task {task}\n"
        assert said in capsys.readouterr().out


@pytest.mark.slow
def test_quietly_there_is_no_progress(tmp_path):
    done = run_here(tmp_path, "pdiff-hf", "collect", "--num-networks", "4", "--epochs", "1", "--quiet")
    assert done.stdout == ""
    assert "%|" not in done.stderr
    quick = ("--autoencoder", "linear", "--unet-steps", "3")
    done = run_here(tmp_path, "pdiff-hf", "train", *quick, "--quiet")
    assert "Next:" not in done.stdout
    assert "%|" not in done.stderr
    done = run_here(tmp_path, "pdiff-hf", "collect", "--num-networks", "5", "--epochs", "1")
    assert "%|" in done.stderr


def test_a_stage_ends_with_where_its_result_is_and_what_comes_next(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "")  # is set below, and as it was when the test ends
    zoo, pipeline, generated, report = (str(tmp_path / name) for name in ("a zoo", "pipeline", "generated", "report"))
    main(["collect", "--output-dir", zoo, "--num-networks", "4", "--epochs", "1"])
    said = capsys.readouterr().out
    assert re.search(rf"4 networks of 1,898 parameters are in '{zoo}' \([\d.]+ s\)", said)
    assert f"Next: pdiff-hf train --zoo '{zoo}'" in said
    main(["train", "--zoo", zoo, "--output-dir", pipeline, "--autoencoder", "linear", "--unet-steps", "2"])
    assert f"Next: pdiff-hf generate --pipeline {pipeline}" in capsys.readouterr().out
    again = ["generate", "--pipeline", pipeline, "--output-dir", generated, "--num-networks", "2"]
    main(again)
    assert f"Next: pdiff-hf evaluate --trained '{zoo}' --generated {generated}" in capsys.readouterr().out
    main([*again, "--quiet"])
    assert capsys.readouterr().out == ""
    with_pipeline = ["--generated", generated, "--pipeline", pipeline, "--networks-per-point", "2"]
    main(["evaluate", "--trained", zoo, *with_pipeline, "--output-dir", report])
    said = capsys.readouterr().out
    assert f"The report is in {report}" in said
    assert f"Next: pdiff-hf play --pipeline {pipeline}\n" in said
