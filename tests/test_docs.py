"""The pages under docs/ and the notebook run as written, and print what they show."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rays import MISSING
from test_readme import shape

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "docs/tutorial.md", *sorted(ROOT.glob("docs/how-to/[!i]*.md"))]
NOTEBOOKS = sorted(ROOT.glob("examples/*.ipynb"))
RUN = pytest.mark.skipif(not os.environ.get("DUALHOOK_DOCS"), reason="takes minutes: DUALHOOK_DOCS=1 runs the pages")
FENCE = re.compile(r"^```(?P<language>\S*)[^\n]*\n(?::caption: (?P<file>\S+)\n+)?(?P<text>.*?)^```$", re.DOTALL | re.M)


def blocks(page: Path, *languages: str) -> list[re.Match[str]]:
    """A page's fenced blocks of some languages; a block with a file's name has the language ``{code-block}``."""
    return [found for found in FENCE.finditer(page.read_text(encoding="utf-8")) if found["language"] in languages]


def script(page: Path) -> str:
    """A page as one script: its Python and, where they stand, its shell commands."""
    parts = ["import subprocess"]
    for found in blocks(page, "python", "sh"):
        shell = f"subprocess.run({found['text']!r}, shell=True, check=True)"
        parts.append(found["text"] if found["language"] == "python" else shell)
    return "\n".join(parts)


def printed(code: str, folder: Path) -> str:
    """What a script prints that runs in a folder of its own, without its numbers."""
    (folder / "script.py").write_text(code, encoding="utf-8")
    commands = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": commands, "MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-u", "script.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return "\n".join(shape(done.stdout))


@RUN
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page(page, tmp_path):
    if page.stem == "ray":
        pytest.importorskip("ray", reason=MISSING)
    for found in blocks(page, "{code-block}"):
        (tmp_path / found["file"]).write_text(found["text"])
    output = printed(script(page), tmp_path)
    for shown in blocks(page, "text"):
        assert "\n".join(shape(shown["text"])) in output


def test_every_page_with_code_is_run():
    assert {page for page in ROOT.glob("docs/**/*.md") if blocks(page, "python", "{code-block}")} == set(PAGES)


@RUN
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_notebook(notebook, tmp_path):
    cells = [cell for cell in json.loads(notebook.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
    output = printed("\n".join("".join(cell["source"]) for cell in cells), tmp_path)
    shown = ["".join(part["text"]) for cell in cells for part in cell["outputs"] if part["output_type"] == "stream"]
    assert shown
    for text in shown:
        assert "\n".join(shape(text)) in output
    assert notebook.stat().st_size < 500_000
