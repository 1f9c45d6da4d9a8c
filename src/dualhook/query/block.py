"""A block of output units of one replayed parameter: forward for the optimiser's state, backward for coefficients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from dualhook.maps import gradient
from dualhook.optimizers import Adjoint, LinearStep, ParameterState, Side, advance, apply, pass_by
from dualhook.query.parts import ReplayShare, StepTaken, Synchronization, Totals
from dualhook.query.scoring import RowScores
from dualhook.query.slots import bias_gradient
from dualhook.records import SLOW, Rows

__all__ = ["Block", "Place", "Shelf", "StepRows", "joined"]

SUMMED = 32  # steps that are summed in the model's precision before they join the float64 totals


@dataclass(frozen=True)
class StepRows:
    """A step's rows, and those of them that totals are to hold."""

    step: int
    rows: Rows
    counted: Rows


class Place:
    """A parameter's weight and the state of every optimiser that has stepped on it, after some step.

    ``slow`` is the weight that Lookahead will go back to, where weights are carried along at all; never written to.
    """

    def __init__(self, weight: Tensor, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.weight = weight
        self.slow = weight
        self.states = {name: ParameterState(weight, dict(own)) for name, own in tensors.items()}

    def copy(self, still: frozenset[str] = frozenset()) -> Place:
        """An independent copy; tensors named in ``still`` (``""``: the weight) are shared, since nothing moves them."""
        own = {
            optimizer: {name: held if name in still else held.clone() for name, held in state.tensors.items()}
            for optimizer, state in self.states.items()
        }
        twin = Place(self.weight if "" in still else self.weight.clone(), own)
        twin.slow = self.slow
        return twin

    def of(self, optimizer: str) -> ParameterState:
        """The state of one optimiser; empty before its first step."""
        return self.states.setdefault(optimizer, ParameterState(self.weight, {}))


@dataclass
class _Done:
    """A step on the way forward, kept for the way back."""

    taken: StepTaken
    linear: LinearStep
    gradient: Tensor | None
    weight: Tensor | None  # before the step, where coupled decay looked at it
    kept: list[Tensor]  # what came from the shelf


class Shelf:
    """Tensors that are used again: the system takes longer to hand out fresh memory than a step takes to fill it."""

    def __init__(self) -> None:
        self._free: dict[tuple[torch.dtype, int], list[Tensor]] = {}

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor with whatever was left in it."""
        count = math.prod(shape)
        size = self._size(count)
        free = self._free.get((dtype, size))
        flat = free.pop() if free else torch.empty(size, dtype=dtype)
        return flat[:count].view(shape)

    def keep(self, values: Tensor) -> Tensor:
        """A copy."""
        return self.take(values.shape, values.dtype).copy_(values)

    def give(self, *tensors: Tensor | float | None) -> None:
        """Put back what was taken; nothing else may hold it."""
        for values in tensors:
            if isinstance(values, Tensor):
                size = self._size(values.numel())
                flat = values.as_strided((size,), (1,))
                self._free.setdefault((values.dtype, size), []).append(flat)

    def _size(self, count: int) -> int:
        """Blocks differ by an output unit: sizes are rounded up by an eighth at most."""
        grain = max(1, 1 << (count.bit_length() - 4)) if count >= 16 else 1
        return -(-count // grain) * grain


class Block:
    """Some output units of one share in a replay; blocks know nothing of each other."""

    def __init__(
        self, share: ReplayShare, units: slice, dtype: torch.dtype, *, totals: bool, scores: RowScores | None
    ) -> None:
        self.share = share
        self.units = units
        self.dtype = dtype
        self.sums = totals
        self.scores = scores
        weight = self._cut(share.weight)
        every = list(share.steps)
        first = every[0].optimizer if every else ""
        state = {name: self._cut(value) for name, value in share.tensors.items() if value.ndim and name != SLOW}
        self.place = Place(weight, {first: state})
        self._origin = self.place.copy()
        self._slow_steps = {step for step in share.slow_steps if step >= share.begins}
        older = SLOW in share.tensors and share.begins not in self._slow_steps
        self._slow = self.place.slow = self._cut(share.tensors[SLOW]) if older else self._origin.weight
        self._from_slow: dict[int, float] = {}  # factors of earlier weights, from synchronisations after them
        self._carries = any(step.rule.reads_weight or step.rule.decay(step.entry) for step in every)
        buffers = {step.rule.buffer or "" for step in every if not step.rule.reads_buffer}
        self._still = frozenset() if self._carries else frozenset({"", *buffers})
        self._adjoints: dict[str, Adjoint] = {}
        self._weight = 0.0  # factor of W where the way back has come to
        self._gradients: Tensor | None = None
        self._recent = torch.zeros_like(weight) if totals else None
        self.totals = Totals(*(torch.zeros(weight.shape, dtype=torch.float64) for _ in range(4)))

    def forward(self, steps: Sequence[StepRows], *, whole: bool = False) -> None:
        """Go on over some steps; with ``whole`` everything is moved, not only what later steps depend on."""
        for at in steps:
            self._advance(at, whole=whole or self._carries)

    def checkpoints(self, steps: Sequence[StepRows], edges: Sequence[int]) -> list[Place]:
        """Go on over some steps and come back; the places after the steps named in ``edges``."""
        here, self.place = self.place, self.place.copy(self._still)
        found = []
        for at in steps:
            self._advance(at, whole=self._carries)
            if at.step in edges:
                found.append(self.place.copy(self._still))
        self.place = here
        return found

    def through(self, steps: Sequence[StepRows], shelf: Shelf) -> Tensor | None:
        """Over some steps and back; what their rows contribute [q, n], steps and rows oldest first."""
        here, self.place = self.place, self.place.copy(self._still)
        kept = [self._advance(at, whole=self._carries, shelf=shelf) for at in steps]
        self.place = here
        found = None
        if self.scores is not None:
            found = torch.zeros(self.scores.queries, sum(len(at.rows) for at in steps), dtype=self.dtype)
            end = found.shape[1]
        for at in reversed(steps):
            self._weight += float(self.share.readout[at.step]) + self._from_slow.pop(at.step, 0.0)
            for done in reversed(kept.pop()):
                if isinstance(done, Synchronization):
                    self._synchronize(done)
                    continue
                values, scale, side = self._back(done)
                if found is not None and self.scores is not None and len(at.rows):
                    values, side = self.share.oriented(values, side)
                    found[:, end - len(at.rows) : end] += self.scores.of(at.rows, values, scale, side)
                shelf.give(*done.kept)
            if found is not None:
                end -= len(at.rows)
            if self.sums and at.step % SUMMED == 0:
                self._join()
        return found

    def arrive(self) -> None:
        """The way back has come to the origin."""
        self._weight += float(self.share.readout[: self.share.begins + 1].sum())
        self._weight += self._from_slow.pop(self.share.begins, 0.0)
        self._join()
        self.totals.origin.add_(self._origin.weight, alpha=self._weight)
        self.totals.origin.add_(self._slow, alpha=sum(self._from_slow.values()))  # those older than the origin
        for optimizer, adjoint in self._adjoints.items():
            rule = next(step.rule for step in self.share.steps if step.optimizer == optimizer)
            buffer = self._origin.of(optimizer).tensors.get(rule.buffer or "")
            if buffer is not None:
                self.totals.origin -= apply(adjoint.buffer, buffer, rule.side(self.place.weight))

    def state(self) -> dict[str, Tensor]:
        """What the way back has brought so far, by name; numbers as tensors without dimensions."""
        found = {"weight": torch.tensor(self._weight, dtype=torch.float64)}
        for optimizer, adjoint in self._adjoints.items():
            held, scale = adjoint.product
            found[f"buffer/{optimizer}"] = held if isinstance(held, Tensor) else torch.tensor(held, dtype=torch.float64)
            found[f"scale/{optimizer}"] = torch.tensor(scale, dtype=torch.float64)
        found |= {f"slow/{step}": torch.tensor(v, dtype=torch.float64) for step, v in self._from_slow.items()}
        if self._recent is not None:
            sums = {f"totals/{f.name}": getattr(self.totals, f.name) for f in fields(Totals) if f.name != "origin"}
            found |= {"recent": self._recent, **sums}
        return found

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`state` gave."""
        self._weight = float(state["weight"])
        for name, held in state.items():
            kind, _, rest = name.partition("/")
            if kind == "buffer":
                adjoint = self._adjoints[rest] = Adjoint(self._weight)
                adjoint.product = held.clone() if held.ndim else float(held), float(state[f"scale/{rest}"])
            elif kind == "slow":
                self._from_slow[int(rest)] = float(held)
            elif kind == "totals":
                getattr(self.totals, rest).copy_(held)
        if self._recent is not None:
            self._recent.copy_(state["recent"])

    def _advance(self, at: StepRows, *, whole: bool, shelf: Shelf | None = None) -> list[_Done | Synchronization]:
        """Take the step's entries; kept for the way back on the shelf, if there is one."""
        taken = self.share.taken.get(at.step, ())
        done = self._take(taken, at, whole, shelf) if taken else []
        if whole and at.step in self._slow_steps:
            self.place.slow = self.place.weight.clone()
        return done

    def _take(
        self, taken: Sequence[StepTaken | Synchronization], at: StepRows, whole: bool, shelf: Shelf | None
    ) -> list[_Done | Synchronization]:
        done: list[_Done | Synchronization] = []
        gradient = self._gradient(at.rows, shelf if self.sums else None)
        summed = gradient if at.counted is at.rows or shelf is None else self._gradient(at.counted, shelf)
        for one in taken:
            if isinstance(one, Synchronization):
                if whole:
                    self.place.weight.lerp_(self.place.slow, 1 - one.alpha)
                done.append(one)
                continue
            state = self.place.of(one.optimizer)
            if shelf is None and not whole and pass_by(one.rule, state, gradient, one.entry):
                continue
            decays = shelf is not None and self.sums and one.rule.decay(one.entry)
            before = shelf.keep(state.weight) if shelf is not None and decays else None
            linear = advance(one.rule, state, gradient, one.entry, whole=whole)
            if shelf is not None:
                done.append(self._done(one, linear, summed if self.sums else None, before, shelf))
        if shelf is not None and self.sums:
            if summed is not gradient:
                shelf.give(gradient)
            last_back = next((one for one in done if isinstance(one, _Done)), None)
            if last_back is not None:  # it gives the gradient back
                last_back.kept.append(summed)
            else:
                shelf.give(summed)
        return done

    def _synchronize(self, pull: Synchronization) -> None:
        """Take a synchronisation back: a part of the weight was that of an earlier step."""
        before = self._from_slow.get(pull.slow_step, 0.0)
        self._from_slow[pull.slow_step] = before + (1 - pull.alpha) * self._weight
        self._weight *= pull.alpha

    def _done(
        self, taken: StepTaken, linear: LinearStep, gradient: Tensor | None, before: Tensor | None, shelf: Shelf
    ) -> _Done:
        kept = [] if before is None else [before]
        same = linear.buffer_factor is linear.factor
        for name in ("factor", "buffer_factor", "rest"):
            values = getattr(linear, name)
            if isinstance(values, Tensor) and not (same and name == "buffer_factor"):
                kept.append(shelf.keep(values))
                setattr(linear, name, kept[-1])
        if same:
            linear.buffer_factor = linear.factor
        return _Done(taken, linear, gradient, before, kept)

    def _back(self, done: _Done) -> tuple[Tensor | float, float, Side]:
        """Take one step back; the coefficient of its rebuilt gradient, as a product."""
        rule, entry, linear = done.taken.rule, done.taken.entry, done.linear
        adjoint = self._adjoints.setdefault(done.taken.optimizer, Adjoint())
        adjoint.weight = at_step = self._weight
        values, factor = adjoint.back(linear, fresh=entry.fresh)
        self._weight = adjoint.weight
        side, scale = rule.side(self.place.weight), factor * rule.gradient_scale(entry)
        if self._recent is not None and done.gradient is not None:
            if isinstance(values, Tensor) and side == "elementwise":
                self._recent.addcmul_(values, done.gradient, value=-scale)
            else:
                self._recent.sub_(apply(values, done.gradient, side), alpha=scale)
            decay = rule.decay(entry)
            if decay and done.weight is not None:
                self.totals.weight_decay.sub_(apply(values, done.weight, side), alpha=decay * factor)
            if linear.rest is not None:
                self.totals.rounding.sub_(linear.rest, alpha=at_step)
        return values, scale, side

    def _join(self) -> None:
        if self._recent is not None:
            self.totals.patterns += self._recent
            self._recent.zero_()

    def _gradient(self, rows: Rows, shelf: Shelf | None) -> Tensor:
        """What the rows of one step rebuild; on the shelf, or where the next one will be."""
        d, shape = rows.output_grad[:, self.units].to(self.dtype), self.place.weight.shape
        if rows.slot is not None or rows.constant is not None or self.share.is_natural:
            found = self._laid_out_gradient(d, rows)
            return found if shelf is None else shelf.keep(found)  # what comes off the shelf has room to be put back
        if shelf is None and self._gradients is None:
            self._gradients = torch.empty(shape, dtype=self.dtype)
        out = self._gradients if shelf is None else shelf.take(shape, self.dtype)
        return torch.mm(d.T, rows.key.to(self.dtype), out=out) if len(shape) == 2 else torch.sum(d, 0, out=out)

    def _laid_out_gradient(self, d: Tensor, rows: Rows) -> Tensor:
        """The same of rows that are not plain, or for a parameter that is no matrix."""
        matrix = self.share.as_matrix(self.share.weight)
        if self.share.is_bias:
            return self.share.from_matrix(bias_gradient(d, rows, 1 if matrix.ndim == 1 else matrix.shape[1]))
        return self.share.from_matrix(gradient(d, rows.key.to(self.dtype), rows.slot, matrix.shape[1])).contiguous()

    def _cut(self, value: Tensor) -> Tensor:
        """The block's output units of a tensor; of one that is not laid out by output units, all."""
        by_unit = value.ndim > 0 and value.shape[0] == self.share.weight.shape[0]
        return (value[self.units] if by_unit else value).to(self.dtype, copy=True)


def joined(blocks: Sequence[Block]) -> Totals:
    """The totals of a share from those of its blocks."""
    return Totals(*(torch.cat([getattr(block.totals, f.name) for block in blocks]) for f in fields(Totals)))
