"""Small things that two processes do together, with what came of them as JSON; see tests/training/test_together.py."""

from __future__ import annotations

import contextlib
import copy
import json
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import CLASSES, INPUTS, SCENARIOS, loader_of, loss_of, network, whole, wrapped
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

import dualhook

DDP, FSDP = SCENARIOS["ddp"], SCENARIOS["fsdp"]
HELD: list[object] = []
"""What is still in use when the process ends."""


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, count: int = 3) -> None:
    for _, (inputs, labels) in zip(range(count), loader_of(rank, torch.float64), strict=False):
        optimizer.zero_grad()
        loss_of(model, inputs, labels).backward()
        optimizer.step()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)


def refusal(make) -> str:
    with pytest.raises(dualhook.DualHookError) as caught:
        make()
    return f"{type(caught.value).__name__}: {caught.value}"


def refusals(rank: int, folder: Path) -> dict:
    found = {}
    model = wrapped(DDP, network(torch.float64))
    found["fold"] = refusal(lambda: dualhook.instrument(model, folder / "fold", on_full="fold"))
    (folder / "taken").mkdir(exist_ok=True)
    (folder / "taken" / "thesis.txt").write_text("not yours")
    found["taken"] = refusal(lambda: dualhook.instrument(model, folder / "taken"))
    found["elsewhere"] = refusal(lambda: dualhook.instrument(model, folder / f"own-{rank}", verbose=False))

    recorder = dualhook.instrument(model, folder / "joined", verbose=False)
    with model.join():
        found["join"] = refusal(lambda: steps(model, sgd(model), rank, 1))
    recorder.discard()
    model = wrapped(DDP, network(torch.float64))
    recorder = dualhook.instrument(model, folder / "zero", verbose=False)
    redundant = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
    found["zero"] = refusal(lambda: steps(model, redundant, rank, 1))
    recorder.discard()
    model = network(torch.float64)
    recorder = dualhook.instrument(model, folder / "late", group=dist.group.WORLD, verbose=False)
    wrapped(FSDP, model)
    found["late"] = refusal(lambda: steps(model, sgd(model), rank, 1))
    recorder.discard()
    return found


def by_itself(rank: int, folder: Path) -> dict:
    """A process group alone changes nothing: each process trains a model of its own."""
    model = network(torch.float64)
    recorder = dualhook.instrument(model, folder / f"single-{rank}", verbose=False)
    steps(model, sgd(model), rank, 3 + rank)  # not even equally often
    memory = recorder.close()
    manifest = json.loads((memory.path / "dualhook.json").read_text())
    return {"error": memory.verify().max_error, "columns": memory.columns, "ranks": manifest.get("ranks")}


def left_open(rank: int, folder: Path) -> dict:
    """Each process ends without having closed a recorder of its own."""
    model = network(torch.float64)
    HELD.append(dualhook.instrument(model, folder / f"open-{rank}", verbose=False))
    steps(model, sgd(model), rank)
    HELD.append(model)
    return {}


def temporary(rank: int, folder: Path) -> dict:
    model = wrapped(DDP, network(torch.float64))
    with dualhook.instrument(model, verbose=False) as recorder:
        steps(model, sgd(model), rank)
    memory = recorder.close()
    kept = recorder.save(folder / "kept")
    HELD.append(memory)
    found = {"path": str(memory.path), "error": memory.verify().max_error, "kept": kept.patterns("0")}
    dist.barrier()
    return found


def stopped(rank: int, folder: Path) -> dict:
    """The budget counts the rows of all, and ends the recording of all at one step."""
    model = wrapped(DDP, network(torch.float64))
    recorder = dualhook.instrument(model, folder / "stopped", max_bytes=12_000, verbose=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        steps(model, sgd(model), rank, 4)
        steps(model, sgd(model), rank, 4)
    memory = recorder.close()
    texts = [str(w.message) for w in caught if "recording stopped" in str(w.message)]
    return {"steps": memory.steps, "patterns": memory.patterns("0"), "texts": texts, "error": memory.verify().max_error}


def crashed(rank: int, folder: Path, name: str) -> dict:
    """Each process leaves by an exception, one long before the other: nobody waits."""
    model = wrapped(SCENARIOS[name], network(torch.float64))
    begin = time.monotonic()
    with contextlib.suppress(KeyboardInterrupt), dualhook.instrument(model, folder / f"crashed-{name}", verbose=False):
        steps(model, sgd(model), rank, 2)
        if rank == 1:
            time.sleep(2)
        begin = time.monotonic()
        raise KeyboardInterrupt
    seconds = time.monotonic() - begin
    dist.barrier()
    memory, trained = dualhook.load(folder / f"crashed-{name}"), {n: whole(v) for n, v in model.state_dict().items()}
    plain = network(torch.float64)
    plain.load_state_dict({name.removeprefix("module."): value for name, value in trained.items()})
    return {"seconds": seconds, "steps": memory.steps, "error": memory.verify(plain).max_error}


def flushed(rank: int, folder: Path, name: str) -> dict:
    model = wrapped(SCENARIOS[name], network(torch.float64))
    optimizer = sgd(model)
    recorder = dualhook.instrument(model, folder / f"flushed-{name}", verbose=False)
    steps(model, optimizer, rank, 2)
    recorder.flush()
    early = dualhook.load(recorder.path)
    found = {"steps": early.steps, "early": early.verify().max_error}
    dist.barrier()
    steps(model, optimizer, rank, 2)
    memory = recorder.close()
    return found | {"later": memory.steps, "error": memory.verify().max_error}


def changed(rank: int, folder: Path) -> dict:
    """Something writes to the part of a weight that only the second process holds."""
    model = wrapped(FSDP, network(torch.float64))
    optimizer = sgd(model)
    recorder = dualhook.instrument(model, folder / "changed", verbose=False)
    warnings.simplefilter("ignore")
    steps(model, optimizer, rank, 1)
    if rank == 1:
        with torch.no_grad():
            model[0].weight.to_local().add_(0.1)
    steps(model, optimizer, rank, 1)
    marks = recorder.close()._store.histories["0.weight"].mark.tolist()
    warnings.simplefilter("error", dualhook.InexactWarning)
    return {"marks": marks}


def resumed(rank: int, folder: Path, name: str) -> dict:
    """Two steps, a checkpoint, a third step that is lost; then the second run goes on from the checkpoint."""
    path = folder / f"resumed-{name}"
    model = wrapped(SCENARIOS[name], network(torch.float64))
    optimizer = sgd(model)
    recorder = dualhook.instrument(model, path, verbose=False)
    steps(model, optimizer, rank, 2)
    recorder.flush()
    checkpoint = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    steps(model, optimizer, rank, 1)
    recorder.flush()
    recorder.discard()
    dist.barrier()
    model = wrapped(SCENARIOS[name], network(torch.float64))
    optimizer = sgd(model)
    far = refusal(lambda: dualhook.instrument(model, path, resume_at=2, verbose=False))
    model.load_state_dict(checkpoint[0])
    optimizer.load_state_dict(checkpoint[1])
    recorder = dualhook.instrument(model, path, resume_at=2, verbose=False)
    steps(model, optimizer, rank, 2)
    memory = recorder.close()
    report = memory.verify()
    found = {"steps": memory.steps, "error": report.max_error, "exact": bool(report["exact"].all()), "far": far}
    return found | {"patterns": memory.patterns("0"), "marks": memory._store.histories["0.weight"].mark.tolist()}


def broken(rank: int, folder: Path) -> dict:
    """An error of the recorder's own, in a hook of the second process only."""
    model = wrapped(DDP, network(torch.float64))
    optimizer = sgd(model)
    recorder = dualhook.instrument(model, folder / "broken", verbose=False)
    steps(model, optimizer, rank, 2)
    recorder.flush()
    book = recorder._book
    if rank == 1:

        def take(*given):
            raise ZeroDivisionError("a mistake of ours")

        book.take = take
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        steps(model, optimizer, rank, 3)
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    alike = [torch.zeros_like(weights[0]) for _ in range(2)]
    dist.all_gather(alike, weights[0])
    found = {"stopped": recorder.stopped, "recorded": recorder.steps, "error": type(recorder.error).__name__}
    recorder.close_alone()
    dist.barrier()
    found["on_disk"] = dualhook.load(folder / "broken").steps
    told = [str(w.message) for w in caught if "recording" in str(w.message)]
    return found | {"told": told, "alike": torch.equal(*alike)}


class Bare(nn.Module):
    """Uses one weight in a way that no tap sees, in process 1 only; another one in both."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rank = rank
        self.first, self.second, self.head = nn.Linear(INPUTS, 4), nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = (x @ self.first.weight.T + self.first.bias).tanh()
        h = self.second(h) if self.rank == 0 else h @ self.second.weight.T + self.second.bias
        return self.head(h)


def audited(rank: int, folder: Path, name: str) -> dict:
    model = wrapped(SCENARIOS[name], Bare(rank).double())
    recorder = dualhook.instrument(model, folder / f"audited-{name}", verbose=False)
    steps(model, sgd(model), rank)
    coverage = recorder.coverage
    memory = recorder.close()
    notes = dict(zip(coverage["parameter"], coverage["note"], strict=True))
    return {"layers": memory.layers, "notes": notes, "error": memory.verify().max_error}


def every_case(rank: int, folder: Path) -> None:
    cases = {
        "refusals": lambda: refusals(rank, folder),
        "by_itself": lambda: by_itself(rank, folder),
        "left_open": lambda: left_open(rank, folder),
        "temporary": lambda: temporary(rank, folder),
        "stopped": lambda: stopped(rank, folder),
        "broken": lambda: broken(rank, folder),
        "crashed-ddp": lambda: crashed(rank, folder, "ddp"),
        "crashed-fsdp": lambda: crashed(rank, folder, "fsdp"),
        "flushed-ddp": lambda: flushed(rank, folder, "ddp"),
        "flushed-fsdp": lambda: flushed(rank, folder, "fsdp"),
        "changed": lambda: changed(rank, folder),
        "resumed-ddp": lambda: resumed(rank, folder, "ddp"),
        "resumed-fsdp": lambda: resumed(rank, folder, "fsdp"),
        "audited-ddp": lambda: audited(rank, folder, "ddp"),
        "audited-fsdp": lambda: audited(rank, folder, "fsdp"),
    }
    found = {}
    for name, case in cases.items():
        try:
            found[name] = case()
        except BaseException as error:
            error.add_note(f"in the case {name!r}")
            raise
        dist.barrier()
    (folder / f"found-{rank}.json").write_text(json.dumps(found))
