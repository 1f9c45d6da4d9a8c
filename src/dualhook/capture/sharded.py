"""Parameters, gradients and states that several processes hold a part of each (``fully_shard``).

Told by what a tensor offers, so that torch's distributed packages are not imported where nobody uses them. A shard is
some consecutive rows: ``Shard(0)``, the way ``fully_shard`` does it unless told otherwise.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["Place", "is_sharded", "local", "rows_at", "spread", "whole"]


class Place:
    """Where a parameter stands in a module; looked up every time, since loading weights may put another one there."""

    def __init__(self, module: nn.Module, attribute: str) -> None:
        self._module = module
        self._attribute = attribute
        used = self.used
        self._shard = used if used is not None and is_sharded(used) else None

    @property
    def is_sharded(self) -> bool:
        """Whether an optimiser steps on a part of it."""
        return self._shard is not None

    @property
    def used(self) -> nn.Parameter | None:
        """What a forward pass uses; None if it has been taken away or is computed from others."""
        return self._module._parameters.get(self._attribute)  # reading a parametrised attribute would compute it

    @property
    def trained(self) -> nn.Parameter | None:
        """What an optimiser steps on: the shard, also while the whole parameter takes its place in a pass."""
        found = self.used
        if self._shard is None and type(found) is nn.Parameter:  # nearly always; asked many times in every step
            return found
        if found is not None and is_sharded(found):
            self._shard = found
        return found if self._shard is None else self._shard


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that is in this process, without its graph; of one that is not sharded the tensor itself."""
    found: Any = tensor.detach()
    return found.to_local() if is_sharded(found) else found  # type: ignore[no-any-return]


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, without its graph; of a sharded one every process has to ask, in the same order."""
    found: Any = tensor.detach()
    return found.full_tensor() if is_sharded(found) else found  # type: ignore[no-any-return]


def rows_at(tensor: Tensor, index: Tensor) -> Tensor:
    """The rows [k, …] of a whole tensor [n, …] at ``index`` [k]; zero where another process holds them."""
    held, index = local(tensor), index.to(tensor.device)
    if not is_sharded(tensor):
        return held.index_select(0, index)
    index = index - _first_row(tensor)
    here = (index >= 0) & (index < len(held))
    found = held.new_zeros(len(index), *held.shape[1:])
    found[here] = held[index[here]]
    return found


def spread(values: Tensor, like: Tensor) -> Tensor:
    """Values [m, …], one per row that this process holds of ``like`` [n, …], as [n, …]; zero for the others."""
    if not is_sharded(like):
        return values
    first = _first_row(like)
    found = values.new_zeros(like.shape[0], *values.shape[1:])
    found[first : first + len(values)] = values
    return found


def _first_row(tensor: Any) -> int:
    """Which row of the whole tensor is the first one here: all shards but the last ones are equally long."""
    mesh = tensor.device_mesh
    length = -(-tensor.shape[0] // mesh.size(mesh.ndim - 1))
    return int(min(tensor.shape[0], mesh.get_local_rank(mesh.ndim - 1) * length))
