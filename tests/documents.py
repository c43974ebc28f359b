"""The commands and programs in README and documentation."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from .conftest import ROOT


class Document(NamedTuple):
    """A Markdown file of the project."""

    name: str

    @property
    def text(self) -> str:
        return (ROOT / self.name).read_text(encoding="utf-8")

    def blocks(self, language: str) -> list[str]:
        """The code blocks of a language, in order."""
        return re.findall(rf"^```{language}\n(.*?)^```", self.text, flags=re.MULTILINE | re.DOTALL)

    def containing(self, language: str, text: str) -> str:
        """The only code block that holds a text."""
        (block,) = [block for block in self.blocks(language) if text in block]
        return block

    def inline(self) -> list[list[str]]:
        """The commands within sentences that have arguments, but for those that name an option alone."""
        text = re.sub(r"^```.*?^```", "", self.text, flags=re.MULTILINE | re.DOTALL)
        found = [shlex.split(one) for one in re.findall(r"`(pdiff-hf [a-z]+ [^`]+)`", text)]
        return [one for one in found if len(one) > 3 or not one[-1].startswith("--")]

    def benchmarks(self) -> list[list[str]]:
        """The names and arguments of the benchmarks within sentences."""
        found = re.findall(r"`python -m benchmarks\.([a-z_]+[^`]*)`", " ".join(self.text.split()))
        return [shlex.split(one) for one in found]

    def commands(self, text: str = "pdiff-hf") -> list[list[str]]:
        """The command lines in shell blocks that hold a text."""
        lines = "".join(block for block in self.blocks("bash") if text in block).replace("\\\n", " ").splitlines()
        return [shlex.split(line, comments=True) for line in lines if line.strip() and not line.startswith("#")]


def run_here(folder: Path, *command: str) -> subprocess.CompletedProcess:
    """Runs in a folder, with `pdiff-hf` meaning that of this interpreter."""
    arguments = list(command)
    if arguments[0] == "pdiff-hf":
        arguments[:1] = [sys.executable, "-m", "pdiff_hf"]
    done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done
