"""Writes a memory while training runs: one background thread, three builders in turn, nothing half visible."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dualhook.errors import StoreError
from dualhook.store.direct import DirectFile
from dualhook.store.lanes import Segment
from dualhook.store.layout import Layout, Manifest, open_tensors, read_header, version_needed, write_tensors
from dualhook.store.pool import KeyPool
from dualhook.store.segment import SegmentBuilder

__all__ = ["SEGMENT_BYTES", "Writer", "segment_header"]

SEGMENT_BYTES = 64 * 2**20
BUILDERS = 3  # one filling, one being written, one waiting: training waits rather than take more memory


class Writer:
    """Takes rows and ledger entries in :attr:`builder`; :meth:`seal` sends them to disk as one segment.

    ``after_write(writer)`` runs in the writing thread after every segment and may lower :attr:`bytes`. Where several
    processes record one memory, each has a writer; but for segments, only that of ``rank`` 0 writes anything. Rows of
    ``eight_bit`` layers are put in 8 bits; with ``sparse`` others that are mostly zeros leave them out. At most
    ``pool_bytes`` (None: as many as there are) go to keys that later segments refer to.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        segment_bytes: int = SEGMENT_BYTES,
        after_write: Callable[[Writer], None] | None = None,
        rank: int = 0,
        sparse: bool = False,
        eight_bit: Collection[str] = (),
        pool_bytes: int | None = None,
    ) -> None:
        self.layout = layout
        self.rank = rank
        self.sparse = sparse
        self.eight_bit = eight_bit
        self.pool = KeyPool(layout, rank=rank, sparse=sparse, most_bytes=pool_bytes)
        self.builder = SegmentBuilder()
        self.segment_bytes = segment_bytes
        self.bytes = 0
        """Bytes of the segments on disk, with the keys that they refer to."""
        self.folded = 0
        """The step up to which patterns are being made part of the origin, or have been."""
        self.slow_steps: dict[str, int] = {}
        """The step whose weights a parameter's first synchronisation goes back to: not to be folded away."""
        self.error: BaseException | None = None
        """What has gone wrong in the writing thread, or elsewhere so that nothing more is to be written."""
        self.last_step = 0
        """The newest step on disk."""
        self.before_seal: Callable[[], None] | None = None
        """What has to happen before committed rows go to disk; it may add to the ledger."""
        self.waited = 0.0
        """Seconds for which other threads than the writing one have waited for the disk."""
        self._after_write = after_write
        self._number = 0
        self._sealed_bytes = 0
        self._spared_bytes = 0  # of what was sealed, not written: keys that another layer holds, zeros, bits
        self._needs = 1  # the format version of what was written
        self._made = 1
        self._spare: queue.SimpleQueue[SegmentBuilder] = queue.SimpleQueue()
        self._sealed: queue.Queue[SegmentBuilder | None] = queue.Queue()
        self._origins = threading.Lock()
        self._origin_number = 0
        self._file = DirectFile()
        self._thread = threading.Thread(target=self._work, name="dualhook-writer", daemon=True)
        self._thread.start()

    @cached_property
    def _stamp(self) -> dict[str, str]:
        return Manifest.read(self.layout).stamp

    def go_on(self) -> None:
        """Continue what is in the directory: numbers of files and patterns go on from there."""
        own = [Segment(path, read_header(path, open_tensors(path))) for path in self.layout.segments(self.rank)]
        self._number = max((int(segment.header["number"]) + 1 for segment in own), default=0)
        self._origin_number = max((int(path.stem) + 1 for path in self.layout.origins()), default=0)
        self.last_step = max((segment.last_step for segment in own), default=0)
        self.folded = max((int(read_header(p, open_tensors(p))["folded"]) for p in self.layout.origins()), default=0)
        self.pool.go_on(own)
        self.bytes = self._sealed_bytes = self.pool.nbytes + sum(segment.path.stat().st_size for segment in own)
        for segment in own:
            for layer, rows in segment.header["rows"].items():
                self.builder.start_at(layer, int(rows["first"]) + int(rows["count"]))

    @property
    def recorded_bytes(self) -> int:
        """Bytes of all rows so far, on disk or on their way."""
        return self._sealed_bytes - self._spared_bytes + self.builder.nbytes

    @property
    def may_write_less(self) -> bool:
        """Whether rows may take less on disk than they do on their way there."""
        return self.sparse or bool(self.eight_bit) or self.builder.may_find_keys

    @property
    def full(self) -> bool:
        """Whether the builder has grown to a segment."""
        return self.builder.nbytes >= self.segment_bytes

    def seal(self) -> None:
        """Hand the committed rows to the writing thread; waits while all buffers are in use.

        After an error nothing more is written; :meth:`check` raises it.
        """
        if self.builder.steps is None or self.error is not None:
            return
        if self.before_seal is not None:
            self.before_seal()
        self._sealed_bytes += self.builder.nbytes
        done, self.builder = self.builder, self._next_builder()
        done.carry(self.builder)
        self._sealed.put(done)

    def flush(self) -> None:
        """Seal, and wait until everything sealed so far is on disk.

        Raises:
            StoreError: a segment could not be written.
        """
        self.seal()
        with self._waiting():
            self._sealed.join()
        self.check()

    def check(self) -> None:
        """Raise what went wrong in the writing thread.

        Raises:
            StoreError: a segment could not be written.
        """
        if self.error is not None:
            raise StoreError(f"{self.layout.root} could not be written: {self.error}") from self.error

    def write_origin(
        self,
        step: int,
        parts: Mapping[str, Mapping[str, Tensor]],
        dtypes: Mapping[str, torch.dtype],
        *,
        folded: int = 0,
        inexact: Mapping[str, int] | None = None,
    ) -> None:
        """Write where parameters begin after ``step``, at once: it must stand before the segment that needs it.

        ``parts`` holds the tensors of every parameter, ``dtypes`` what the model has it in. Up to step ``folded``
        they have swallowed all patterns, ``inexact`` of whose steps were marked so.
        """
        if self.rank:
            return
        header = {
            "kind": "origin",
            "step": step,
            "folded": folded,
            "parameters": {name: list(own) for name, own in parts.items()},
            "dtypes": {name: str(dtype).removeprefix("torch.") for name, dtype in dtypes.items()},
            "inexact": dict(inexact or {}),
        }
        with self._origins:
            path = self.layout.origin(self._origin_number)
            self._origin_number += 1
            with self._waiting():
                write_tensors(path, _named(parts), header | {"number": int(path.stem)} | self._stamp)

    def write_snapshot(self, step: int, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Write tensors of the optimiser's state of some parameters as they are after ``step``."""
        if self.rank:
            return
        header = {"kind": "snapshot", "step": step, "parameters": {name: list(own) for name, own in parts.items()}}
        with self._waiting():
            write_tensors(self.layout.snapshot(step), _named(parts), header | self._stamp)

    def write_latest(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Write the weights after the last step."""
        if not self.rank:
            with self._waiting():
                write_tensors(self.layout.latest, tensors, {"kind": "latest", "step": step} | self._stamp)

    def close(self, *, discard: bool = False) -> None:
        """Write what is left (unless it is to be discarded) and end the thread.

        Raises:
            StoreError: a segment could not be written.
        """
        try:
            if not discard:
                self.seal()
        finally:
            self._sealed.put(None)
            if threading.current_thread() is not self._thread:
                self._thread.join()
            else:  # a recorder that nobody holds, collected in the middle of its own writing
                self._work()
        if not discard:
            self.check()

    def _next_builder(self) -> SegmentBuilder:
        if self._spare.empty() and self._made < BUILDERS:
            self._made += 1
            return SegmentBuilder()
        with self._waiting():
            return self._spare.get()

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            if threading.current_thread() is not self._thread:
                self.waited += time.perf_counter() - began

    def _work(self) -> None:
        while (builder := self._sealed.get()) is not None:
            try:
                if self.error is None:
                    self._write(builder)
            except BaseException as error:
                self.error = error  # raised in the training thread, by check()
            builder.reset()
            self._spare.put(builder)
            self._sealed.task_done()
        self._sealed.task_done()

    def _write(self, builder: SegmentBuilder) -> None:
        seed, keys = f"{self.rank} {self._number}", self.pool.segment(self._number)
        tensors, header = builder.contents(sparse=self.sparse, eight_bit=self.eight_bit, seed=seed, keys=keys)
        brought = keys.write(self._stamp)  # first: the segment refers to it
        self._spared_bytes += builder.nbytes - brought - sum(values.nbytes for values in tensors.values())
        self._tell_version(version_needed(header["rows"], tensors))
        path = self.layout.segment(self._number, self.rank)
        write_tensors(path, tensors, segment_header(header, self._number, self.rank) | self._stamp, self._file)
        self._number += 1
        self.last_step = header["steps"][1]
        self.bytes += brought + path.stat().st_size
        if self._after_write is not None:
            self._after_write(self)

    def _tell_version(self, needs: int) -> None:
        """Before the first segment that older readers would misread, the manifest says so."""
        self._needs = max(needs, self._needs)
        if self._needs > 1:  # each time: of several processes another may have read the manifest before and written it
            manifest = Manifest.read(self.layout)
            if self._needs > manifest.needs:
                replace(manifest, needs=self._needs).write(self.layout, rank=self.rank)


def segment_header(contents: Mapping[str, Any], number: int, rank: int) -> dict[str, Any]:
    """The header of a segment from that of what it holds."""
    return {"kind": "segment", "number": number, **contents} | ({"rank": rank} if rank else {})


def _named(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of parameters as ``<parameter>//<part>``, ready for a file."""
    return {
        f"{name}//{part}": value.detach().to("cpu").contiguous()
        for name, own in parts.items()
        for part, value in own.items()
    }
