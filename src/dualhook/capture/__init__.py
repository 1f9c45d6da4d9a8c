"""Taps: how the rows of a linear map are seen while a model runs. Knows torch.nn, not files."""

from __future__ import annotations

from dualhook.capture.audit import Audit, RootHook, Verdict
from dualhook.capture.calls import as_rows, used_rows
from dualhook.capture.compiled import forget_compiled_code
from dualhook.capture.coverage import coverage_table
from dualhook.capture.functional import is_within, leave_all
from dualhook.capture.hooks import Guard, tapped
from dualhook.capture.installing import Removable, install
from dualhook.capture.intake import Intake, Sink
from dualhook.capture.kinds import ROOT, Tapped, linear_maps
from dualhook.capture.loader import TrackedLoader, as_batch
from dualhook.capture.measurement import Measurement, Seen, fit_scales
from dualhook.capture.observe import Observed, directions, observe
from dualhook.capture.precision import operation_of
from dualhook.capture.probe import Corner, LayerProbe, looked
from dualhook.capture.recompute import sequence_number
from dualhook.capture.selection import Selection, select_layers, unwrapped
from dualhook.capture.sharded import Place, is_sharded, local, whole
from dualhook.capture.steps import StepWatcher, innermost
from dualhook.capture.uses import Use

__all__ = [
    "ROOT",
    "Audit",
    "Corner",
    "Guard",
    "Intake",
    "LayerProbe",
    "Measurement",
    "Observed",
    "Place",
    "Removable",
    "RootHook",
    "Seen",
    "Selection",
    "Sink",
    "StepWatcher",
    "Tapped",
    "TrackedLoader",
    "Use",
    "Verdict",
    "as_batch",
    "as_rows",
    "coverage_table",
    "directions",
    "fit_scales",
    "forget_compiled_code",
    "innermost",
    "install",
    "is_sharded",
    "is_within",
    "leave_all",
    "linear_maps",
    "local",
    "looked",
    "observe",
    "operation_of",
    "select_layers",
    "sequence_number",
    "tapped",
    "unwrapped",
    "used_rows",
    "whole",
]
