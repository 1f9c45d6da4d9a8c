"""The recorder: the only room that knows taps, rules and files at once."""

from __future__ import annotations

from dualhook.recorder.front import Recorder, instrument

__all__ = ["Recorder", "instrument"]
