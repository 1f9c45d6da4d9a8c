"""What replayed patterns contribute to queries: a coefficient per entry of the weight, met by every query.

For one step with output gradients ``d`` [n, o], keys ``x`` [n, i] and coefficient ``C`` of the gradient ``dᵀ x``, the
contribution of row n to a query ``x*`` along a direction ``u`` is ``-sum_oi u_o d_no C_oi x_ni x*_i``. Zeros of ``u``
(units that a ReLU has switched off) and of ``x*`` are left out: most of the work is there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dualhook.optimizers import Side
from dualhook.query.parts import ReplayShare
from dualhook.records import Rows

__all__ = ["ReplayScores"]

DENSE = 0.75  # share of non-zeros above which picking them costs more than it saves


class ReplayScores:
    """Sums the contributions of replayed shares by step: the visitor of a :class:`~dualhook.query.replay.Replay`."""

    def __init__(self, query: Tensor, direction: Tensor) -> None:
        self._shape = query.shape[:2]
        self._query = query.reshape(-1, query.shape[-1])
        self._direction = direction.reshape(-1, direction.shape[-1])
        self._inputs = [_nonzero(one) for one in self._query]
        self._outputs: dict[tuple[int, int], list[Tensor | None]] = {}
        self._found: dict[int, Tensor] = {}

    def take(self, step: int) -> Tensor:
        """The contributions [q, n] of a step's rows; they are handed out once."""
        return self._found.pop(step)

    def visit(
        self, step: int, rows: Rows, share: ReplayShare, coefficient: Tensor | float, side: Side, units: slice
    ) -> None:
        """Add what one share's coefficients give for some output units."""
        dtype = torch.promote_types(share.dtype, torch.float32)
        d, u = rows.output_grad[:, units].to(dtype), self._direction[:, units].to(dtype)
        if share.weight.ndim == 1:
            scores = (u * coefficient) @ d.T
        elif side == "elementwise" and isinstance(coefficient, Tensor):
            scores = self._elementwise(d, rows.key.to(dtype), u, coefficient, units)
        else:
            x, q = rows.key.to(dtype), self._query.to(dtype)
            if not isinstance(coefficient, Tensor):
                scores = (u @ d.T) * (q @ x.T) * coefficient
            elif side == "left":
                scores = (u @ coefficient @ d.T) * (q @ x.T)
            else:
                scores = (u @ d.T) * (q @ coefficient.T @ x.T)
        scores = -scores.reshape(*self._shape, -1).sum(1)
        if step in self._found:
            self._found[step] += scores
        else:
            self._found[step] = scores

    def _elementwise(self, d: Tensor, x: Tensor, u: Tensor, coefficient: Tensor, units: slice) -> Tensor:
        place = (units.start, units.stop)
        if place not in self._outputs:
            self._outputs[place] = [_nonzero(one) for one in u]
        found = torch.zeros(len(u), len(d), dtype=d.dtype)
        for k, (outputs, inputs) in enumerate(zip(self._outputs[place], self._inputs, strict=True)):
            own, along, gradients = coefficient, u[k], d
            if outputs is not None:
                own, along, gradients = own.index_select(0, outputs), along[outputs], d.index_select(1, outputs)
            query, keys = self._query[k].to(d.dtype), x
            if inputs is not None:
                own, query, keys = own.index_select(1, inputs), query[inputs], x.index_select(1, inputs)
            if gradients.shape[1] == 0 or keys.shape[1] == 0:
                continue
            found[k] = (((gradients * along) @ own).mul_(keys)) @ query
        return found


def _nonzero(values: Tensor) -> Tensor | None:
    """Where a vector is not zero; None if that is nearly everywhere."""
    found = values.nonzero().squeeze(1)
    return None if len(found) > DENSE * len(values) else found
