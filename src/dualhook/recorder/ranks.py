"""The processes that train one model together: DistributedDataParallel, or shards of ``fully_shard``.

Every process records its own rows, process 0 the rest. What is decided from measurements is decided from their sum, so
that all processes decide the same.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dualhook.capture import is_sharded
from dualhook.errors import DualHookError, LayerError, StoreError
from dualhook.records import Rows

__all__ = ["Ranks", "ranks_of"]

T = TypeVar("T")
Array = npt.NDArray[np.float64]


class Ranks:
    """This process among those that train the model; alone unless there is a ``group`` of several.

    ``counts``: whether what this process holds of a gradient adds to the sum over all; of a copy only one does.
    """

    def __init__(
        self,
        group: Any = None,
        *,
        device: torch.device | None = None,
        sharded: bool = False,
        counts: bool | None = None,
        wrapper: nn.Module | None = None,
    ) -> None:
        self._group = group
        self._device = device
        self._wrapper = None if wrapper is None else weakref.ref(wrapper)
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        self.sharded = sharded
        self.counts = self.rank == 0 if counts is None else counts

    @property
    def several(self) -> bool:
        """Whether there are other processes."""
        return self.size > 1

    @property
    def connected(self) -> bool:
        """Whether the other processes can be reached."""
        return not self.several or dist.is_initialized()

    def columns(self, rows: Rows) -> Mapping[str, Tensor]:
        """The columns of rows, with that of their process where there are several."""
        if not self.several:
            return rows.columns
        return {"rank": torch.full_like(rows.sample, self.rank), **rows.columns}

    def sum(self, arrays: Sequence[Array]) -> list[Array]:
        """The arrays, each summed over all processes; they have the same shapes everywhere."""
        if not self.several:
            return list(arrays)
        flat = torch.from_numpy(np.concatenate([array.ravel() for array in arrays])).to(self._device)
        dist.all_reduce(flat, group=self._group)
        ends = np.cumsum([array.size for array in arrays])[:-1]
        parts = np.split(flat.cpu().numpy(), ends)
        return [part.reshape(array.shape) for part, array in zip(parts, arrays, strict=True)]

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """Which of the flags are set in any process."""
        return [bool(total) for total in self.sum([np.asarray(flags, dtype=np.float64)])[0]] if flags else []

    def gather(self, value: T) -> list[T]:
        """What every process has."""
        found: list[Any] = [value]
        if self.several:
            found = [None] * self.size
            dist.all_gather_object(found, value, group=self._group)
        return found

    def share(self, make: Callable[[], str]) -> str:
        """What ``make`` returns in process 0, in all.

        Raises:
            StoreError: it was raised there.
        """
        if not self.several:
            return make()
        found: list[Any] = [None, None]
        error: Exception | None = None
        if self.rank == 0:
            try:
                found[0] = make()
            except Exception as raised:
                error, found[1] = raised, str(raised)
        dist.broadcast_object_list(found, src=dist.get_global_rank(self._group, 0), group=self._group)
        if error is not None:
            raise error
        if found[1] is not None:
            raise StoreError(found[1])
        return str(found[0])

    def wait(self) -> None:
        """Until every process is here."""
        if self.several and self.connected:
            dist.barrier(group=self._group)

    def check(self, stepped: Iterable[Tensor | None]) -> None:
        """Before a step on some parameters: is it one that all processes take, on what they have been asked about?

        Raises:
            LayerError: a parameter was sharded after ``instrument``.
            DualHookError: uneven inputs under ``model.join()``: some processes stop stepping before others do.
        """
        if not self.sharded and any(is_sharded(parameter) for parameter in stepped if parameter is not None):
            raise LayerError("a recorded layer was sharded after instrument(): call fully_shard first, then instrument")
        wrapper = None if self._wrapper is None else self._wrapper()
        if wrapper is not None and getattr(getattr(wrapper, "_join_config", None), "enable", False):
            raise DualHookError(
                "model.join(): processes that run out of data take no steps, which cannot be recorded; give all of "
                "them equally many batches (DistributedSampler does), or close() the recorder before"
            )


def ranks_of(model: nn.Module, modules: Iterable[nn.Module], group: Any = None) -> Ranks:
    """The processes that train the recorded ``modules`` of ``model``; ``group`` names them if the model does not yet.

    Raises:
        LayerError: the model is distributed in a way that cannot be recorded.
    """
    if not dist.is_available() or not dist.is_initialized():
        if group is not None:
            raise DualHookError("group=: torch.distributed is not initialised; call init_process_group first")
        return Ranks()
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise LayerError(
            "FullyShardedDataParallel flattens parameters, so that no weight can be told from its neighbours: shard "
            "with torch.distributed.fsdp.fully_shard instead"
        )
    parameters = [parameter for module in modules for parameter in module.parameters(recurse=False)]
    shards = [parameter for parameter in parameters if is_sharded(parameter)]
    if shards:
        if len(shards) < len(parameters):
            raise LayerError("some recorded layers are sharded and others are not: call fully_shard on the whole model")
        return _of_mesh(shards)
    wrapper = model if isinstance(model, DistributedDataParallel) else None
    if group is None and wrapper is not None:
        group = wrapper.process_group
    if group is None or dist.get_world_size(group) == 1:
        return Ranks()
    return Ranks(group, device=parameters[0].device, wrapper=wrapper)


def _of_mesh(shards: Sequence[Any]) -> Ranks:
    """The processes that hold the shards of parameters, or copies of these shards (hybrid sharding)."""
    mesh = shards[0].device_mesh
    for shard in shards:
        *copies, last = shard.placements
        if shard.device_mesh != mesh or not last.is_shard(0) or not all(placed.is_replicate() for placed in copies):
            raise LayerError(
                f"a parameter is distributed as {shard.placements} over {shard.device_mesh}: expected rows of it on "
                "every process, as fully_shard does on one mesh (no tensor parallelism, no shard_placement_fn)"
            )
    if mesh.ndim > 1 and mesh.size() != dist.get_world_size():
        raise LayerError(f"{mesh} leaves out some processes: expected all of them in a mesh of several dimensions")
    first_copy = not any(mesh.get_local_rank(dim) for dim in range(mesh.ndim - 1))
    group = mesh.get_group() if mesh.ndim == 1 else dist.group.WORLD
    return Ranks(group, device=shards[0].device, sharded=True, counts=first_copy)
