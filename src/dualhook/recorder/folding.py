"""Keeps a memory within its budget: the oldest patterns become part of the origin, and nothing changes in the sum."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from dualhook.composition import compose
from dualhook.errors import RuleError, StoreError
from dualhook.optimizers import components
from dualhook.query import rebuild
from dualhook.records import AVERAGE, MOMENTUM, VALUE
from dualhook.store import Store, Writer

__all__ = ["folding_to"]


def folding_to(budget: int) -> partial[None]:
    """What a writer does after every segment to stay within ``budget`` bytes."""
    return partial(_fold, budget)


def _fold(budget: int, writer: Writer) -> None:
    """Fold the oldest segments into the origin until the rest fits the budget; the newest always stays.

    Raises:
        StoreError: an optimiser without a rule: what the origin would become is not known.
    """
    if writer.bytes <= budget:
        return
    store = Store(writer.layout.root)
    gone, left = [], writer.bytes
    for segment in store.segments[:-1]:
        if left <= budget:
            break
        gone.append(segment)
        left -= segment.path.stat().st_size
    if not gone:
        return
    step = gone[-1].last_step
    try:
        parts = _origins_after(store, step)
    except RuleError as error:
        raise StoreError(f"the budget is used up and cannot be folded: {error}") from error
    dtypes = {name: store.dtype(name) for name in parts}
    inexact = {name: store.inexact_steps(name, step) for name in parts}
    writer.write_origin(step, parts, dtypes, folded=step, inexact=inexact)
    for segment in gone:
        segment.path.unlink()
    writer.bytes = left
    for path in store.superseded_by(parts):
        path.unlink()


def _origins_after(store: Store, step: int) -> dict[str, dict[str, Tensor]]:
    """Value and optimiser state, after ``step``, of every parameter whose recording begins before."""
    parts: dict[str, dict[str, Tensor]] = {}
    for spec in store.layers:
        begun = [name for name in spec.parameters if store.origin_steps[name] <= step]
        wanted = {name: _state_names(store, name, step) for name in begun}
        for component in dict.fromkeys(component for names in wanted.values() for component in names):
            rebuilt = rebuild(store, compose(store, spec, horizon=step, component=component))
            for name in begun:
                if component in wanted[name]:
                    parts.setdefault(name, {})[component] = rebuilt[name]
    return parts


def _state_names(store: Store, parameter: str, step: int) -> tuple[str, ...]:
    origin = store.origin(parameter).tensors
    history = store.histories.get(parameter)
    if history is None:  # no step in the segments that are left: it is as its origin says
        return tuple(name for name in (VALUE, MOMENTUM, AVERAGE) if name in origin)
    return components(history.where(history.step <= step), origin)
