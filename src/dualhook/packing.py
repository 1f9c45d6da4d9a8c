"""Output gradients kept in less room: those of a head that is as wide as a vocabulary, and any in 16 bits.

Under softmax cross-entropy a row is a multiple of ``softmax(W x + b) - onehot(target)``: with its key, three numbers
and the weights as they were it is there again. Of any other row the largest can be kept, which loses the rest.

Letters: ``n`` pattern, ``i`` input, ``o`` output, ``k`` numbers kept of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from dualhook.gathering import columns_at

__all__ = [
    "FORMS",
    "Largest",
    "Packed",
    "Scaled",
    "Softmax",
    "changed",
    "pack_largest",
    "pack_scaled",
    "pack_softmax",
    "parts_of",
]

LOOKED_AT = 32  # outputs of every row that are compared before it counts as one of a softmax
WHOLE_ROWS = 8  # rows of which all outputs are
OFF_BY = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 4e-2, torch.float16: 2e-2}
# by which share of their norm these may differ: an exponent carries the rounding of a logit
SOME_OFF_BY = 4  # times as much at some outputs: there one large entry may be most of it
FEW = 64  # outputs that are found one by one


@dataclass(frozen=True)
class Softmax:
    """Rows of one step under softmax cross-entropy: ``exp(W x + b - offset)``, but ``value`` at the ``target``.

    ``target`` [n] int32 is the class that was right, ``offset`` [n] the logarithm of what the softmax divides by less
    that of the loss's factor. ``weight`` [o, i], or [o, i + 1] with the bias behind it, is what the forward passes of
    the step have used.
    """

    name: ClassVar[str] = "softmax"
    fields: ClassVar[tuple[str, ...]] = ("target", "value", "offset")

    target: Tensor
    value: Tensor
    offset: Tensor
    weight: Tensor

    def dense(self, key: Tensor, outputs: Tensor | None = None) -> Tensor:
        """The output gradients [n, o], or those of some ``outputs``, for keys [n, i] and in their dtype."""
        weight = self.weight if outputs is None else self.weight.index_select(0, outputs)
        grads = _logits(key, weight).sub_(self.offset[:, None]).exp_().to(key.dtype)
        if outputs is None:
            return grads.scatter_(1, self.target.long()[:, None], self.value[:, None])
        return torch.where(self.target[:, None] == outputs, self.value[:, None], grads)

    def used_rows(self) -> Tensor | None:
        """Which rows are not exactly zero, as an index [m]; None: all."""
        return _index_of((self.value != 0) | self.offset.isfinite())


@dataclass(frozen=True)
class Largest:
    """Rows of which only the ``value`` [n, k] at some ``index`` [n, k] int32 is kept, of ``width`` outputs."""

    name: ClassVar[str] = "largest"
    fields: ClassVar[tuple[str, ...]] = ("value", "index")

    value: Tensor
    index: Tensor
    width: int

    def used_rows(self) -> Tensor | None:
        """Which rows are not exactly zero, as an index [m]; None: all."""
        return _index_of((self.value != 0).any(1))

    def dense(self, key: Tensor, outputs: Tensor | None = None) -> Tensor:
        """The output gradients [n, o], or those of some ``outputs``; zero where nothing is kept."""
        if outputs is not None and len(outputs) <= FEW:
            return torch.stack([(self.value * (self.index == output)).sum(1) for output in outputs.tolist()], 1)
        found = self.value.new_zeros(len(self.value), self.width).scatter_(1, self.index.long(), self.value)
        return found if outputs is None else columns_at(found, outputs)


@dataclass(frozen=True)
class Scaled:
    """Rows in 16 bits: ``value`` [n, o] float16 times ``scale`` [n], a power of two not above a row's largest number.

    Without it the gradients of a long batch would be less than the smallest number of float16.
    """

    name: ClassVar[str] = "scaled"
    fields: ClassVar[tuple[str, ...]] = ("value", "scale")

    value: Tensor
    scale: Tensor

    def used_rows(self) -> Tensor | None:
        """Which rows are not exactly zero, as an index [m]; None: all."""
        return _index_of((self.value != 0).any(1))

    def dense(self, key: Tensor, outputs: Tensor | None = None) -> Tensor:
        """The output gradients [n, o], or those of some ``outputs``, in the dtype of ``scale``."""
        value = self.value if outputs is None else columns_at(self.value, outputs)
        return value.to(self.scale.dtype) * self.scale[:, None]


Packed = Softmax | Largest | Scaled

FORMS: Mapping[str, type[Packed]] = {form.name: form for form in (Softmax, Largest, Scaled)}


def parts_of(packed: Packed) -> dict[str, Tensor]:
    """What is kept of every row, by name: ``softmax/target`` and the like."""
    return {f"{packed.name}/{field}": getattr(packed, field) for field in packed.fields}


def changed(packed: Packed, change: Callable[[Tensor], Tensor]) -> Packed:
    """The same with a change to what is kept of every row."""
    fields: dict[str, Any] = {field: change(getattr(packed, field)) for field in packed.fields}
    return replace(packed, **fields)


def pack_softmax(key: Tensor, output_grad: Tensor, weight: Tensor, start: int) -> Softmax | None:
    """Rows under softmax cross-entropy; None if some are something else.

    That is told from the sum and some outputs of every row and from all outputs of some rows, others for another
    ``start``. ``key`` [n, i], ``output_grad`` [n, o]; ``weight`` [o, i], or [o, i + 1] with the bias, as the forward
    pass has used it.
    """
    count, width = output_grad.shape
    if not count or width < 2 or key.dtype not in OFF_BY:
        return None
    value, target = _lowest(output_grad)
    sure = value >= 0
    if bool(sure.any()):  # a probability of 1 has left no gradient to tell the target by
        target[sure] = _logits(key[sure], weight).argmax(1)
        value = output_grad.gather(1, target[:, None]).squeeze(1)
    outputs = _every(width, LOOKED_AT, start, key.device)
    others = outputs != target[:, None]
    seen = (output_grad.index_select(1, outputs) * others).to(_computed_in(key))
    logits = _logits(key, weight.index_select(0, outputs))
    # sum of exp(logit - offset) = sum of the gradients
    offset = logits.masked_fill(~others, -torch.inf).logsumexp(1) - seen.sum(1).log()
    faint = ~(seen.sum(1) > LOOKED_AT * torch.finfo(key.dtype).tiny)
    if bool(faint.any()):  # next to nothing: gradients without all their digits
        largest, other = output_grad[faint].max(1)
        offset[faint] = _logit_at(key[faint], weight, other) - largest.to(offset.dtype).log()
    made = (logits - offset[:, None]).exp() * others
    if not bool((_differs(made, seen) <= SOME_OFF_BY * OFF_BY[key.dtype]).all()):  # nor are comparisons with NaN true
        return None
    found = Softmax(target.int(), value, offset, weight.to(key.dtype) if key.element_size() < 4 else weight)
    rows = _every(count, WHOLE_ROWS, start, key.device)
    whole = changed(found, lambda values: values[rows]).dense(key[rows])
    is_told = _sums_are_zero(found, key, output_grad) and _is_alike(whole, output_grad[rows], target[rows])
    return found if is_told else None


def _every(size: int, count: int, start: int, device: torch.device) -> Tensor:
    """About ``count`` numbers below ``size`` at even distances."""
    stride = max(1, size // count)
    return torch.arange(start % stride, size, stride, device=device)


def _sums_are_zero(packed: Softmax, key: Tensor, output_grad: Tensor) -> bool:
    """Whether the rows sum to nothing, up to the rounding of a probability."""
    probable = (_logit_at(key, packed.weight, packed.target.long()) - packed.offset).exp()  # the target's, of the loss
    rounding = OFF_BY[key.dtype] * packed.value.abs() + 2**6 * torch.finfo(packed.offset.dtype).eps * probable
    return bool((output_grad.sum(1, dtype=packed.offset.dtype).abs() <= rounding).all())


def _is_alike(found: Tensor, expected: Tensor, target: Tensor) -> bool:
    """Whether whole rows [n, o] are those that were expected, up to rounding, beside their ``target`` [n]."""
    least, off_by = torch.finfo(found.dtype).tiny, OFF_BY[found.dtype]
    rest = torch.ones_like(found, dtype=torch.bool).scatter_(1, target[:, None], False)
    if bool(((expected == 0) & (found.abs() > least)).any()):  # outputs that were masked
        return False
    told = rest & (torch.minimum(expected, found) > least)
    dtype = _computed_in(found)
    is_level = _tilt(found.to(dtype), expected.to(dtype), told).abs() <= off_by / 2
    return bool(is_level & (_differs(found * rest, expected * rest) <= off_by).all())


def _tilt(found: Tensor, expected: Tensor, told: Tensor) -> Tensor:
    """By how much logarithms of expected numbers grow faster than those found: a slope over all that are ``told``.

    Rounding is even, but smoothed labels and logits that were scaled on their way tilt all rows alike.
    """
    level = torch.where(told, found, 1.0).log()
    level = torch.where(told, level - level.sum(1, keepdim=True) / told.sum(1, keepdim=True).clamp(min=1), 0.0)
    off = torch.where(told, expected / found, 1.0).log()
    spread = level.square().sum()
    return torch.where(spread == 0, 0.0, (off * level).sum() / spread)


def _differs(found: Tensor, expected: Tensor) -> Tensor:
    """The norm of the difference of rows [n, k] as a share of their norm [n]; 0 where there is nothing."""
    dtype = _computed_in(expected)
    left, size = ((part.to(dtype)).norm(dim=1) for part in (found.to(dtype) - expected.to(dtype), expected))
    return torch.where((left == 0) & (size == 0), 0.0, left / size)


def pack_largest(output_grad: Tensor, count: int) -> Largest:
    """Rows by their ``count`` largest numbers."""
    index = output_grad.abs().topk(min(count, output_grad.shape[1]), dim=1).indices
    return Largest(output_grad.gather(1, index), index.int(), output_grad.shape[1])


def pack_scaled(output_grad: Tensor) -> Scaled:
    """Rows in 16 bits."""
    largest = output_grad.abs().amax(1) if output_grad.numel() else output_grad.new_zeros(len(output_grad))
    largest = largest.to(_computed_in(output_grad))
    scale = torch.where((largest > 0) & largest.isfinite(), 2.0 ** largest.log2().floor(), 1.0)
    return Scaled((output_grad / scale[:, None]).half(), scale)


def _index_of(used: Tensor) -> Tensor | None:
    """Of a bool [n], where it is true; None: everywhere."""
    return None if bool(used.all()) else used.nonzero().squeeze(1)


def _lowest(values: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest number of every row [n], and where it is."""
    if values.device.type != "cpu" or values.dtype not in (torch.float32, torch.float64):
        return values.min(1)
    index = torch.from_numpy(values.numpy().argmin(1))  # by vector instructions: ten times as fast
    return values.gather(1, index[:, None]).squeeze(1), index


def _computed_in(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)


def _logits(key: Tensor, weight: Tensor) -> Tensor:
    """``W x + b`` [n, o], rounded to the dtype of ``key`` as a layer under autocast does it, in 32 bits at least."""
    dtype = _computed_in(key)
    used = weight.to(key.dtype).to(dtype)
    has_bias = weight.shape[1] > key.shape[1]
    found = F.linear(key.to(dtype), used[:, : key.shape[1]], used[:, -1] if has_bias else None)
    return found.to(key.dtype).to(dtype)


def _logit_at(key: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """One entry of the same per row [n], at ``index`` [n]."""
    dtype = _computed_in(key)
    used = weight.index_select(0, index).to(key.dtype).to(dtype)
    found = (used[:, : key.shape[1]] * key.to(dtype)).sum(1)
    found = found if weight.shape[1] == key.shape[1] else found + used[:, -1]
    return found.to(key.dtype).to(dtype)
