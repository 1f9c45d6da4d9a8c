"""dualhook as an attributor of dattri: scores [training sample, test sample] that its metrics take.

.. code-block:: python

    attributor = DualMemoryAttributor(model, memory)
    scores = attributor.attribute(train_loader, test_loader)
    lds(scores, ground_truth)

Needs ``dualhook[dattri]``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from dualhook.integrations import library
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler

from dualhook import DualHookError, DualMemory

__all__ = ["DualMemoryAttributor"]

_BaseAttributor: Any = library("dattri.algorithm.base").BaseAttributor


class DualMemoryAttributor(_BaseAttributor):  # type: ignore[misc]
    """Attributes predictions to the samples of a recorded memory: its estimated influence.

    Scores have dattri's sign, positive where training on the sample has improved the test sample: raised its margin or
    logit, or lowered its loss. The memory's samples are rows of the training loader's data set, as
    ``recorder.track(loader)`` numbers them; a row that was never trained on has the score 0.

    Args:
        model: the trained model, as it is after the memory's last step.
        memory: what was recorded of its training.
        of: what would have changed: ``"margin"``, ``"logit"`` or ``"loss"``, see
            :meth:`dualhook.DualMemory.influence`.
        method: ``"decayed"``, ``"cosine"`` or ``"contribution"``, likewise.
        layers: whose weights to look at, default all.
    """

    def __init__(
        self,
        model: nn.Module,
        memory: DualMemory,
        *,
        of: Literal["margin", "logit", "loss"] = "margin",
        method: Literal["decayed", "cosine", "contribution"] = "decayed",
        layers: str | Sequence[str] | None = None,
    ) -> None:
        self.model = model
        self.memory = memory
        self._options: dict[str, Any] = {"of": of, "method": method, "layers": layers}

    def cache(self, full_train_dataloader: Any = None) -> None:
        """Nothing: the memory is what others would work out here."""

    def attribute(self, train_dataloader: DataLoader[Any], test_dataloader: Iterable[Any]) -> Tensor:
        """Scores [training sample, test sample], in the loaders' orders.

        ``test_dataloader`` gives batches of inputs (one tensor or several) and, last, targets.

        Raises:
            DualHookError: a training loader that shuffles, or whose data set is smaller than the memory's.
        """
        rows = self._rows(train_dataloader)
        sign = -1.0 if self._options["of"] == "loss" else 1.0
        parts = []
        for *inputs, targets in test_dataloader:
            given = inputs[0] if len(inputs) == 1 else tuple(inputs)
            found = self.memory.influence(self.model, given, target=targets, **self._options)
            parts.append(self._in_order(rows, found.samples, sign * found.scores.T))
        return torch.cat(parts, 1)

    def self_attribute(self, train_dataloader: DataLoader[Any]) -> Tensor:
        """How far every training sample's own steps have lowered its own loss [training sample], in the loader's order.

        From the recorded rows, see :meth:`dualhook.DualMemory.suspects`.

        Raises:
            DualHookError: likewise, or an optimiser of which the rows do not tell it.
        """
        rows, table = self._rows(train_dataloader), self.memory.suspects(len(self.memory.samples))
        if "self_influence" not in table.columns:
            raise DualHookError(f"no self-influence is known of this memory: {table.footer}")
        order = np.argsort(table["sample"])
        return self._in_order(rows, table["sample"][order], torch.from_numpy(table["self_influence"][order]))

    def _rows(self, loader: DataLoader[Any]) -> np.ndarray:
        """The dataset rows of a loader, in its order."""
        if isinstance(loader.sampler, RandomSampler):
            raise DualHookError("the training loader shuffles: expected one whose order can be told, shuffle=False")
        dataset: Any = loader.dataset
        samples, size = self.memory.samples, len(dataset)
        if len(samples) and samples[-1] >= size:
            raise DualHookError(
                f"the memory knows sample {samples[-1]}, the training loader's data set has {size} rows"
            )
        return np.fromiter(loader.sampler, dtype=np.int64)

    @staticmethod
    def _in_order(rows: np.ndarray, samples: np.ndarray, scores: Tensor) -> Tensor:
        """Scores [sample, ...] by dataset row, 0 for those without."""
        place = torch.from_numpy(np.searchsorted(samples, rows).clip(max=len(samples) - 1))
        known = torch.from_numpy(samples)[place] == torch.from_numpy(rows)
        found = scores[place].float()
        return torch.where(known.reshape(-1, *[1] * (found.dim() - 1)), found, 0.0)
