"""Writes a safetensors file past the page cache, where the system allows it.

Rows are written once and read much later. Through the page cache every byte is copied into freshly allocated kernel
memory by a CPU core that training could use. Written directly, what lies in blocks in memory and in the file is not
copied at all, and the rest once, into a reused buffer.
"""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dualhook.store.durable import write_all

__all__ = ["NAMES", "DirectFile", "as_integers", "bytes_of", "empty_in_blocks", "in_blocks", "without_padding"]

ALIGNMENT = 4096
PADDING = "padding/"
"""What the names of tensors begin with that are there for the next one to begin at a block."""
BUFFER_BYTES = 4 * 2**20
NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}  # safetensors' names; an optimiser's state may hold any of them


class DirectFile:
    """Writes safetensors files, one after the other, through one buffer."""

    def __init__(self) -> None:
        self._buffer = mmap.mmap(-1, BUFFER_BYTES)  # anonymous memory is aligned to pages
        self._view = memoryview(self._buffer)
        self._direct = getattr(os, "O_DIRECT", 0)  # Linux

    def write(self, path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Write contiguous CPU tensors under ``path``, in their order, on disk when this returns.

        Raises:
            OSError: the file system refused.
        """
        try:
            self._write(path, tensors, metadata)
        except OSError as error:
            if error.errno != errno.EINVAL or not self._direct:
                raise
            self._direct = 0  # a file system in memory or over the network: through the cache after all
            self._write(path, tensors, metadata)

    def _write(self, path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | self._direct, 0o666)
        try:
            size = begin = filled = 0  # of the file; of the buffer what waits to be written
            waiting: list[memoryview] = []  # for one call: each one blocks, and each wakes this thread up again
            for part in _parts(tensors, metadata):
                size += len(part)
                if filled % ALIGNMENT == 0 and _address(part) % ALIGNMENT == 0:
                    whole = len(part) // ALIGNMENT * ALIGNMENT
                    waiting += [self._view[begin:filled], part[:whole]]
                    begin, part = filled, part[whole:]
                while part:
                    taken = min(len(part), BUFFER_BYTES - filled)
                    self._view[filled : filled + taken] = part[:taken]
                    part, filled = part[taken:], filled + taken
                    if filled == BUFFER_BYTES:
                        write_all(handle, [*waiting, self._view[begin:]])
                        waiting, begin, filled = [], 0, 0
            end = -(-filled // ALIGNMENT) * ALIGNMENT  # up to a whole block, …
            write_all(handle, [*waiting, self._view[begin:end]])
            os.truncate(handle, size)  # … of which the file gives the rest back
            os.fsync(handle)
        finally:
            os.close(handle)


def empty_in_blocks(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised CPU tensor that begins at a block of memory."""
    size = math.prod(shape) * dtype.itemsize
    raw = torch.empty(size + ALIGNMENT, dtype=torch.uint8)
    start = -raw.data_ptr() % ALIGNMENT
    return raw[start : start + size].view(dtype).view(*shape)


def in_blocks(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors in the order in which they are written: each aligned to its dtype, and to a block as it is in memory.

    For that padding comes behind some of them.
    """
    found: dict[str, Tensor] = {}
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    blocks = [item for item in ordered if item[1].nbytes >= ALIGNMENT and item[1].data_ptr() % ALIGNMENT == 0]
    for name, tensor in blocks:
        found[name] = tensor
        if left := -tensor.nbytes % ALIGNMENT:
            found[f"{PADDING}{len(found)}"] = torch.zeros(left, dtype=torch.uint8)
    return found | dict(ordered)  # those that are there keep their places


def _parts(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[memoryview]:
    """The bytes of the file: header length, header up to a block, tensors."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
        if tensor.numel():
            yield bytes_of(tensor)


def _address(part: memoryview) -> int:
    return int(np.frombuffer(part, np.uint8).ctypes.data) if part.nbytes else 0


def without_padding(names: Iterable[str]) -> list[str]:
    """The names of tensors that hold something, not those that fill up blocks of the disk."""
    return [name for name in names if not name.startswith(PADDING)]


def as_integers(values: Tensor) -> Tensor:
    """The same memory as integers of that size: equal where all bits are."""
    return values.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.dtype.itemsize])


def bytes_of(tensor: Tensor) -> memoryview:
    """The numbers of a contiguous CPU tensor that is not empty, without a copy."""
    data: Any = tensor.reshape(-1).view(torch.uint8).numpy()  # numpy has no bfloat16
    return memoryview(data).cast("B")
