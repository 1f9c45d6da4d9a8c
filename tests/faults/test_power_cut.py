"""The power goes between any two changes of the directory: what was promised is there, what is there is right.

A model of the worst that a file system may do: of a file only what had been synced when the power went, of a directory
the names it had when it was synced last, or those it had at the end, over files that may be empty.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import stat
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
from faults import loop
from faults.test_kills import KILLS, check

import dualhook

Names = dict[Path, dict[str, int]]  # of every directory its files, by a number of their own; 0 is a directory


@dataclass(frozen=True)
class Moment:
    """What is on disk if the power goes now."""

    synced: Names
    current: Names
    contents: dict[int, bytes]  # of the files, as they were synced
    kept: int  # the step that flush() has promised


class Disk:
    """Follows what is done to the files below ``root``, through the functions of ``os``."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.moments: list[Moment] = []
        self.kept = 0
        self._lock = threading.RLock()
        self._numbers: dict[int, int] = {}  # of the files, by inodes, which are used again
        self._count = itertools.count(1)
        self._synced = self._current()
        self._contents = {
            number: (folder / name).read_bytes()
            for folder, names in self._synced.items()
            for name, number in names.items()
            if number
        }
        for name in ("open", "fsync", "replace", "unlink", "mkdir", "rmdir"):
            patch.setattr(os, name, self._followed(name, getattr(os, name)))

    def say(self, text: str) -> None:
        if text.startswith("kept "):
            self.kept = int(text.removeprefix("kept "))

    def _current(self) -> Names:
        """Names as they are."""
        return {
            Path(folder): dict.fromkeys(folders, 0) | {n: self._number(os.stat(f"{folder}/{n}")) for n in files}
            for folder, folders, files in os.walk(self.root)
        }

    def _number(self, file: os.stat_result) -> int:
        if file.st_ino not in self._numbers:
            self._numbers[file.st_ino] = next(self._count)
        return self._numbers[file.st_ino]

    def _followed(self, name: str, original):
        def call(*args, **kwargs):
            with self._lock:
                is_new = name == "open" and args[1] & os.O_CREAT and not os.path.exists(args[0])
                found = original(*args, **kwargs)
                if is_new:
                    self._numbers.pop(os.fstat(found).st_ino, None)
                if name == "fsync":
                    self._sync(os.fstat(args[0]))
                if name != "open":
                    self.moments.append(Moment(self._synced, self._current(), dict(self._contents), self.kept))
                return found

        return call

    def _sync(self, handle: os.stat_result) -> None:
        for folder, names in self._current().items():
            if stat.S_ISDIR(handle.st_mode) and folder.stat().st_ino == handle.st_ino:
                self._synced = self._synced | {folder: names}
            for name, number in names.items():
                if number == self._numbers.get(handle.st_ino):
                    self._contents[number] = (folder / name).read_bytes()


def lay_out(root: Path, names: Names, contents: dict[int, bytes], at: Path) -> Path:
    """Make a directory as it would be found, in another place."""
    shutil.rmtree(at, ignore_errors=True)

    def folder(path: Path) -> None:
        there = at / path.relative_to(root)
        there.mkdir(parents=True)
        for name, number in names.get(path, {}).items():
            if number:
                (there / name).write_bytes(contents.get(number, b""))
            else:
                folder(path / name)

    if root in names:
        folder(root)
    return at


@pytest.mark.parametrize("goes_on", [False, True])
@pytest.mark.parametrize("scenario", loop.SCENARIOS)
def test_what_the_power_leaves_is_a_memory(tmp_path, monkeypatch, scenario, goes_on):
    folder = tmp_path / "run"
    folder.mkdir()
    draw = random.Random(scenario)
    if goes_on:

        class StopError(Exception):
            pass

        def stop(text: str) -> None:
            if text == "kept 21":  # the checkpoint that is left is that of step 18
                raise StopError

        with pytest.raises(StopError):
            loop.whole_run(scenario, folder, stop)
    with monkeypatch.context() as patch:
        disk = Disk(folder / "memory", patch)
        loop.whole_run(scenario, folder, disk.say)
    hold(disk, scenario, draw, tmp_path / "found")


@pytest.mark.parametrize("scenario", loop.SCENARIOS)
def test_what_the_power_leaves_of_compacting_is_the_old_or_the_new_memory(tmp_path, monkeypatch, scenario):
    loop.whole_run(scenario, tmp_path, lambda text: None)
    with monkeypatch.context() as patch:
        disk = Disk(tmp_path / "memory", patch)
        disk.kept = loop.STEPS
        dualhook.compact(tmp_path / "memory", segment_bytes=2000)
        dualhook.compact(tmp_path / "memory")
    hold(disk, scenario, random.Random(scenario), tmp_path / "found")


def hold(disk: Disk, scenario: str, draw: random.Random, at: Path) -> None:
    """Some moments, or all: what is found after each is a memory that has what was promised."""
    moments = disk.moments if KILLS >= 200 else draw.sample(disk.moments, 12)
    for moment in moments:
        for names in (moment.synced, moment.current):
            found = lay_out(disk.root, names, moment.contents, at)
            check(found, scenario, moment.kept, draw)
