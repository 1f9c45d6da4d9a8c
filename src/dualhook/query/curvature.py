"""The curvature of the loss along one layer's weights, from the recorded rows alone: Kronecker factors, eigenvalues.

With ``g_s = sum d k'`` the gradient of a sample's part of the loss and ``w`` its weight in it, the Hessian is close to
``sum g_s g_s' / w`` (the Fisher information). Eigenvectors of the mean ``d d'`` and ``k k'`` are taken for its own, and
its eigenvalues measured along them (EKFAC: George et al. 2018), all of it in the optimiser's metric: where a
preconditioner scales entry (o, i) by about ``row_o · column_i``, outputs are measured by ``√row``, inputs by
``√column``.

Letters: ``n`` pattern, ``o`` output, ``s`` slot, ``c`` column of a slot with the bias's 1 as the last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dualhook.maps import gradient
from dualhook.records import LayerSpec, Rows

__all__ = ["Basis", "Metric", "Moments", "extended", "laid_out", "moments_of", "norms_of"]

WIDEST = 4096  # a side of more dimensions keeps its own coordinates
STILL = 1e-6  # of the largest: what moves less is as good as still
GRADIENTS = 2**25  # numbers of samples' gradients at a time


def extended(spec: LayerSpec, rows: Rows) -> Rows:
    """The rows with the bias's constant as one more column of the key."""
    if spec.bias is None:
        return rows
    one = torch.ones_like(rows.key[:, :1]) if rows.constant is None else rows.constant[:, None].to(rows.key.dtype)
    return replace(rows, key=torch.cat([rows.key, one], 1), constant=None)


@dataclass(frozen=True)
class Metric:
    """How far a step moves the entry (o, i): in proportion to ``row`` [o] times ``column`` [s, c]."""

    row: Tensor
    column: Tensor

    def positive(self) -> Metric:
        """The same where no entry stands still: what can be divided by."""
        return Metric(*(side.clamp(min=STILL * max(float(side.max()), 1e-30)) for side in (self.row, self.column)))

    def measured(self, rows: Rows) -> Rows:
        """Rows in units in which every entry moves alike."""
        column = self.column.reshape(-1) if rows.slot is None else self.column[rows.slot.long()]
        return replace(rows, key=rows.key * column.sqrt(), output_grad=rows.output_grad * self.row.sqrt())


@dataclass(frozen=True)
class Basis:
    """Directions on both sides: ``outputs`` [o, o] and ``inputs`` [s, c, c], columns are vectors; None: coordinates."""

    outputs: Tensor | None
    inputs: Tensor | None

    def along(self, rows: Rows) -> Rows:
        """Rows by their components."""
        output_grad = rows.output_grad if self.outputs is None else rows.output_grad @ self.outputs
        return replace(rows, key=self.turned(rows.key, rows.slot), output_grad=output_grad)

    def turned(self, key: Tensor, slot: Tensor | None, *, back: bool = False) -> Tensor:
        """Keys [..., c] in their slots [...] by their components, or ``back`` from these."""
        if self.inputs is None:
            return key
        vectors = self.inputs.mT if back else self.inputs
        if slot is None or len(vectors) == 1:
            return key @ vectors[0]
        found = torch.empty_like(key)
        for one in torch.unique(slot).tolist():
            own = slot == one
            found[own] = key[own] @ vectors[one]
        return found


@dataclass
class Moments:
    """Second moments of rows: ``outputs`` [o, o], ``inputs`` [s, c, c]; None where a side is too wide."""

    outputs: Tensor | None
    inputs: Tensor | None

    @classmethod
    def none(cls, outputs: int, slots: int, columns: int) -> Moments:
        """Of no rows yet."""
        wide = columns > WIDEST or columns == 1
        return cls(
            None if outputs > WIDEST else torch.zeros(outputs, outputs, dtype=torch.float64),
            None if wide else torch.zeros(slots, columns, columns, dtype=torch.float64),
        )

    def add(self, rows: Rows) -> None:
        """Take more rows, measured in the metric."""
        if self.outputs is not None:
            self.outputs += (rows.output_grad.T @ rows.output_grad).double()
        if self.inputs is None:
            return
        if rows.slot is None:
            self.inputs[0] += (rows.key.T @ rows.key).double()
        else:
            for one in torch.unique(rows.slot).tolist():
                key = rows.key[rows.slot == one]
                self.inputs[one] += (key.T @ key).double()

    def basis(self) -> Basis:
        """Their eigenvectors."""

        def vectors(values: Tensor | None) -> Tensor | None:
            return None if values is None else torch.linalg.eigh(values).eigenvectors.float()

        return Basis(vectors(self.outputs), vectors(self.inputs))


def moments_of(rows: Rows, slots: int, columns: int) -> Tensor:
    """``sum_s g_s ∘ g_s`` [o, s · c] over samples and steps, of rows by their components.

    Patterns of a sample are summed first, those of tokens (slots of one column) are not.
    """
    if columns == 1:
        return gradient(rows.output_grad.square(), rows.key.square(), rows.slot, slots)
    found = rows.output_grad.new_zeros(rows.output_grad.shape[1], slots, columns)
    for slot, own in _by_slot(rows):
        found[:, slot] += _squared(own)
    return found.flatten(1)


def norms_of(rows: Rows) -> tuple[Tensor, Tensor]:
    """``|g_s|^2`` [m] of every sample and step among the rows, and which of them each row belongs to [n]."""
    group, counts = _groups(rows)
    own = (torch.linalg.vector_norm(rows.output_grad, dim=1) * torch.linalg.vector_norm(rows.key, dim=1)).square()
    squares = own.new_zeros(len(counts), dtype=torch.float64).index_add_(0, group, own.double())
    for which, k, d, slot in _of_several(rows, group, counts, lambda most: most * most):
        met = (k @ k.mT) * (d @ d.mT)
        if slot is not None:
            met = met * (slot[:, :, None] == slot[:, None, :])
        squares[which] = met.double().sum((1, 2))
    return squares, group


def _by_slot(rows: Rows) -> Iterator[tuple[int, Rows]]:
    if rows.slot is None:
        yield 0, rows
        return
    for one in torch.unique(rows.slot).tolist():
        yield one, rows.where(rows.slot == one)


def _squared(rows: Rows) -> Tensor:
    """``sum_s g_s ∘ g_s`` [o, c]."""
    group, counts = _groups(rows)
    outputs, columns = rows.output_grad.shape[1], rows.key.shape[1]
    alone = rows.where(counts[group] == 1)
    found = alone.output_grad.square().T @ alone.key.square()
    for _, k, d, _ in _of_several(rows, group, counts, lambda most: outputs * columns):
        found += (d.mT @ k).square().sum(0)
    return found


def _groups(rows: Rows) -> tuple[Tensor, Tensor]:
    """Which sample and step each row is of [n], and how many rows these have [m]."""
    numbers, sample = torch.unique(rows.sample, return_inverse=True)
    _, group, counts = torch.unique(rows.step * len(numbers) + sample, return_inverse=True, return_counts=True)
    return group, counts


def _of_several(
    rows: Rows, group: Tensor, counts: Tensor, size: Callable[[int], int]
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """The samples of more than one row as :func:`laid_out` lays them out, each time with their numbers [m]."""
    several = (counts > 1).nonzero()[:, 0]
    if len(several):
        number = torch.full_like(counts, -1).index_put((several,), torch.arange(len(several)))[group]
        is_of_them = number >= 0
        for samples, k, d, slot in laid_out(rows.where(is_of_them), number[is_of_them], counts[several], size):
            yield several[samples], k, d, slot


def laid_out(
    rows: Rows, group: Tensor, counts: Tensor, size: Callable[[int], int]
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor | None]]:
    """Samples side by side, some at a time, filled up with zeros: keys [m, most, c], gradients [m, most, o], slots.

    ``size(most)`` is how many numbers a sample makes.
    """
    order = group.argsort(stable=True)
    most, widths = int(counts.max()), rows.key.shape[1] + rows.output_grad.shape[1]
    place = torch.arange(len(order)) - (counts.cumsum(0) - counts)[group[order]]
    starts = [0, *counts.cumsum(0).tolist()]
    each = max(1, GRADIENTS // max(size(most), most * widths))
    for first in range(0, len(counts), each):
        last = min(len(counts), first + each)
        own = order[starts[first] : starts[last]]
        at = group[own] - first, place[starts[first] : starts[last]]

        def filled(values: Tensor, at: tuple[Tensor, Tensor] = at, m: int = last - first) -> Tensor:
            found = values.new_zeros(m, most, *values.shape[1:])
            found[at] = values
            return found

        slot = None if rows.slot is None else filled(rows.slot[own])
        yield slice(first, last), filled(rows.key[own]), filled(rows.output_grad[own]), slot
