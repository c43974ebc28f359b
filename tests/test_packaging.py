"""What is installed: from a wheel, from the source distribution, from a checkout, and as type checkers see it."""

import re
import shutil
import sys
import tarfile
import textwrap
import zipfile
from pathlib import Path

import pytest

from .conftest import ROOT, run


LEFT_OUT = (".git", ".venv*", ".gpu", ".whl", ".hypothesis", ".*_cache", "runs", "site", "build", "dist")
LEFT_OUT += ("*.egg-info", "__pycache__", "*.part", "*.lock")
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_{kind}(sys.argv[1]))"


def build(kind: str, source: Path, target: Path) -> Path:
    target.mkdir(exist_ok=True)
    script = f"import os; os.chdir({str(source)!r}); " + BUILD.format(kind=kind)
    done = run("-c", script, str(target))
    assert done.returncode == 0, done.stderr
    return target / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of this checkout, without what git ignores."""
    folder = tmp_path_factory.mktemp("checkout") / "source"
    shutil.copytree(ROOT, folder, symlinks=True, ignore=shutil.ignore_patterns(*LEFT_OUT))
    return folder


@pytest.fixture(scope="module")
def source(checkout, tmp_path_factory) -> Path:
    """What the source distribution unpacks to."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(build("sdist", checkout, folder)) as archive:
        archive.extractall(folder, filter="data")
    (unpacked,) = (path for path in folder.iterdir() if path.is_dir())
    return unpacked


@pytest.fixture(scope="module")
def installed(source, tmp_path_factory) -> Path:
    """What the wheel, which is made of the source distribution, puts on the path."""
    folder = tmp_path_factory.mktemp("wheel")
    zipfile.ZipFile(build("wheel", source, folder)).extractall(folder / "site")
    return folder / "site"


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.mark.slow
def test_links_and_pictures_of_the_description_lead_to_the_repository(installed):
    (metadata,) = installed.glob("pdiff_hf-*.dist-info/METADATA")
    headers, _, description = metadata.read_text(encoding="utf-8").partition("\n\n")
    assert "Description-Content-Type: text/markdown" in headers
    (address,) = re.findall(r"Project-URL: Repository, (.*)", headers)
    targets = re.findall(r"\]\(([^)]+)\)", description)
    assert f"{address}/raw/main/docs/quickstart.png" in targets
    files = [
        target.removeprefix(address).split("/", 3)[3].partition("#")[0]
        for target in targets
        if f"{address}/" in target
    ]
    assert len(files) > 10
    assert [name for name in files if not (ROOT / name).exists()] == []
    assert [target for target in targets if not target.startswith(("https://", "http://", "#"))] == []


@pytest.mark.slow
def test_the_source_distribution_holds_all_that_its_tests_need(checkout, source):
    ours, theirs = files_of(checkout), files_of(source)
    folders = ("tests", "benchmarks", "pipelines", "docs", "examples", "spaces", ".ci")
    needed = [name for name in ours if name.partition("/")[0] in folders]
    needed += [
        "Makefile",
        "mkdocs.yml",
        "constraints.txt",
        "constraints-lowest.txt",
        "README.md",
        "setup.py",
        "pyproject.toml",
    ]
    assert [name for name in needed if theirs.get(name) != ours[name]] == []
    done = run("-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "tests/test_config.py", cwd=source)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_wheel_holds_the_package_with_its_pipelines_and_templates(checkout, installed):
    ours = {f"pdiff_hf/{name}": content for name, content in files_of(checkout / "pdiff_hf").items()}
    for link in ("pipelines", "model_cards"):
        content = files_of(checkout / link)
        ours |= {f"pdiff_hf/{link}/{name}": content[name] for name in content}
    theirs = {name: content for name, content in files_of(installed).items() if name.startswith("pdiff_hf/")}
    assert theirs == ours


@pytest.mark.slow
def test_the_wheel_runs_the_stages_outside_of_a_clone(installed, tmp_path):
    script = textwrap.dedent("""
        import sys, pdiff_hf
        assert pdiff_hf.__file__.startswith(sys.argv[1]), pdiff_hf.__file__
        from pdiff_hf.cli import main
        main(["collect", "--num-networks", "20", "--epochs", "1"])
        main(["train", "--autoencoder-steps", "20", "--unet-steps", "30"])
        main(["generate", "--num-networks", "5", "--num-inference-steps", "5"])
        main(["evaluate", "--pipeline", "runs/pipeline", "--networks-per-point", "5"])
    """)
    done = run("-c", script, str(installed), cwd=tmp_path, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "report" / "report.html").is_file()
    assert (tmp_path / "runs" / "pipeline" / "pipeline.py").is_file()


def test_a_checkout_without_links_says_in_one_line_what_is_missing(checkout, tmp_path):
    shutil.copytree(checkout, tmp_path / "source", symlinks=True)
    link = tmp_path / "source" / "pdiff_hf" / "pipelines"
    if link.is_symlink():
        link.unlink()
    else:  # of an unpacked source distribution
        shutil.rmtree(link)
    link.write_text("../pipelines")  # what git leaves on such a system
    done = run("setup.py", "--version", cwd=tmp_path / "source")
    assert done.returncode == 1
    assert done.stderr.startswith("pdiff_hf/pipelines should be a symbolic link to pipelines, and this checkout")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.long
def test_a_users_type_checker_sees_our_types(tmp_path):
    (tmp_path / "mine.py").write_text(
        textwrap.dedent("""
            import numpy as np
            import torch
            from pdiff_hf import TrainConfig, WeightZoo, evaluate, load_pipeline, run_train

            pipe = load_pipeline("folder")
            states: list[dict[str, torch.Tensor]] = pipe(num_networks=2).state_dicts
            vectors: torch.Tensor = pipe(output_type="pt").state_dicts
            arrays: np.ndarray = pipe(output_type="np").state_dicts
            (networks,) = pipe(num_networks=2, return_dict=False)
            wrong: int = pipe(num_networks=2).state_dicts  # an error
            zoo: WeightZoo = WeightZoo("folder")
            zoo.vectors().unknown  # an error
            run_train(TrainConfig(unet_steps="many"))  # an error
            evaluate(trained=zoo, generated=pipe)["verdict"]
        """)
    )
    done = run("-m", "mypy", "--python-executable", sys.executable, "mine.py", cwd=tmp_path)
    assert [line.split(":")[1] for line in done.stdout.splitlines() if " error: " in line] == ["11", "13", "14"], done
