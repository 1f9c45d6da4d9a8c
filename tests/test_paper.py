"""The scripts of examples/paper, made tiny: what their tables have to satisfy."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

PAPER = Path(__file__).parent.parent / "examples" / "paper"
LONG = pytest.mark.skipif(not os.environ.get("DUALHOOK_DOCS"), reason="takes minutes: DUALHOOK_DOCS=1 runs the scripts")
NAMES = ("single", "continual")
IMAGES = ["--only", *NAMES, "--shorter", "250", "--queries", "30", "--seeds", "1", "--out", "out"]
LANGUAGE = ["--passages", "60", "--epochs", "1", "--queries", "8", "--seeds", "1", "--out", "out"]


def paper(script: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PAPER / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def check_statistics(folder: Path) -> None:
    """Weights are rebuilt, and votes are counted once: what is right and what is wrong make up all predictions."""
    assert all(float(row["error"]) < 1e-5 for row in table(folder / "rebuilt.csv"))
    counts = defaultdict(dict)
    for row in table(folder / "power.csv"):
        counts[row.get("task"), row.get("groups"), row["layer"], row["by"]][row["predictions"]] = int(row["queries"])
        if row["predictions"] == "correct" and row["queries"] != "0":
            assert row["equals_target"] == row["equals_output"]
    assert len(counts) % 4 == 0
    assert all(kinds["all"] == kinds["correct"] + kinds["wrong"] > 0 for kinds in counts.values())


@LONG
def test_images(tmp_path):
    done = paper("images.py", tmp_path, *IMAGES)
    assert done.returncode == 0, done.stderr
    for name in NAMES:
        run = tmp_path / "out" / name / "seed-0"
        check_statistics(run)
        logits = {row["query"]: float(row["logit"]) for row in table(run / "queries.csv")}
        sums = defaultdict(float)
        for row in table(run / "signed.csv"):
            sums[row["query"]] += float(row["contribution"]) * (row["layer"] == "fc3")
        assert sums == pytest.approx(logits, rel=1e-4, abs=1e-4)
        shares = defaultdict(float)
        for row in table(run / "shares.csv"):
            shares[row["task"], row["layer"]] += float(row["abs_weight"])
        assert list(shares.values()) == pytest.approx([1.0] * len(shares))
        for picture in ("attended", "class-totals", "scores-0", "totals-over-training", "../power"):
            assert (run / f"{picture}.png").stat().st_size > 10_000
        assert not (run / "memory").exists()

    *left_out, nothing = table(tmp_path / "out" / "single" / "seed-0" / "bookkeeping.csv")
    assert float(nothing["size_retrained"]) < 1e-4  # the retraining is the run's own, but for rounding
    assert all(float(row["size_retrained"]) > 1e-3 for row in left_out)
    continual = tmp_path / "out" / "continual" / "seed-0"
    first, *_, last = table(continual / "forgetting.csv")
    assert (first["step"], last["step"], last["task"]) == ("0", "24", "digits")
    at_the_end = {row["task"]: float(row["accuracy"]) for row in table(continual / "accuracy.csv")}
    assert float(last["accuracy"]) == pytest.approx(at_the_end["digits"], abs=1.01 / 30)  # an image may be on the edge

    again = paper("images.py", tmp_path, *IMAGES)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("done before") == len(NAMES)
    other = paper("images.py", tmp_path, *IMAGES, "--queries", "31")
    assert other.returncode != 0
    assert "other settings" in other.stderr


@LONG
def test_language(tmp_path):
    done = paper("language.py", tmp_path, *LANGUAGE)
    assert done.returncode == 0, done.stderr
    for name in ("lstm", "gpt2"):
        run = tmp_path / "out" / name / "seed-0"
        check_statistics(run)
        assert table(run / "supporting.csv")
        assert (run / "prompt-0.png").stat().st_size > 10_000
        assert not (run / "run").exists()
    logits = {row["query"]: float(row["logit"]) for row in table(tmp_path / "out" / "lstm" / "seed-0" / "queries.csv")}
    sums = defaultdict(float)
    for row in table(tmp_path / "out" / "lstm" / "seed-0" / "parts.csv"):
        sums[row["query"]] += float(row["contribution"])
    assert sums == pytest.approx(logits, rel=1e-4, abs=1e-4)
    again = paper("language.py", tmp_path, *LANGUAGE)
    assert again.stdout.count("done before") == 2, again.stderr
