"""Writes a safetensors file past the page cache, where the system allows it.

Rows are written once and read much later. Through the page cache every byte is copied into freshly allocated kernel
memory by a CPU core that training could use; written directly it is one copy into a reused, aligned buffer.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dualhook.store.durable import write_all

__all__ = ["NAMES", "DirectFile", "bytes_of"]

ALIGNMENT = 4096
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
        """Write contiguous CPU tensors under ``path``, on disk when this returns.

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
            size = filled = 0
            for part in _parts(tensors, metadata):
                size += len(part)
                while part:
                    taken = min(len(part), BUFFER_BYTES - filled)
                    self._view[filled : filled + taken] = part[:taken]
                    part, filled = part[taken:], filled + taken
                    if filled == BUFFER_BYTES:
                        write_all(handle, self._view)
                        filled = 0
            write_all(handle, self._view[: -(-filled // ALIGNMENT) * ALIGNMENT])  # up to a whole block, …
            os.truncate(handle, size)  # … which the file then gives back
            os.fsync(handle)
        finally:
            os.close(handle)


def _parts(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[memoryview]:
    """The bytes of the file: header length, header, tensors; wider dtypes first, so that each is aligned."""
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, tensor in ordered:
        end = offset + tensor.nbytes
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for _, tensor in ordered:
        if tensor.numel():
            yield bytes_of(tensor)


def bytes_of(tensor: Tensor) -> memoryview:
    """The numbers of a contiguous CPU tensor that is not empty, without a copy."""
    data: Any = tensor.reshape(-1).view(torch.uint8).numpy()  # numpy has no bfloat16
    return memoryview(data).cast("B")
