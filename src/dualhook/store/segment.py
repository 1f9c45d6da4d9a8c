"""A segment in the making: rows go straight from training into the buffers that will be written.

Per layer the buffer holds committed rows, then pending ones (accumulated into a gradient that no step has used yet).
Buffers are kept and filled again after writing, since first-touch of fresh memory costs more than the copy.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dualhook.packing import Packed, Softmax, parts_of
from dualhook.records import FIELDS, OPTIONAL, LedgerEntry, Rows, absent
from dualhook.store.direct import empty_in_blocks
from dualhook.store.eightbit import EIGHT_BIT_FIELDS, EightBitRows, in_eight_bits, scale_of
from dualhook.store.keyfiles import KEY_FILES
from dualhook.store.ledger import pack
from dualhook.store.packed import StepWeights, form_of
from dualhook.store.pool import NewKeys, is_worth_finding
from dualhook.store.sharing import KEY_ROW, shared_keys
from dualhook.store.sparse import SPARSE_FIELDS, SparseRows, packed_in_place
from dualhook.store.streams import rows_of

__all__ = ["SegmentBuilder"]

ENTRY_BYTES = 64  # of a ledger entry, about


class LayerBuffer:
    """The rows of one layer, in growing tensors."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.weights = StepWeights()
        self.committed = 0
        self.filled = 0
        self.first = 0  # pattern number of row 0
        self._row_bytes: int | None = 0  # None: to be counted again
        self.fixed_keys = False  # whether no trained weight has had a part in the keys of any row
        self._like: Packed | None = None  # rows that are kept as those here are
        self._narrow: frozenset[tuple[str, torch.dtype]] = frozenset()  # what of them has been in 8 bits, and its dtype

    @property
    def is_packed(self) -> bool:
        """Whether output gradients are kept in another way than whole."""
        return self._like is not None

    @property
    def row_bytes(self) -> int:
        """Bytes of one row in all tensors."""
        if self._row_bytes is None:
            self._row_bytes = sum(values[0].nbytes for values in self.tensors.values() if len(values))
        return self._row_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of what is committed."""
        return self.committed * self.row_bytes + self.weights.nbytes

    def takes(self, rows: Rows, scales: Mapping[str, Tensor] | None = None) -> bool:
        """Whether rows can follow those that are here: packed in one way or not, the same of them in 8 bits before."""
        alike = type(rows.packed) is type(self._like) and _narrow_before(rows, scales) == self._narrow
        return not self.filled or alike

    def append(
        self, rows: Rows, kept: Tensor | None, dtype: torch.dtype | None, scales: Mapping[str, Tensor] | None = None
    ) -> None:
        """Copy rows, or those of an index ``kept`` [m], behind the pending ones; floating numbers as ``dtype``.

        In one go: fresh memory for a copy of the copy would cost more than both. ``scales`` are those of the tensors
        that have been in 8 bits.
        """
        assert self.takes(rows, scales)
        self._narrow = _narrow_before(rows, scales)
        if not self.filled and type(rows.packed) is not type(self._like):
            self.tensors, self._row_bytes = {}, None
        self._like = rows.packed
        self.fixed_keys = rows.fixed_keys and (self.fixed_keys or not self.filled)
        count = len(rows) if kept is None else len(kept)
        if isinstance(rows.packed, Softmax) and count:
            self.weights.take(rows.packed.weight)
        start, self.filled = self.filled, self.filled + count
        fields = _fields(rows) | {scale_of(name): values for name, values in (scales or {}).items()}
        for name, values in fields.items():
            as_dtype = dtype or values.dtype if name in ("key", "output_grad") else values.dtype
            room = self._room(name, values, start, as_dtype)[start : self.filled]
            if room.shape[1:] != values.shape[1:]:  # a smaller map: its extent says how much of the row it takes
                room[:, values.shape[1] :].zero_()
                room = room[:, : values.shape[1]]
            if kept is not None and room.dtype == values.dtype and room.is_contiguous():
                torch.index_select(values, 0, kept, out=room)
            else:
                room.copy_(values if kept is None else values.index_select(0, kept))
        for name in self.tensors.keys() - fields.keys():  # a column that this batch does not have
            self._room(name, self.tensors[name], start, self.tensors[name].dtype)[start : self.filled].fill_(
                absent(self.tensors[name])
            )

    def view(self, start: int, stop: int) -> Rows:
        """Rows ``start`` to ``stop`` without a copy."""
        cut = {name: values[start:stop] for name, values in self.tensors.items()}
        rows, like = replace(rows_of(cut, self.first + start), fixed_keys=self.fixed_keys), self._like
        if like is None:
            return rows
        fields: dict[str, Any] = {field: cut[f"{like.name}/{field}"] for field in like.fields}
        packed = replace(like, **fields)
        if isinstance(packed, Softmax):
            step = None if start >= self.committed else int(cut["step"][0])
            packed = replace(packed, weight=self.weights.of(step))
        return replace(rows, packed=packed)

    def _room(self, name: str, like: Tensor, start: int, dtype: torch.dtype) -> Tensor:
        """The named tensor, grown to hold ``filled`` rows and widened to hold ``like``'s as ``dtype`` without loss."""
        held = self.tensors.get(name)
        if held is None:
            held = torch.empty((0, *like.shape[1:]), dtype=dtype)
            if start:  # a column that appears later: the rows before had none
                held = torch.full((start, *like.shape[1:]), absent(like), dtype=dtype)
        dtype = torch.promote_types(held.dtype, dtype)
        wider = like.dim() == 2 and like.shape[1] > held.shape[1]
        if held.shape[0] < self.filled or held.dtype != dtype or wider:
            rows = self.filled if self.filled <= held.shape[0] else max(self.filled, int(1.5 * held.shape[0]))
            grown = empty_in_blocks((rows, *(like if wider else held).shape[1:]), dtype)
            if wider:
                grown[:start, held.shape[1] :].zero_()
            (grown[:start, : held.shape[1]] if wider else grown[:start]).copy_(held[:start])
            held = grown
        if self.tensors.get(name) is not held:
            self.tensors[name], self._row_bytes = held, None
        return held


class SegmentBuilder:
    """Collects the rows and the ledger of consecutive steps."""

    def __init__(self) -> None:
        self.layers: dict[str, LayerBuffer] = {}
        self.ledger: list[LedgerEntry] = []
        self.steps: tuple[int, int] | None = None  # the first and the last one
        self.expected = 0
        """How many ledger entries of these steps are still to come."""

    def append(
        self,
        layer: str,
        rows: Rows,
        kept: Tensor | None = None,
        dtype: torch.dtype | None = None,
        scales: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Add pending rows, or those of an index ``kept`` [m], with keys and output gradients as ``dtype``.

        ``scales`` [n] of those tensors that have been in 8 bits: they will be again, and the same.
        """
        self.layers.setdefault(layer, LayerBuffer()).append(rows, kept, dtype, scales)

    def is_open(self, layer: str) -> bool:
        """Whether there are no rows of the layer yet."""
        return layer not in self.layers or not self.layers[layer].filled

    def takes(self, layer: str, rows: Rows, scales: Mapping[str, Tensor] | None = None) -> bool:
        """Whether rows of the layer can follow those that are here."""
        return layer not in self.layers or self.layers[layer].takes(rows, scales)

    def start_at(self, layer: str, number: int) -> None:
        """The layer's next row is the pattern with this number."""
        self.layers.setdefault(layer, LayerBuffer()).first = number

    def rewind(self, layer: str) -> None:
        """Forget the layer's pending rows."""
        if layer in self.layers:
            self.layers[layer].filled = self.layers[layer].committed
            self.layers[layer].weights.rewind()

    def holds(self, layer: str) -> bool:
        """Whether the layer has pending rows."""
        buffer = self.layers.get(layer)
        return buffer is not None and buffer.filled > buffer.committed

    def is_plain(self, layer: str) -> bool:
        """Whether none of the layer's rows are packed."""
        return self.is_open(layer) or not self.layers[layer].is_packed

    def pending(self, layer: str) -> Rows | None:
        """The layer's pending rows, or None."""
        buffer = self.layers.get(layer)
        return buffer.view(buffer.committed, buffer.filled) if buffer is not None and self.holds(layer) else None

    def of_step(self, layer: str, step: int) -> Rows | None:
        """The layer's rows that ``step`` has committed, or None."""
        buffer = self.layers.get(layer)
        if buffer is None or not buffer.committed:
            return None
        start, stop = np.searchsorted(buffer.tensors["step"][: buffer.committed].numpy(), [step, step + 1]).tolist()
        return None if start == stop else buffer.view(start, stop)

    def of_steps(self, layer: str, steps: Sequence[int]) -> tuple[Rows, list[tuple[int, int]]]:
        """The layer's committed rows from the first to the last of ``steps``, and where in them those of each lie."""
        buffer = self.layers[layer]
        committed = buffer.tensors["step"][: buffer.committed].numpy()
        starts, stops = np.searchsorted(committed, steps, "left"), np.searchsorted(committed, steps, "right")
        rows = buffer.view(int(starts[0]), int(stops[-1]))
        return rows, [(int(a), int(b)) for a, b in zip(starts - starts[0], stops - starts[0], strict=True)]

    def commit(self, layer: str, step: int) -> None:
        """Turn the layer's pending rows into patterns of ``step``."""
        buffer = self.layers.get(layer)
        if buffer is not None and buffer.filled > buffer.committed:
            buffer.tensors["step"][buffer.committed : buffer.filled].fill_(step)
            buffer.committed = buffer.filled
            buffer.weights.commit(step)

    def withdraw(self, step: int) -> None:
        """Forget everything after a step, which did not end."""
        self.steps = None if self.steps is None or self.steps[0] > step else (self.steps[0], step)
        self.ledger = [entry for entry in self.ledger if entry.step <= step]
        for buffer in self.layers.values():
            if buffer.committed:
                steps = buffer.tensors["step"][: buffer.committed]
                buffer.committed = buffer.filled = int(torch.searchsorted(steps, step, right=True))
                buffer.weights.withdraw(step)

    def add(self, step: int, entries: Iterable[LedgerEntry]) -> None:
        """Add the ledger entries of a step; it may have none, where all that it stepped on was frozen."""
        self.steps = (step, step) if self.steps is None else (min(step, self.steps[0]), max(step, self.steps[1]))
        self.ledger.extend(entries)

    @property
    def nbytes(self) -> int:
        """Bytes of the committed rows and the ledger."""
        return sum(buffer.nbytes for buffer in self.layers.values()) + ENTRY_BYTES * (len(self.ledger) + self.expected)

    @property
    def may_find_keys(self) -> bool:
        """Whether keys of some layer are such that later epochs may find them again."""
        nbytes, own = self.nbytes, [buffer for buffer in self.layers.values() if buffer.committed and buffer.fixed_keys]
        return any(is_worth_finding(one.committed, one.tensors["key"][0].nbytes, nbytes) for one in own)

    @property
    def recorded_rows(self) -> int:
        """The committed rows, and those of the segments before."""
        return sum(buffer.first + buffer.committed for buffer in self.layers.values())

    @property
    def pending_bytes(self) -> int:
        """Bytes of the rows that no step has used yet."""
        return sum((buffer.filled - buffer.committed) * buffer.row_bytes for buffer in self.layers.values())

    def carry(self, successor: SegmentBuilder) -> None:
        """Hand the pending rows and the pattern numbers on to the builder of the next segment."""
        for name, buffer in self.layers.items():
            heir = successor.layers.setdefault(name, LayerBuffer())
            heir.first = buffer.first + buffer.committed
            if buffer.filled > buffer.committed:
                heir.append(buffer.view(buffer.committed, buffer.filled), None, None)

    def reset(self) -> None:
        """Empty the builder; its memory stays."""
        self.ledger = []
        self.expected = 0
        self.steps = None
        for buffer in self.layers.values():
            buffer.committed = buffer.filled = 0
            buffer.weights.reset()

    def contents(
        self, *, sparse: bool = False, eight_bit: Collection[str] = (), seed: str = "", keys: NewKeys | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The committed part as named tensors and the header that goes with them.

        Rows of ``eight_bit`` layers are put in 8 bits, rounded by ``seed``. With ``sparse`` others that are mostly
        zeros leave them out; the builder's own are used up by that. Keys that no trained weight has made go to
        ``keys``, as far as these take them.
        """
        tensors, header = pack(self.ledger)
        written = {name: buffer for name, buffer in self.layers.items() if buffer.committed}
        rows = {
            name: {part: values[: buffer.committed] for part, values in buffer.tensors.items()}
            for name, buffer in written.items()
        }
        counts: dict[str, dict[str, Any]] = {
            name: {"first": buffer.first, "count": buffer.committed} for name, buffer in written.items()
        }
        narrow = {name: _to_narrow(own, asked=name in eight_bit) for name, own in rows.items()}
        apart = [name for name, own in narrow.items() if "key" in own]
        for name, shared in shared_keys(rows, apart).items():
            del rows[name]["key"]
            counts[name]["key_of"] = shared.holder
            if shared.rows is not None:
                rows[name][KEY_ROW] = shared.rows
        if keys is not None:
            fixed = [name for name, buffer in written.items() if buffer.fixed_keys and name not in apart]
            _refer(keys, fixed, rows, counts)
        for name, own in rows.items():
            if dtypes := _narrowed(own, narrow[name], f"{seed} {name}"):
                counts[name]["eight_bit"] = dtypes
            if sparse and (widths := _without_zeros(own)):
                counts[name]["sparse"] = widths
        for own_header in counts.values():  # complete by itself: readers do not look at the holder's
            of_holder = counts.get(own_header.get("key_of", ""), {})
            for form in ("eight_bit", "sparse"):
                if "key" in of_holder.get(form, {}):
                    own_header[form] = own_header.get(form, {}) | {"key": of_holder[form]["key"]}
        for name, buffer in written.items():
            rows[name] |= buffer.weights.tensors()
        tensors |= {f"rows/{name}/{part}": values for name, own in rows.items() for part, values in own.items()}
        return tensors, {"steps": self.steps, **header, "rows": counts}


def _refer(
    keys: NewKeys,
    fixed: Collection[str],
    rows: Mapping[str, dict[str, Tensor]],
    counts: Mapping[str, dict[str, Any]],
) -> None:
    """Put in the place of the keys of some layers, and of those that share them, where else these are."""
    nbytes = sum(values.nbytes for own in rows.values() for values in own.values())
    for name in (name for name in fixed if "key" in rows[name]):
        found = keys.take(name, rows[name], nbytes)
        if found is None:
            continue
        del rows[name]["key"]
        for sharer in (other for other, own in counts.items() if own.get("key_of") == name):
            counts[sharer][KEY_FILES] = found.files
            if KEY_ROW in rows[sharer]:  # else all of the holder's, in their order
                rows[sharer][KEY_ROW] = torch.from_numpy(found.rows.numpy()[rows[sharer][KEY_ROW].numpy()])
        rows[name][KEY_ROW], counts[name][KEY_FILES] = found.rows, found.files


def _to_narrow(tensors: dict[str, Tensor], *, asked: bool) -> dict[str, Tensor | None]:
    """Which of a layer's tensors are to be put in 8 bits, with the scales that their rows had there before, if any.

    Those are taken out. Without being ``asked`` for it, tensors all of whose rows have been in 8 bits stay so.
    """
    known = {name: tensors.pop(scale_of(name), None) for name in EIGHT_BIT_FIELDS}
    whole = ("key",) if form_of(tensors) == Softmax.name else ()  # a key's rounding would be in an exponent
    return {
        name: scales
        for name, scales in known.items()
        if name not in whole and (asked or (scales is not None and not bool(scales.isnan().any())))
    }


def _narrowed(tensors: dict[str, Tensor], narrow: Mapping[str, Tensor | None], seed: str) -> dict[str, str]:
    """Put rows in 8 bits in the place of some of a layer's tensors where that is less; their dtypes by name."""
    dtypes = dict[str, str]()
    for name, known in narrow.items():
        if name in tensors and (found := in_eight_bits(tensors[name], f"{seed} {name}", known)) is not None:
            del tensors[name]
            tensors |= {f"{name}/{field}": getattr(found, field) for field in EightBitRows.FIELDS}
            dtypes[name] = str(found.dtype).removeprefix("torch.")
    return dtypes


def _without_zeros(tensors: dict[str, Tensor]) -> dict[str, int]:
    """Put sparse rows in the place of a layer's tensors where that is less; the width of each by its name."""
    widths = dict[str, int]()
    for name in SPARSE_FIELDS:
        if name in tensors and (found := packed_in_place(tensors[name])) is not None:
            del tensors[name]
            tensors |= {f"{name}/{field}": getattr(found, field) for field in SparseRows.FIELDS}
            widths[name] = found.width
    return widths


def _narrow_before(rows: Rows, scales: Mapping[str, Tensor] | None) -> frozenset[tuple[str, torch.dtype]]:
    """Which tensors of rows have been in 8 bits, and their dtypes."""
    return frozenset((name, getattr(rows, name).dtype) for name in scales or ())


def _fields(rows: Rows) -> dict[str, Tensor]:
    fields = {name: getattr(rows, name) for name in FIELDS}
    if rows.packed is not None:
        fields |= parts_of(rows.packed)
    fields |= {name: values for name in OPTIONAL if (values := getattr(rows, name)) is not None}
    return fields | {f"column/{name}": values for name, values in rows.columns.items()}
