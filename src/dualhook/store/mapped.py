"""Reads a safetensors file by mapping it, in pieces of 2 MB where the kernel can.

A page cache that was filled through an ordinary mapping is mapped again 64 kB at a time, and a scan at the speed of
memory then spends more time on page faults than on its products. Linux from 5.18 on keeps what a mapping that asks for
large pages is the first to read in pieces of 2 MB, and maps each with one fault, also the next time. Read-ahead would
put smaller ones between them: a piece is read when it is met, which takes no longer, and nothing that is not asked for.
"""

from __future__ import annotations

import mmap
import os
import platform
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from dualhook.store.header import Header, header_length, parsed

__all__ = ["MappedFile", "glanced"]

GLANCE_BYTES = 2**14  # that a header takes, as a rule
READ_ONLY = os.O_RDONLY | getattr(os, "O_BINARY", 0)  # which Windows has


def glanced(path: Path) -> tuple[dict[str, str], list[str]]:
    """The texts that go with a file's tensors, and their names; only its header is read, and compared with its size.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is no whole safetensors file.
    """
    descriptor = os.open(path, READ_ONLY)  # a file object would take as long as reading
    try:
        size, data = os.fstat(descriptor).st_size, os.read(descriptor, GLANCE_BYTES)
        length = header_length(data, size)
        while len(data) < 8 + length and (more := os.read(descriptor, 8 + length - len(data))):
            data += more
    finally:
        os.close(descriptor)
    header = parsed(data[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    if 8 + length + max([own["data_offsets"][1] for own in header.values()], default=0) != size:
        raise ValueError(f"{size} bytes are not what its header says")
    return metadata, list(header)


class MappedFile:
    """The tensors of one safetensors file; those that were read stay valid when it is gone.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is no whole safetensors file.
    """

    def __init__(self, path: Path) -> None:
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        if LARGE_PAGES:
            with suppress(OSError):  # a kernel that was built without them
                self._map.madvise(mmap.MADV_HUGEPAGE)
                self._map.madvise(mmap.MADV_RANDOM)
        self._header = Header.of(self._map, len(self._map))

    def metadata(self) -> Mapping[str, str]:
        """The texts that go with the tensors."""
        return self._header.metadata

    def keys(self) -> list[str]:
        """The names of the tensors."""
        return list(self._header.places)

    def get_tensor(self, name: str) -> Tensor:
        """A tensor that reads the file where it is looked at; what is written to it stays in memory."""
        place = self._header.places[name]
        if not (count := prod(place.shape)):
            return torch.empty(place.shape, dtype=place.dtype)
        flat = torch.frombuffer(self._map, dtype=place.dtype, count=count, offset=place.begin)
        return flat.view(place.shape)

    def get_tensors(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Several of them."""
        return {name: self.get_tensor(name) for name in names}


def _has_large_pages() -> bool:
    """Whether files can be asked for in large pages: an earlier Linux would read 4 kB at a time instead."""
    release = re.match(r"(\d+)\.(\d+)", platform.release())
    recent = platform.system() == "Linux" and release is not None and tuple(map(int, release.groups())) >= (5, 18)
    return recent and mmap.PAGESIZE == 4096


LARGE_PAGES = _has_large_pages()
