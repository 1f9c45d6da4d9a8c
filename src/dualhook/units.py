"""What an influence is told of: training samples, or the tokens in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from dualhook.errors import LayerError
from dualhook.records import Rows, places_among
from dualhook.store import Store

__all__ = ["Units", "tokens_of"]

WIDTH = 2**31  # more than a sample has positions


@dataclass(frozen=True)
class Units:
    """Samples [s] (dataset rows, ascending), or ``tokens`` [u] of them, ascending.

    A token is the place of its sample among the samples, times ``WIDTH``, plus its position.
    """

    samples: Tensor
    tokens: Tensor | None = None

    def __len__(self) -> int:
        return len(self.samples if self.tokens is None else self.tokens)

    @cached_property
    def owner(self) -> Tensor:
        """The place of every unit's sample among the samples [u]."""
        return torch.arange(len(self.samples)) if self.tokens is None else self.tokens // WIDTH

    @property
    def sample(self) -> np.ndarray:
        """The dataset row of every unit [u]."""
        found: np.ndarray = self.samples[self.owner].numpy()
        return found

    @property
    def position(self) -> np.ndarray | None:
        """The position of every token [u]; None: units are samples."""
        return None if self.tokens is None else (self.tokens % WIDTH).numpy()

    def of(self, rows: Rows) -> Tensor:
        """The unit of every pattern [n]; ``len(self)`` for those of no known sample."""
        place = places_among(self.samples, rows.sample)
        if self.tokens is None:
            return place
        return places_among(self.tokens, torch.where(place < len(self.samples), place * WIDTH + rows.position, -1))


def tokens_of(store: Store, layers: Sequence[str], samples: Tensor) -> Units:
    """The tokens of ``samples`` that any of the layers has patterns of.

    Raises:
        LayerError: a layer that sees samples as a whole, so that its rows belong to no token; or no row of a sample.
    """
    found = {layer: tokens for layer in layers if len(tokens := _tokens(store, layer, samples))}
    if not found:
        raise LayerError(f"no row of {', '.join(layers)} knows its sample: there are no tokens to have an influence")
    whole = [layer for layer, tokens in found.items() if not bool((tokens % WIDTH).any())]
    if whole:
        others = [layer for layer in layers if layer not in whole]
        remedy = f"ask the others, layers={others}" if others else "ask per='sample'"
        raise LayerError(
            f"the rows of {', '.join(map(repr, whole))} know no position, all are at 0: such a layer sees a sample "
            f"as a whole, and has no influence by token; {remedy}"
        )
    return Units(samples, torch.unique(torch.cat(list(found.values()))))


def _tokens(store: Store, layer: str, samples: Tensor) -> Tensor:
    """The tokens [u] that a layer has patterns of, ascending; no more than twice as many are held on the way."""
    found, waiting = torch.zeros(0, dtype=torch.int64), list[Tensor]()
    for sample, position in store.places(layer):
        place = places_among(samples, sample)
        known = place < len(samples)
        waiting.append(torch.unique(place[known] * WIDTH + position[known]))
        if sum(map(len, waiting)) > len(found):
            found, waiting = torch.unique(torch.cat([found, *waiting])), []
    tokens: Tensor = torch.unique(torch.cat([found, *waiting]))
    return tokens
