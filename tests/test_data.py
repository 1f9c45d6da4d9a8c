"""The text that ships with the package, and the script that makes it."""

from __future__ import annotations

import gzip
import subprocess
import sys
from pathlib import Path

from dualhook.data import load_king_james_subset

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "make_text_subset.py"
SOURCE = "Ge1:1 In the beginning.\nExo1:1 Now these are the names.\nMark16:20 And they went forth. Amen.\n"


def made_from(source: str, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "source.gz").write_bytes(gzip.compress(source.encode()))
    command = [sys.executable, str(SCRIPT), "--source", str(folder / "source.gz"), "--out", str(folder / "made.gz")]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_every_verse_has_a_reference_of_its_own():
    text = load_king_james_subset()
    verses = dict(zip(text.references, text.verses, strict=True))
    assert len(verses) == 3637
    assert verses["Genesis 1:3"] == "And God said, Let there be light: and there was light."
    assert verses["Jonah 1:17"].endswith("Jonah was in the belly of the fish three days and three nights.")
    assert all(verse == verse.strip() and verse for verse in verses.values())


def test_the_script_takes_whole_books_and_leaves_the_others_out(tmp_path):
    assert made_from(SOURCE, tmp_path).returncode == 0
    made = gzip.decompress((tmp_path / "made.gz").read_bytes()).decode()
    assert made == "Genesis 1:1\tIn the beginning.\nMark 16:20\tAnd they went forth. Amen.\n"


def test_the_script_names_a_line_that_is_no_verse(tmp_path):
    done = made_from(SOURCE + "chapter two\n", tmp_path)
    assert done.returncode != 0
    assert "line 4: 'chapter two'" in done.stderr
