"""Keys in files of their own, to which the segments of later epochs refer: what was found there once is read there.

Letters: ``n`` row of a file, or of several, one behind the other; ``k`` row that is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dualhook.errors import StoreError
from dualhook.store.checksums import CHECKSUMS
from dualhook.store.direct import as_integers
from dualhook.store.layout import UNREADABLE, open_tensors, read_header
from dualhook.store.remote import RangedFile
from dualhook.store.sparse import SparseRows, with_sparse

__all__ = ["KEY_FILES", "PooledKeys", "check_keys", "keys_in"]

KEY_FILES = "key_files"
"""What a segment's header calls the files that a layer's keys are in: their numbers, and how many rows each has."""
OPEN = 32  # files that are held open at a time: a process may not have many
FETCHED = 16  # files of object storage whose keys are kept, since every segment of later epochs asks for them


class PooledKeys:
    """Keys [n, i] of some files, one behind the other; they read like a tensor, of which each choice is copied."""

    def __init__(self, files: Sequence[tuple[Path, int]], layer: str) -> None:
        self._files, self._layer = files, layer
        self._ends = np.cumsum([count for _, count in files])
        self._open: dict[int, Tensor] = {}
        first = self._part(0)
        self.dtype = first.dtype
        self.shape = torch.Size((int(self._ends[-1]), first.shape[1]))

    def dim(self) -> int:
        """Dimensions."""
        return 2

    def is_floating_point(self) -> bool:
        """Whether the numbers are."""
        return self.dtype.is_floating_point

    def __len__(self) -> int:
        return self.shape[0]

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """Some rows ``index`` [k], in that order; ``dim`` is 0. Neighbours in one file may come without a copy."""
        rows = index.numpy().astype(np.int64)
        files = np.searchsorted(self._ends, rows, side="right")
        there = np.flatnonzero(np.bincount(files)).tolist()
        if len(there) == 1:
            return _chosen(self._part(there[0]), rows - self._begin(there[0]))
        found = torch.empty((len(rows), self.shape[1]), dtype=self.dtype)
        bits = as_integers(found).numpy()
        for number in there:
            own = np.flatnonzero(files == number)
            bits[own] = as_integers(_chosen(self._part(number), rows[own] - self._begin(number))).numpy()
        return found

    def _begin(self, number: int) -> int:
        return int(self._ends[number - 1]) if number else 0

    def _part(self, number: int) -> Tensor:
        """The keys of one of the files."""
        found = self._open.get(number)
        if found is None:
            found = keys_in(self._files[number][0], self._layer, self._files[number][1])
            if self._open and (found.shape[1], found.dtype) != (self.shape[1], self.dtype):
                raise StoreError(f"{self._files[number][0]} has keys of {self._layer!r} that do not fit other files'")
            if len(self._open) >= OPEN:
                self._open = {}
            self._open[number] = found
        return found


def keys_in(path: Path, layer: str, count: int) -> Tensor:
    """A layer's keys in a file, memory-mapped, or what reads like them.

    Raises:
        StoreError: it is gone, or they are not what they have to be.
    """
    file = open_tensors(path)
    header = read_header(path, file)
    try:
        own = header["rows"][layer]
        fields = [f"key/{field}" for field in SparseRows.FIELDS] if "sparse" in own else ["key"]
        names = [f"rows/{layer}/{field}" for field in fields]
        if isinstance(file, RangedFile) and (sums := header.get(CHECKSUMS)) is not None:
            tensors: Mapping[str, Tensor] = _fetched(path, tuple((name, sums[name]) for name in names))
        else:
            tensors = file.get_tensors(names)
        parts = dict(zip(fields, (tensors[name] for name in names), strict=True))
        key = with_sparse(parts, own.get("sparse", {}))["key"]
        if len(key) != count or own["count"] != count or key.dim() != 2 or not key.is_floating_point():
            raise ValueError(f"{len(key)} keys of {list(key.shape)}, {key.dtype}, for {count} rows")
    except UNREADABLE as error:
        raise StoreError(f"{path} has keys of {layer!r} that make no sense: {error}") from error
    return key


@lru_cache(maxsize=FETCHED)
def _fetched(path: Path, sums: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    """Tensors of a file in object storage, by their names and checksums."""
    return open_tensors(path).get_tensors([name for name, _ in sums])


def check_keys(path: Path, header: Mapping[str, Any]) -> None:
    """Look at every bit of a file of keys that checksums do not tell.

    Raises:
        StoreError: some make no sense.
    """
    for layer, own in header["rows"].items():
        key = keys_in(path, layer, own["count"])
        try:
            if isinstance(key, SparseRows):
                key.check()
        except ValueError as error:
            raise StoreError(f"{path} has keys of {layer!r} that make no sense: {error}") from error


def _chosen(keys: Tensor, rows: np.ndarray) -> Tensor:
    """Some rows of one file; in one piece, as in a first epoch, and whole without a copy."""
    if (np.diff(rows) == 1).all():
        return keys[int(rows[0]) : int(rows[-1]) + 1]
    if isinstance(keys, SparseRows):
        return keys.index_select(0, torch.from_numpy(rows))
    return torch.from_numpy(as_integers(keys).numpy()[rows]).view(keys.dtype)
