"""Every kind of linear map in two processes, recorded and not; see tests/training/test_every_kind_together.py."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from capture.test_kinds import CASES, network
from processes import WORLD, whole
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import dualhook

STEPS, OWN = 2, 2  # samples of each process in a batch
OPTIMIZERS = {
    "ddp": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.01),
    "fsdp": partial(torch.optim.Adam, lr=0.01),
}
RUNS = [(case, wrap) for case in CASES for wrap in OPTIMIZERS]


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = model(x)
    if y.dim() == 2:
        return F.cross_entropy(y, torch.arange(len(x)) % 3)
    return F.cross_entropy(y.transpose(1, 2), x.roll(1, 1))


def train(case: str, wrap: str, rank: int | None, path: Path | None = None) -> dict[str, torch.Tensor]:
    """A clipped run; of one process (``rank`` None) on the batches of all."""
    model = inner = network(case)
    if rank is not None:
        model = DistributedDataParallel(inner) if wrap == "ddp" else fully_shard(inner)
    recorder = None if path is None else dualhook.instrument(model, path, layers="all", verbose=False)
    optimizer = OPTIMIZERS[wrap](model.parameters())
    torch.manual_seed(1)
    for step in range(STEPS):
        x = CASES[case][1]()
        own = torch.arange(len(x)) if rank is None else OWN * rank + torch.arange(OWN)
        if recorder is not None:
            recorder.batch(samples=own + 10 * step)
        optimizer.zero_grad()
        if rank is None:  # the mean over processes, each of which pads and counts for itself
            torch.stack([loss_of(model, x[OWN * r : OWN * r + OWN]) for r in range(WORLD)]).mean().backward()
        else:
            loss_of(model, x[own]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    if recorder is not None:
        recorder.close()
    return {name: whole(value) for name, value in inner.state_dict().items()}


def every_kind(rank: int, folder: Path) -> None:
    for case, wrap in RUNS:
        try:
            found = [train(case, wrap, rank), train(case, wrap, rank, folder / f"{case} {wrap}")]
        except BaseException as error:
            error.add_note(f"{case}, {wrap}")
            raise
        torch.save(found, folder / f"{case} {wrap} {rank}.pt")
