"""Taps: how the rows of a linear map are seen while a model runs. Knows torch.nn, not files."""

from __future__ import annotations

from dualhook.capture.coverage import coverage_table
from dualhook.capture.intake import Intake
from dualhook.capture.linear import LinearTap, tapped
from dualhook.capture.loader import TrackedLoader, as_batch
from dualhook.capture.observe import Observed, directions, observe
from dualhook.capture.probe import LayerProbe, Measurement, fit_scales
from dualhook.capture.selection import Selection, select_layers, unwrapped
from dualhook.capture.sharded import Place, is_sharded, local, whole
from dualhook.capture.steps import StepWatcher, innermost

__all__ = [
    "Intake",
    "LayerProbe",
    "LinearTap",
    "Measurement",
    "Observed",
    "Place",
    "Selection",
    "StepWatcher",
    "TrackedLoader",
    "as_batch",
    "coverage_table",
    "directions",
    "fit_scales",
    "innermost",
    "is_sharded",
    "local",
    "observe",
    "select_layers",
    "tapped",
    "unwrapped",
    "whole",
]
