"""Small things with a lifetime: a named batch, the directory of a recorder without a path, a method held weakly.

And what lets a directory outlive it: a copy.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
import weakref
from collections.abc import Callable
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

from dualhook.errors import StoreError
from dualhook.records import Batch

__all__ = ["AtExit", "BatchScope", "TemporaryRoot", "copied", "weakly"]


class BatchScope:
    """What :meth:`Recorder.batch` returns: leaving it as a context manager brings back the batch before."""

    def __init__(self, announce: Callable[[Batch | None], None], before: Batch | None) -> None:
        self._announce = announce
        self._before = before

    def __enter__(self) -> BatchScope:
        return self

    def __exit__(self, *exception: object) -> None:
        self._announce(self._before)


class AtExit:
    """An action for the end of this process, unless it is cancelled; it must do no harm when it is called twice.

    Python's own list is worked through from its end; processes that multiprocessing has forked leave it out.
    """

    def __init__(self, action: Callable[[], object]) -> None:
        self._action = action
        atexit.register(action)
        self._if_forked = Finalize(None, action, exitpriority=1)

    def cancel(self) -> None:
        """Forget it."""
        atexit.unregister(self._action)
        self._if_forked.cancel()


class TemporaryRoot:
    """A directory that is removed when nothing refers to this object any more; one of another process stays its own."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or Path(tempfile.mkdtemp(prefix="dualhook-"))
        if path is None:  # at exit after what AtExit calls: a recorder still writes there
            Finalize(self, shutil.rmtree, (self.path, True), exitpriority=0)


def copied(root: Path, target: Path) -> str:
    """Copy a memory's directory; returns where to.

    Raises:
        StoreError: ``target`` exists and is not empty.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise StoreError(f"{target} exists and is not empty: choose another path for the copy of the memory")
    shutil.copytree(root, target, dirs_exist_ok=True)
    return str(target)


def weakly(method: Callable[..., object]) -> Callable[..., None]:
    """A bound method that does not keep its object alive."""
    reference = weakref.WeakMethod(method)

    def call(*args: Any) -> None:
        found = reference()
        if found is not None:
            found(*args)

    return call
