"""Questions: streaming passes over the patterns, and what they add up to."""

from __future__ import annotations

from dualhook.query.answers import Answer, Answers, Gathered, key_of
from dualhook.query.collectors import Collector, GroupSums, Receipt, TopPatterns
from dualhook.query.parts import REPLAY_BYTES, Composition, ReplayShare, StepTaken, Synchronization
from dualhook.query.replay import Replay
from dualhook.query.streaming import LayerQuery, dual_output, scan, scan_known
from dualhook.query.weights import rebuild

__all__ = [
    "REPLAY_BYTES",
    "Answer",
    "Answers",
    "Collector",
    "Composition",
    "Gathered",
    "GroupSums",
    "LayerQuery",
    "Receipt",
    "Replay",
    "ReplayShare",
    "StepTaken",
    "Synchronization",
    "TopPatterns",
    "dual_output",
    "key_of",
    "rebuild",
    "scan",
    "scan_known",
]
