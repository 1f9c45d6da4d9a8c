"""Changes to a directory that the end of the process, or of the power, finds made or not made, and in their order."""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path

__all__ = ["PARTIAL", "put", "remove", "settle", "write_all", "write_bytes"]

PARTIAL = ".partial"
"""What the name of a file ends in that is being written, or was when the process ended."""
AT_ONCE = 1024  # buffers that one call takes: IOV_MAX of Linux, macOS and the BSDs
NO_SUCH_THING = (errno.EINVAL, errno.ENOTSUP)  # of directories on file systems that order their changes themselves


def put(path: Path, write: Callable[[Path], None], partial: Path | None = None) -> None:
    """Let ``write`` make a file, on disk when it returns, and give it its name: there it is whole or not at all.

    Raises:
        OSError: the file system refused; what was begun is left empty, since a full disk wants its space back.
    """
    partial = partial or path.with_suffix(PARTIAL)
    try:
        write(partial)
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            os.truncate(partial, 0)
        raise
    settle(path.parent)


def remove(path: Path) -> None:
    """Remove a file, if it is there, before anything that comes later."""
    path.unlink(missing_ok=True)
    settle(path.parent)


def settle(folder: Path) -> None:
    """Wait until the names in a directory are on disk."""
    if os.name == "nt":  # directories cannot be opened there
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_SUCH_THING:
            raise
    finally:
        os.close(handle)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a small file, on disk when this returns."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        write_all(handle, [memoryview(data)])
        os.fsync(handle)
    finally:
        os.close(handle)


def write_all(handle: int, parts: Iterable[memoryview]) -> None:
    """Write buffers to an open file, one behind the other, in as few calls as the system allows."""
    left = deque(part for part in parts if part)
    while left:
        written = _written(handle, list(islice(left, AT_ONCE)))
        while left and written >= len(left[0]):
            written -= len(left.popleft())
        if written:
            left[0] = left[0][written:]


def _written(handle: int, parts: Sequence[memoryview]) -> int:
    """Write buffers, or a first part of what they hold; the bytes of it."""
    if hasattr(os, "writev"):
        return os.writev(handle, parts)
    return os.write(handle, parts[0])  # Windows
