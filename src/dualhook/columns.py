"""What patterns can be grouped by: their coordinates, columns recorded with them, and values of the samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dualhook.errors import DualHookError
from dualhook.records import COORDINATES, NO_SAMPLE, Rows
from dualhook.store import Store
from dualhook.summaries import UNKNOWN, Grouping

__all__ = ["Columns"]


class Columns:
    """The columns of one memory."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._recorded = store.row_columns()
        self._added = {
            name: values if categories is None else np.asarray(categories, dtype=object)[values]
            for name, (values, categories) in store.sample_columns().items()
        }

    @property
    def names(self) -> list[str]:
        """Coordinates, then recorded and added columns."""
        return [*COORDINATES, *self._recorded, *(name for name in self._added if name not in self._recorded)]

    def samples(self, layers: Sequence[str]) -> np.ndarray:
        """The samples that any of the layers has patterns of, ascending."""
        parts = [torch.unique(part) for layer in layers for part in self._store.coordinates(layer, "sample")]
        found = torch.unique(torch.cat(parts)) if parts else torch.zeros(0, dtype=torch.int64)
        known: np.ndarray = found[found != NO_SAMPLE].numpy()
        return known

    def add(
        self, name: str, values: Sequence[Any] | np.ndarray | Tensor | Mapping[int, Any], samples: np.ndarray
    ) -> None:
        """Keep a value for every sample, in memory and beside the segments."""
        if name in COORDINATES or name in self._recorded:
            raise DualHookError(f"column {name!r} is recorded with the patterns: choose another name")
        length = int(samples[-1]) + 1 if len(samples) else 0
        if isinstance(values, Mapping):
            missing = [sample for sample in samples.tolist() if sample not in values]
            if missing:
                raise DualHookError(
                    f"column {name!r} has no value for sample {missing[0]} ({len(missing)} are missing)"
                )
            listed: Any = [values.get(sample) for sample in range(max([length, *(k + 1 for k in values)]))]
            first = next(iter(values.values()), 0)
            listed = [first if value is None else value for value in listed]  # rows that no pattern refers to
        else:
            listed = values.detach().cpu().numpy() if isinstance(values, Tensor) else values
        array = np.asarray(listed)
        if array.ndim != 1 or len(array) < length:
            raise DualHookError(
                f"column {name!r} of shape {list(array.shape)}: expected one value for each dataset row, at least "
                f"{length}, since the memory holds patterns of sample {length - 1}"
            )
        if array.dtype.kind in "biuf":
            numbers = array.astype(np.float64 if array.dtype.kind == "f" else np.int64)
            self._store.write_column(name, torch.from_numpy(numbers), None)
            self._added[name] = torch.from_numpy(numbers)
        else:
            categories, codes = np.unique(array.astype(str), return_inverse=True)
            self._store.write_column(name, torch.from_numpy(codes.astype(np.int64)), categories.tolist())
            self._added[name] = categories.astype(object)[codes]

    def of_samples(self, column: str) -> Sequence[Any] | None:
        """An added column's values by sample; None of one that was recorded with the patterns."""
        values = None if column in self._recorded else self._added.get(column)
        listed: Sequence[Any] | None = None if values is None else np.asarray(values).tolist()
        return listed

    def grouping(self, layer: str, column: str) -> Grouping:
        """A column as groups of one layer's patterns, in ascending order; samples that are not known come first.

        Raises:
            DualHookError: there is no such column.
        """
        if column in COORDINATES or column in self._recorded:
            return self._recorded_grouping(layer, column)
        if column not in self._added:
            raise DualHookError(f"no column {column!r}: expected one of {', '.join(self.names)}; see memory.add_column")
        labels, codes = np.unique(np.asarray(self._added[column]), return_inverse=True)
        known = torch.from_numpy(codes.astype(np.int64) + 1)
        # group 0: the sample is not known, or came after the column was added
        code = torch.cat([torch.zeros(1, dtype=torch.int64), known])
        return Grouping([UNKNOWN, *labels.tolist()], partial(_of_samples, code))

    def added_to(self, samples: np.ndarray, name: str) -> np.ndarray:
        """The values of an added column for some samples; those that came after it was added are unknown.

        Raises:
            DualHookError: no column of that name was added.
        """
        if name not in self._added:
            added = f"expected one of {', '.join(self._added)}" if self._added else "none was added"
            raise DualHookError(f"no column {name!r} of the samples: {added}; see memory.add_column")
        values = np.asarray(self._added[name])
        if not len(samples) or int(samples[-1]) < len(values):
            found: np.ndarray = values[samples]
            return found
        wide = np.full(int(samples[-1]) + 1, UNKNOWN, dtype=object)
        wide[: len(values)] = values
        return np.array([str(value) for value in wide[samples]], dtype=object)

    def _recorded_grouping(self, layer: str, column: str) -> Grouping:
        stored = column if column in COORDINATES else f"column/{column}"
        parts = [torch.unique(part.double()) for part in self._store.coordinates(layer, stored)]
        values = torch.unique(torch.cat(parts)) if parts else torch.zeros(0, dtype=torch.float64)
        if column in COORDINATES:
            return Grouping(values.long().tolist(), partial(_among, values, column))
        # a batch without the column has left NaN, or -1 among whole numbers: group 0
        known = values[~values.isnan() & (values != -1)]
        whole = bool((known == known.round()).all())
        labels = known.long().tolist() if whole else known.tolist()
        return Grouping([UNKNOWN, *labels], partial(_among_known, known, column))


def _of_samples(code: Tensor, rows: Rows) -> Tensor:
    """The groups of samples, by a code [1 + sample] that begins with that of unknown ones."""
    return code[torch.where(rows.sample < len(code) - 1, rows.sample, -1) + 1]


def _among(values: Tensor, column: str, rows: Rows) -> Tensor:
    """Where a column's values stand among all of them, ascending."""
    return torch.searchsorted(values, _of_rows(rows, column))


def _among_known(known: Tensor, column: str, rows: Rows) -> Tensor:
    """The same behind group 0, of those that have none."""
    found = _of_rows(rows, column)
    return torch.where(found.isnan() | (found == -1), 0, 1 + torch.searchsorted(known, found))


def _of_rows(rows: Rows, column: str) -> Tensor:
    if column in COORDINATES:
        values: Tensor = getattr(rows, column)
        return values.double()
    found = rows.columns.get(column)
    return torch.full((len(rows),), torch.nan, dtype=torch.float64) if found is None else found.double()
