"""The memory on disk, as FORMAT.md specifies it: manifest, segments, origin, latest weights, columns."""

from __future__ import annotations

from dualhook.store.answers import AnswerFiles
from dualhook.store.compacting import Saving, compacted
from dualhook.store.cutting import cut_after, tidy
from dualhook.store.durable import PARTIAL, put, settle, write_bytes
from dualhook.store.eightbit import eight_bit_bytes
from dualhook.store.inspection import Damage, Inspection, inspected
from dualhook.store.lanes import Segment
from dualhook.store.layout import FORMAT_VERSION, Layout, Manifest
from dualhook.store.lock import WriterLock
from dualhook.store.pool import is_worth_finding
from dualhook.store.reader import Store
from dualhook.store.remote import located
from dualhook.store.segment import SegmentBuilder
from dualhook.store.sharing import shared_keys
from dualhook.store.spans import Span
from dualhook.store.writer import SEGMENT_BYTES, Writer

__all__ = [
    "FORMAT_VERSION",
    "PARTIAL",
    "SEGMENT_BYTES",
    "AnswerFiles",
    "Damage",
    "Inspection",
    "Layout",
    "Manifest",
    "Saving",
    "Segment",
    "SegmentBuilder",
    "Span",
    "Store",
    "Writer",
    "WriterLock",
    "compacted",
    "cut_after",
    "eight_bit_bytes",
    "inspected",
    "is_worth_finding",
    "located",
    "put",
    "settle",
    "shared_keys",
    "tidy",
    "write_bytes",
]
