"""Keeps a memory within its budget: the oldest patterns become part of the origin, and nothing changes in the sum."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from dualhook.composition import compose, is_replayed, replayed_states
from dualhook.errors import RuleError, StoreError
from dualhook.maps import map_of
from dualhook.optimizers import LOOKAHEAD, components
from dualhook.query import rebuild
from dualhook.records import SLOW, VALUE, LayerSpec
from dualhook.store import Segment, Store, Writer

__all__ = ["folding_to"]


def folding_to(budget: int) -> partial[None]:
    """What a writer does after every segment to stay within ``budget`` bytes."""
    return partial(_fold, budget)


def _fold(budget: int, writer: Writer) -> None:
    """Fold the oldest segments into the origin until the rest fits the budget; the newest always stays.

    Raises:
        StoreError: an optimiser whose rule has gone: what the origin would become is not known.
    """
    if writer.bytes <= budget:
        return
    store = Store(writer.layout.root)
    gone, left = list[Segment](), writer.bytes
    last_used = {path: segment.path for segment in store.segments for path in segment.key_files}
    for segment in store.segments[:-1]:
        if left <= budget:
            break
        gone.append(segment)
        left -= segment.path.stat().st_size
        left -= sum(path.stat().st_size for path, user in last_used.items() if user == segment.path)
    if not gone:
        return
    step = writer.folded = gone[-1].last_step
    try:
        parts = _origins_after(store, step)
        for spec in store.layers:
            for name in parts.keys() & set(spec.parameters):
                parts[name] |= _slow_weight(store, spec, name, step, writer.slow_steps.get(name))
    except RuleError as error:
        raise StoreError(f"the budget is used up and cannot be folded: {error}") from error
    dtypes = {name: store.dtype(name) for name in parts}
    inexact = {name: store.inexact_steps(name, step) for name in parts}
    writer.write_origin(step, parts, dtypes, folded=step, inexact=inexact)
    for segment in gone:
        segment.path.unlink()
    paths = {segment.path for segment in gone}
    writer.pool.remove([path for path, user in last_used.items() if user in paths])
    writer.bytes = left
    for path in store.superseded_by(parts):
        path.unlink()


def _origins_after(store: Store, step: int) -> dict[str, dict[str, Tensor]]:
    """Value and optimiser state, after ``step``, of every parameter whose recording begins before."""
    parts: dict[str, dict[str, Tensor]] = {}
    for spec in store.layers:
        begun = [name for name in spec.parameters if store.origin_steps[name] <= step]
        for name in begun:
            history = store.histories.get(name)
            if history is None or int(history.step[0]) > step:  # no step in the folded segments: as its origin says
                parts[name] = {n: value.double() for n, value in store.origin(name).tensors.items()}
        begun = [name for name in begun if name not in parts]
        replayed = [name for name in begun if is_replayed(store, name)]
        parts |= replayed_states(store, spec, step, replayed)
        begun = [name for name in begun if name not in replayed]
        histories = {name: store.histories[name] for name in begun}
        wanted = {
            name: components(history.where(history.step <= step), store.origin(name).tensors)
            for name, history in histories.items()
        }
        for component in dict.fromkeys(component for names in wanted.values() for component in names):
            rebuilt = rebuild(store, compose(store, spec, horizon=step, component=component))
            for name in begun:
                if component in wanted[name]:
                    shape = store.origin(name).tensors[VALUE].shape
                    parts.setdefault(name, {})[component] = map_of(spec).natural(name, rebuilt[name], shape)
    return parts


def _slow_weight(store: Store, spec: LayerSpec, name: str, step: int, first: int | None) -> dict[str, Tensor]:
    """The weight that a synchronisation after ``step`` goes back to, where that lies before ``step``.

    ``first`` is the step that the first synchronisation goes back to, if there has been one.
    """
    history, origin = store.histories.get(name), store.origin(name).tensors
    taken = () if history is None else zip(history.step.tolist(), history.optimizer, strict=True)
    synchronized = [at for at, optimizer in taken if optimizer == LOOKAHEAD and at <= step]
    slow_step = synchronized[-1] if synchronized else None if SLOW in origin else first
    if slow_step is None:
        return {SLOW: origin[SLOW].double()} if SLOW in origin else {}
    if slow_step >= step:
        return {}
    rebuilt = rebuild(store, compose(store, spec, horizon=slow_step))[name]
    return {SLOW: map_of(spec).natural(name, rebuilt, origin[VALUE].shape)}
