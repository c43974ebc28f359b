"""All of the package is described in pyproject.toml; this says what a checkout without symbolic links lacks."""

from pathlib import Path

from setuptools import setup


for link in ("pipelines", "model_cards"):
    if not Path(__file__).with_name("pdiff_hf").joinpath(link).is_dir():
        raise SystemExit(
            f"pdiff_hf/{link} should be a symbolic link to {link}, and this checkout has none: run "
            "`git config core.symlinks true` and `git checkout pdiff_hf`, or install the wheel."
        )
setup()
