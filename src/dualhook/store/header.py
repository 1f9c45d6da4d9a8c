"""What the first bytes of a safetensors file say: where its tensors lie, and what they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import orjson
import torch

from dualhook.store.direct import NAMES

__all__ = ["Header", "Place", "header_length", "parsed"]

DTYPES = {name: dtype for dtype, name in NAMES.items()}


@dataclass(frozen=True)
class Place:
    """Where a tensor lies, in bytes of the file, and what it is."""

    begin: int
    end: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """The tensors of a file by name, and the texts that go with them."""

    places: Mapping[str, Place]
    metadata: Mapping[str, str]

    @classmethod
    def of(cls, data: Any, size: int) -> Header:
        """From the first bytes of a file of so many, its header at least.

        Raises:
            ValueError: it is no whole safetensors file.
        """
        return _header(bytes(data[8 : 8 + header_length(data, size)]), size)


@lru_cache(maxsize=32)  # a file is opened again for every layer that it holds rows of
def _header(text: bytes, size: int) -> Header:
    header, start = parsed(text), 8 + len(text)
    metadata: Mapping[str, str] = header.pop("__metadata__", {})
    places = {name: _place(name, own, start) for name, own in header.items()}
    end = start
    for place in sorted(places.values(), key=lambda place: (place.begin, place.end)):
        if place.begin != end:
            raise ValueError("its tensors overlap, or leave room between them")
        end = place.end
    if end != size:
        raise ValueError(f"{size} bytes are not what its header says")
    return Header(places, metadata)


def parsed(text: bytes | str) -> dict[str, Any]:
    """A JSON object, of which opening a memory reads two from every file.

    Raises:
        ValueError: it is none.
    """
    try:
        found = orjson.loads(text)
    except orjson.JSONDecodeError:  # lone surrogates too, which Python writes and reads
        found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError("its header is no object")
    return found


def header_length(data: Any, size: int) -> int:
    """What the first bytes of a file of so many say of the length of its header.

    Raises:
        ValueError: so long it cannot be.
    """
    length = int.from_bytes(data[:8], "little")
    if not 0 < length <= size - 8:
        raise ValueError(f"its header would take {length} of {size} bytes")
    return length


def _place(name: str, own: Any, start: int) -> Place:
    """What a header that ends at ``start`` says of a tensor, if it adds up."""
    try:
        begin, end = own["data_offsets"]
        dtype, shape = DTYPES[own["dtype"]], tuple(own["shape"])
        adds_up = all(type(number) is int and number >= 0 for number in (begin, end, *shape))
        if adds_up and end - begin == prod(shape) * dtype.itemsize:
            return Place(start + begin, start + end, dtype, shape)
    except (KeyError, TypeError, ValueError):
        pass
    raise ValueError(f"its header says of {name!r} what does not add up: {own!r}")
