"""Taps: how the rows of a linear map are seen while a model runs. Knows torch.nn, not files."""

from __future__ import annotations

from dualhook.capture.compiled import forget_compiled_code
from dualhook.capture.coverage import coverage_table
from dualhook.capture.intake import Intake
from dualhook.capture.linear import LinearTap, nonzero_rows, tapped
from dualhook.capture.loader import TrackedLoader, as_batch
from dualhook.capture.observe import Observed, directions, observe
from dualhook.capture.probe import LayerProbe, Measurement, fit_scales
from dualhook.capture.recompute import sequence_number
from dualhook.capture.selection import Selection, select_layers, unwrapped
from dualhook.capture.steps import StepWatcher, innermost

__all__ = [
    "Intake",
    "LayerProbe",
    "LinearTap",
    "Measurement",
    "Observed",
    "Selection",
    "StepWatcher",
    "TrackedLoader",
    "as_batch",
    "coverage_table",
    "directions",
    "fit_scales",
    "forget_compiled_code",
    "innermost",
    "nonzero_rows",
    "observe",
    "select_layers",
    "sequence_number",
    "tapped",
    "unwrapped",
]
