"""dualhook as an explainer of quanda, which measures how well explainers attribute.

.. code-block:: python

    explainer = DualMemoryExplainer(model, train_dataset, memory=memory)
    metric = ClassDetectionMetric(model, train_dataset)
    metric.update(explainer.explain(images, labels), labels)
    print(metric.compute())

Where a metric or benchmark makes the explainer itself, the memory goes into its ``expl_kwargs``. Needs
``dualhook[quanda]``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from dualhook.integrations import library
from torch import Tensor, nn

from dualhook import DualHookError, DualMemory

__all__ = ["DualMemoryExplainer"]

_Explainer: Any = library("quanda.explainers").Explainer


class DualMemoryExplainer(_Explainer):  # type: ignore[misc]
    """Explains predictions by the samples of a recorded memory: its estimated influence.

    Scores are positive where training on the sample has raised the target's margin. The memory's samples are rows of
    ``train_dataset``, as ``recorder.track(loader)`` numbers them; a row that was never trained on has the score 0.

    Args:
        model: the trained model, as it is after the memory's last step.
        train_dataset: the data set it was trained on.
        memory: what was recorded of that.
        task: ``"image_classification"`` or ``"text_classification"``, where inputs are mappings of tensors.
        of: what would have changed: the target's ``"margin"`` or ``"logit"``, see
            :meth:`dualhook.DualMemory.influence`.
        method: ``"decayed"``, ``"cosine"`` or ``"contribution"``, likewise.
        layers: whose weights to look at, default all.
        checkpoints: as other explainers take them.
        checkpoints_load_func: likewise.

    Raises:
        DualHookError: the memory knows samples that are no rows of the data set, or none at all.
    """

    accepted_tasks = ("image_classification", "text_classification")

    def __init__(
        self,
        model: nn.Module,
        train_dataset: Any,
        *,
        memory: DualMemory,
        task: str = "image_classification",
        of: Literal["margin", "logit"] = "margin",
        method: Literal["decayed", "cosine", "contribution"] = "decayed",
        layers: str | Sequence[str] | None = None,
        checkpoints: str | list[str] | None = None,
        checkpoints_load_func: Any = None,
    ) -> None:
        super().__init__(model, train_dataset, task, checkpoints, checkpoints_load_func)
        samples, rows = memory.samples, len(train_dataset)
        if not len(samples) or samples[-1] >= rows:
            found = f"row {samples[-1]}" if len(samples) else "none: record with recorder.track(loader)"
            raise DualHookError(f"the memory's samples: expected rows 0 to {rows - 1} of train_dataset, got {found}")
        self.memory = memory
        self._options: dict[str, Any] = {"of": of, "method": method, "layers": layers}

    def explain(self, test_data: Tensor | Mapping[str, Tensor], targets: Sequence[int] | Tensor) -> Tensor:
        """Scores [q, rows of the training set] of what the ``targets`` [q] have on the test samples [q]."""
        found = self.memory.influence(self.model, test_data, target=torch.as_tensor(targets), **self._options)
        scores = torch.zeros(len(found), len(self.train_dataset))
        scores[:, torch.from_numpy(found.samples)] = found.scores.float()
        return scores.to(self.device)

    def self_influence(self, batch_size: int = 32) -> Tensor:
        """How far every training sample's own steps have lowered its own loss [rows of the training set].

        From the recorded rows, see :meth:`dualhook.DualMemory.suspects`; where they do not tell (optimisers whose steps
        are made of more than their state) by explaining the training set, ``batch_size`` samples at a time.
        """
        table = self.memory.suspects(len(self.memory.samples))
        if "self_influence" not in table.columns:
            found: Tensor = super().self_influence(batch_size)
            return found
        scores = torch.zeros(len(self.train_dataset))
        scores[torch.from_numpy(table["sample"])] = torch.from_numpy(table["self_influence"].astype(np.float32))
        return scores.to(self.device)
