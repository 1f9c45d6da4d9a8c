"""The demo: it leaves what it promises, proves itself, and touches nobody else's files."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest
import torch
from matplotlib.image import imread

import dualhook
from dualhook import demo
from dualhook.cli import main
from dualhook.data import CLASSES, load_fashion_mnist_subset
from dualhook.errors import DualHookError, StoreError


def short(out, **settings):
    return demo.run_demo(out, **{"epochs": 3, "batch_size": 50, "train_images": 500, **settings})


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("demo") / "out"


@pytest.fixture(scope="module")
def summary(out):
    torch.set_num_threads(1)  # as in every test: sums are rounded the same
    return short(out)


def test_the_subset_is_balanced_and_in_range():
    data = load_fashion_mnist_subset()
    assert data.train_images.shape == (5000, 784)
    assert data.test_images.shape == (1000, 784)
    assert data.train_images.dtype == torch.float32
    assert (float(data.train_images.min()), float(data.train_images.max())) == (0.0, 1.0)
    assert data.train_labels.bincount().tolist() == [500] * 10
    assert data.test_labels.bincount().tolist() == [100] * 10
    assert len(data.classes) == 10


def test_the_memory_adds_up_and_knows_its_images(summary, out):
    memory = dualhook.load(out / "memory")
    assert memory.verify().max_error == summary.max_error < 1e-5
    assert (memory.steps, summary.steps) == (30, 30)
    assert summary.patterns == 3 * 1500
    assert memory.samples.tolist() == list(range(500))
    assert {"label", "class"} <= set(memory.columns)


def test_the_questions_are_one_right_and_one_wrong_prediction(summary, out):
    model = demo.network()
    model.load_state_dict(dualhook.load(out / "memory").state_dict())
    data, queries = load_fashion_mnist_subset(), torch.from_numpy(np.load(out / "queries.npy"))
    assert queries.shape == (2, 784)
    given = [CLASSES[c] for c in model(queries).argmax(1)]
    where = [int((data.test_images == query).all(1).nonzero()[0]) for query in queries]
    true = [CLASSES[data.test_labels[row]] for row in where]
    assert true[0] == given[0]
    assert true[1] != given[1]
    assert summary.questions == (f"{true[0]}, predicted {given[0]}", f"{true[1]}, predicted {given[1]}")
    assert summary.accuracy > 0.5  # after a second of training


def test_the_report_is_there_and_named(summary, out):
    page = (out / "report.html").read_text("utf-8")
    assert page.count("data:image/png;base64") > 20
    assert CLASSES[0] in page
    assert str(out / "report.html") in str(summary)


def test_the_picture_is_readable_and_of_a_sensible_size(summary, out):
    picture = imread(out / "attention.png")
    height, width = picture.shape[:2]
    assert 800 <= width <= 1600
    assert 800 <= height <= 1600
    assert 0.02 < (picture[..., :3].mean(-1) < 0.9).mean() < 0.5  # neither blank nor black


def test_the_summary_says_what_there_is_and_what_to_do_next(summary, out):
    text = str(summary)
    assert f"{summary.accuracy:.1%}" in text
    assert f"{summary.max_error:.1e}" in text
    assert summary.bytes == sum(path.stat().st_size for path in (out / "memory").rglob("*") if path.is_file())
    for line in text.splitlines()[-3:]:
        assert line.startswith("  dualhook ")


def test_the_commands_it_proposes_work(summary, capsys):
    for line in str(summary).splitlines()[-3:]:
        assert main(line.split()[1:]) == 0
    assert "ankle boot" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("called", "found", "proposed"),
    [
        (".venv/bin/dualhook", None, "  .venv/bin/dualhook info "),  # an environment that is not activated
        ("/somewhere/bin/dualhook", "/somewhere/bin/dualhook", "  dualhook info "),
        ("script.py", None, "  dualhook info "),
    ],
)
def test_the_commands_are_called_as_the_shell_finds_them(summary, monkeypatch, called, found, proposed):
    monkeypatch.setattr("sys.argv", [called])
    monkeypatch.setattr("shutil.which", lambda name: found)
    assert proposed in str(summary)


def test_the_same_seed_gives_the_same_run_whatever_the_global_one(summary, tmp_path):
    torch.manual_seed(17)
    before = torch.random.get_rng_state()
    again = short(tmp_path / "again")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert again.accuracy == summary.accuracy
    assert (
        dualhook.load(tmp_path / "again" / "memory")
        .weight("fc1")
        .equal(dualhook.load(summary.out / "memory").weight("fc1"))
    )


def test_an_earlier_demo_is_replaced_and_other_files_stay(tmp_path):
    tiny = {"epochs": 1, "train_images": 50}
    short(tmp_path, **tiny)
    (tmp_path / "notes.txt").write_text("mine")
    short(tmp_path, **tiny, seed=1)
    assert json.loads((tmp_path / "dualhook-demo.json").read_text())["seed"] == 1
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("make", ["folder", "file"])
def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path, make):
    place = tmp_path / "precious"
    if make == "folder":
        place.mkdir()
        (place / "attention.png").write_text("mine")
    else:
        place.write_text("mine")
    with pytest.raises(StoreError, match="choose another folder with --out"):
        short(place)
    assert [path.read_text() for path in tmp_path.rglob("*") if path.is_file()] == ["mine"]


@pytest.mark.parametrize("settings", [{"epochs": 0}, {"batch_size": 0}, {"train_images": 0}])
def test_numbers_below_one_are_refused_before_anything_is_written(tmp_path, settings):
    with pytest.raises(DualHookError, match="expected at least 1"):
        short(tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_without_matplotlib_it_says_what_to_install_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["demo", "--out", str(tmp_path / "out")]) == 2
    assert 'pip install "dualhook[demo]"' in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("error", "status"), [(1e-6, 0), (1e-5, 1), (math.nan, 1)])
def test_the_exit_status_is_the_identity(summary, monkeypatch, capsys, error, status):
    found = type(summary)(**{**vars(summary), "max_error": error})
    monkeypatch.setattr(demo, "run_demo", lambda out, **settings: found)
    assert main(["demo"]) == status
    assert ("please report" in capsys.readouterr().out) == bool(status)
