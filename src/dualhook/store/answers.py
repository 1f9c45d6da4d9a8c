"""Answers beside a memory: files that may be deleted at any time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from dualhook.errors import StoreError
from dualhook.store.checksums import mismatches
from dualhook.store.layout import open_tensors, read_header, tensor_names, write_tensors
from dualhook.store.remote import RemotePath

__all__ = ["AnswerFiles"]


class AnswerFiles:
    """Named tensors under keys, one file each. What cannot be read or is of another key counts as not there.

    Raises:
        StoreError: nothing can be written beside the memory.
    """

    def __init__(self, folder: Path) -> None:
        if isinstance(folder, RemotePath):
            folder.mkdir()
        self._folder = folder

    def get(self, key: str) -> dict[str, Tensor] | None:
        """What was put there, or None."""
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            file = open_tensors(path)
            header = read_header(path, file)
        except StoreError:
            return None
        if header.get("kind") != "answer" or header.get("key") != key or any(mismatches(file, header)):
            return None
        return {name: file.get_tensor(name) for name in tensor_names(file)}

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors, whole or not at all."""
        self._folder.mkdir(exist_ok=True)
        write_tensors(self._path(key), tensors, {"kind": "answer", "key": key})

    def drop(self, key: str) -> None:
        """Forget a key, if it is there."""
        self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.safetensors"
