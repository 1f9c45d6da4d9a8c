"""The recorder: the only room that knows taps, rules and files at once."""

from __future__ import annotations

from dualhook.recorder.entry import instrument
from dualhook.recorder.front import Recorder

__all__ = ["Recorder", "instrument"]
