"""The rooms and their doors: who may import whom, and how light the package's import is."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dualhook

SOURCE = Path(dualhook.__file__).parent
SHARED = {"records", "errors", "table", "host"}
ALLOWED = {
    "sampling": set(),
    "capture": SHARED | {"gathering", "maps", "packing", "sampling"},
    "optimizers": SHARED,
    "gathering": set(),
    "maps": {"gathering", "records"},
    "store": SHARED | {"gathering", "maps", "packing"},
    "query": SHARED | {"maps", "optimizers"},
    "report": SHARED,
    "evaluate": SHARED,
    "packing": {"gathering"},
    "records": {"gathering", "packing"},
    "errors": set(),
    "host": set(),
    "table": {"report"},
    "model": SHARED | {"capture"},
    "composition": SHARED | {"maps", "optimizers", "query", "store"},
    "dual": SHARED | {"query"},
    "questions": SHARED | {"capture", "maps", "model", "query"},
    "summaries": SHARED | {"query"},
    "statistics": SHARED | {"summaries"},
    "attention": SHARED | {"index", "query", "progress", "statistics", "summaries"},
    "progress": {"query", "records"},
    "verification": SHARED | {"composition", "model", "store"},
    "columns": SHARED | {"store", "summaries"},
    "reporting": SHARED | {"attention", "memory", "model", "query", "report", "summaries"},
    "index": SHARED | {"query", "store"},
    "influence": SHARED,
    "loss": SHARED | {"maps", "store"},
    "units": SHARED | {"store"},
    "estimates": SHARED | {"attention", "composition", "loss", "query", "questions", "store", "units"},
    "suspects": SHARED | {"composition", "estimates", "loss", "query", "store", "units"},
    "reading": SHARED | {"columns", "composition", "maps", "optimizers", "progress", "query", "store", "verification"},
}


def imports(path: Path) -> set[str]:
    """The rooms of this package that a module imports, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("dualhook.")}
    return found


def forbidden(room: str, paths: list[Path]) -> dict[str, set[str]]:
    left = {path.name: imports(path) - ALLOWED[room] - {room} for path in paths}
    return {name: rooms for name, rooms in left.items() if rooms}


def modules(room: str) -> list[Path]:
    place = SOURCE / room
    return sorted(place.rglob("*.py")) if place.is_dir() else [SOURCE / f"{room}.py"]


@pytest.mark.parametrize("room", ALLOWED)
def test_rooms_import_one_way(room):
    assert modules(room)
    assert forbidden(room, modules(room)) == {}


def test_the_test_above_can_fail(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from dualhook.store import Store\n")
    assert forbidden("capture", [bad]) == {"bad.py": {"store"}}


def test_integrations_and_examples_use_public_names_only():
    root = Path(__file__).parent.parent
    public = set(dualhook.__all__) | {"integrations", "data", "demo", "sampling", "statistics"}
    for path in [*root.glob("integrations/**/*.py"), *root.glob("examples/**/*.py")]:
        assert imports(path) <= public, path


HEAVY = {
    "transformers",
    "torchvision",
    "lightning",
    "pytorch_lightning",
    "pandas",
    "matplotlib",
    "datasets",
    "dask",
    "faiss",
    "ray",
    "quanda",
    "dattri",
    "torch._dynamo",  # as long as the rest of torch
}


@pytest.fixture(scope="module")
def loaded() -> list[set[str]]:
    """The modules that there are after ``import dualhook``, and after one of a room that draws."""
    code = "import sys, dualhook\nprint(*sys.modules)\nimport dualhook.report.bars\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [set(line.split()) for line in done.stdout.splitlines()]


def test_import_is_light(loaded):
    assert "dualhook" in loaded[0]
    assert not HEAVY & loaded[0]


def test_the_test_above_can_fail_too(loaded):
    assert "matplotlib" in loaded[1]
