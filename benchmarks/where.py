"""Where the time of a recorded step goes, in the training thread and in the writing one.

Parts of the recorder are timed where they are entered, all layers together: by the clock, and by what their thread has
had of a processor. A part that is set in lies within the one above it. What is left of the difference to the bare step
are hooks, timers, and what the writing thread and the disk take from training: processors, memory bandwidth, Python's
lock.

``paper`` is the network of 784-800-800-10 under SGD, ``gpt2`` the model of ``trainer.py`` under AdamW, in a loop of its
own that clips gradients.

    python benchmarks/where.py [paper | gpt2] [--width 256] [--dtype bfloat16] [--warm 40] [--steps 64] [--threads N]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn import functional as F
from turns import spread

import dualhook
from dualhook.capture.intake import Intake
from dualhook.demo import network
from dualhook.recorder import pending
from dualhook.recorder.backlog import Backlog
from dualhook.recorder.heads import Heads
from dualhook.recorder.measuring import Measuring
from dualhook.recorder.steps import StepBook
from dualhook.store import SegmentBuilder, Writer, layout
from dualhook.store.direct import DirectFile

BLOCK = 8  # steps of one way before the other one's turn
TRAINING: list[tuple[int, str, Any, str]] = [
    (0, "a call of a layer", Intake, "on_call"),
    (0, "its output gradient", Intake, "_arrive"),
    (0, "a parameter's gradient is there", Intake, "accumulate"),
    (1, "which rows are zero", pending, "used_rows"),
    (1, "how a head is kept", Heads, "pack"),
    (1, "rows copied", SegmentBuilder, "append"),
    (1, "steps measured in one go", Backlog, "_measure"),
    (0, "before the optimiser's step", StepBook, "before"),
    (1, "layers measured at once", Measuring, "measure"),
    (0, "after it", StepBook, "after"),
]
WRITING: list[tuple[int, str, Any, str]] = [
    (0, "a segment", Writer, "_write"),
    (1, "keys found again, and the like", SegmentBuilder, "contents"),
    (1, "checksums", layout, "with_checksums"),
    (1, "on its way to the disk", DirectFile, "_write"),
]

Step = Callable[[int], None]


class Timers:
    """Seconds by part: of the clock and of a processor, apart for the writing thread."""

    def __init__(self) -> None:
        self.spent: dict[tuple[bool, str], list[float]] = {}

    def timed(self, label: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, timed."""

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter(), time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                own = self.spent.setdefault((threading.current_thread() is threading.main_thread(), label), [0.0, 0.0])
                own[0] += time.perf_counter() - began[0]
                own[1] += time.thread_time() - began[1]

        return call

    @contextmanager
    def watching(self) -> Iterator[None]:
        """A block in which every part is timed."""
        with ExitStack() as stack:
            for _, label, owner, name in TRAINING + WRITING:
                stack.enter_context(mock.patch.object(owner, name, self.timed(label, getattr(owner, name))))
            yield


def paper() -> tuple[nn.Module, torch.optim.Optimizer, Step]:
    """The paper's network, and what trains it."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=3e-3)
    batches = [(torch.rand(128, 784), torch.randint(0, 10, (128,))) for _ in range(20)]

    def step(number: int) -> None:
        images, labels = batches[number % len(batches)]
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return model, optimizer, step


def gpt2(width: int) -> tuple[nn.Module, torch.optim.Optimizer, Step]:
    """A GPT-2-style model, and what trains it."""
    from trainer import Size

    size = Size(width)
    model = size.model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    batches = [size.tokens(size.batch) for _ in range(20)]

    def step(number: int) -> None:
        ids = batches[number % len(batches)]
        model(input_ids=ids, labels=ids).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return model, optimizer, step


def block(step: Step) -> float:
    """Seconds of a step, over some."""
    began = time.perf_counter()
    for number in range(BLOCK):
        step(number)
    return (time.perf_counter() - began) / BLOCK


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["paper", "gpt2"], nargs="?", default="paper")
    parser.add_argument("--width", type=int, default=256, help="of gpt2, a multiple of 64")
    parser.add_argument("--dtype", help="of the rows, as float16; without it as computed")
    parser.add_argument("--warm", type=int, default=40, help="first steps, which do not count")
    parser.add_argument("--steps", type=int, default=64, help="those that do")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore", FutureWarning)
    make = {"paper": paper, "gpt2": partial(gpt2, options.width)}[options.model]
    timers, settings = Timers(), {} if options.dtype is None else {"dtype": getattr(torch, options.dtype)}
    with timers.watching(), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        _, _, bare = make()
        torch.manual_seed(0)
        model, optimizer, recorded = make()
        recorder = dualhook.instrument(model, f"{folder}/run", optimizer=optimizer, verbose=False, **settings)
        for _ in range(max(1, options.warm // BLOCK)):
            block(bare), block(recorded)
        timers.spent.clear()
        rounds = max(1, options.steps // BLOCK)
        seconds = [(block(bare), block(recorded)) for _ in range(rounds)]
        spent = {key: list(own) for key, own in timers.spent.items()}
        recorder.discard()
    base, own = zip(*seconds, strict=True)
    print(f"{options.model}, {options.threads} threads, torch {torch.__version__}, {rounds} rounds of {BLOCK} steps")
    before, after = (1000 * statistics.median(one) for one in (base, own))
    print(f"bare {before:.1f} ms a step, recorded {after:.1f} (medians); ratio {spread(own, base)}")
    for title, parts, in_training in (("training thread", TRAINING, True), ("writing thread", WRITING, False)):
        print(f"\n{title:36} {'ms/step':>8} {'on a processor':>15}")
        for depth, label, _, _ in parts:
            wall, processor = (1000 * one / (rounds * BLOCK) for one in spent.get((in_training, label), (0.0, 0.0)))
            print(f"{'  ' * depth + label:36} {wall:8.2f} {processor:15.2f}")


if __name__ == "__main__":
    main()
