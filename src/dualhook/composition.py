"""What a layer's weights are made of: the ledger turned into factors of origin and patterns, by the rules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dualhook.errors import RuleError
from dualhook.maps import map_of
from dualhook.optimizers import (
    LOOKAHEAD,
    Entry,
    Exactness,
    FittedRule,
    LookaheadRule,
    ReplayedScalar,
    ReplayRule,
    Rule,
    ScalarRule,
    average_weights,
    coefficients,
    collapsed,
    rules_in,
)
from dualhook.query import REPLAY_BYTES, Composition, Replay, ReplayShare, StepTaken, Synchronization
from dualhook.records import AVERAGE, SLOW, VALUE, Coefficients, FactorVectors, History, LayerSpec, Mark
from dualhook.store import Store

__all__ = [
    "Explanation",
    "check_average",
    "compose",
    "explanation",
    "is_replayed",
    "replayed_states",
    "rules_of",
    "shares_of",
    "unknown_composition",
]


def compose(
    store: Store,
    spec: LayerSpec,
    *,
    horizon: int,
    weights: Tensor | None = None,
    component: str = VALUE,
    replay_bytes: int = REPLAY_BYTES,
    preview: bool = False,
    tick: Callable[[int], None] | None = None,
) -> Composition:
    """The composition of a layer after step ``horizon``.

    ``weights`` [horizon + 1] asks for that average of the weights along the way, ``component`` for another part of
    the optimiser's state than the weight itself (of parameters under a scalar rule only); ``replay_bytes`` is the
    budget of replays, ``preview`` asks for snapshots in their place, ``tick`` is called while they run.

    Raises:
        RuleError: the layer's rule is not registered any more, or no preview can be had.
    """
    replays, parts, factor = [], [], None
    for name in spec.parameters:
        if is_replayed(store, name):
            replays.append(_replay_share(store, spec, name, horizon, weights))
            if preview:
                replays[-1].snapshots = _snapshots(store, replays[-1])
            nothing = map_of(spec).matrix(name, store.origin(name).tensors[VALUE])
            nothing = torch.zeros_like(nothing, dtype=torch.float64)
            parts.append((torch.zeros(horizon + 1, dtype=torch.float64), nothing))
            continue
        found = _coefficients(store, name, horizon, weights, component)
        by_step, share = _by_step(store, name, horizon, found)
        parts.append((by_step, map_of(spec).matrix(name, share)))
        if name == spec.weight and component == VALUE:
            factor = _factor(store, name, horizon, found)
    weight, origin_weight = parts[0]
    bias, origin_bias = parts[1] if len(parts) > 1 else (None, None)
    return Composition(
        spec,
        weight,
        origin_weight,
        bias,
        origin_bias,
        tuple(replays),
        replay_bytes=replay_bytes,
        factor=factor,
        tick=tick,
        preview=preview,
    )


def unknown_composition(spec: LayerSpec, horizon: int, why: str) -> Composition:
    """What stands for a layer whose optimiser's rule has gone: keys and queries are known, coefficients are not."""
    nan = torch.full((horizon + 1,), torch.nan, dtype=torch.float64)
    weight = torch.full((spec.out_features, spec.in_features), torch.nan, dtype=torch.float64)
    if spec.bias is None:
        return Composition(spec, nan, weight, unknown=why)
    bias = weight[:, 0] if spec.slots == 1 else weight[:, : spec.slots]
    return Composition(spec, nan, weight, nan, bias, unknown=why)


def check_average(
    store: Store, specs: Iterable[LayerSpec], name: str, horizon: int, settings: Mapping[str, Any]
) -> None:
    """Whether a memory can be asked about an average of its weights.

    Raises:
        RuleError: it cannot, or these settings make none.
    """
    if name == "asgd":
        if not any("asgd" in explanation(store, spec).rule for spec in specs):
            raise RuleError(
                f"{store.layout.root} was not trained by torch.optim.ASGD: there is no mean of its own to ask about"
            )
    elif store.first_step:
        raise RuleError(
            f"{store.layout.root} has folded its first {store.first_step} steps into the origin: "
            "an average needs every step; record with a larger max_bytes"
        )
    else:
        average_weights(name, horizon=horizon, **settings)


def rules_of(store: Store, parameter: str) -> dict[str, Rule]:
    """The rule of every optimiser that has stepped on a parameter, by the optimiser's class."""
    history = store.histories.get(parameter)
    return {} if history is None else rules_in(history)


def is_replayed(store: Store, parameter: str) -> bool:
    """Whether a parameter's rules need its rows."""
    return any(isinstance(rule, ReplayRule) for rule in rules_of(store, parameter).values())


@dataclass(frozen=True)
class Explanation:
    """Which rules explain a layer, as tables show them; several are listed."""

    optimizer: str
    rule: str
    kind: str
    cost: str
    exact: bool
    """Whether every rule is, at least up to the optimiser's own rounding."""


def explanation(store: Store, spec: LayerSpec) -> Explanation:
    """How the steps on a layer are explained."""
    rules = {name: rule for parameter in spec.parameters for name, rule in rules_of(store, parameter).items()}

    def listed(values: Iterable[str]) -> str:
        return ", ".join(dict.fromkeys(values))

    return Explanation(
        listed(name.rpartition(".")[2] for name in rules if name != LOOKAHEAD),
        listed(rule.name for rule in rules.values()),
        listed(rule.kind for rule in rules.values()),
        listed(sorted(rule.cost for rule in rules.values())),
        all(rule.exactness is not Exactness.APPROXIMATE for rule in rules.values()),
    )


def replayed_states(store: Store, spec: LayerSpec, step: int, names: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """Value and optimiser state after ``step`` of those of the layer's parameters that are replayed."""
    shares = [_replay_share(store, spec, name, step, None) for name in names]
    found = Replay(store, spec.name, shares, budget=REPLAY_BYTES).forward() if shares else []
    states = {}
    for share, (weight, tensors) in zip(shares, found, strict=True):
        states[share.parameter] = {VALUE: weight.double(), **{n: v.double() for n, v in tensors.items()}}
    return states


def shares_of(store: Store, spec: LayerSpec, horizon: int) -> list[ReplayShare]:
    """The layer's parameters as replays take them, whatever their rules, with their snapshots; the weight first.

    Raises:
        RuleError: steps of a parameter were fitted, or its rule is not registered any more.
    """
    shares = []
    for name in spec.parameters:
        if name in store.histories:
            shares.append(share := _replay_share(store, spec, name, horizon, None))
            found = store.snapshots(name)
            share.snapshots = {step: partial(_laid_out, store, spec, share, step) for step in found if step <= horizon}
    return shares


def _laid_out(store: Store, spec: LayerSpec, share: ReplayShare, step: int) -> dict[str, Tensor]:
    """A snapshot of an optimiser's state, laid out as the share's weight is."""
    own, found = map_of(spec), store.snapshot(share.parameter, step)
    if share.map is None or share.is_natural:
        return found
    return {n: own.matrix(share.parameter, v) if v.shape == share.shape else v for n, v in found.items()}


def _replay_share(store: Store, spec: LayerSpec, name: str, horizon: int, weights: Tensor | None) -> ReplayShare:
    origin, own = store.origin(name), map_of(spec)
    readout = torch.zeros(horizon + 1, dtype=torch.float64)
    if weights is None:
        readout[horizon] = 1.0
    else:
        readout += weights.double()
    history = store.histories[name]
    shape = origin.tensors[VALUE].shape
    share = ReplayShare(
        name,
        min(origin.step, horizon),
        origin.tensors[VALUE],
        {part: value for part, value in origin.tensors.items() if part != VALUE},
        _taken(history.where(history.step <= horizon)),
        readout,
        store.dtype(name),
        None if own.keeps_shape and len(store.uses(spec.name)) == 1 else own,
        tuple(shape),
    )
    if share.map is not None and not share.is_natural:

        def laid_out(values: Tensor) -> Tensor:
            return own.matrix(name, values).contiguous() if values.shape == shape else values

        tensors = {part: laid_out(value) for part, value in share.tensors.items()}
        share = replace(share, weight=laid_out(share.weight), tensors=tensors)
    return share


def _snapshots(store: Store, share: ReplayShare) -> dict[int, Callable[[], Mapping[str, Tensor]]]:
    """What loads the snapshots of a parameter's optimiser state.

    Raises:
        RuleError: there are none, or they would not do.
    """
    rules = {own.rule.name: own.rule for own in share.steps}
    if any(not rule.preview_state for rule in rules.values()) or len({own.optimizer for own in share.steps}) > 1:
        raise RuleError(
            f"no preview of {share.parameter!r}: what {' and '.join(rules)} did is made of more than one optimiser's "
            "state at a few steps; ask with method='exact'"
        )
    if share.map is not None:
        raise RuleError(
            f"no preview of {share.parameter!r}: previews are of nn.Linear's weights only; ask with method='exact'"
        )
    found = store.snapshots(share.parameter)
    if not found:
        raise RuleError(f"no preview of {share.parameter!r}: the memory holds no snapshots; ask with method='exact'")
    return {step: partial(store.snapshot, share.parameter, step) for step in found}


def _taken(history: History) -> dict[int, list[StepTaken | Synchronization]]:
    """The steps of a history as a replay takes them."""
    rules: dict[str, ReplayRule] = {}
    for name, rule in rules_in(history).items():
        if isinstance(rule, LookaheadRule):
            continue
        if isinstance(rule, ScalarRule):
            rules[name] = ReplayedScalar(rule)
        elif isinstance(rule, ReplayRule):
            rules[name] = rule
        else:
            raise RuleError(f"{history.parameter!r} was trained by {name}, which has no rule that can be replayed")
    hyper = {name: values.tolist() for name, values in history.hyper.items()}
    state = {name: values.tolist() for name, values in history.state.items()}
    fresh, scale = history.marked(Mark.FRESH).tolist(), history.scale.tolist()
    found: dict[int, list[StepTaken | Synchronization]] = {}
    for e, step in enumerate(history.step.tolist()):
        numbers = {name: values[e] for name, values in hyper.items()}
        noted = {name: values[e] for name, values in state.items()}
        optimizer = history.optimizer[e]
        if optimizer not in rules:
            found.setdefault(step, []).append(Synchronization(numbers["alpha"], int(numbers["slow_step"])))
            continue
        entry = Entry(numbers, noted, scale[e], fresh[e])
        found.setdefault(step, []).append(StepTaken(entry, rules[optimizer], optimizer))
    return found


def _coefficients(store: Store, name: str, horizon: int, weights: Tensor | None, component: str) -> Coefficients:
    """What one parameter is made of, by its scalar rules."""
    history = store.histories.get(name)
    if history is None:  # never stepped: it is what it was
        nothing = torch.zeros(0, dtype=torch.float64)
        return Coefficients(nothing, {component: 1.0}, nothing)
    begins = store.origin_steps[name]
    return coefficients(history, horizon=horizon, weights=weights, component=component, begins=begins)


def _by_step(store: Store, name: str, horizon: int, found: Coefficients) -> tuple[Tensor, Tensor]:
    """Coefficients by step [horizon + 1] and the origin's share of one parameter."""
    by_step = torch.zeros(horizon + 1, dtype=torch.float64)
    if found.pattern.numel():
        by_step.index_add_(0, store.histories[name].step[: found.pattern.numel()], found.pattern)
    origin = store.origin(name).tensors
    share = torch.zeros_like(origin[VALUE], dtype=torch.float64)
    for part, factor in found.origin.items():
        if part in origin:
            share += factor * origin[part].double()
        elif part in (AVERAGE, SLOW):  # what has not begun is the weight itself, a momentum buffer zero
            share += factor * origin[VALUE].double()
    return by_step, share


def _factor(store: Store, name: str, horizon: int, found: Coefficients) -> FactorVectors | None:
    """What multiplies the rows of a weight whose steps were fitted; None if none was."""
    if not any(isinstance(rule, FittedRule) for rule in rules_of(store, name).values()):
        return None
    return collapsed(store.histories[name], found, store.fitted(name), horizon)
