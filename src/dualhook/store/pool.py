"""Keys that no trained weight has made, as those of a raw input, are written once and found again in later epochs.

Done in the writing thread, and by numpy alone: torch would call threads in for it, and training would wait for these.
Which row a key is of, its sample and position, says only where to look: what is found is compared bit by bit, so that
augmented inputs, a sample of another content or an accident of the hash cost room and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor

from dualhook.records import NO_SAMPLE
from dualhook.store.direct import DirectFile, as_integers
from dualhook.store.keyfiles import KEY_FILES, keys_in
from dualhook.store.layout import Layout, write_tensors
from dualhook.store.sharing import KEY_ROW
from dualhook.store.sparse import SparseRows, packed_in_place

if TYPE_CHECKING:
    from dualhook.store.lanes import Segment

__all__ = ["KeyPool", "NewKeys", "Reference", "is_worth_finding"]

Look = Callable[[np.ndarray], np.ndarray]
WORTH_BYTES = 256  # of a key, from where on what tells where it is found is clearly smaller
WORTH_SHARE = 16  # part of a segment that keys have to be: of less there would be many small files for little
WORTH_FOUND = 2  # part of the keys looked for that have to be found, or no more are looked for
BLOCK_BYTES = 2**19  # of keys, compared at a time: as many as stay in a processor's cache


@dataclass(frozen=True)
class Reference:
    """Where a layer's keys are: the ``rows`` [n] int32 of ``files``, numbers and counts, one behind the other."""

    rows: Tensor
    files: list[tuple[int, int]]


@dataclass
class _Table:
    """A layer's keys in the pool, numbered file by file, and by sample and position where each is to be found."""

    width: int
    dtype: torch.dtype
    marks: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    """Of sample and position, ascending."""
    rows: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    """The newest row of each."""
    files: np.ndarray = field(default_factory=lambda: np.empty((0, 3), np.int64))
    """Number of a file, its first row and how many."""
    end: int = 0

    def find(self, marks: np.ndarray) -> np.ndarray:
        """The row of each mark; -1: none."""
        if not len(self.marks):
            return np.full(len(marks), -1)
        place = np.minimum(np.searchsorted(self.marks, marks), len(self.marks) - 1)
        return np.where(self.marks[place] == marks, self.rows[place], -1)

    def put(self, marks: np.ndarray, rows: np.ndarray) -> None:
        """Take rows for their marks, of several the last."""
        marks, last = np.unique(marks[::-1], return_index=True)
        rows = rows[::-1][last]
        place = np.searchsorted(self.marks, marks)
        is_there = place < len(self.marks)
        is_there[is_there] = self.marks[place[is_there]] == marks[is_there]
        self.rows[place[is_there]] = rows[is_there]
        is_new = ~is_there
        self.marks = np.insert(self.marks, place[is_new], marks[is_new])
        self.rows = np.insert(self.rows, place[is_new], rows[is_new])

    def add(self, number: int, count: int) -> int:
        """Take in the rows of a file; the first one's number."""
        known = self.files[self.files[:, 0] == number]
        if len(known):
            return int(known[0, 1])
        begin, self.end = self.end, self.end + count
        self.files = np.append(self.files, [[number, begin, count]], axis=0)
        return begin

    def forget(self, numbers: Collection[int]) -> None:
        """Lose the rows of some files."""
        gone = np.isin(self.files[:, 0], list(numbers))
        kept = ~gone[self._places(self.rows)]
        self.marks, self.rows, self.files = self.marks[kept], self.rows[kept], self.files[~gone]

    def refer(self, rows: np.ndarray) -> Reference:
        """Rows by their files."""
        places = self._places(rows)
        used, own = np.unique(places, return_inverse=True)
        behind = np.cumsum(self.files[used, 2]) - self.files[used, 2]
        numbers = rows - self.files[places, 1] + behind[own]
        files = [(int(number), int(count)) for number, _, count in self.files[used]]
        return Reference(torch.from_numpy(numbers.astype(np.int32)), files)

    def _places(self, rows: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.files[:, 1], rows, side="right") - 1


class KeyPool:
    """What one process has of its layers' keys in files, at most ``most_bytes``; a layer that does not pay is left."""

    def __init__(self, layout: Layout, *, rank: int = 0, sparse: bool = False, most_bytes: int | None = None) -> None:
        self.layout = layout
        self.rank = rank
        self.sparse = sparse
        self.most_bytes = most_bytes
        self.nbytes = 0
        """Bytes of the files."""
        self.tables: dict[str, _Table] = {}
        self.given_up: set[str] = set()
        self.file = DirectFile()  # a run of one epoch never reads it

    def segment(self, number: int) -> NewKeys:
        """For the rows of the segment with this number, which is about to be written."""
        return NewKeys(self, number)

    def go_on(self, segments: Iterable[Segment]) -> None:
        """Know what is there: the keys that some segments, oldest first, refer to."""
        for segment in segments:
            for layer, own in segment.header["rows"].items():
                if KEY_FILES in own and "key_of" not in own:
                    self._know(segment, layer, own[KEY_FILES])
        self.nbytes = sum(path.stat().st_size for path in self.layout.key_files(self.rank))

    def remove(self, paths: Iterable[Path]) -> None:
        """Remove some files, to which no segment refers any more."""
        gone = set(paths)
        self.nbytes -= sum(path.stat().st_size for path in gone)
        for table in self.tables.values():
            own = table.files[:, 0].tolist()
            table.forget([number for number in own if self.layout.key_file(number, self.rank) in gone])
        for path in gone:
            path.unlink()

    def table(self, layer: str, key: Tensor) -> _Table:
        """Of a layer's keys; a new one where they are of another width or dtype than before."""
        known, width = self.tables.get(layer), key.shape[1]
        if known is None or (known.width, known.dtype) != (width, key.dtype):
            known = self.tables[layer] = _Table(width, key.dtype)
        return known

    def are_there(self, layer: str, where: Reference, bits: np.ndarray, own: np.ndarray) -> np.ndarray:
        """Which of the rows ``own`` [k] of keys as integers are those that stand there in the files."""
        rows, found, begin = where.rows.numpy(), np.empty(len(own), bool), 0
        for number, count in where.files:
            keys = keys_in(self.layout.key_file(number, self.rank), layer, count)
            there = np.flatnonzero((rows >= begin) & (rows < begin + count))
            found[there] = _are_equal(bits, own[there], partial(_bits_at, keys), rows[there] - begin)
            begin += count
        return found

    def has_room(self, nbytes: int) -> bool:
        """Whether so many more bytes fit."""
        return self.most_bytes is None or self.nbytes + nbytes <= self.most_bytes

    def give_up(self, layer: str) -> None:
        """Leave a layer's keys where they are from now on."""
        self.given_up.add(layer)
        del self.tables[layer]

    def _know(self, segment: Segment, layer: str, files: list[list[int]]) -> None:
        tensors = segment.tensors(layer, ("sample", "position", KEY_ROW))
        paths = segment.key_paths(layer)
        table = self.table(layer, keys_in(paths[0][0], layer, paths[0][1]))
        counts = np.array([count for _, count in files])
        begins = np.array([table.add(number, count) for number, count in files])
        rows = tensors[KEY_ROW].numpy().astype(np.int64)
        place = np.searchsorted(np.cumsum(counts), rows, side="right")
        table.put(_marks(tensors), rows - (np.cumsum(counts) - counts)[place] + begins[place])


def is_worth_finding(count: int, row_bytes: int, nbytes: int) -> bool:
    """Whether so many keys of so many bytes each are large, and a large part of a segment of ``nbytes``."""
    return row_bytes >= WORTH_BYTES and WORTH_SHARE * count * row_bytes >= nbytes


class NewKeys:
    """The keys that one segment brings: what of them is new is a file of its own, before the segment."""

    def __init__(self, pool: KeyPool, number: int) -> None:
        self._pool = pool
        self._number = number
        self._keys: dict[str, Tensor] = {}

    def take(self, layer: str, tensors: Mapping[str, Tensor], nbytes: int) -> Reference | None:
        """Where the keys of a layer's rows are, or will be, of a segment of so many bytes; None: they stay in it."""
        pool, key = self._pool, tensors["key"]
        if layer in pool.given_up or not _is_eligible(tensors, nbytes):
            return None
        table, marks, bits = pool.table(layer, key), _marks(tensors), _wide(key)
        rows, first = table.find(marks), _first_of(marks)
        known = np.flatnonzero(rows >= 0)
        again = np.flatnonzero((rows < 0) & (first < np.arange(len(marks))))  # not the first in the segment
        is_found = np.zeros(len(marks), bool)
        if len(known):
            is_found[known] = pool.are_there(layer, table.refer(rows[known]), bits, known)
        is_found[again] = _are_equal(bits, again, lambda part: bits[part], first[again])
        new = np.flatnonzero(~is_found)
        pays = WORTH_FOUND * int(is_found.sum()) >= len(known) + len(again)
        if not (pays and pool.has_room(len(new) * key[0].nbytes)):
            pool.give_up(layer)
            return None
        if len(new):
            rows[new] = table.add(self._number, len(new)) + np.arange(len(new))
            rows[again] = np.where(is_found[again], rows[first[again]], rows[again])
            table.put(marks[new], rows[new])
            is_all = len(new) == len(key)
            self._keys[layer] = key if is_all else torch.from_numpy(as_integers(key).numpy()[new]).view(key.dtype)
        return table.refer(rows)

    def write(self, stamp: Mapping[str, str]) -> int:
        """Put what is new on disk; the bytes of it."""
        if not self._keys:
            return 0
        pool, tensors, rows = self._pool, dict[str, Tensor](), dict[str, dict[str, object]]()
        for layer, key in self._keys.items():
            rows[layer] = {"count": len(key)}
            packed = packed_in_place(key) if pool.sparse else None
            if packed is None:
                tensors[f"rows/{layer}/key"] = key
            else:
                rows[layer]["sparse"] = {"key": packed.width}
                tensors |= {f"rows/{layer}/key/{part}": getattr(packed, part) for part in SparseRows.FIELDS}
        rank = {"rank": pool.rank} if pool.rank else {}
        path = pool.layout.key_file(self._number, pool.rank)
        write_tensors(path, tensors, {"kind": "keys", "number": self._number, "rows": rows, **rank, **stamp}, pool.file)
        size = path.stat().st_size
        pool.nbytes += size
        return size


def _is_eligible(tensors: Mapping[str, Tensor], nbytes: int) -> bool:
    """Whether the keys are large, of a segment too, and of rows that can be told from others."""
    key = tensors["key"]
    is_large = is_worth_finding(len(key), key[0].nbytes, nbytes)
    return is_large and not bool((tensors["sample"].numpy() == NO_SAMPLE).any())


def _marks(tensors: Mapping[str, Tensor]) -> np.ndarray:
    """A number that rows of the same sample and position have in common, and hardly any others [n]."""
    sample, position = (tensors[name].numpy() for name in ("sample", "position"))
    factors = np.random.default_rng(0).integers(-(2**62), 2**62, 2) | 1
    return cast(np.ndarray, sample * factors[0] + position * factors[1])  # wraps around


def _wide(key: Tensor) -> np.ndarray:
    """Keys as integers, as large ones as their rows can be cut into."""
    bits = as_integers(key).numpy()
    return bits.view(np.int64) if bits[0].nbytes % 8 == 0 else bits


def _first_of(marks: np.ndarray) -> np.ndarray:
    """Of each row the first one with its mark [n]."""
    _, first, place = np.unique(marks, return_index=True, return_inverse=True)
    return cast(np.ndarray, first[place])


def _bits_at(keys: Tensor, rows: np.ndarray) -> np.ndarray:
    """Some rows of keys in a file as integers; torch would call threads in to choose them."""
    if isinstance(keys, SparseRows):
        return _wide(keys.index_select(0, torch.from_numpy(rows)))
    return cast(np.ndarray, _wide(keys)[rows])


def _are_equal(bits: np.ndarray, own: np.ndarray, look: Look, rows: np.ndarray) -> np.ndarray:
    """Which of the rows ``own`` [k] of keys as integers are the same as ``rows`` [k], which ``look`` gives."""
    found, order = np.empty(len(own), bool), np.argsort(rows, kind="stable")
    at_once = max(1, BLOCK_BYTES // bits[0].nbytes)
    for begin in range(0, len(own), at_once):
        part = order[begin : begin + at_once]
        found[part] = (bits[own[part]] == look(rows[part])).all(1)
    return found
