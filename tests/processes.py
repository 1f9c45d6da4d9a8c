"""Two processes that train one model together, recorded and not: what the tests of distributed training look at.

All scenarios run one after the other in one pair of processes, since starting a pair is what takes the time. A process
leaves behind what it saw, the tests compare that with a plain run of one process and with the memory.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import dualhook
from dualhook.store import pool

WORLD, BATCH, SAMPLES, INPUTS, CLASSES = 2, 3, 24, 5, 3
IGNORED = -100
TIMEOUT = 100  # seconds for everything


@dataclass(frozen=True)
class Scenario:
    """One way of training together."""

    wrap: str = "ddp"  # or "fsdp", "hybrid" (copies of shards), "later" (wrapped after instrument)
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD
    settings: dict[str, Any] = field(default_factory=lambda: {"lr": 0.2, "momentum": 0.9})
    dtype: torch.dtype = torch.float64
    micro: int = 1  # batches per step
    sync: bool = True  # whether gradients are averaged after every one of them
    clip: float | None = None
    wasted: str = ""  # "none", "zero": before every step a backward pass whose gradient is zeroed that way
    silent: bool = False  # the second process has nothing to learn in every other step
    buckets: bool = False  # gradients are views of DDP's buckets
    amount: int = 1  # epochs


ADAM = {"lr": 1e-2, "weight_decay": 0.1}
SCENARIOS = {
    "ddp": Scenario(amount=2),
    "ddp-float32": Scenario(dtype=torch.float32),
    "ddp-buckets": Scenario(buckets=True, clip=0.05),
    "ddp-no-sync": Scenario(micro=2, sync=False),
    "ddp-accumulated": Scenario(micro=2),
    "ddp-clipped": Scenario(clip=0.05, micro=2, sync=False),
    "ddp-adam": Scenario(optimizer=torch.optim.Adam, settings=ADAM),
    "ddp-wasted": Scenario(wasted="none"),
    "ddp-zeroed": Scenario(wasted="zero", micro=2, sync=False),
    "ddp-silent": Scenario(silent=True),
    "ddp-later": Scenario(wrap="later", clip=0.05),
    "fsdp": Scenario(wrap="fsdp", amount=2),
    "fsdp-float32": Scenario(wrap="fsdp", dtype=torch.float32, clip=0.05),
    "fsdp-no-sync": Scenario(wrap="fsdp", micro=2, sync=False),
    "fsdp-accumulated": Scenario(wrap="fsdp", micro=2, clip=0.05),
    "fsdp-adamw": Scenario(wrap="fsdp", optimizer=torch.optim.AdamW, settings=ADAM),
    "fsdp-wasted": Scenario(wrap="fsdp", wasted="none"),
    "fsdp-zeroed": Scenario(wrap="fsdp", wasted="zero", micro=2, sync=False),
    "fsdp-silent": Scenario(wrap="fsdp", silent=True),
    "hybrid": Scenario(wrap="hybrid"),
}


def network(dtype: torch.dtype) -> nn.Sequential:
    """The layer of one unit is a shard of one process and nothing of the other."""
    torch.manual_seed(0)
    sizes = [INPUTS, 7, 1, 6, CLASSES]
    layers = [part for i, o in itertools.pairwise(sizes) for part in (nn.Linear(i, o), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).to(dtype)


def data(dtype: torch.dtype) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(SAMPLES, INPUTS, generator=generator, dtype=torch.float64).to(dtype)
    return TensorDataset(inputs, torch.randint(0, CLASSES, (SAMPLES,), generator=generator))


def loader_of(rank: int, dtype: torch.dtype) -> DataLoader[Any]:
    dataset = data(dtype)
    return DataLoader(dataset, BATCH, sampler=DistributedSampler(dataset, WORLD, rank, shuffle=True, seed=3))


def batches(scenario: Scenario, rank: int, loader: Any) -> Iterator[tuple[Tensor, Tensor]]:
    for epoch in range(scenario.amount):
        loader.sampler.set_epoch(epoch)
        for number, (inputs, labels) in enumerate(loader):
            silent = scenario.silent and rank == 1 and number % 2
            yield inputs, torch.full_like(labels, IGNORED) if silent else labels


def loss_of(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(inputs), labels, reduction="sum", ignore_index=IGNORED) / BATCH


def plain(scenario: Scenario) -> dict[str, Tensor]:
    """What one process makes of the batches of all: the oracle."""
    model = network(scenario.dtype)
    optimizer = scenario.optimizer(model.parameters(), **scenario.settings)
    streams = [batches(scenario, rank, loader_of(rank, scenario.dtype)) for rank in range(WORLD)]
    for number, together in enumerate(zip(*streams, strict=True), start=1):
        for inputs, labels in together:
            (loss_of(model, inputs, labels) / WORLD).backward()
        if number % scenario.micro == 0:
            if scenario.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), scenario.clip)
            optimizer.step()
            optimizer.zero_grad()
    return model.state_dict()


def wrapped(scenario: Scenario, model: nn.Module) -> nn.Module:
    if scenario.wrap in ("ddp", "later"):
        return DistributedDataParallel(model, gradient_as_bucket_view=scenario.buckets)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    shape = (WORLD, 1) if scenario.wrap == "hybrid" else (WORLD,)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("copies", "shards")[-len(shape) :])
    for layer in list(model.children())[:3] if isinstance(model, nn.Sequential) else ():
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@contextlib.contextmanager
def syncing(model: nn.Module, on: bool) -> Iterator[None]:
    """Whether the backward pass in the block averages gradients over the processes."""
    if isinstance(model, DistributedDataParallel):
        with contextlib.nullcontext() if on else model.no_sync():
            yield
    else:
        model.set_requires_gradient_sync(on)
        yield


def train(scenario: Scenario, rank: int, path: Path | None) -> dict[str, Any]:
    model = inner = network(scenario.dtype)
    later = scenario.wrap == "later"
    recorder = None
    if path is not None and later:
        recorder = dualhook.instrument(inner, path, group=dist.group.WORLD, verbose=False)
    model = wrapped(scenario, inner)
    if path is not None and not later:
        recorder = dualhook.instrument(model, path, verbose=False)
    optimizer = scenario.optimizer(model.parameters(), **scenario.settings)
    loader = loader_of(rank, scenario.dtype)
    torch.manual_seed(5)
    losses = []
    for number, (inputs, labels) in enumerate(batches(scenario, rank, recorder.track(loader) if recorder else loader)):
        last = (number + 1) % scenario.micro == 0
        if scenario.wasted and number % scenario.micro == 0:
            loss_of(model, inputs, labels).backward()
            optimizer.zero_grad(set_to_none=scenario.wasted == "none")
        with syncing(model, scenario.sync or last):
            loss = loss_of(model, inputs, labels)
            loss.backward()
        losses.append(loss.detach())
        if last:
            if scenario.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), scenario.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=scenario.wasted != "zero")
    found = {name: whole(value) for name, value in inner.state_dict().items()}
    if recorder is not None:
        memory = recorder.close()
        assert memory.patterns("0")  # of both processes, in both
    return {"weights": found, "losses": torch.stack(losses), "random": torch.get_rng_state()}


def whole(value: Any) -> Tensor:
    return copy.deepcopy(value.full_tensor() if hasattr(value, "full_tensor") else value)


def work(rank: int, folder: Path, task: Callable[[int, Path], None]) -> None:
    """One process: everything that ``task`` does, with a process group."""
    torch.set_num_threads(1)
    pool.WORTH_BYTES = 1  # the inputs are small, and come again in a second epoch
    warnings.simplefilter("error", dualhook.InexactWarning)
    rendezvous = f"file://{folder / 'rendezvous'}"
    dist.init_process_group(
        "gloo", init_method=rendezvous, rank=rank, world_size=WORLD, timeout=timedelta(seconds=TIMEOUT / 2)
    )
    try:
        task(rank, folder)
    finally:
        dist.destroy_process_group()


def every_scenario(rank: int, folder: Path) -> None:
    for name, scenario in SCENARIOS.items():
        try:
            found = {"plain": train(scenario, rank, None), "recorded": train(scenario, rank, folder / name)}
        except BaseException as error:
            error.add_note(f"in the scenario {name!r}")
            raise
        torch.save(found, folder / f"{name}-{rank}.pt")


def together(folder: Path, task: Callable[[int, Path], None]) -> None:
    """Run ``task(rank, folder)`` in two processes; raises what one of them raised.

    Raises:
        TimeoutError: they wait for each other.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    multiprocessing.set_forkserver_preload(["dualhook", "torch._dynamo", "torch.distributed.fsdp"])
    start = "forkserver" if hasattr(os, "fork") else "spawn"  # which imports once what takes the time
    with mock.patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": ""}):  # else wrappers would go there by themselves
        context = mp.start_processes(work, args=(folder, task), nprocs=WORLD, join=False, start_method=start)
    end = time.monotonic() + TIMEOUT
    while not context.join(timeout=1):  # returns as soon as one of them is through
        if time.monotonic() > end:
            for process in context.processes:
                process.kill()
            raise TimeoutError(f"two processes were not through after {TIMEOUT} s")
