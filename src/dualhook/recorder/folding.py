"""Keeps a memory within its budget: the oldest patterns become part of the origin, and nothing changes in the sum."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from dualhook.composition import compose
from dualhook.optimizers import components
from dualhook.query import rebuild
from dualhook.store import Layout, Store

__all__ = ["fold"]

WriteOrigin = Callable[..., None]


def fold(layout: Layout, used: int, budget: int, write_origin: WriteOrigin) -> int:
    """Fold the oldest segments into the origin until ``used`` bytes fit the budget; returns the bytes then used.

    The newest segment always stays.

    Raises:
        RuleError: an optimiser without a rule: what the origin would become is not known.
    """
    if used <= budget:
        return used
    store = Store(layout.root)
    gone = []
    for segment in store.segments[:-1]:
        if used <= budget:
            break
        gone.append(segment)
        used -= segment.path.stat().st_size
    if not gone:
        return used
    step = gone[-1].last_step
    parts: dict[str, dict[str, Tensor]] = {}
    for spec in store.layers:
        for name in spec.parameters:
            if store.origin_steps[name] <= step:
                parts[name] = {}
        histories = {name: store.histories[name] for name in parts if name in store.histories}
        wanted = {
            name: components(history.where(history.step <= step), store.origin(name).tensors)
            for name, history in histories.items()
        }
        for component in dict.fromkeys(c for names in wanted.values() for c in names) or ["value"]:
            rebuilt = rebuild(store, compose(store, spec, horizon=step, component=component))
            for name in spec.parameters:
                if name in parts and component in wanted.get(name, ("value",)):
                    parts[name][component] = rebuilt[name]
    dtypes = {name: str(store.dtype(name)).removeprefix("torch.") for name in parts}
    write_origin(step, parts, dtypes, folded=step)
    for segment in gone:
        segment.path.unlink()
    return used
