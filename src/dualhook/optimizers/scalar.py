"""The scalar rules: every coefficient is one number per step, exact for the SGD family.

The state of one parameter is ``z = (W, B)``, weight and momentum buffer. Every step is linear in it and in the
recorded gradient ``G``::

    W' = ww W + wb B + wg G + ws W_tau
    B' = bw W + bb B + bg G

(``W_tau`` is the weight after an earlier step, which only Lookahead goes back to),
so a weight, or any weighted sum of the weights along the way, is a sum over the origin and over the gradients whose
factors one backward pass finds: the adjoint of the recursion.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from dualhook.errors import RuleError
from dualhook.optimizers.registry import register, rules_in
from dualhook.optimizers.rule import Entry, LinearStep, ReplayRule, Rule
from dualhook.records import AVERAGE, MOMENTUM, SLOW, VALUE, Coefficients, History, Mark

__all__ = ["ASGDRule", "ReplayedScalar", "SGDRule", "ScalarRule", "Transitions", "coefficients", "components"]


@dataclass(frozen=True)
class Transitions:
    """The numbers of every step, each float64 [e]; ``wg`` and ``bg`` multiply the gradient the rows rebuild.

    ``ws`` multiplies the weight after the step that the entry's ``slow_step`` names; None: there is no such step.
    """

    ww: Tensor
    wb: Tensor
    wg: Tensor
    bw: Tensor
    bb: Tensor
    bg: Tensor
    ws: Tensor | None = None

    def put(self, chosen: Tensor, part: Transitions) -> None:
        """Write another rule's numbers into the entries that a bool mask [e] chooses."""
        for field in fields(self):
            numbers = getattr(part, field.name)
            if numbers is not None:
                getattr(self, field.name)[chosen] = numbers


class ScalarRule(Rule):
    """An optimiser whose step is linear in weight, momentum buffer and gradient, with scalar factors."""

    kind: ClassVar[str] = "scalar"
    cost: ClassVar[str] = "one pass"

    @abstractmethod
    def transitions(self, history: History) -> Transitions:
        """The numbers of every entry of ``history``."""

    def keeps_buffer(self, history: History) -> bool:
        """Whether the momentum buffer plays a part in any entry of ``history``."""
        return bool((history.column("momentum") != 0).any())

    def average_rate(self, history: History) -> Tensor:
        """How far each step moves the optimiser's own running mean towards the weight, in [0, 1], float64 [e]."""
        return torch.zeros(len(history), dtype=torch.float64)


class SGDRule(ScalarRule):
    """``torch.optim.SGD``: momentum, Nesterov, dampening, weight decay, maximize.

    With ``decoupled=True`` the weight decay shrinks the weight by ``1 - lr · weight_decay`` beside the gradient step
    (SGDW, Loshchilov and Hutter 2019) instead of joining the gradient.
    """

    def __init__(self, *, decoupled: bool = False) -> None:
        self.decoupled = decoupled
        self.name = "sgdw" if decoupled else "sgd"

    def transitions(self, history: History) -> Transitions:
        lr, momentum, decay = (history.column(name) for name in ("lr", "momentum", "weight_decay"))
        gradient = history.scale * (1 - 2 * history.column("maximize"))  # maximize flips G, not the decay
        coupled = torch.zeros_like(decay) if self.decoupled else decay
        shrink = 1 - lr * decay if self.decoupled else torch.ones_like(decay)
        buffered = momentum != 0
        fresh = buffered & history.marked(Mark.FRESH)  # torch starts the buffer as a copy of the gradient
        intake = torch.where(fresh, 1.0, 1 - history.column("dampening"))
        keep = torch.where(fresh, 0.0, momentum)
        # B' = keep B + intake g with g = coupled W + gradient G; an unbuffered step leaves B alone
        bb = torch.where(buffered, keep, 1.0)
        bw = torch.where(buffered, intake * coupled, 0.0)
        bg = torch.where(buffered, intake * gradient, 0.0)
        # direction = direct · g + through · B'
        nesterov = history.column("nesterov") != 0
        direct = torch.where(buffered & ~nesterov, 0.0, 1.0)
        through = torch.where(buffered, torch.where(nesterov, momentum, 1.0), 0.0)
        return Transitions(
            ww=shrink - lr * (direct * coupled + through * bw),
            wb=-lr * through * bb,
            wg=-lr * (direct * gradient + through * bg),
            bw=bw,
            bb=bb,
            bg=bg,
        )


class ASGDRule(ScalarRule):
    """``torch.optim.ASGD``; its running mean is the average named ``"asgd"``.

    ``eta`` and ``mu`` are the values in force before the step, which torch keeps as float32 tensors.
    """

    name = "asgd"

    def state_numbers(self, state: Mapping[str, object], hyper: Mapping[str, float]) -> dict[str, float]:
        if state:
            return {name: float(state[name]) for name in ("eta", "mu")}  # type: ignore[arg-type]
        # what torch's first step will set up, in the precision it will keep it in
        precise = torch.get_default_dtype() == torch.float64
        return {"eta": float(torch.tensor(hyper["lr"], dtype=torch.float64 if precise else torch.float32)), "mu": 1.0}

    def transitions(self, history: History) -> Transitions:
        eta = history.state["eta"]
        gradient = history.scale * (1 - 2 * history.column("maximize"))
        zero = torch.zeros_like(eta)
        return Transitions(
            ww=1 - eta * (history.column("lambd") + history.column("weight_decay")),
            wb=zero,
            wg=-eta * gradient,
            bw=zero.clone(),
            bb=torch.ones_like(eta),
            bg=zero.clone(),
        )

    def average_rate(self, history: History) -> Tensor:
        return history.state["mu"]


class ReplayedScalar(ReplayRule):
    """A scalar rule among replayed ones, for a parameter that optimisers of both families have trained."""

    kind: ClassVar[str] = "scalar"
    buffer: ClassVar[str | None] = MOMENTUM

    def __init__(self, rule: ScalarRule) -> None:
        self.name = rule.name
        self._rule = rule
        self._couples = isinstance(rule, SGDRule) and not rule.decoupled

    def start(self, weight: Tensor, entry: Entry) -> dict[str, Tensor]:
        return {MOMENTUM: torch.zeros_like(weight)}

    def decay(self, entry: Entry) -> float:
        return entry["weight_decay"] if self._couples else 0.0

    def linearize(self, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], entry: Entry) -> LinearStep:
        handled = ("maximize", "weight_decay") if self._couples else ("maximize",)
        hyper = {name: 0.0 if name in handled else value for name, value in entry.hyper.items()}
        numbers = self._rule.transitions(_single(hyper, entry))
        ww, wb, wg, bb, bg = (float(getattr(numbers, name)[0]) for name in ("ww", "wb", "wg", "bb", "bg"))
        return LinearStep(1.0, from_buffer=-wb, from_gradient=-wg, keep=bb, take=bg, shrink=ww)


def _single(hyper: Mapping[str, float], entry: Entry) -> History:
    """One entry as a history, for a gradient that is already scaled."""
    return History(
        "",
        torch.ones(1, dtype=torch.int64),
        ("",),
        {name: torch.tensor([value], dtype=torch.float64) for name, value in hyper.items()},
        {name: torch.tensor([value], dtype=torch.float64) for name, value in entry.state.items()},
        torch.ones(1, dtype=torch.float64),
        torch.zeros(1, dtype=torch.float64),
        torch.tensor([int(Mark.FRESH) if entry.fresh else 0]),
    )


register("torch.optim.sgd.SGD", SGDRule())
register("torch.optim.asgd.ASGD", ASGDRule())


def components(history: History, origin: Mapping[str, object]) -> tuple[str, ...]:
    """Which tensors make up the parameter's state at the end of ``history``: what a moved origin has to hold."""
    names = [VALUE]
    rules = _rules(history)
    if MOMENTUM in origin or any(rule.keeps_buffer(history) for rule in rules.values()):
        names.append(MOMENTUM)
    if AVERAGE in origin or any(isinstance(rule, ASGDRule) for rule in rules.values()):
        names.append(AVERAGE)
    return tuple(names)


def coefficients(
    history: History, *, horizon: int, weights: Tensor | None = None, component: str = VALUE, begins: int = 0
) -> Coefficients:
    """What one parameter is made of after step ``horizon``, its origin being what it was after step ``begins``.

    ``weights`` [horizon + 1] asks for ``sum_t weights[t] · W_t`` (an average of the weights) instead of the weight
    itself; ``component`` for another part of the optimiser's state: ``"momentum_buffer"`` or ASGD's mean ``"ax"``.

    Raises:
        RuleError: an optimiser of this history has no scalar rule.
    """
    used = history.where(history.step <= horizon)
    rules = _rules(used)
    readout = torch.zeros(len(used) + 1, dtype=torch.float64)  # of W before the first entry, after it, after each next
    momentum, origin_average = 0.0, 0.0
    if component == MOMENTUM:
        momentum = 1.0
    elif component == AVERAGE:
        readout[1:], origin_average = _running_mean(used, rules)
    elif weights is None:
        readout[-1] = 1.0
    else:
        readout = _by_entry(used.step, weights)
    slow = _slow(used, begins)
    pattern, reach, value, buffer, older = _adjoint(_transitions(used, rules), readout, momentum, slow)
    parts = {VALUE: value, MOMENTUM: buffer, AVERAGE: origin_average, SLOW: older}
    return Coefficients(pattern, {name: factor for name, factor in parts.items() if factor != 0.0}, reach)


def _rules(history: History) -> dict[str, ScalarRule]:
    """The rule of every optimiser in a history."""
    found = {}
    for name, rule in rules_in(history).items():
        if not isinstance(rule, ScalarRule):
            raise RuleError(f"{history.parameter!r} was trained by {name}, which has no scalar rule")
        found[name] = rule
    return found


def _transitions(history: History, rules: Mapping[str, ScalarRule]) -> Transitions:
    """All entries' numbers, each by the rule of the optimiser that made the step."""
    whole = Transitions(*(torch.zeros(len(history), dtype=torch.float64) for _ in fields(Transitions)))
    for name, rule in rules.items():
        chosen = torch.tensor([entry == name for entry in history.optimizer], dtype=torch.bool)
        whole.put(chosen, rule.transitions(history.where(chosen)))
    return whole


def _running_mean(history: History, rules: Mapping[str, ScalarRule]) -> tuple[Tensor, float]:
    """Weights [e] of W after each entry in the optimiser's running mean, and that of the mean it started from."""
    rate = torch.zeros(len(history), dtype=torch.float64)
    for name, rule in rules.items():
        chosen = torch.tensor([entry == name for entry in history.optimizer], dtype=torch.bool)
        rate[chosen] = rule.average_rate(history.where(chosen))
    kept = (1 - rate).flip(0).cumprod(0).flip(0)  # what is left at the end of what stood before each entry
    after = torch.cat([kept[1:], torch.ones(min(1, len(history)), dtype=torch.float64)])
    return rate * after, float(kept[0]) if len(history) else 1.0


def _by_entry(step: Tensor, weights: Tensor) -> Tensor:
    """Sum weights over steps [t] into weights over the stretches between entries [e + 1]."""
    total = torch.cat([torch.zeros(1, dtype=torch.float64), weights.to(torch.float64).cumsum(0)])
    edges = torch.cat([torch.zeros(1, dtype=torch.int64), step, torch.tensor([weights.numel()])])
    return total[edges[1:]] - total[edges[:-1]]


def _slow(history: History, begins: int) -> Tensor:
    """Where every entry reads its slow weight, int64 [e]: a stretch, or behind the last if older than ``begins``."""
    step = history.column("slow_step").long()
    stretch = torch.searchsorted(history.step, step, right=True)
    return torch.where(step < begins, len(history) + 1, stretch)


def _adjoint(
    steps: Transitions, readout: Tensor, momentum: float, slow: Tensor
) -> tuple[Tensor, Tensor, float, float, float]:
    """One pass from the last entry to the first.

    Returns the pattern coefficients [e], the factor of W after each entry [e], and those of W_0, B_0 and older slow
    weights.
    ``readout`` [e + 1] asks for the weight between the entries, ``slow`` [e] says where ``ws`` reads it.
    """
    ww, wb, wg, bw, bb, bg, ws = (getattr(steps, field.name).tolist() for field in fields(Transitions))
    read, source = [*readout.tolist(), 0.0], slow.tolist()
    count = len(ww)
    pattern, reach = [0.0] * count, [0.0] * count
    value, buffer = read[count], momentum
    for e in range(count - 1, -1, -1):
        reach[e] = value
        pattern[e] = -(value * wg[e] + buffer * bg[e])
        if ws[e]:
            read[source[e]] += value * ws[e]
        value, buffer = value * ww[e] + buffer * bw[e] + read[e], value * wb[e] + buffer * bb[e]
    found = torch.tensor(pattern, dtype=torch.float64), torch.tensor(reach, dtype=torch.float64)
    return *found, value, buffer, read[count + 1]
