"""What a process that was killed leaves lying about: never read, never in the way, gone when recording goes on."""

from __future__ import annotations

import os
import shutil
import uuid

import pytest
import torch
from torch import nn

import dualhook
from dualhook.errors import StoreError
from dualhook.store import Layout

HALF = ("dualhook.json.partial", "latest.partial", "segments/00000007.partial", "origin/00000001.partial",
        "snapshots/00000009.partial", "columns/label.partial", "answers/0f.partial")  # fmt: skip


def recorded(path, **options):
    model = nn.Linear(3, 2)
    recorder = dualhook.instrument(model, path, verbose=False, **options)
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
    return model, recorder.close()


def test_half_written_files_are_removed_by_going_on_and_not_by_reading(tmp_path):
    model, _ = recorded(tmp_path)
    (tmp_path / "answers").mkdir()
    for name in HALF:
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / "notes.partial.txt").write_text("the user's")
    assert dualhook.load(tmp_path).verify(model)["exact"].all()
    assert all((tmp_path / name).exists() for name in HALF)
    dualhook.instrument(model, tmp_path, resume=True, verbose=False).close()
    assert not any((tmp_path / name).exists() for name in HALF)
    assert (tmp_path / "notes.partial.txt").exists()


def test_what_folding_was_about_to_remove_is_removed_by_going_on(tmp_path, monkeypatch):
    monkeypatch.setattr("uuid.uuid4", lambda: uuid.UUID(int=7))  # the files of both are those of one memory
    model, memory = recorded(tmp_path / "run", max_bytes=200)
    folded, layout = memory._store.first_step, memory._store.layout
    monkeypatch.setattr("dualhook.recorder.front.SEGMENT_BYTES", 1)  # a segment for every step
    whole = recorded(tmp_path / "whole")[1]._store
    left = layout.segment(0), layout.origin(0)
    assert folded >= whole.segments[0].last_step
    assert not any(path.exists() for path in left)
    for path in left:
        shutil.copy(tmp_path / "whole" / path.relative_to(layout.root), path)
    assert dualhook.load(layout.root)._store.first_step == folded
    dualhook.instrument(model, layout.root, resume=True, verbose=False).close()
    assert not any(path.exists() for path in left)
    assert dualhook.load(layout.root).verify(model)["exact"].all()


def test_a_memory_opens_while_a_recorder_folds_it(tmp_path, monkeypatch):
    _, memory = recorded(tmp_path, max_bytes=200)
    segments, folded = Layout.segments, memory._store.layout.segment(0)
    lists = iter([[folded], [folded], []])  # what a reader still finds, and cannot open any more
    monkeypatch.setattr(Layout, "segments", lambda self, rank=None: next(lists) + segments(self, rank))
    with pytest.raises(StoreError, match="00000000.safetensors cannot be read"):
        dualhook.load(tmp_path)  # it was so twice
    lists = iter([[folded], []])
    assert dualhook.load(tmp_path).steps == 3


@pytest.mark.parametrize("moment", ["making", "removing"])
def test_a_memory_that_was_never_finished_is_no_obstacle(tmp_path, monkeypatch, moment):
    if moment == "removing":
        recorded(tmp_path / "run")
    replace = os.replace

    def cut(source, target):
        if moment == "removing":
            replace(source, target)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", cut)
        with pytest.raises(KeyboardInterrupt):
            dualhook.instrument(nn.Linear(3, 2), tmp_path / "run", overwrite=True, verbose=False)
    with pytest.raises(StoreError, match="holds no memory"):
        dualhook.load(tmp_path / "run")
    assert recorded(tmp_path / "run")[1].steps == 3
