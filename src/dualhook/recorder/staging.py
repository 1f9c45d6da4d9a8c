"""Rows on their way from a CUDA device into host memory, without making training wait for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dualhook.capture import used_rows
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
    """Copies rows on a stream of its own; :meth:`drain` waits for the copies and hands them to ``keep``, in order."""

    def __init__(self, keep: Callable[[str, Rows, Tensor | None], None]) -> None:
        self._keep = keep
        self._staged: list[Staged] = []
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._bytes = 0

    @staticmethod
    def takes(rows: Rows) -> bool:
        """Whether copying these rows would make training wait."""
        return rows.key.is_cuda

    def put(self, layer: str, rows: Rows, dtype: torch.dtype) -> None:
        """Begin to copy rows, as ``dtype``."""
        # copies on the device first: training may write to the input of a layer once its gradient is there
        source = (rows.key.to(dtype, copy=True), rows.output_grad.to(dtype, copy=True))
        host, done = self._copied(source) if rows.key.is_cuda else (source, None)
        self._staged.append(Staged(layer, replace(rows, key=host[0], output_grad=host[1]), done))
        self._bytes += host[0].nbytes + host[1].nbytes
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
            self._keep(one.layer, one.rows, used_rows(one.rows.output_grad))

    def _copied(self, source: tuple[Tensor, Tensor]) -> tuple[tuple[Tensor, Tensor], torch.cuda.Event]:
        device = source[0].device
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream = self._streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            host = tuple(torch.empty(one.shape, dtype=one.dtype, pin_memory=True) for one in source)
            for there, here in zip(host, source, strict=True):
                there.copy_(here, non_blocking=True)
                here.record_stream(stream)  # its memory is not to be used again before the copy has ended
            done = stream.record_event()
        return (host[0], host[1]), done
