"""Which training samples would have changed a prediction: the answer object of :meth:`DualMemory.influence`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dualhook.errors import DualHookError, LayerError
from dualhook.host import asked_on_host
from dualhook.table import Table

__all__ = [
    "MEASURES",
    "METHODS",
    "MOST_BYTES",
    "UNITS",
    "Influence",
    "InfluenceMethod",
    "InfluenceUnit",
    "check_asked",
    "check_size",
]

InfluenceMethod = Literal["decayed", "cosine", "contribution"]
InfluenceUnit = Literal["sample", "token"]
MEASURES = ("margin", "logit", "loss")
UNITS = ("sample", "token")

MOST_BYTES = 2**31
"""Of the scores of one influence: 8 for every query, layer, and sample or token."""

METHODS = {
    "decayed": "each training gradient met by the prediction's own, as far as later training has left it (an estimate)",
    "cosine": "cosines between the prediction's gradient and each training gradient (an instant list, no amounts)",
    "contribution": "exact contributions: what the weights are made of, far too large for a removal",
}


def check_asked(method: str, of: str, per: str) -> None:
    """Whether there are such a method, measure and unit.

    Raises:
        DualHookError: there are not.
    """
    for name, value, there in (("method", method, METHODS), ("of", of, MEASURES), ("per", per, UNITS)):
        if value not in there:
            raise DualHookError(f"{name}={value!r}: expected one of {', '.join(there)}")


def check_size(queries: int, layers: int, units: int, per: str) -> None:
    """Whether the scores find room.

    Raises:
        DualHookError: they would take more than ``MOST_BYTES``.
    """
    if (size := 8 * queries * layers * units) > MOST_BYTES:
        raise DualHookError(
            f"the influence of {units:,} {per}s on {queries:,} queries through {layers} layers takes {size:,} bytes: "
            f"expected at most {MOST_BYTES:,}; ask fewer queries at a time, fewer layers (layers=)"
            + (", or per='sample'" if per == "token" else "")
        )


@asked_on_host
class Influence:
    """Per query and training sample, how much training on it has raised what was asked about: an estimate.

    ``scores`` [query, sample] (float64; layers and repeats summed) are positive where the sample has raised the
    margin, logit or loss that was asked about; leaving it out would lower that. ``samples`` are their dataset rows.
    With ``per="token"`` columns of ``scores`` are tokens, ``samples`` says of which dataset row each is, and
    ``positions`` where it stands there (None: columns are samples).
    """

    def __init__(
        self,
        by_layer: Mapping[str, Tensor],
        samples: np.ndarray,
        positions: np.ndarray | None,
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
        self.positions = positions
        self.queries = queries
        """What is asked, as :attr:`Attention.queries` has it; ``score`` is the margin, logit or loss."""
        self.method = method
        self.of = of
        self.note = note
        """What the estimate rests on, and what it does not see."""
        first, *rest = self._by_layer.values()
        self.scores = sum(rest, start=first)

    @property
    def per(self) -> str:
        """What a column of ``scores`` is: ``"sample"`` or ``"token"``."""
        return "sample" if self.positions is None else "token"

    @property
    def meaning(self) -> str:
        """The method and what it means, with :attr:`note`."""
        return f"{self.method}: {METHODS[self.method]}{'; ' if self.note else ''}{self.note}"

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

        Of tokens there is the column position as well, behind sample.

        Raises:
            DualHookError: ``k`` below 1.
        """
        return self._ranked(k, largest=True)

    def bottom(self, k: int = 10) -> Table:
        """The ``k`` samples per query that have lowered it most, the lowest first."""
        return self._ranked(k, largest=False)

    def sum_by(self, column: str) -> Table:
        """Totals per group of samples: columns query, the column, influence.

        ``column`` is one that ``memory.add_column`` has added (labels, documents, …), ``"sample"``, or of tokens
        ``"position"``.

        Raises:
            DualHookError: an unknown column.
        """
        places = self._units(slice(None))
        values = places[column] if column in places else self._column(self.samples, column)
        labels, codes = np.unique(values.astype(object) if values.dtype.kind in "US" else values, return_inverse=True)
        totals = torch.zeros(len(self), len(labels), dtype=torch.float64)
        totals.index_add_(1, torch.from_numpy(codes.astype(np.int64)), self.scores)
        return self._table({column: np.tile(labels, len(self))}, totals, len(labels), f"influence by {column}")

    def to_pandas(self) -> Any:
        """All of it as a DataFrame: query, sample, of tokens position, influence (needs ``dualhook[pandas]``)."""
        units = self._units(np.tile(np.arange(len(self.samples)), len(self)))
        return self._table(units, self.scores, len(self.samples), "").to_pandas()

    def plot(self, ax: Any = None, *, k: int = 10) -> Any:
        """The first query's ``k`` strongest samples as bars (needs ``dualhook[plot]``); returns the Axes."""
        return self.top(k).where(query=0).plot(ax)

    def __repr__(self) -> str:
        return (
            f"estimated influence of {len(self.samples):,} {self.per}s on {len(self)} queries ({self.of}), method "
            f"{self.method}: {METHODS[self.method]}; ask .top(10), .bottom(10), .sum_by(...), .scores"
        )

    def _ranked(self, k: int, *, largest: bool) -> Table:
        if not isinstance(k, int) or k < 1:
            raise DualHookError(f"k={k!r}: expected at least 1")
        count = min(k, len(self.samples))
        # of equals the first sample comes first
        order = torch.stack([own.sort(descending=largest, stable=True).indices[:count] for own in self.scores])
        title = f"the {count} {self.per}s of the {'most' if largest else 'least'} estimated influence on the {self.of}"
        columns = {"rank": np.tile(np.arange(1, count + 1), len(self))} | self._units(order.reshape(-1).numpy())
        return self._table(columns, self.scores.gather(1, order), count, title)

    def _units(self, at: Any) -> dict[str, np.ndarray]:
        """Samples, and positions of tokens, of an index."""
        found = {"sample": self.samples[at]}
        return found if self.positions is None else found | {"position": self.positions[at]}

    def _table(self, columns: Mapping[str, np.ndarray], values: Tensor, each: int, title: str) -> Table:
        head = {"query": np.repeat(np.arange(len(self)), each)}
        return Table(
            head | dict(columns) | {"influence": values.reshape(-1).numpy()},
            title=title,
            footer=self.meaning,
            bars=([name for name in columns if name != "rank"], "influence"),
        )
