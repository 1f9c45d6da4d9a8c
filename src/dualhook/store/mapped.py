"""Reads a safetensors file by mapping it, in pieces of 2 MB where the kernel can.

A page cache that was filled through an ordinary mapping is mapped again 64 kB at a time, and a scan at the speed of
memory then spends more time on page faults than on its products. Linux from 5.18 on keeps what a mapping that asks for
large pages is the first to read in pieces of 2 MB, and maps each with one fault, also the next time. Read-ahead would
put smaller ones between them: a piece is read when it is met, which takes no longer, and nothing that is not asked for.
"""

from __future__ import annotations

import json
import mmap
import os
import platform
import re
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dualhook.store.direct import NAMES

__all__ = ["MappedFile", "glanced"]

DTYPES = {name: dtype for dtype, name in NAMES.items()}


GLANCE_BYTES = 2**14  # that a header takes, as a rule


def glanced(path: Path) -> tuple[dict[str, str], list[str]]:
    """The texts that go with a file's tensors, and their names; only its header is read, and compared with its size.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is no whole safetensors file.
    """
    with open(path, "rb", buffering=0) as file:
        size, data = os.fstat(file.fileno()).st_size, file.read(GLANCE_BYTES)
        length = _header_length(data, size)
        while len(data) < 8 + length and (more := file.read(8 + length - len(data))):
            data += more
    header = json.loads(data[8 : 8 + length])
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    metadata = header.pop("__metadata__", {})
    if 8 + length + max((own["data_offsets"][1] for own in header.values()), default=0) != size:
        raise ValueError(f"{size} bytes are not what its header says")
    return metadata, list(header)


def _header_length(data: Any, size: int) -> int:
    """What a file of so many bytes says of the length of its header."""
    length = int.from_bytes(data[:8], "little")
    if not 0 < length <= size - 8:
        raise ValueError(f"its header would take {length} of {size} bytes")
    return length


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies, in bytes behind the header, and what it is."""

    begin: int
    end: int
    dtype: torch.dtype
    shape: tuple[int, ...]


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
        size = len(self._map)
        length = _header_length(self._map, size)
        header = json.loads(self._map[8 : 8 + length])
        if not isinstance(header, dict):
            raise ValueError("its header is no object")
        self._start = 8 + length
        self._metadata: dict[str, str] = header.pop("__metadata__", {})
        self._tensors = {name: _place(name, own) for name, own in header.items()}
        end = 0
        for place in sorted(self._tensors.values(), key=lambda place: (place.begin, place.end)):
            if place.begin != end:
                raise ValueError("its tensors overlap, or leave room between them")
            end = place.end
        if end != size - self._start:
            raise ValueError(f"{size} bytes are not what its header says")

    def metadata(self) -> dict[str, str]:
        """The texts that go with the tensors."""
        return self._metadata

    def keys(self) -> list[str]:
        """The names of the tensors."""
        return list(self._tensors)

    def get_tensor(self, name: str) -> Tensor:
        """A tensor that reads the file where it is looked at; what is written to it stays in memory."""
        place = self._tensors[name]
        if not (count := prod(place.shape)):
            return torch.empty(place.shape, dtype=place.dtype)
        flat = torch.frombuffer(self._map, dtype=place.dtype, count=count, offset=self._start + place.begin)
        return flat.view(place.shape)


def _place(name: str, own: Any) -> _Place:
    """What a file's header says of a tensor, if it adds up."""
    try:
        begin, end = own["data_offsets"]
        place = _Place(begin, end, DTYPES[own["dtype"]], tuple(own["shape"]))
        numbers = (begin, end, *place.shape)
        adds_up = all(type(number) is int and number >= 0 for number in numbers)
        if adds_up and end - begin == prod(place.shape) * place.dtype.itemsize:
            return place
    except (KeyError, TypeError, ValueError):
        pass
    raise ValueError(f"its header says of {name!r} what does not add up: {own!r}")


def _has_large_pages() -> bool:
    """Whether files can be asked for in large pages: an earlier Linux would read 4 kB at a time instead."""
    release = re.match(r"(\d+)\.(\d+)", platform.release())
    recent = platform.system() == "Linux" and release is not None and tuple(map(int, release.groups())) >= (5, 18)
    return recent and mmap.PAGESIZE == 4096


LARGE_PAGES = _has_large_pages()
