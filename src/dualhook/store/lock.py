"""One writer at a time: a lock on a memory's directory, which the system takes off a process that ends in any way."""

from __future__ import annotations

import errno
import os
import sys
import weakref
from pathlib import Path
from types import TracebackType

from dualhook.errors import StoreError

if sys.platform != "win32":
    import fcntl

__all__ = ["WriterLock"]

TAKEN = (errno.EWOULDBLOCK, errno.EACCES)
_HELD: weakref.WeakSet[WriterLock] = weakref.WeakSet()


class WriterLock:
    """Held from :meth:`take` to :meth:`release`."""

    def __init__(self) -> None:
        self._handle: int | None = None

    def take(self, root: Path) -> None:
        """Lock a memory's directory; where the system or the file system has no such locks, nothing is held.

        Raises:
            StoreError: somebody else holds it.
        """
        if sys.platform == "win32":
            return
        handle = os.open(root, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            if error.errno in TAKEN:
                raise StoreError(
                    f"{root} is being written: close() the recorder that does so, in this or another process, or wait "
                    "until it has been compacted"
                ) from error
            return  # a file system without locks
        self._handle = handle
        _HELD.add(self)

    def __enter__(self) -> WriterLock:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.release()

    def release(self) -> None:
        """Let the next one write; twice does no harm."""
        handle, self._handle = self._handle, None
        if handle is not None:
            os.close(handle)


def _after_fork() -> None:
    """A forked process, such as a DataLoader's worker, does not write: the lock is its parent's alone."""
    for lock in list(_HELD):
        lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
