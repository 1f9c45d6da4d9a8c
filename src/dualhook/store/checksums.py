"""Checksums of a file's tensors and of its header, in the header itself: they tell a file that is as it was written."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import xxhash
from torch import Tensor

from dualhook.store.direct import NAMES, bytes_of, without_padding

__all__ = ["CHECKSUMS", "HEADER_ITSELF", "digest", "mismatches", "text_digest", "with_checksums"]

CHECKSUMS = "checksums"
HEADER_ITSELF = ""  # the name under which the header's own checksum stands among those of the tensors


def digest(tensor: Tensor) -> str:
    """XXH3 in 64 bits of dtype, shape and numbers."""
    found = xxhash.xxh3_64(f"{NAMES[tensor.dtype]}{list(tensor.shape)}".encode())
    if tensor.numel():
        found.update(bytes_of(tensor))
    return found.hexdigest()


def with_checksums(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The header of a file that holds these tensors."""
    plain = {name: value for name, value in header.items() if name != CHECKSUMS}
    return plain | {CHECKSUMS: {HEADER_ITSELF: _of_header(plain), **{n: digest(t) for n, t in tensors.items()}}}


def mismatches(file: Any, header: Mapping[str, Any]) -> Iterator[str]:
    """The tensors of an open file that are not as they were written, missing ones too; the header by its own name.

    Nothing of a file without checksums from the time before there were any, nor did a file name its memory then.
    """
    expected = header.get(CHECKSUMS)
    if expected is None and "memory" not in header:
        return
    plain = {name: value for name, value in header.items() if name != CHECKSUMS}
    if not isinstance(expected, dict) or expected.get(HEADER_ITSELF) != _of_header(plain):
        yield HEADER_ITSELF
        return
    there = set(without_padding(file.keys()))
    for name in sorted((there | expected.keys()) - {HEADER_ITSELF}):
        if name not in there or name not in expected or digest(file.get_tensor(name)) != expected[name]:
            yield name


def text_digest(text: str) -> str:
    """The same of a text."""
    return xxhash.xxh3_64_hexdigest(text.encode())


def _of_header(header: Mapping[str, Any]) -> str:
    return text_digest(json.dumps(header))
