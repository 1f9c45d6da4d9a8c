"""The README's example runs as written and prints what the README shows."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    """The first fenced block of a language."""
    found = re.search(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)
    assert found, language
    return found.group(1)


def shape(text: str) -> list[str]:
    """A printed table without its numbers, which depend on the random start."""
    return [
        re.sub(r"\s+", " ", re.sub(r"-?\d[\d.e+-]*", "#", line.replace("─", ""))).strip() for line in text.splitlines()
    ]


def test_example(tmp_path):
    code = block("python")
    assert len([line for line in code.splitlines() if line.strip()]) == 12
    assert code.splitlines()[-1].startswith("assert memory.verify().max_error < 1e-5")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("dualhook: recording 2 layers")
    assert shape(done.stdout) == shape(block("text"))


def test_files_that_the_readme_names_are_there():
    root = Path(__file__).parent.parent
    for name in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (root / name).exists(), name
