"""A segment in the making: rows go straight from training into the buffers that will be written.

Per layer the buffer holds committed rows, then pending ones (accumulated into a gradient that no step has used yet).
Buffers are kept and filled again after writing, since first-touch of fresh memory costs more than the copy.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dualhook.records import FIELDS, OPTIONAL, LedgerEntry, Rows, absent
from dualhook.store.ledger import pack
from dualhook.store.sharing import KEY_ROW, shared_keys
from dualhook.store.streams import rows_of

__all__ = ["SegmentBuilder"]

ENTRY_BYTES = 64  # of a ledger entry, about


class LayerBuffer:
    """The rows of one layer, in growing tensors."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.committed = 0
        self.filled = 0
        self.first = 0  # pattern number of row 0

    @property
    def row_bytes(self) -> int:
        """Bytes of one row in all tensors."""
        return sum(values[0].nbytes for values in self.tensors.values() if len(values))

    def append(self, rows: Rows) -> None:
        """Copy rows behind the pending ones."""
        start, self.filled = self.filled, self.filled + len(rows)
        for name, values in _fields(rows).items():
            room = self._room(name, values, start)[start : self.filled]
            if room.shape == values.shape:
                room.copy_(values)
            else:  # a smaller map than others: its extent says how much of the row it takes
                room[:, values.shape[1] :].zero_()
                room[:, : values.shape[1]].copy_(values)
        for name in self.tensors.keys() - _fields(rows).keys():  # a column that this batch does not have
            self._room(name, self.tensors[name], start)[start : self.filled].fill_(absent(self.tensors[name]))

    def view(self, start: int, stop: int) -> Rows:
        """Rows ``start`` to ``stop`` without a copy."""
        cut = {name: values[start:stop] for name, values in self.tensors.items()}
        return rows_of(cut, self.first + start)

    def _room(self, name: str, like: Tensor, start: int) -> Tensor:
        """The named tensor, grown to hold ``filled`` rows and widened to hold ``like``'s numbers without loss."""
        held = self.tensors.get(name)
        if held is None:
            held = torch.empty((0, *like.shape[1:]), dtype=like.dtype)
            if start:  # a column that appears later: the rows before had none
                held = torch.full((start, *like.shape[1:]), absent(like), dtype=like.dtype)
        dtype = torch.promote_types(held.dtype, like.dtype)
        wider = like.dim() == 2 and like.shape[1] > held.shape[1]
        if held.shape[0] < self.filled or held.dtype != dtype or wider:
            rows = self.filled if self.filled <= held.shape[0] else max(self.filled, int(1.5 * held.shape[0]))
            grown = torch.empty((rows, *(like if wider else held).shape[1:]), dtype=dtype)
            if wider:
                grown[:start, held.shape[1] :].zero_()
            (grown[:start, : held.shape[1]] if wider else grown[:start]).copy_(held[:start])
            held = grown
        self.tensors[name] = held
        return held


class SegmentBuilder:
    """Collects the rows and the ledger of consecutive steps."""

    def __init__(self) -> None:
        self.layers: dict[str, LayerBuffer] = {}
        self.ledger: list[LedgerEntry] = []
        self.steps: tuple[int, int] | None = None  # the first and the last one

    def append(self, layer: str, rows: Rows) -> None:
        """Add pending rows."""
        self.layers.setdefault(layer, LayerBuffer()).append(rows)

    def start_at(self, layer: str, number: int) -> None:
        """The layer's next row is the pattern with this number."""
        self.layers.setdefault(layer, LayerBuffer()).first = number

    def rewind(self, layer: str) -> None:
        """Forget the layer's pending rows."""
        if layer in self.layers:
            self.layers[layer].filled = self.layers[layer].committed

    def pending(self, layer: str) -> Rows | None:
        """The layer's pending rows, or None."""
        buffer = self.layers.get(layer)
        return buffer.view(buffer.committed, buffer.filled) if buffer and buffer.filled > buffer.committed else None

    def of_step(self, layer: str, step: int) -> Rows | None:
        """The layer's rows that ``step``, the newest, has committed, or None."""
        buffer = self.layers.get(layer)
        if buffer is None or not buffer.committed or int(buffer.tensors["step"][buffer.committed - 1]) != step:
            return None
        start = int(torch.searchsorted(buffer.tensors["step"][: buffer.committed], step))
        return buffer.view(start, buffer.committed)

    def commit(self, layer: str, step: int) -> None:
        """Turn the layer's pending rows into patterns of ``step``."""
        buffer = self.layers.get(layer)
        if buffer is not None and buffer.filled > buffer.committed:
            buffer.tensors["step"][buffer.committed : buffer.filled].fill_(step)
            buffer.committed = buffer.filled

    def withdraw(self, step: int) -> None:
        """Forget everything after a step, which did not end."""
        self.steps = None if self.steps is None or self.steps[0] > step else (self.steps[0], step)
        self.ledger = [entry for entry in self.ledger if entry.step <= step]
        for buffer in self.layers.values():
            if buffer.committed:
                steps = buffer.tensors["step"][: buffer.committed]
                buffer.committed = buffer.filled = int(torch.searchsorted(steps, step, right=True))

    def add(self, step: int, entries: Iterable[LedgerEntry]) -> None:
        """Add the ledger entries of a step; it may have none, where all that it stepped on was frozen."""
        self.steps = (step if self.steps is None else self.steps[0], step)
        self.ledger.extend(entries)

    @property
    def nbytes(self) -> int:
        """Bytes of the committed rows and the ledger."""
        rows = sum(buffer.committed * buffer.row_bytes for buffer in self.layers.values())
        return rows + ENTRY_BYTES * len(self.ledger)

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
                heir.append(buffer.view(buffer.committed, buffer.filled))

    def reset(self) -> None:
        """Empty the builder; its memory stays."""
        self.ledger = []
        self.steps = None
        for buffer in self.layers.values():
            buffer.committed = buffer.filled = 0

    def contents(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The committed part as named tensors and the header that goes with them."""
        tensors, header = pack(self.ledger)
        written = {name: buffer for name, buffer in self.layers.items() if buffer.committed}
        rows = {
            name: {part: values[: buffer.committed] for part, values in buffer.tensors.items()}
            for name, buffer in written.items()
        }
        counts: dict[str, dict[str, Any]] = {
            name: {"first": buffer.first, "count": buffer.committed} for name, buffer in written.items()
        }
        for name, shared in shared_keys(rows).items():
            del rows[name]["key"]
            counts[name]["key_of"] = shared.holder
            if shared.rows is not None:
                rows[name][KEY_ROW] = shared.rows
        tensors |= {f"rows/{name}/{part}": values for name, own in rows.items() for part, values in own.items()}
        return tensors, {"steps": self.steps, **header, "rows": counts}


def _fields(rows: Rows) -> dict[str, Tensor]:
    fields = {name: getattr(rows, name) for name in FIELDS}
    fields |= {name: values for name in OPTIONAL if (values := getattr(rows, name)) is not None}
    return fields | {f"column/{name}": values for name, values in rows.columns.items()}
