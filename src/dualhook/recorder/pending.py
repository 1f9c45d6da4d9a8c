"""Rows that are in a gradient and in no step yet."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from threading import RLock

import torch
from torch import Tensor

from dualhook.capture import used_rows
from dualhook.packing import Softmax, pack_scaled
from dualhook.recorder.heads import Heads
from dualhook.recorder.ranks import Ranks
from dualhook.recorder.staging import Staging, is_elsewhere
from dualhook.records import LayerSpec, Rows
from dualhook.store import Writer
from dualhook.store.writer import SEGMENT_BYTES

__all__ = ["PATIENCE", "PENDING_BYTES", "Pending"]

PATIENCE = 16  # steps for which accumulated rows wait at least for an optimiser that may never come
WAITING_BYTES = SEGMENT_BYTES  # of rows that have waited so long
PENDING_BYTES = 2**31  # of all rows that no step has used yet


class Pending:
    """Takes rows as they accumulate, by layer, until a step commits them or their gradient is zeroed.

    Rows of other devices than the processor come to the host while training goes on: all that is done to rows is done
    in its order, but some of it later.
    """

    def __init__(self, writer: Writer, ranks: Ranks, stored_in: Mapping[str, torch.dtype], heads: Heads) -> None:
        self.seen = False
        """Whether any row has ever come."""
        self.heads = heads
        self.lock = RLock()
        """Where a model lies on several devices autograd has a thread for each: they take turns."""
        self._writer = writer
        self._ranks = ranks
        # 8 bits are for the disk alone: until they are written rows stay as computed
        self._stored_in = {layer: dtype for layer, dtype in stored_in.items() if dtype != torch.int8}
        self._staging = Staging()
        self._ahead: dict[str, bool] = {}  # whether a layer will have rows once all that is on its way has come
        self._unlike: set[str] = set()  # layers with rows on their way that are packed, or follow others that are
        self._waited: dict[str, int] = {}  # steps for which a layer's rows have been waiting

    @property
    def is_full(self) -> bool:
        """Whether so many rows wait that they must go before others come."""
        return self._writer.builder.pending_bytes > PENDING_BYTES

    @property
    def is_idle(self) -> bool:
        """Whether nothing is on its way to the host."""
        return self._staging.is_idle

    def take(self, spec: LayerSpec, rows: Rows, parameters: Mapping[str, Tensor]) -> None:
        """Keep the rows of a layer that are not exactly zero; its ``parameters`` are as the forward pass used them."""
        self.seen, layer = True, spec.name
        # elsewhere a look at the numbers would make training wait: it is taken when they have come to the host
        are_elsewhere = is_elsewhere(rows.key)
        used = None if are_elsewhere else used_rows(rows.output_grad)
        is_first, is_open = not self.holds(layer), layer not in self._ahead and self._writer.builder.is_open(layer)
        rows = self.heads.pack(spec, rows, parameters, is_first=is_first, is_open=is_open)
        rows = replace(rows, columns=self._ranks.columns(rows))
        if self._staging.is_idle and not are_elsewhere:
            self._keep_form(layer, rows, used)
            return
        rows = self._copied(layer, rows)
        self._ahead[layer] = True
        if rows.packed is not None or self._is_scaled(layer, rows) or not self._writer.builder.takes(layer, rows):
            self._unlike.add(layer)
        nbytes = 0 if are_elsewhere else rows.key.nbytes + rows.output_grad.nbytes
        self._staging.then(partial(self._arrived, layer, self._brought(rows)), nbytes=nbytes)
        self._rest()

    def drop(self, layers: Iterable[str]) -> None:
        """Forget the rows of some layers."""
        with self.lock:
            for layer in layers:
                self._then(layer, partial(self._rewind, layer))

    def holds(self, layer: str) -> bool:
        """Whether the layer has rows that no step has used."""
        held = self._ahead.get(layer)
        return self._writer.builder.holds(layer) if held is None else held

    def has_plain(self, layer: str) -> bool:
        """Whether the layer has rows that no step has used, and none that are packed."""
        return self.holds(layer) and layer not in self._unlike and self._writer.builder.is_plain(layer)

    def bring(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Tensors in host memory, there when an action is called that :meth:`then` takes afterwards.

        Of those elsewhere they are copies; nothing may write to these any more.
        """
        return self._staging.bring(values)

    def then(self, action: Callable[[], object]) -> None:
        """Call ``action`` when everything so far has come, at once if nothing is on its way."""
        self._staging.then(action)

    def end_step(self) -> None:
        """No optimiser will step on these rows any more."""
        self._staging.end_step()

    def arrive(self) -> None:
        """Do what is due of complete steps that have come."""
        with self.lock:
            self._staging.arrive()
            self._rest()

    def settle(self) -> None:
        """Wait for everything that is on its way."""
        with self.lock:
            self._staging.drain()
            self._rest()

    def give_up(self) -> None:
        """Forget what is on its way."""
        self._staging.clear()
        self._rest()

    @property
    def recorded_rows(self) -> int:
        """How many rows steps have used so far."""
        self.settle()
        return self._writer.builder.recorded_rows

    def of(self, layer: str, committed: int | None) -> Rows | None:
        """The layer's rows; where it has none, those that the step ``committed`` has taken already."""
        rows = self._writer.builder.pending(layer)
        return self._writer.builder.of_step(layer, committed) if rows is None and committed is not None else rows

    def commit(self, layer: str, step: int) -> None:
        """A step has used the layer's rows."""
        self._then(layer, partial(self._commit, layer, step))
        self._waited.pop(layer, None)

    def late(self, layers: Collection[str]) -> list[str]:
        """A step is over: the layers whose rows have waited too long, if they take much room."""
        self._waited = {layer: self._waited.get(layer, 0) + 1 for layer in layers if self.holds(layer)}
        if self._writer.builder.pending_bytes <= WAITING_BYTES:
            return []
        return [layer for layer, steps in self._waited.items() if steps >= PATIENCE]

    def _then(self, layer: str, action: Callable[[], object]) -> None:
        """Commit or forget the layer's rows, in its turn."""
        if not self._staging.is_idle:
            self._ahead[layer] = False
        self._staging.then(action)

    def _rewind(self, layer: str) -> None:
        self._writer.builder.rewind(layer)

    def _commit(self, layer: str, step: int) -> None:
        self._writer.builder.commit(layer, step)

    def _rest(self) -> None:
        """Where nothing is on its way any more, the builder knows all."""
        if self._staging.is_idle:
            self._ahead.clear()
            self._unlike.clear()

    def _brought(self, rows: Rows) -> Rows:
        """Rows on their way to the host."""
        there = list[Tensor]()

        def listed(values: Tensor) -> Tensor:
            there.append(values)
            return values

        _all_changed(rows, listed)
        brought = iter(self._staging.bring(there))
        return _all_changed(rows, lambda values: next(brought))

    def _dtype(self, layer: str, rows: Rows) -> torch.dtype:
        """What rows of a layer are stored in."""
        return self._stored_in.get(layer, rows.key.dtype)

    def _is_scaled(self, layer: str, rows: Rows) -> bool:
        """Whether rows are kept in 16 bits with a scale, which they have not been computed in."""
        return self._stored_in.get(layer) == torch.float16 != rows.output_grad.dtype

    def _copied(self, layer: str, rows: Rows) -> Rows:
        """Rows of our own: training may write to what it has shown us once its gradient is there.

        As narrow as they will be stored, if that takes no more than a cast: fewer bytes have to travel.
        """
        if rows.packed is not None or self._is_scaled(layer, rows):
            return _all_changed(rows, torch.clone)
        large, dtype = (rows.key, rows.output_grad), self._dtype(layer, rows)
        return _all_changed(
            rows, lambda values: values.to(dtype if any(values is one for one in large) else values.dtype, copy=True)
        )

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


def _all_changed(rows: Rows, change: Callable[[Tensor], Tensor]) -> Rows:
    """Rows with a change to all of their tensors, the weights that packed ones are made with among them."""
    rows = rows.each(change)
    if isinstance(rows.packed, Softmax):
        rows = replace(rows, packed=replace(rows.packed, weight=change(rows.packed.weight)))
    return rows
