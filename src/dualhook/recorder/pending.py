"""Rows that are in a gradient and in no step yet."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from dualhook.capture import used_rows
from dualhook.packing import Softmax, pack_scaled
from dualhook.recorder.heads import Heads
from dualhook.recorder.ranks import Ranks
from dualhook.recorder.staging import Staging
from dualhook.records import LayerSpec, Rows
from dualhook.store import Writer
from dualhook.store.writer import SEGMENT_BYTES

__all__ = ["PATIENCE", "PENDING_BYTES", "Pending"]

PATIENCE = 16  # steps for which accumulated rows wait at least for an optimiser that may never come
WAITING_BYTES = SEGMENT_BYTES  # of rows that have waited so long
PENDING_BYTES = 2**31  # of all rows that no step has used yet


class Pending:
    """Takes rows as they accumulate, by layer, until a step commits them or their gradient is zeroed."""

    def __init__(self, writer: Writer, ranks: Ranks, stored_in: Mapping[str, torch.dtype], heads: Heads) -> None:
        self.seen = False
        """Whether any row has ever come."""
        self.heads = heads
        self._writer = writer
        self._ranks = ranks
        # 8 bits are for the disk alone: until they are written rows stay as computed
        self._stored_in = {layer: dtype for layer, dtype in stored_in.items() if dtype != torch.int8}
        self._staging = Staging(self._arrived)
        self._waited: dict[str, int] = {}  # steps for which a layer's rows have been waiting

    @property
    def is_full(self) -> bool:
        """Whether so many rows wait that they must go before others come."""
        return self._writer.builder.pending_bytes > PENDING_BYTES

    def take(self, spec: LayerSpec, rows: Rows, parameters: Mapping[str, Tensor]) -> None:
        """Keep the rows of a layer that are not exactly zero; its ``parameters`` are as the forward pass used them."""
        self.seen, layer = True, spec.name
        # elsewhere a look at the numbers would make training wait: it is taken when they have come to the host
        is_elsewhere = self._staging.takes(rows)
        used = None if is_elsewhere else used_rows(rows.output_grad)
        is_first, is_open = not self.holds(layer), self._writer.builder.is_open(layer)
        rows = self.heads.pack(spec, rows, parameters, is_first=is_first, is_open=is_open)
        rows = replace(rows, columns=self._ranks.columns(rows))
        if is_elsewhere:
            self._staging.put(layer, self._narrowed(layer, rows))
        else:
            self._keep_form(layer, rows, used)

    def drop(self, layers: Iterable[str]) -> None:
        """Forget the rows of some layers."""
        for layer in layers:
            self._staging.drop(layer)
            self._writer.builder.rewind(layer)

    def holds(self, layer: str) -> bool:
        """Whether the layer has rows that no step has used."""
        return self._staging.holds(layer) or self._writer.builder.holds(layer)

    def has_plain(self, layer: str) -> bool:
        """Whether the layer has rows that no step has used, all of them in host memory and none packed."""
        return not self._staging.holds(layer) and self._writer.builder.holds_plain(layer)

    def settle(self) -> None:
        """Wait for rows that are still on their way from a device."""
        self._staging.drain()

    def of(self, layer: str, committed: int | None) -> Rows | None:
        """The layer's rows; where it has none, those that the step ``committed`` has taken already."""
        rows = self._writer.builder.pending(layer)
        return self._writer.builder.of_step(layer, committed) if rows is None and committed is not None else rows

    def commit(self, layer: str, step: int) -> None:
        """A step has used the layer's rows."""
        self._writer.builder.commit(layer, step)
        self._waited.pop(layer, None)

    def late(self, layers: Collection[str]) -> list[str]:
        """A step is over: the layers whose rows have waited too long, if they take much room."""
        self._waited = {layer: self._waited.get(layer, 0) + 1 for layer in layers if self.holds(layer)}
        if self._writer.builder.pending_bytes <= WAITING_BYTES:
            return []
        return [layer for layer, steps in self._waited.items() if steps >= PATIENCE]

    def _dtype(self, layer: str, rows: Rows) -> torch.dtype:
        """What rows of a layer are stored in."""
        return self._stored_in.get(layer, rows.key.dtype)

    def _is_scaled(self, layer: str, rows: Rows) -> bool:
        """Whether rows are kept in 16 bits with a scale, which they have not been computed in."""
        return self._stored_in.get(layer) == torch.float16 != rows.output_grad.dtype

    def _narrowed(self, layer: str, rows: Rows) -> Rows:
        """Rows as narrow as they will be stored, if that takes no more than a cast: fewer bytes have to travel."""
        if rows.packed is not None or self._is_scaled(layer, rows):
            return rows
        dtype = self._dtype(layer, rows)
        return replace(rows, key=rows.key.to(dtype), output_grad=rows.output_grad.to(dtype))

    def _arrived(self, layer: str, rows: Rows) -> None:
        """Rows are in host memory now."""
        self._keep_form(layer, rows, used_rows(rows.output_grad) if rows.packed is None else rows.packed.used_rows())

    def _keep_form(self, layer: str, rows: Rows, used: Tensor | None) -> None:
        """Keep the rows of an index ``used`` [m], or all, in their form."""
        if rows.packed is None:
            self._keep_whole(layer, rows, used)
        else:
            self._keep_packed(layer, rows, used)

    def _keep_whole(self, layer: str, rows: Rows, kept: Tensor | None) -> None:
        if self._is_scaled(layer, rows):
            rows = replace(rows, output_grad=rows.output_grad[:, :0], packed=pack_scaled(rows.output_grad))
        self._keep(layer, rows, kept, self._stored_in.get(layer))

    def _keep(self, layer: str, rows: Rows, kept: Tensor | None = None, dtype: torch.dtype | None = None) -> None:
        """Copy rows, or those of an index ``kept`` [m], to where they will be written from, as ``dtype``."""
        if self._writer.builder.holds(layer) and not self._writer.builder.takes(layer, rows):
            # of one step, kept in two ways
            waiting = self._writer.builder.pending(layer)
            assert waiting is not None
            whole = waiting.unpacked().at(torch.arange(len(waiting)))  # a copy: it stands where it will be written
            self._writer.builder.rewind(layer)
            self._keep(layer, whole)
            rows = rows.unpacked()
        if not self._writer.builder.takes(layer, rows):
            self._writer.seal()
        if self._writer.builder.takes(layer, rows):  # else it has not been sealed, after an error
            self._writer.builder.append(layer, rows, kept, dtype)

    def _keep_packed(self, layer: str, rows: Rows, kept: Tensor | None) -> None:
        """Keys that output gradients are computed from stay as they are: their rounding would be in an exponent."""
        assert rows.packed is not None
        packed, dtype = rows.packed, self._dtype(layer, rows)
        if isinstance(packed, Softmax):
            dtype = rows.key.dtype
        elif not self._is_scaled(layer, rows):  # a few numbers need no scale
            packed = replace(packed, value=packed.value.to(dtype))
        self._keep(layer, replace(rows, packed=packed), kept, dtype)
