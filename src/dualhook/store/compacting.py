"""Writes the segments of a memory once more: fewer files, another dtype, without the rows that hardly count.

The new ones lie in a folder of their own. The manifest that names it is what a reader goes by: until it is replaced the
memory is the old one, from then on the new one.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from dualhook.errors import StoreError
from dualhook.packing import Scaled, Softmax, pack_scaled
from dualhook.records import LayerSpec, LedgerEntry, Mark, Rows
from dualhook.store.checksums import mismatches
from dualhook.store.cutting import tidy
from dualhook.store.direct import DirectFile
from dualhook.store.durable import settle
from dualhook.store.layout import Layout, Manifest, open_tensors, read_header, version_needed, write_tensors
from dualhook.store.ledger import entries
from dualhook.store.lock import WriterLock
from dualhook.store.pool import KeyPool
from dualhook.store.reader import Store
from dualhook.store.segment import SegmentBuilder
from dualhook.store.streams import Stored
from dualhook.store.writer import segment_header

__all__ = ["Saving", "compacted"]

Saved = tuple[Rows, Tensor | None, torch.dtype | None, Mapping[str, Tensor]]
"""Rows of a step, an index of those that are kept, their dtype, and the scales of what has been in 8 bits."""


@dataclass(frozen=True)
class Saving:
    """What is made of the rows: floating numbers as ``dtype``, without those below ``min_share``, ``sparse`` or whole.

    Rows that are in 8 bits stay as they are, to the last bit, unless another dtype is asked for. A row's share is the
    norm of its output gradient times that of its key, as part of the sum over all rows of the layer in the same step
    (and process).
    """

    dtype: torch.dtype | None = None
    min_share: float = 0.0
    sparse: bool | None = None
    """None: as the memory is."""

    def kept(self, spec: LayerSpec, rows: Rows) -> Tensor | None:
        """The rows [m] of one step that are kept; None: all."""
        if not self.min_share or not len(rows):
            return None
        key = rows.key.double().square().sum(1)
        key = key if spec.bias is None else key + 1
        size = rows.grads().double().norm(dim=1) * key.sqrt()
        kept = ~(size < self.min_share * size.sum())  # comparisons with NaN keep a row
        return None if bool(kept.all()) else kept.nonzero().squeeze(1)

    @property
    def in_eight_bits(self) -> bool:
        """Whether rows are put in 8 bits."""
        return self.dtype == torch.int8

    @property
    def keeps_eight_bits(self) -> bool:
        """Whether those stay so that are."""
        return self.dtype in (None, torch.int8)

    def converted(self, spec: LayerSpec, rows: Rows) -> tuple[Rows, torch.dtype | None]:
        """Rows in the form they get, and the dtype they are to be written in.

        Raises:
            StoreError: keys that are too large for it.
        """
        if self.dtype is None or isinstance(rows.packed, Softmax):  # a key's rounding would be in an exponent
            return rows, None
        if self.in_eight_bits:
            return (rows.unpacked(), rows.packed.scale.dtype) if isinstance(rows.packed, Scaled) else (rows, None)
        largest = float(rows.key.abs().max()) if rows.key.numel() else 0.0
        if torch.finfo(self.dtype).max < largest < torch.inf:
            name = str(self.dtype).removeprefix("torch.")
            raise StoreError(f"layer {spec.name!r} has keys up to {largest:.3g}, too large for {name}: try bfloat16")
        if rows.packed is None and self.dtype == torch.float16 != rows.output_grad.dtype:
            rows = replace(rows, output_grad=rows.output_grad[:, :0], packed=pack_scaled(rows.output_grad))
        return rows, self.dtype


@dataclass
class _Lane:
    """The new segments of one process, as they are written."""

    layout: Layout
    stamp: dict[str, str]
    rank: int
    segment_bytes: int
    saving: Saving
    builder: SegmentBuilder = field(default_factory=SegmentBuilder)
    number: int = 0
    needs: int = 1
    """The format version that the segments so far need."""
    file: DirectFile = field(default_factory=DirectFile)
    pool: KeyPool = field(init=False)

    def __post_init__(self) -> None:
        self.pool = KeyPool(self.layout, rank=self.rank, sparse=bool(self.saving.sparse))

    def add(self, step: int, rows: Mapping[str, Saved]) -> None:
        """Add the rows of a step; those that are kept in another way than the ones before begin a new segment."""
        if not all(self.builder.takes(layer, own, scales) for layer, (own, _, _, scales) in rows.items()):
            self.seal()
        for layer, own in rows.items():
            self.builder.append(layer, *own)
            self.builder.commit(layer, step)

    def enter(self, step: int, ledger: Sequence[LedgerEntry]) -> None:
        """Add the ledger of a step, which is then whole."""
        self.builder.add(step, ledger)
        if self.builder.nbytes >= self.segment_bytes:
            self.seal()

    def seal(self) -> None:
        """Write what is there as a segment."""
        if self.builder.steps is None:
            return
        narrow, seed = self.builder.layers if self.saving.in_eight_bits else (), f"{self.rank} {self.number}"
        keys = self.pool.segment(self.number)
        tensors, contents = self.builder.contents(
            sparse=bool(self.saving.sparse), eight_bit=narrow, seed=seed, keys=keys
        )
        keys.write(self.stamp)
        self.needs = max(self.needs, version_needed(contents["rows"], tensors))
        header = segment_header(contents, self.number, self.rank) | self.stamp
        write_tensors(self.layout.segment(self.number, self.rank), tensors, header, self.file)
        done, self.builder, self.number = self.builder, SegmentBuilder(), self.number + 1
        done.carry(self.builder)


def compacted(
    root: Path, saving: Saving, segment_bytes: int, on_bytes: Callable[[int], None] = lambda count: None
) -> None:
    """Write the segments of a memory anew; ``on_bytes`` hears of the bytes that were read.

    Raises:
        StoreError: no memory, a damaged one, or one that is being written; or the disk refused. It is as it was then.
    """
    with WriterLock() as lock:
        Manifest.read(Layout(root))  # raises where there is none
        lock.take(root)
        before = Store(root)
        tidy(before.layout)
        layout = Layout(root, before.layout.generation + 1)
        if saving.sparse is None:
            saving = replace(saving, sparse=before.is_sparse)
        try:
            layout.segment_folder.mkdir()
            settle(root)
            dropped, needs = _rewritten(before, layout, saving, segment_bytes, on_bytes)
            rows = {name: before.manifest.dropped.get(name, 0) + count for name, count in dropped.items()}
            dropped = {**before.manifest.dropped, **rows}
            replace(before.manifest, needs=needs, generation=layout.generation, dropped=dropped).write(layout)
        except BaseException as error:
            if Manifest.read(layout).generation != layout.generation:
                shutil.rmtree(layout.segment_folder, ignore_errors=True)
            if isinstance(error, OSError):
                raise StoreError(f"{root} could not be compacted and is as it was: {error}") from error
            raise
        tidy(layout)
        shutil.rmtree(layout.answers, ignore_errors=True)  # of another memory now


def _rewritten(
    store: Store, layout: Layout, saving: Saving, segment_bytes: int, on_bytes: Callable[[int], None]
) -> tuple[dict[str, int], int]:
    """Write the segments of all processes; how many rows of every layer are not in them, and the version they need."""
    needs, dropped = 1, dict[str, dict[int, int]]()  # rows by layer and step
    for path in sorted({path for segment in store.segments for path in segment.key_files}):
        _check(path, store)
        on_bytes(path.stat().st_size)
    for rank in reversed(range(store.manifest.ranks)):  # the first one's ledger has to know what all have dropped
        lane = _Lane(layout, store.manifest.stamp, rank, segment_bytes, saving)
        own = [segment for segment in store.segments if segment.rank == rank]
        for segment in reversed(own):
            for layer, rows in segment.header["rows"].items():
                lane.builder.start_at(layer, int(rows["first"]))
        for segment in own:
            _check(segment.path, store)
            ledger: dict[int, list[LedgerEntry]] = {}
            for entry in entries(open_tensors(segment.path), segment.header):
                ledger.setdefault(entry.step, []).append(entry)
            stored = [one for spec in store.manifest.layers if (one := segment.stored(spec)) is not None]
            for step in range(segment.first_step, segment.last_step + 1):
                lane.add(step, dict(_saved(stored, step, saving, dropped)))
                short = [spec for spec in store.manifest.layers if step in dropped.get(spec.name, ())]
                lane.enter(step, _marked(ledger.get(step, []), {name for spec in short for name in spec.parameters}))
            on_bytes(segment.path.stat().st_size)
        lane.seal()
        needs = max(needs, lane.needs)
    return {layer: sum(counts.values()) for layer, counts in dropped.items()}, needs


def _saved(
    stored: Sequence[Stored], step: int, saving: Saving, dropped: dict[str, dict[int, int]]
) -> Iterator[tuple[str, Saved]]:
    """What is kept of the rows of a step, layer by layer."""
    for one in stored:
        start, stop = one.between(step, step)
        if start == stop:
            continue
        rows = one.as_kept(start, stop)
        kept = saving.kept(one.spec, rows)
        if kept is not None:
            counts = dropped.setdefault(one.spec.name, {})
            counts[step] = counts.get(step, 0) + len(rows) - len(kept)
        converted, dtype = saving.converted(one.spec, rows)
        scales = one.scales(start, stop) if saving.keeps_eight_bits else {}
        yield one.spec.name, (converted, kept, dtype, scales)


def _marked(ledger: Sequence[LedgerEntry], short: Collection[str]) -> list[LedgerEntry]:
    """The ledger of a step whose rows do not explain the gradients of some parameters any more."""
    return [replace(e, mark=e.mark | Mark.UNEXPLAINED) if e.parameter in short else e for e in ledger]


def _check(path: Path, store: Store) -> None:
    """Damaged rows must not come out with checksums that are right."""
    file = open_tensors(path)
    if damaged := list(mismatches(file, read_header(path, file))):
        name = path.relative_to(store.layout.root).as_posix()
        raise StoreError(f"{store.layout.root} is damaged: {name} is not as it was written: {damaged[0]}")
