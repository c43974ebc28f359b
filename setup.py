"""
The package is described in pyproject.toml. This says what a checkout without symbolic links lacks, and gives the
README of an index of packages, which has no files beside it, links and pictures that lead to the repository.
"""

import re
from pathlib import Path

from setuptools import setup


for link in ("pipelines", "model_cards"):
    if not Path(__file__).with_name("pdiff_hf").joinpath(link).is_dir():
        raise SystemExit(
            f"pdiff_hf/{link} should be a symbolic link to {link}, and this checkout has none: run "
            "`git config core.symlinks true` and `git checkout pdiff_hf`, or install the wheel."
        )


REPOSITORY = "https://github.com/pdiff-hf/pdiff-hf"


def absolute(link: re.Match[str]) -> str:
    """A link or a picture of a file."""
    mark, text, target = link.groups()
    return f"{mark}[{text}]({REPOSITORY}/{'raw' if mark else 'blob'}/main/{target})"


readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
setup(
    long_description=re.sub(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)]+)\)", absolute, readme),
    long_description_content_type="text/markdown",
)
