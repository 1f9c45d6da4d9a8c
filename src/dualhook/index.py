"""The keys of a layer's patterns in an index: those that a query attends to most, without going through all of them.

The largest inner products with a query are the nearest keys, once every key has one more component that makes all of
them equally long (Bachrach et al., RecSys 2014). FAISS sorts keys into lists by the nearest of many centres and keeps
them in 16 bits; a question looks into a few of the lists and ranks what it finds there by the recorded rows themselves.

Letters: ``n`` pattern, ``q`` query, ``i`` input, ``c`` candidate.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dualhook.errors import DualHookError, LayerError, StoreError
from dualhook.query import LayerQuery
from dualhook.records import LayerSpec, Rows
from dualhook.store import PARTIAL, Span, Store, put, settle, write_bytes

__all__ = ["KeyIndex", "indexed"]

LISTS = 2.0  # times the square root of the number of keys
LEARNED_FROM, LEAST_LEARNED_FROM = 44, 39  # keys a list that centres are learned from, and what FAISS asks for
BLOCK_ROWS = 16384
CANDIDATES = 8  # times as many patterns as are asked for are ranked by their rows …
LEAST_CANDIDATES = 64  # … and at least so many
TRIED = 64  # recorded keys that are questions while an index is made …
FOUND = 10  # … for so many patterns each, …
RECALL = 0.98  # … of which this share has to be found; new inputs find somewhat less


@dataclass(frozen=True)
class Description:
    """What an index on disk is of, and how it was made."""

    layer: str
    memory: str
    """What tells the memory, and its state, from others."""
    last_step: int
    patterns: int
    lists: int
    probes: int
    recall: float


class KeyIndex:
    """An index of one layer's keys, see :meth:`~dualhook.DualMemory.index`; answers it takes part in are approximate.

    ``probes`` is how many of its ``lists`` a question looks into: with more it finds more, and takes longer.
    ``recall`` is the share of the ten largest attention weights that the first ``probes`` held, for some recorded keys
    as queries (which had to find others than themselves).
    """

    def __init__(self, store: Store, about: Description, index: Any) -> None:
        self._memory, self._last_step = about.memory, about.last_step
        self._index = index
        self._pieces: list[Span] = list(store.pieces(about.layer, last_step=about.last_step))
        self._begins = torch.tensor([piece.first for piece in self._pieces])
        self.layer = about.layer
        """The layer whose keys it holds."""
        self.patterns = about.patterns
        """How many patterns it holds: those of all steps, but for keys whose length is no number."""
        self.lists = about.lists
        self.probes = about.probes
        self.recall = about.recall

    def __repr__(self) -> str:
        return (
            f"KeyIndex of {self.patterns:,} patterns of {self.layer!r}: looks into {self.probes} of {self.lists} "
            f"lists, recall {self.recall:.3f} for recorded keys"
        )

    def check(self, asked: LayerQuery) -> None:
        """Raises: DualHookError: what is asked is not what the index holds."""
        if asked.name != self.layer:
            raise LayerError(
                f"an index of {self.layer!r} knows nothing of {asked.name!r}: ask for layers={self.layer!r}"
            )
        if not asked.memory.startswith(self._memory):
            raise StoreError(f"this index of {self.layer!r} is of another memory, or another state of it: make it anew")
        if asked.made_of.horizon != self._last_step:
            raise DualHookError(
                f"step {asked.made_of.horizon}: an index holds the patterns of all {self._last_step} steps; ask "
                "about the last one, or without an index"
            )

    def nearest(self, query: Tensor, k: int) -> tuple[Tensor, Rows]:
        """Patterns among which the ``k`` largest attention weights of queries [q, i] most probably are.

        Their numbers [c], ascending, and their rows.
        """
        numbers = self.candidates(query, k)
        found = torch.unique(numbers[numbers >= 0])
        return found, self.rows(found)

    def candidates(self, query: Tensor, k: int) -> Tensor:
        """The numbers of each query's candidates [q, c], -1 where there are no more.

        Raises:
            DualHookError: queries that are no numbers, or ``probes`` below 1.
        """
        if self.probes < 1:
            raise DualHookError(f"probes={self.probes!r}: expected 1 to {self.lists}")
        if not bool(query.isfinite().all()):
            raise DualHookError(f"a query of {self.layer!r} holds NaN or infinity: nothing is nearest to it")
        query = query.detach().cpu().double()
        shorter = query / query.abs().amax(1, keepdim=True).clamp(min=torch.finfo(query.dtype).tiny)
        longer = F.pad(F.normalize(shorter, dim=1), (0, 1)).float().numpy()
        count, probes = min(self.patterns, max(LEAST_CANDIDATES, CANDIDATES * k)), min(self.probes, self.lists)
        while True:
            self._index.nprobe = probes
            found = torch.from_numpy(self._index.search(longer, count)[1])
            if probes == self.lists or int((found >= 0).sum(1).min()) >= min(k, self.patterns):
                return found
            probes = min(2 * probes, self.lists)

    def rows(self, numbers: Tensor) -> Rows:
        """The rows of some patterns [c], ascending."""
        place = torch.searchsorted(self._begins, numbers, right=True) - 1
        pieces, counts = torch.unique_consecutive(place, return_counts=True)
        parts = zip(pieces.tolist(), torch.split(numbers, counts.tolist()), strict=True)
        rows: list[Rows] = [self._pieces[piece].at(own - self._pieces[piece].first) for piece, own in parts]
        return rows[0].joined(*rows[1:])


def indexed(store: Store, spec: LayerSpec, folder: Path, *, rebuild: bool) -> KeyIndex:
    """The index of a layer in a folder; made if there is none, or if it is to be made anew.

    Raises:
        LayerError: keys of this layer cannot be indexed.
        StoreError: the index that is there is of another state of the memory, or damaged.
        DualHookError: FAISS is not installed.
    """
    faiss = _faiss()
    if spec.kind not in ("linear", "transposed") or len(store.uses(spec.name)) > 1:
        raise LayerError(f"layer {spec.name!r} cannot be indexed: expected a linear layer with a weight of its own")
    if not store.count(spec.name):
        raise LayerError(f"layer {spec.name!r} has no patterns to index")
    path = folder / f"{quote(spec.name, safe='')}.index"
    about, again = path.with_suffix(".json"), f"make it anew with memory.index({spec.name!r}, rebuild=True)"
    if rebuild or not about.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        about.unlink(missing_ok=True)
        made = _make(faiss, store, spec, path)
        put(about, lambda partial: write_bytes(partial, json.dumps(asdict(made), indent=1).encode()), _partial(about))
    try:
        made = Description(**json.loads(about.read_text()))
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
        if (index.ntotal, index.nlist) != (made.patterns, made.lists):
            raise ValueError("an index of something else")
    except (ValueError, TypeError, RuntimeError) as error:
        raise StoreError(f"{path} or {about.name} beside it is damaged: {again}") from error
    if made.memory != store.fingerprint:
        raise StoreError(
            f"{path} is of another state of the memory ({made.patterns:,} patterns up to step {made.last_step}, now "
            f"{store.count(spec.name):,} up to {store.last_step}): {again}"
        )
    return KeyIndex(store, made, index)


def _make(faiss: Any, store: Store, spec: LayerSpec, path: Path) -> Description:
    """Make an index under ``path``, and see into how many of its lists a question has to look."""
    index, tried = _filled(faiss, store, spec)
    made = Description(spec.name, store.fingerprint, store.last_step, index.ntotal, index.nlist, 1, 1.0)

    def write(partial: Path) -> None:
        faiss.write_index(index, str(partial))
        settle(partial)

    try:
        put(path, write, _partial(path))
    except (RuntimeError, OSError) as error:
        raise StoreError(f"{path} could not be written: {error}") from error
    index.reset()
    found = KeyIndex(store, made, faiss.read_index(str(path), faiss.IO_FLAG_MMAP))
    while (recall := tried.recall(found)) < RECALL and found.probes < found.lists:
        found.probes = min(2 * found.probes, found.lists)
    return replace(made, probes=found.probes, recall=recall)


@dataclass
class Tried:
    """Recorded keys [q, i] as queries, with their ``number`` [q] and their largest attention weights to others."""

    query: Tensor
    number: Tensor
    largest: Tensor
    """The weights [q, at most FOUND], as far as patterns have been seen."""

    def see(self, key: Tensor, number: Tensor) -> None:
        """Take in the keys [n, i] of patterns with a ``number`` [n]."""
        own = (self.query @ key.double().T).masked_fill_(self.number[:, None] == number, -torch.inf)
        together = torch.cat([self.largest, own], 1)
        self.largest = together.topk(min(FOUND, together.shape[1]), dim=1).values

    def recall(self, index: KeyIndex) -> float:
        """The share of the largest that an index finds; equally large ones are as good."""
        found = index.candidates(self.query, FOUND)
        numbers = torch.unique(found[found >= 0])
        own = self.query @ index.rows(numbers).key.double().T
        mine = torch.zeros(len(found), len(numbers) + 1, dtype=torch.bool)
        mine.scatter_(1, torch.where(found < 0, len(numbers), torch.searchsorted(numbers, found)), True)
        own[~mine[:, :-1] | (self.number[:, None] == numbers)] = -torch.inf
        least = self.largest[:, -1:]
        rounding = 1e-12 * self.query.square().sum(1, keepdim=True)
        hits = (own >= least - rounding).sum(1).clamp(max=self.largest.shape[1])
        return float(hits.sum() / self.largest.numel())


def _filled(faiss: Any, store: Store, spec: LayerSpec) -> tuple[Any, Tried]:
    """An index of all keys whose length is a number, and what to try it with; goes through the patterns twice."""
    count, random = store.count(spec.name), np.random.default_rng(0)
    lists, longest, seen = int(LISTS * math.sqrt(count)), 0.0, []
    for key, number in _keys(store, spec):
        longest = max(longest, float(key.double().norm(dim=1).max()))
        chosen = torch.from_numpy(random.random(len(key)) * count < max(LEARNED_FROM * lists, TRIED))
        seen.append((key[chosen], number[chosen]))
    learned, numbers = (torch.cat(parts) for parts in zip(*seen, strict=True)) if seen else (torch.empty(0),) * 2
    if not len(learned):
        raise LayerError(f"layer {spec.name!r} has no key whose length is a number: there is nothing to index")
    lists = max(1, min(lists, len(learned) // LEAST_LEARNED_FROM))
    index = faiss.index_factory(spec.in_features + 1, f"IVF{lists},SQfp16", faiss.METRIC_L2)
    index.cp.min_points_per_centroid = 1  # FAISS would speak of it where there are few keys at all
    index.train(_lengthened(learned, longest))
    some = torch.from_numpy(random.permutation(len(learned))[:TRIED])
    tried = Tried(learned[some].double(), numbers[some], torch.zeros(len(some), 0, dtype=torch.float64))
    del learned, seen
    for key, number in _keys(store, spec):
        index.add_with_ids(_lengthened(key, longest), number.numpy())
        tried.see(key, number)
    return index, tried


def _keys(store: Store, spec: LayerSpec) -> Iterator[tuple[Tensor, Tensor]]:
    """The keys [n, i] whose length is a number, of patterns with a number [n], in blocks."""
    for rows in store.blocks(spec.name, last_step=store.last_step, block_rows=BLOCK_ROWS):
        there = rows.key.double().norm(dim=1).isfinite()
        if bool(there.any()):
            yield rows.key[there], torch.arange(rows.first, rows.first + len(rows))[there]


def _lengthened(key: Tensor, longest: float) -> np.ndarray:
    """Keys [n, i + 1] with one more component that makes them as long as the ``longest``, and divided by that length.

    In 8 bits the additional component, of many keys the largest one, would be too coarse.
    """
    shorter = key.double() / (longest or 1.0)
    more = (1.0 - shorter.square().sum(1)).clamp(min=0).sqrt()
    return torch.cat([shorter, more[:, None]], 1).float().numpy()


def _partial(path: Path) -> Path:
    """Where this process writes a file: another one may be making the same."""
    return path.with_suffix(f".{os.getpid()}{PARTIAL}")


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise DualHookError("an index needs FAISS: pip install 'dualhook[faiss]'") from error
    return faiss
