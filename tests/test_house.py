"""The rules of the house: who imports whom."""

import ast
import graphlib
from pathlib import Path

import pytest

from .conftest import ROOT


PACKAGE = ROOT / "pdiff_hf"
STAGES = {"pdiff_hf.collect", "pdiff_hf.train.stage", "pdiff_hf.generate", "pdiff_hf.evaluation.stage"}
OF_THE_HUB = {"torch", "numpy", "diffusers", "huggingface_hub"}
STANDARD = {"collections", "contextlib", "copy", "dataclasses", "fnmatch", "functools", "importlib", "inspect"}
STANDARD |= {"itertools", "json", "math", "numbers", "os", "pathlib", "shutil", "typing"}


def name_of(file: Path) -> str:
    """The dotted name of a module."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def files() -> list[Path]:
    """The modules of the package but for its pipelines."""
    found = (file for file in PACKAGE.rglob("*.py") if (PACKAGE / "pipelines") not in file.parents)
    return sorted(found)


def imports(file: Path) -> set[str]:
    """Absolute names of all that a module imports, in functions too."""
    package = name_of(file) if file.stem == "__init__" else name_of(file).rpartition(".")[0]
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


def graph() -> dict[str, set[str]]:
    """What each module of the package imports of the package."""
    # A name of the package itself stands for the modules that it exports, on demand.
    modules = {name_of(file): file for file in files() if name_of(file) != "pdiff_hf"}
    return {name: (imports(file) & modules.keys()) - {name} for name, file in modules.items()}


def test_modules_import_each_other_in_one_direction():
    inner = {
        # A package's `__init__` is imported before its modules: what it re-exports is no arrow of theirs.
        name: {other for other in others if not name.startswith(f"{other}.")}
        for name, others in graph().items()
    }
    order = tuple(graphlib.TopologicalSorter(inner).static_order())
    assert order.index("pdiff_hf.errors") < order.index("pdiff_hf.zoo.store") < order.index("pdiff_hf.generate")


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_stages_do_not_import_each_other(stage):
    assert not graph()[stage] & (STAGES - {stage})


def test_the_hub_knows_nothing_of_zoos_and_zoos_nothing_of_stages():
    for name, others in graph().items():
        if name.startswith("pdiff_hf.hub"):
            assert not any(other.startswith(("pdiff_hf.zoo", "pdiff_hf.train")) for other in others), name
        if name.startswith("pdiff_hf.zoo"):
            assert not others & STAGES, name


def test_pipelines_import_what_the_loader_of_the_hub_has_and_no_sibling():
    for file in (ROOT / "pipelines").rglob("*.py"):
        if file.stem != "__init__":
            tops = {name.partition(".")[0] for name in imports(file)} - STANDARD
            assert tops <= OF_THE_HUB, (file, tops)


def test_files_are_short_or_say_why_not():
    for file in [*files(), *(ROOT / "pipelines").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        text = file.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 400 or text.startswith("# Over 400 lines: "), file


def test_the_package_reads_the_pipelines_beside_it():
    for name in ("pipelines", "model_cards"):
        ours, theirs = (
            {
                path.relative_to(folder): path.read_bytes()
                for path in folder.rglob("*")
                if path.suffix in (".py", ".md")
            }
            for folder in (PACKAGE / name, ROOT / name)
        )
        assert ours == theirs != {}
