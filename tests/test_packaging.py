"""The wheel holds everything, integrations included, and so does an editable install."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BORROWED = "borrowed.pth"  # lends the clean environment torch and numpy, which would take minutes to install
CHECK = """
import importlib.util, sys, dualhook, dualhook.integrations, dualhook.integrations.torchvision, dualhook.cli
from dualhook.data import load_fashion_mnist_subset, load_king_james_subset
assert len(load_fashion_mnist_subset().train_images) == 5000
assert len(load_king_james_subset().verses) == 3637
print(dualhook.__file__, dualhook.integrations.__file__, sep="\\n")
"""


def pip(python: Path | str, *arguments: str) -> None:
    command = [str(python), "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of what the repository tracks, so that building leaves no traces in it."""
    target = tmp_path_factory.mktemp("source") / "dualhook"
    left_out = shutil.ignore_patterns(".git", ".venv*", "*.egg-info", "build", "__pycache__", ".*_cache", ".hypothesis")
    shutil.copytree(ROOT, target, ignore=left_out)
    return target


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Path:
    """The Python of a new environment without this package, but with what it depends on; each install ends another."""
    folder = tmp_path_factory.mktemp("clean") / "env"
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    place = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    )
    pip(python, "uninstall", "--yes", "setuptools")  # the one that venv brings is too old on Python 3.10 and 3.11
    # paths in a .pth file are searched last, and the .pth files lying there (an editable install's) are not read
    Path(place.stdout.strip(), BORROWED).write_text(sysconfig.get_path("purelib") + "\n")
    return python


def imported(python: Path, tmp_path: Path) -> list[str]:
    done = subprocess.run([python, "-c", CHECK], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_wheel_in_a_clean_environment(source, clean, tmp_path):
    pip(sys.executable, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source))
    (wheel,) = tmp_path.glob("dualhook-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    modules = {f"dualhook/{path.relative_to(ROOT / 'src' / 'dualhook')}" for path in (ROOT / "src").rglob("*.py")}
    modules |= {f"dualhook/{path.relative_to(ROOT)}" for path in (ROOT / "integrations").rglob("*.py")}
    assert modules <= set(names)
    assert "dualhook/py.typed" in names
    assert {"dualhook/data/LICENSE-fashion-mnist", "dualhook/data/LICENSE-king-james"} <= set(names)
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "examples"))]
    pip(clean, "install", "--no-deps", str(wheel))
    for place in imported(clean, tmp_path):
        assert str(clean.parent.parent) in place
    command = clean.parent / "dualhook"
    assert "demo" in subprocess.run([command, "--help"], capture_output=True, text=True, check=True).stdout


def test_editable_install(source, clean, tmp_path):
    pip(clean, "install", "--no-deps", "--no-build-isolation", "--editable", str(source))
    package, integrations = imported(clean, tmp_path)
    assert package == str(source / "src" / "dualhook" / "__init__.py")
    assert integrations == str(source / "integrations" / "__init__.py")
