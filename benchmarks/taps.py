"""What recording costs by kind of layer and by way of training: the ratio of a recorded to a bare training step.

One layer of each kind alone (the dearest case: no other work hides the tap), then one network trained in every way.
Bare and recorded take turns in blocks of steps, in one process or one pair. What is not recorded, or not rebuilt
exactly, is printed as such in place of a ratio.

    python benchmarks/taps.py [--rounds 9] [--block 20] [--threads N] [--only linear]
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from turns import in_turns, spread

import dualhook
from dualhook.demo import network

WIDTH, BATCH, LENGTH, WORDS = 128, 16, 32, 1000
Step = Callable[[Tensor], None]


def plain(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        loss_of(model(x)).backward()
        optimizer.step()

    return step


def accumulation(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        for part in x.chunk(4):
            (loss_of(model(part)) / 4).backward()
        optimizer.step()

    return step


def autocast(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model(x))
        loss.backward()
        optimizer.step()

    return step


def checkpointed(model: nn.Module, optimizer: torch.optim.Optimizer, *, reentrant: bool) -> Step:
    def again(x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=reentrant)

    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        loss_of(again(x.requires_grad_(reentrant))).backward()  # reentrant: only an input that asks for a gradient
        optimizer.step()

    return step


def compiled(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    return plain(torch.compile(model, backend="aot_eager"), optimizer)


def functional(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        loss_of(functional_call(model, dict(model.named_parameters()), (x,))).backward()
        optimizer.step()

    return step


def sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model)


def loss_of(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return (output if isinstance(output, Tensor) else output[0]).float().square().mean()


class Attention(nn.MultiheadAttention):
    """Self-attention as it is called in an encoder."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, x, x, need_weights=False)[0]


def conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(WIDTH, WIDTH)


def experts() -> nn.Module:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    torch.manual_seed(0)
    block = MixtralSparseMoeBlock(MixtralConfig(hidden_size=WIDTH, intermediate_size=WIDTH, num_local_experts=4))
    for parameter in block.parameters():  # allocated, but not filled, outside a whole model
        nn.init.normal_(parameter, std=0.1)
    return block


def vectors() -> Tensor:
    return torch.randn(BATCH * LENGTH, WIDTH)


def sequences() -> Tensor:
    return torch.randn(BATCH, LENGTH, WIDTH)


def words() -> Tensor:
    return torch.randint(0, WORDS, (BATCH, LENGTH))


def images() -> Tensor:
    return torch.randn(BATCH, 16, 16, 16)


def digits() -> Tensor:
    return torch.rand(128, 784)


@dataclass(frozen=True)
class Subject:
    """A model, its inputs, and how it is trained."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    way: Callable[[nn.Module, torch.optim.Optimizer], Step] = plain
    together: Callable[[nn.Module], nn.Module] | None = None
    """How two processes wrap it, each with a batch of its own; None: one process."""


KINDS = {
    "Linear, vectors": Subject(lambda: nn.Linear(WIDTH, WIDTH), vectors),
    "Linear, sequences": Subject(lambda: nn.Linear(WIDTH, WIDTH), sequences),
    "Conv1D of transformers": Subject(conv1d, sequences),
    "Conv2d 3×3": Subject(lambda: nn.Conv2d(16, 16, 3, padding=1), images),
    "Embedding": Subject(lambda: nn.Embedding(WORDS, WIDTH), words),
    "MultiheadAttention": Subject(lambda: Attention(WIDTH, 4, batch_first=True), sequences),
    "LSTM": Subject(lambda: nn.LSTM(WIDTH, WIDTH, batch_first=True), sequences),
    "experts of Mixtral": Subject(experts, sequences),
}
WAYS = {
    "plain": Subject(network, digits),
    "4 micro-batches": Subject(network, digits, accumulation),
    "autocast, bfloat16": Subject(network, digits, autocast),
    "checkpoint": Subject(network, digits, partial(checkpointed, reentrant=False)),
    "checkpoint, reentrant": Subject(network, digits, partial(checkpointed, reentrant=True)),
    "compile, aot_eager": Subject(network, digits, compiled),
    "functional_call": Subject(network, digits, functional),
    "DDP, 2 processes": Subject(network, digits, together=DistributedDataParallel),
    "FSDP2, 2 processes": Subject(network, digits, together=sharded),
}


class Training:
    """A subject in training, bare or recorded; a call runs a block of steps and returns the seconds of one."""

    def __init__(self, subject: Subject, block: int, folder: Path | None = None) -> None:
        torch.manual_seed(0)
        self.model = subject.build() if subject.together is None else subject.together(subject.build())
        self.recorder = None
        if folder is not None:
            self.recorder = dualhook.instrument(self.model, folder, layers="all", verbose=False)
        self.step = subject.way(self.model, torch.optim.SGD(self.model.parameters(), lr=1e-3))
        torch.manual_seed(1)
        self.batches = [subject.inputs() for _ in range(block)]
        self.count = 0

    def __call__(self) -> float:
        started = time.perf_counter()
        for x in self.batches:
            self.step(x)
        self.count += len(self.batches)
        return (time.perf_counter() - started) / len(self.batches)


def missing(training: Training, memory: dualhook.DualMemory) -> str:
    """Why the recording is not what it should be, or the empty string."""
    assert training.recorder is not None
    for row in training.recorder.coverage:
        if row["layer"] is None:
            return f"{row['parameter']} is not recorded: {row['note']}"
    report = memory.verify()
    wrong = [str(layer) for layer, exact in zip(report["layer"], report["exact"], strict=True) if not exact]
    return f"{', '.join(wrong)} not rebuilt exactly (error {report.max_error:.2g})" if wrong else ""


def measured(subject: Subject, rounds: int, block: int, folder: Path) -> str:
    """The subject's line of the table, after its name."""
    try:
        bare, recorded = Training(subject, block), Training(subject, block, folder)
    except (dualhook.DualHookError, ImportError) as error:
        return f"  skipped: {error}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dualhook.InexactWarning)  # the line says it
        seconds = in_turns({"bare": bare, "recorded": recorded}, rounds)
    assert recorded.recorder is not None
    memory = recorded.recorder.close()
    if why := missing(recorded, memory):
        return f"  skipped: {why}"
    rows, ratio = sum(map(memory.patterns, memory.layers)), spread(seconds["recorded"], seconds["bare"])
    numbers = f"{rows / recorded.count:>11.0f}{memory.nbytes / rows:>9.0f}{memory.nbytes / recorded.count / 1e6:>9.2f}"
    return f"{1e3 * statistics.median(seconds['bare']):>9.2f}{ratio:>26}{numbers}"


def one_of_two(rank: int, name: str, rounds: int, block: int, folder: Path) -> None:
    """A process's share of a way of training; process 0 leaves the line."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2)
    line = measured(WAYS[name], rounds, block, folder / "memory")
    dist.barrier()
    dist.destroy_process_group()
    if rank == 0:
        (folder / "line").write_text(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--block", type=int, default=20, help="steps of one before the other's turn")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", default="", help="part of the names of the lines to measure")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    threads = f"{arguments.threads} thread{'s' if arguments.threads > 1 else ''}"
    print(f"torch {torch.__version__}, {arguments.rounds} rounds of {arguments.block} steps each, {threads}")
    for title, subjects in (("kind of layer", KINDS), ("way of training", WAYS)):
        print(f"\n{title:<24}{'ms bare':>9}{'ratio recorded to bare':>26}{'rows/step':>11}{'B/row':>9}{'MB/step':>9}")
        for name, subject in subjects.items():
            if arguments.only.lower() in name.lower():
                folder = Path(tempfile.mkdtemp(prefix="dualhook-benchmark-"))
                try:
                    if subject.together is None:
                        line = measured(subject, arguments.rounds, arguments.block, folder / "memory")
                    else:
                        multiprocessing.spawn(one_of_two, (name, arguments.rounds, arguments.block, folder), nprocs=2)
                        line = (folder / "line").read_text()
                finally:
                    shutil.rmtree(folder)
                print(f"{name:<24}{line}", flush=True)


if __name__ == "__main__":
    main()
