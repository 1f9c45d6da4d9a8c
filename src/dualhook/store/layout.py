"""Names and places of a memory's files, and the manifest that says what they hold."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from dualhook.errors import StoreError
from dualhook.records import LayerSpec
from dualhook.store.checking import checked_count, checked_layer
from dualhook.store.checksums import text_digest, with_checksums
from dualhook.store.direct import DirectFile, in_blocks, without_padding
from dualhook.store.durable import PARTIAL, put, settle, write_bytes
from dualhook.store.header import parsed
from dualhook.store.lock import WriterLock
from dualhook.store.mapped import MappedFile, glanced
from dualhook.store.packed import form_of
from dualhook.store.remote import RangedFile, RemotePath

__all__ = [
    "FORMAT_VERSION",
    "UNREADABLE",
    "Layout",
    "Manifest",
    "glance",
    "key_file_name",
    "open_tensors",
    "read_header",
    "segment_name",
    "tensor_names",
    "version_needed",
    "write_tensors",
]

FORMAT_VERSION = 8
RANKS_SINCE = 2  # a reader of version 1 would miss the rows of other processes without a word
SHARED_KEYS_SINCE = 3  # one of version 2 would miss the keys that another layer holds
PACKED_SINCE = 4  # one of version 3 would take packed output gradients for none
COMPACTED_SINCE = 5  # one of version 4 would look for the segments where they were before
SPARSE_SINCE = 6  # one of version 5 would miss keys and output gradients that are kept without their zeros
EIGHT_BIT_SINCE = 7  # one of version 6 would miss those that are kept in 8 bits
KEY_FILES_SINCE = 8  # one of version 7 would miss keys in files of their own
KEYS = "keys-"  # what the names of files of keys begin with, among the segments
FOLDERS = ("origin", "snapshots", "columns")  # and one of segments
UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)
"""What files that make no sense give."""
HEADER = "dualhook"  # the one key of every file's safetensors metadata; its value is a JSON object


@dataclass(frozen=True)
class Layout:
    """Where things lie in a memory's directory; one behind a URL can be read only.

    ``generation`` counts how often the memory has been compacted, each time into another folder.
    """

    root: Path
    generation: int = 0

    @property
    def segment_folder(self) -> Path:
        """Where the segments lie."""
        return self.root / (f"segments-{self.generation:04d}" if self.generation else "segments")

    @property
    def folders(self) -> list[Path]:
        """The folders that every memory has."""
        return [self.segment_folder, *(self.root / name for name in FOLDERS)]

    def other_generations(self) -> list[Path]:
        """What compacting has left: folders of segments that do not count any more, or never have."""
        found = sorted(self.root.glob("segments*"))
        return [f for f in found if re.fullmatch(r"segments(-\d{4,})?", f.name) and f != self.segment_folder]

    @property
    def manifest(self) -> Path:
        """The file that makes a directory a memory."""
        return self.root / "dualhook.json"

    @property
    def unfinished(self) -> Path:
        """The manifest before it has its name: without the other one, of a memory that is being made or removed."""
        return self.manifest.with_suffix(f".json{PARTIAL}")

    @property
    def latest(self) -> Path:
        """The weights after the last recorded step."""
        return self.root / "latest.safetensors"

    def segment(self, number: int, rank: int = 0) -> Path:
        """The file of a segment, counted from 0 in every process that records."""
        return self.segment_folder / segment_name(number, rank)

    def key_file(self, number: int, rank: int = 0) -> Path:
        """The file of the keys that a segment has brought and later ones refer to."""
        return self.segment_folder / key_file_name(number, rank)

    def segments(self, rank: int | None = None) -> list[Path]:
        """Every committed segment, or those that one process has written: process by process, oldest first."""
        return self._files("", rank)

    def key_files(self, rank: int | None = None) -> list[Path]:
        """The same of keys that segments refer to."""
        return self._files(KEYS, rank)

    def _files(self, prefix: str, rank: int | None) -> list[Path]:
        process = r"(r\d{4}-)?" if rank is None else f"r{rank:04d}-" if rank else ""
        own = re.compile(prefix + process + r"\d{8,}\.safetensors")
        folder = self.segment_folder
        if isinstance(folder, RemotePath):
            names = [path.name for path in folder.glob("*")]
        else:
            names = os.listdir(folder) if folder.is_dir() else []
        return [folder / name for name in sorted(names) if own.fullmatch(name)]

    def origin(self, number: int) -> Path:
        """An origin file, counted from 0; a later one takes the place of earlier ones for the parameters it holds."""
        return self.root / "origin" / f"{number:08d}.safetensors"

    def origins(self) -> list[Path]:
        """Every origin file, oldest first."""
        return sorted(self.root.glob("origin/[0-9]*.safetensors"))

    def snapshot(self, step: int) -> Path:
        """The snapshot of optimiser state after a step."""
        return self.root / "snapshots" / f"{step:08d}.safetensors"

    def snapshots(self) -> list[Path]:
        """Every snapshot file, oldest first."""
        return sorted(self.root.glob("snapshots/[0-9]*.safetensors"))

    @property
    def answers(self) -> Path:
        """Where answers are kept that somebody may ask for again."""
        return self.root / "answers"

    @property
    def is_writable(self) -> bool:
        """Whether anything can be kept beside the memory."""
        return not isinstance(self.root, RemotePath) and os.access(self.root, os.W_OK)

    def column(self, name: str) -> Path:
        """The file of a column over the samples.

        Raises:
            StoreError: the name is not letters, digits and underscores.
        """
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", name):
            raise StoreError(f"column name {name!r}: expected letters, digits and underscores, at most 64")
        return self.root / "columns" / f"{name}.safetensors"

    def columns(self) -> list[Path]:
        """Every column file."""
        return sorted(self.root.glob("columns/*.safetensors"))

    def partials(self) -> list[Path]:
        """Every file that was being written when a process ended."""
        folders = [self.root, self.answers, *self.folders]
        return [path for folder in folders for path in sorted(folder.glob(f"*{PARTIAL}"))]

    def create(self, *, overwrite: bool, lock: WriterLock | None = None) -> None:
        """Make the directory ready for a new memory, under a lock; one that was never finished is no obstacle.

        Raises:
            StoreError: it holds a memory and ``overwrite`` is false, or something else; or somebody is writing there.
        """
        is_memory = self.manifest.exists()
        if is_memory and not overwrite:
            raise StoreError(
                f"{self.root} already holds a memory: choose another path, or pass overwrite=True to replace it"
            )
        is_memory = is_memory or self.unfinished.exists()
        if not is_memory and self.root.exists() and (not self.root.is_dir() or any(self.root.iterdir())):
            raise StoreError(
                f"{self.root} exists and is not empty, but holds no memory: choose another path "
                "(overwrite=True replaces memories only, never other files)"
            )
        new = [folder for folder in (self.root, *self.root.parents) if not folder.exists()]
        self.root.mkdir(parents=True, exist_ok=True)
        if lock is not None:
            lock.take(self.root)
        if is_memory:
            self.clear()
        self.unfinished.touch()
        for folder in [self.root, *(folder.parent for folder in new)]:
            settle(folder)
        for folder in self.folders:
            folder.mkdir(exist_ok=True)
        settle(self.root)

    def clear(self) -> None:
        """Remove the memory's own files; whatever else lies in the directory stays."""
        if self.manifest.exists():
            os.replace(self.manifest, self.unfinished)  # first: from here on it is no memory any more
            settle(self.root)
        self.latest.unlink(missing_ok=True)
        for folder in [*self.folders, *self.other_generations(), self.answers]:
            shutil.rmtree(folder, ignore_errors=True)


def version_needed(rows: Mapping[str, Mapping[str, Any]], names: Collection[str]) -> int:
    """The first format version that knows how the ``rows`` of a segment's header lie in its tensors of these names."""
    if any("key_files" in own for own in rows.values()):
        return KEY_FILES_SINCE
    if any("eight_bit" in own for own in rows.values()):
        return EIGHT_BIT_SINCE
    if any("sparse" in own for own in rows.values()):
        return SPARSE_SINCE
    if any(form_of(name.removeprefix(f"rows/{layer}/") for name in names) for layer in rows):
        return PACKED_SINCE
    return SHARED_KEYS_SINCE if any("key_of" in own for own in rows.values()) else 1


def segment_name(number: int, rank: int = 0) -> str:
    """What the file of a segment is called."""
    return f"{f'r{rank:04d}-' if rank else ''}{number:08d}.safetensors"


def key_file_name(number: int, rank: int = 0) -> str:
    """What the file is called of the keys that came with a segment."""
    return f"{KEYS}{segment_name(number, rank)}"


@dataclass(frozen=True)
class Manifest:
    """What a memory holds: versions, the linear maps of the model, and how many processes have written it.

    ``needs``: the format version that its segments need: of shared keys, of packed output gradients, of sparse
    rows, of those in 8 bits, of keys in files of their own.
    ``id`` tells the memory from others. ``generation`` counts how often it has been compacted, ``dropped`` the rows
    that this has cost every layer.
    """

    layers: tuple[LayerSpec, ...]
    versions: Mapping[str, str]
    ranks: int = 1
    needs: int = 1
    id: str | None = None
    generation: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)

    @property
    def stamp(self) -> dict[str, str]:
        """What the headers of the memory's files say of it."""
        return {} if self.id is None else {"memory": self.id}

    def write(self, layout: Layout, *, rank: int = 0) -> None:
        """Put the manifest in place, whole or not at all; several processes may at the same time."""
        manifest: dict[str, Any] = {
            "format": "dualhook",
            "version": max(self.needs, RANKS_SINCE if self.ranks > 1 else 1, COMPACTED_SINCE if self.generation else 1),
            "written_by": dict(self.versions),
            "layers": [asdict(layer) for layer in self.layers],
        }
        if self.ranks > 1:
            manifest["ranks"] = self.ranks
        if self.id is not None:
            manifest["id"] = self.id
        if self.generation:
            manifest["generation"] = self.generation
        if self.dropped:
            manifest["dropped"] = dict(self.dropped)
        manifest["checksum"] = text_digest(json.dumps(manifest))
        text = json.dumps(manifest, indent=2)
        partial = layout.manifest.with_suffix(f".json.{rank}{PARTIAL}") if rank else layout.unfinished
        put(layout.manifest, lambda path: write_bytes(path, f"{text}\n".encode()), partial)

    @classmethod
    def read(cls, layout: Layout) -> Manifest:
        """Read and check the manifest of a directory.

        Raises:
            StoreError: the directory is no memory, or one of a newer format.
        """
        if not layout.manifest.is_file():
            inside = sorted(path.parent for path in layout.root.glob(f"*/{layout.manifest.name}"))
            hint = f"did you mean {inside[0]}?" if inside else "expected the path that was given to dualhook.instrument"
            raise StoreError(f"{layout.root} holds no memory, there is no file {layout.manifest.name}: {hint}")
        try:
            found = json.loads(layout.manifest.read_text(encoding="utf-8"))
            version = found["version"]
            if found["format"] != "dualhook":
                raise ValueError(f"format {found['format']!r}")
            checksum = found.pop("checksum", None)
            if (checksum is not None or "id" in found) and checksum != text_digest(json.dumps(found)):
                raise ValueError("it is not as it was written")
            if checked_count("version", version, 1) <= FORMAT_VERSION:
                layers = tuple(map(checked_layer, found["layers"]))
                if len({spec.name for spec in layers}) < len(layers):
                    raise ValueError("two layers of one name")
                ranks, generation = checked_count("ranks", found.get("ranks", 1), 1, 2**16), found.get("generation", 0)
                dropped = {name: checked_count("dropped", count) for name, count in found.get("dropped", {}).items()}
                checked_count("generation", generation, 0, 2**32)
                return cls(layers, found["written_by"], ranks, version, found.get("id"), generation, dropped)
        except UNREADABLE as error:
            raise StoreError(f"{layout.manifest} is no manifest of a memory: {error}") from error
        raise StoreError(
            f"{layout.root} is a memory of format version {version}, this dualhook reads up to {FORMAT_VERSION}: "
            "install a newer dualhook"
        )


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any], file: DirectFile | None = None
) -> None:
    """Write one safetensors file, whole or not at all: it appears under its name once it is complete."""
    direct, text = file or DirectFile(), json.dumps(with_checksums(header, tensors))
    put(path, lambda partial: direct.write(partial, in_blocks(tensors), {HEADER: text}))


def open_tensors(path: Path) -> MappedFile | RangedFile:
    """Open a safetensors file for memory-mapped reading, or behind a URL for reading in ranges.

    Raises:
        StoreError: the file is gone or is no safetensors file.
    """
    try:
        return RangedFile(path) if isinstance(path, RemotePath) else MappedFile(path)
    except FileNotFoundError as error:
        raise StoreError(f"{path} cannot be read: it is gone. Open the memory again, or bring the file back") from error
    except UNREADABLE as error:
        raise StoreError(f"{path} cannot be read: {error}") from error


def glance(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The JSON object in a file's metadata and the names of its tensors, by its header alone.

    Raises:
        StoreError: the file is gone or was not written by dualhook.
    """
    if isinstance(path, RemotePath):
        file = open_tensors(path)
        return read_header(path, file), tensor_names(file)
    try:
        metadata, names = glanced(path)
    except UNREADABLE as error:
        raise StoreError(f"{path} cannot be read: {error}") from error
    return _header(path, metadata), names


def tensor_names(file: Any) -> list[str]:
    """The names of the tensors in an open file, without what fills up blocks of the disk."""
    return without_padding(file.keys())


def read_header(path: Path, file: Any) -> dict[str, Any]:
    """The JSON object in a file's metadata.

    Raises:
        StoreError: there is none.
    """
    return _header(path, file.metadata() or {})


def _header(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        return parsed(metadata[HEADER])
    except UNREADABLE as error:
        raise StoreError(f"{path} was not written by dualhook: its metadata holds no {HEADER!r} object") from error
