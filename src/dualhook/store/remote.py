"""Memories in object storage, read through fsspec: the part of ``pathlib`` that reading needs, and files in ranges."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import total_ordering
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from dualhook.errors import StoreError
from dualhook.store.header import Header

__all__ = ["RangedFile", "RemotePath", "located"]

FIRST_BYTES = 2**16  # read to begin with: most headers are shorter


def located(path: str | os.PathLike[str]) -> Path:
    """A local path, or behind a URL (``s3://bucket/run``) a :class:`RemotePath`, which reads like one.

    Raises:
        StoreError: fsspec, or what it needs for the URL, is not installed.
    """
    if isinstance(path, RemotePath):
        return cast(Path, path)
    if not isinstance(path, str) or "://" not in path:
        return Path(path)
    return cast(Path, RemotePath(path))


@total_ordering
class RemotePath:
    """A file or folder by its URL; only that is pickled, so that other machines bring their own access."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            import fsspec

            self._fs, key = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            scheme = self.url.partition("://")[0]
            extra = "s3" if scheme == "s3" else "fsspec"
            raise StoreError(f"{self.url} cannot be opened: {error}; pip install 'dualhook[{extra}]'") from error
        self._key = PurePosixPath(key)

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return self._key.name

    @property
    def stem(self) -> str:
        """The same without its suffix."""
        return self._key.stem

    @property
    def parent(self) -> RemotePath:
        """The folder."""
        return RemotePath(self.url.rpartition("/")[0])

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self.url}/{name}")

    def exists(self) -> bool:
        """Whether a file is there."""
        with self._reached():
            return bool(self._fs.isfile(str(self._key)))

    is_file = exists

    def stat(self) -> SimpleNamespace:
        """``st_size`` in bytes."""
        with self._reached():
            return SimpleNamespace(st_size=int(self._fs.info(str(self._key))["size"]))

    def glob(self, pattern: str) -> list[RemotePath]:
        """The files below that fit a pattern, as they are there now."""
        with self._reached():
            self._fs.invalidate_cache()
            found = self._fs.glob(f"{self._key}/{pattern}")
        return [self / PurePosixPath(key).relative_to(self._key).as_posix() for key in found]

    def relative_to(self, other: RemotePath) -> PurePosixPath:
        """The way from a folder above."""
        return self._key.relative_to(other._key)

    def read_text(self, encoding: str) -> str:
        """The whole file."""
        with self._reached():
            return str(self._fs.cat_file(str(self._key)).decode(encoding))

    def ranges(self, places: Sequence[tuple[int, int]]) -> list[bytes]:
        """Some stretches of bytes, begin and end, asked for together."""
        with self._reached():
            starts, ends = [begin for begin, _ in places], [end for _, end in places]
            return list(self._fs.cat_ranges([str(self._key)] * len(places), starts, ends, on_error="raise"))

    def mkdir(self, **_: object) -> NoReturn:
        """Refuse: nothing is written there.

        Raises:
            StoreError: always.
        """
        raise StoreError(f"{self} cannot be made: a memory behind a URL is read only; copy it to a disk for that")

    @contextmanager
    def _reached(self) -> Iterator[None]:
        """Errors of whatever lies between as ours."""
        try:
            yield
        except Exception as error:
            raise StoreError(f"{self.url} cannot be read: {type(error).__name__}: {error}") from error

    def __reduce__(self) -> tuple[type[RemotePath], tuple[str]]:
        return RemotePath, (self.url,)

    def __str__(self) -> str:
        return self.url

    __repr__ = __str__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and self.url == other.url

    def __lt__(self, other: RemotePath) -> bool:
        return self.url < other.url

    def __hash__(self) -> int:
        return hash(self.url)


class RangedFile:
    """The tensors of one safetensors file behind a URL; each is fetched when it is asked for.

    Raises:
        StoreError: the file cannot be reached.
        ValueError: it is no whole safetensors file.
    """

    def __init__(self, path: RemotePath) -> None:
        self._path, size = path, path.stat().st_size
        (start,) = path.ranges([(0, min(size, FIRST_BYTES))])
        length = 8 + int.from_bytes(start[:8], "little")
        if len(start) < length <= size:
            start += path.ranges([(len(start), length)])[0]
        self._header = Header.of(start, size)

    def metadata(self) -> Mapping[str, str]:
        """The texts that go with the tensors."""
        return self._header.metadata

    def keys(self) -> list[str]:
        """The names of the tensors."""
        return list(self._header.places)

    def get_tensor(self, name: str) -> Tensor:
        """One tensor."""
        return self.get_tensors([name])[name]

    def get_tensors(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Several, fetched together."""
        places = [self._header.places[name] for name in names]
        found: list[Any] = self._path.ranges([(place.begin, place.end) for place in places])
        return {
            name: torch.frombuffer(bytearray(data), dtype=place.dtype).view(place.shape)
            if place.end > place.begin
            else torch.empty(place.shape, dtype=place.dtype)
            for name, place, data in zip(names, places, found, strict=True)
        }
