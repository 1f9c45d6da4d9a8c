"""Keys that several layers have read are stored once: queries, keys and values read the same input, gates and ups too.

Found where a segment is written, bit by bit, off the training thread: whatever made the keys of two layers equal, or
different, they come back as they were. A layer may lack rows that the other has: those without output gradient. numpy
finds them: torch would call threads in for it, and training would wait for these.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch
from torch import Tensor

from dualhook.store.direct import as_integers

__all__ = ["KEY_ROW", "SharedKey", "shared_keys"]

KEY_ROW = "key_row"  # the tensor that says which rows of the holder's keys a layer's are
WORTH_BYTES = 16  # of a key, from where on an index is clearly smaller
LOOKED_AT = 16  # numbers of a key that tell rows apart, before all are compared
PLACE = ("step", "sample", "position")  # of a row, by which it is told from others too
BLOCK_BYTES = 2**22  # of keys, compared at a time


@dataclass(frozen=True)
class SharedKey:
    """The keys of a layer are those that ``holder`` stores: the ``rows`` [n] of them, int32; None: the very same."""

    holder: str
    rows: Tensor | None


@dataclass(frozen=True)
class _Marked:
    """A layer's keys as integers [n, i], and of each row a number that equal rows of one place have in common [n]."""

    name: str
    bits: np.ndarray
    marks: np.ndarray

    @cached_property
    def _order(self) -> np.ndarray:
        """The rows by ascending marks."""
        return np.argsort(self.marks, kind="stable")

    def hold(self, other: _Marked) -> SharedKey | None:
        """The other layer's keys as some of these; None if it has one that is not here."""
        if np.array_equal(self.marks, other.marks):
            return SharedKey(self.name, None) if self._are_keys_of(other) else None
        if not (self.marks == other.marks[0]).any():  # nearly always, where layers read something else
            return None
        place = np.searchsorted(self.marks, other.marks, sorter=self._order)
        rows = self._order[np.minimum(place, len(self.marks) - 1)]
        return SharedKey(self.name, torch.from_numpy(rows.astype(np.int32))) if self._are_keys_of(other, rows) else None

    def _are_keys_of(self, other: _Marked, rows: np.ndarray | None = None) -> bool:
        """Whether these keys, or those of some ``rows`` [n], are the other's."""
        at_once = max(1, BLOCK_BYTES // self.bits[0].nbytes)
        parts = (slice(start, start + at_once) for start in range(0, len(other.bits), at_once))
        return all(np.array_equal(self.bits[part if rows is None else rows[part]], other.bits[part]) for part in parts)


def shared_keys(layers: Mapping[str, Mapping[str, Tensor]], apart: Collection[str] = ()) -> dict[str, SharedKey]:
    """Of layers with their stored tensors those whose keys another one holds, which keeps its own.

    Those that are kept ``apart``, since they will be written in another way, share theirs among themselves.
    """
    alike: dict[tuple[int, torch.dtype, bool], list[str]] = {}
    for name, tensors in layers.items():
        key = tensors["key"]
        if len(key) and key.shape[1] * key.dtype.itemsize >= WORTH_BYTES:
            alike.setdefault((key.shape[1], key.dtype, name in apart), []).append(name)
    found: dict[str, SharedKey] = {}
    for names in alike.values():
        if len(names) > 1:
            found |= dict(_within({name: layers[name] for name in names}))
    return found


def _within(layers: Mapping[str, Mapping[str, Tensor]]) -> Iterator[tuple[str, SharedKey]]:
    """The same among layers with keys of one width and dtype; those with most rows hold them for others."""
    holders: list[_Marked] = []
    for name in sorted(layers, key=lambda name: -len(layers[name]["key"])):
        own = _marked(name, layers[name])
        found = next((shared for holder in reversed(holders) if (shared := holder.hold(own)) is not None), None)
        if found is None:
            holders.append(own)
        else:
            yield name, found


def _marked(name: str, tensors: Mapping[str, Tensor]) -> _Marked:
    bits = as_integers(tensors["key"]).numpy()
    middle = max(0, bits.shape[1] - LOOKED_AT) // 2  # side by side: of each row a cache line or two
    looked_at = bits[:, middle : middle + LOOKED_AT]
    factors = _factors(len(PLACE) + looked_at.shape[1])
    marks = np.einsum("nk,k->n", looked_at, factors[len(PLACE) :])  # wraps around, as below
    for one, factor in zip(PLACE, factors, strict=False):
        marks += tensors[one].numpy() * factor
    return _Marked(name, bits, marks)


@cache
def _factors(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(-(2**62), 2**62, count)
