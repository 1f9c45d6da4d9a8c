"""Where the recording of a parameter begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor
from torch.optim import Optimizer

from dualhook.capture import whole
from dualhook.recorder.changes import Look
from dualhook.recorder.watched import Watched, state_of
from dualhook.records import VALUE
from dualhook.store import Writer

__all__ = ["keep_origins"]


def keep_origins(
    writer: Writer,
    known: Mapping[str, Watched],
    optimizer: Optimizer,
    stepped: Sequence[Watched],
    before: int,
    look: Look,
) -> None:
    """Keep what the parameters that are about to be ``stepped`` on are after step ``before``, if it is their first.

    With them the others in their layer, which may never train. ``known`` are all parameters by name, and ``look`` has
    seen those that step.
    """
    new = [watched for watched in stepped if not watched.stepped]
    if not new:
        return
    parts: dict[str, dict[str, Tensor]] = {}
    for name in dict.fromkeys(name for watched in new for name in watched.spec.parameters):
        parameter = known[name].parameter
        if parameter is not None and not known[name].stepped:
            parts[name] = {VALUE: whole(parameter)}
    for watched in new:
        state = state_of(optimizer, watched.parameter)
        parts[watched.name] |= {name: whole(value) for name, value in state.items() if isinstance(value, Tensor)}
    dtypes = {name: own[VALUE].dtype for name, own in parts.items()}
    now = {watched.name: entries for watched, entries in look.seen}
    for watched in new:
        watched.begin(before, now[watched.name])
    writer.write_origin(before, parts, dtypes)
