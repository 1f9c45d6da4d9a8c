"""Which training samples would have changed a prediction: the answer object of :meth:`DualMemory.influence`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dualhook.errors import DualHookError, LayerError
from dualhook.table import Table

__all__ = ["METHODS", "Influence", "InfluenceMethod", "check_method"]

InfluenceMethod = Literal["decayed", "cosine", "contribution"]
MEASURES = ("margin", "logit", "loss")

METHODS = {
    "decayed": "each training gradient met by the prediction's own, as far as later training has left it (an estimate)",
    "cosine": "cosines between the prediction's gradient and each training gradient (an instant list, no amounts)",
    "contribution": "exact contributions: what the weights are made of, far too large for a removal",
}


def check_method(method: str, of: str) -> None:
    """Whether there are such a method and measure.

    Raises:
        DualHookError: there are not.
    """
    if method not in METHODS:
        raise DualHookError(f"method={method!r}: expected one of {', '.join(METHODS)}")
    if of not in MEASURES:
        raise DualHookError(f"of={of!r}: expected one of {', '.join(MEASURES)}")


class Influence:
    """Per query and training sample, how much training on it has raised what was asked about: an estimate.

    ``scores`` [query, sample] (float64; layers and repeats summed) are positive where the sample has raised the
    margin, logit or loss that was asked about; leaving it out would lower that. ``samples`` are their dataset rows.
    """

    def __init__(
        self,
        by_layer: Mapping[str, Tensor],
        samples: np.ndarray,
        queries: Table,
        column: Callable[[np.ndarray, str], np.ndarray],
        *,
        method: str,
        of: str,
        note: str = "",
    ) -> None:
        self._by_layer = dict(by_layer)
        self._column = column
        self.samples = samples
        self.queries = queries
        """What is asked, as :attr:`Attention.queries` has it; ``score`` is the margin, logit or loss."""
        self.method = method
        self.of = of
        self.note = note
        """What the estimate rests on, and what it does not see."""
        self.scores = torch.stack(list(self._by_layer.values())).sum(0)

    @property
    def layers(self) -> list[str]:
        """The layers whose weights the estimate goes through."""
        return list(self._by_layer)

    def __len__(self) -> int:
        return len(self.scores)

    def of_layer(self, layer: str) -> Tensor:
        """The part of the scores [query, sample] that goes through one layer's weights.

        Raises:
            LayerError: it was not asked.
        """
        if layer not in self._by_layer:
            raise LayerError(f"layer {layer!r} was not asked: this influence has {', '.join(self._by_layer)}")
        return self._by_layer[layer]

    def top(self, k: int = 10) -> Table:
        """The ``k`` samples per query that have raised it most: columns query, rank, sample, influence.

        Raises:
            DualHookError: ``k`` below 1.
        """
        return self._ranked(k, largest=True)

    def bottom(self, k: int = 10) -> Table:
        """The ``k`` samples per query that have lowered it most, the lowest first."""
        return self._ranked(k, largest=False)

    def sum_by(self, column: str) -> Table:
        """Totals per group of samples: columns query, the column, influence.

        ``column`` is one that ``memory.add_column`` has added: labels, documents, …

        Raises:
            DualHookError: an unknown column.
        """
        values = self._column(self.samples, column)
        labels, codes = np.unique(values.astype(object) if values.dtype.kind in "US" else values, return_inverse=True)
        totals = torch.zeros(len(self), len(labels), dtype=torch.float64)
        totals.index_add_(1, torch.from_numpy(codes.astype(np.int64)), self.scores)
        return self._table({column: np.tile(labels, len(self))}, totals, len(labels), f"influence by {column}", column)

    def to_pandas(self) -> Any:
        """All of it as a pandas DataFrame with the columns query, sample, influence (needs ``dualhook[pandas]``)."""
        samples = np.tile(self.samples, len(self))
        return self._table({"sample": samples}, self.scores, len(self.samples), "", "sample").to_pandas()

    def plot(self, ax: Any = None, *, k: int = 10) -> Any:
        """The first query's ``k`` strongest samples as bars (needs ``dualhook[plot]``); returns the Axes."""
        return self.top(k).where(query=0).plot(ax)

    def __repr__(self) -> str:
        return (
            f"estimated influence of {len(self.samples):,} samples on {len(self)} queries ({self.of}), method "
            f"{self.method}: {METHODS[self.method]}; ask .top(10), .bottom(10), .sum_by(...), .scores"
        )

    def _ranked(self, k: int, *, largest: bool) -> Table:
        if not isinstance(k, int) or k < 1:
            raise DualHookError(f"k={k!r}: expected at least 1")
        count = min(k, len(self.samples))
        # of equals the first sample comes first
        order = torch.sort(self.scores, dim=1, descending=largest, stable=True).indices[:, :count]
        title = f"the {count} samples of the {'most' if largest else 'least'} estimated influence on the {self.of}"
        columns = {
            "rank": np.tile(np.arange(1, count + 1), len(self)),
            "sample": self.samples[order.reshape(-1).numpy()],
        }
        return self._table(columns, self.scores.gather(1, order), count, title, "sample")

    def _table(self, columns: Mapping[str, np.ndarray], values: Tensor, each: int, title: str, label: str) -> Table:
        head = {"query": np.repeat(np.arange(len(self)), each)}
        footer = f"{self.method}: {METHODS[self.method]}{'; ' if self.note else ''}{self.note}"
        return Table(
            head | dict(columns) | {"influence": values.reshape(-1).numpy()},
            title=title,
            footer=footer,
            bars=((label,), "influence"),
        )
