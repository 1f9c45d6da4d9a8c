"""Rows on their way into host memory; from a CUDA device without making training wait for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dualhook.packing import Softmax
from dualhook.records import Rows

__all__ = ["Staging"]

STAGED_BYTES = 2**30  # of pinned memory, before training has to wait


@dataclass(frozen=True)
class Staged:
    """Rows whose copy to the host may still be under way; ``done`` tells."""

    layer: str
    rows: Rows
    done: torch.cuda.Event | None


class Staging:
    """Copies rows to the host, from a CUDA device on a stream of its own.

    :meth:`drain` waits for the copies and hands them to ``keep``, in order.
    """

    def __init__(self, keep: Callable[[str, Rows], None]) -> None:
        self._keep = keep
        self._staged: list[Staged] = []
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._bytes = 0

    @staticmethod
    def takes(rows: Rows) -> bool:
        """Whether rows are somewhere else than in host memory."""
        return rows.key.device.type != "cpu"

    def put(self, layer: str, rows: Rows) -> None:
        """Begin to copy rows."""
        if rows.key.is_cuda:
            staged = Staged(layer, *self._on_the_way(rows))
        else:
            staged = Staged(layer, _all_changed(rows, lambda values: values.to("cpu", copy=True)), None)
        self._staged.append(staged)
        self._bytes += _nbytes(staged.rows)
        if self._bytes > STAGED_BYTES:
            self.drain()

    def holds(self, layer: str) -> bool:
        """Whether any rows of the layer are on their way."""
        return any(one.layer == layer for one in self._staged)

    def drop(self, layer: str) -> None:
        """Forget the layer's rows; their copies end by themselves."""
        self._staged = [one for one in self._staged if one.layer != layer]

    def drain(self) -> None:
        """Wait for all copies, and hand the rows on."""
        staged, self._staged, self._bytes = self._staged, [], 0
        for one in staged:
            if one.done is not None:
                one.done.synchronize()
            self._keep(one.layer, one.rows)

    def _on_the_way(self, rows: Rows) -> tuple[Rows, torch.cuda.Event]:
        device = rows.key.device
        # copies on the device first: training may write to what it has shown us once its gradient is there
        rows = _all_changed(rows, lambda values: values.clone() if values.is_cuda else values)
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream = self._streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))

        def copied(here: Tensor) -> Tensor:
            if not here.is_cuda:
                return here
            there = torch.empty(here.shape, dtype=here.dtype, pin_memory=True)
            there.copy_(here, non_blocking=True)
            here.record_stream(stream)  # its memory is not to be used again before the copy has ended
            return there

        with torch.cuda.stream(stream):
            return _all_changed(rows, copied), stream.record_event()


def _nbytes(rows: Rows) -> int:
    """Bytes of what is large of rows."""
    weight = rows.packed.weight.nbytes if isinstance(rows.packed, Softmax) else 0
    return rows.key.nbytes + rows.output_grad.nbytes + weight


def _all_changed(rows: Rows, change: Callable[[Tensor], Tensor]) -> Rows:
    """Rows with a change to all of their tensors, the weights that packed ones are made with among them."""
    rows = rows.each(change)
    if isinstance(rows.packed, Softmax):
        rows = replace(rows, packed=replace(rows.packed, weight=change(rows.packed.weight)))
    return rows
