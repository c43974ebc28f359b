"""The examples are short, and run."""

import re
import sys

import nbclient
import nbformat
import pytest

from .conftest import ROOT
from .documents import run_here


EXAMPLES = ROOT / "examples"


def test_examples_are_short():
    scripts = list(EXAMPLES.glob("*.py"))
    assert len(scripts) >= 3
    for script in scripts:
        code = [line for line in script.read_text(encoding="utf-8").partition('"""\n')[2].splitlines() if line.strip()]
        assert len(code) <= 30, script


@pytest.mark.slow
def test_ensembles_know_more_than_one(digits_pipeline, tmp_path):
    said = run_here(tmp_path, sys.executable, str(EXAMPLES / "ensemble.py"), str(digits_pipeline), "digits-convnet")
    mean, least, _ = (float(number) for number in re.findall(r"([\d.]+) %", said.stdout))
    assert 10 < least <= mean <= 100


@pytest.mark.slow
def test_a_walk_prints_accuracies(digits_pipeline, tmp_path):
    said = run_here(tmp_path, sys.executable, str(EXAMPLES / "walk.py"), str(digits_pipeline), "digits-convnet")
    accuracies = [float(number) for number in re.findall(r"([\d.]+) %", said.stdout)]
    assert len(accuracies) == 9
    assert min(accuracies) > 10


@pytest.mark.slow
@pytest.mark.long
def test_a_generator_of_ones_own_gets_a_verdict(digits_zoo, tmp_path):
    said = run_here(tmp_path, sys.executable, str(EXAMPLES / "own_generator.py"), str(digits_zoo.folder))
    assert "the front of the baselines" in said.stdout


@pytest.mark.slow
@pytest.mark.long
def test_the_notebook_executes(tmp_path):
    notebook = nbformat.read(EXAMPLES / "tour.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert "the front of the baselines" in str(notebook.cells)
    assert (tmp_path / "runs" / "report" / "plane.png").is_file()
