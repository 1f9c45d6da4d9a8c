"""A small deterministic training loop that is killed again and again, and the warm process that starts and kills it.

``python loop.py`` imports everything once, then forks a child for every order on its standard input: importing torch
takes far longer than the training. It never runs a backward pass itself, since torch may start threads in one.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dualhook
from dualhook.store import pool

EPOCH = 4  # steps, after which the same inputs come again
STEPS, EVERY, LATE = 30, 3, 8  # steps, those between two checkpoints, that from which one layer trains
Say = Callable[[str], None]


@dataclass(frozen=True)
class Scenario:
    """An optimiser and a byte budget."""

    optimizer: Callable[..., torch.optim.Optimizer]
    max_bytes: int


SCENARIOS = {
    "momentum, folding": Scenario(partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.01), 42_000),
    "adamw": Scenario(partial(torch.optim.AdamW, lr=0.01), 10**7),
}


class Net(nn.Module):
    """Two layers that read the same keys (stored once), a third that trains later."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.late, self.head = (nn.Linear(6, o) for o in (6, 6, 6, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.late(torch.tanh(self.one(x) * self.other(x)))))


def network() -> Net:
    torch.manual_seed(0)
    model = Net().double()
    model.late.requires_grad_(False)
    return model


def train(
    model: Net,
    optimizer: torch.optim.Optimizer,
    recorder: Any,
    steps: range,
    after_step: Callable[[int], None] = lambda step: None,
) -> None:
    """Some steps; what they do depends on the model, the optimiser's state and the step's number only."""
    for step in steps:
        model.late.requires_grad_(step >= LATE)
        torch.manual_seed(step % EPOCH)
        x, y = torch.randn(4, 6, dtype=torch.float64), torch.randint(0, 3, (4,))
        if recorder is not None:
            recorder.batch(samples=4 * (step % EPOCH) + torch.arange(4))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        after_step(step)


def whole_run(scenario: str, folder: Path, say: Say) -> None:
    """Train to the end, from the last checkpoint if there is one; ``say`` what can be relied upon from then on."""
    path, checkpoint = folder / "memory", folder / "checkpoint.pt"
    model, settings = network(), SCENARIOS[scenario]
    optimizer = settings.optimizer(model.parameters())
    step, options = 0, {"max_bytes": settings.max_bytes, "verbose": False}
    if checkpoint.exists():
        step, weights, state = torch.load(checkpoint)
        say(f"kept {step}")  # what lies after it may go from here on
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
        recorder = dualhook.instrument(model, path, resume_at=step, **options)
    else:
        recorder = dualhook.instrument(model, path, overwrite=True, **options)

    def after_step(step: int) -> None:
        if step % EVERY == 0:
            recorder.flush()
            say(f"kept {step}")
            torch.save((step, model.state_dict(), optimizer.state_dict()), folder / "checkpoint.partial")
            os.replace(folder / "checkpoint.partial", checkpoint)

    train(model, optimizer, recorder, range(step + 1, STEPS + 1), after_step)
    memory = recorder.close()
    memory.add_column("label", [k % 3 for k in range(4 * STEPS + 4)])
    say("done")


def compact_again_and_again(folder: Path, say: Say) -> None:
    """Write a memory anew, a step a file or all in one, so that there is always something to interrupt."""
    for turn in range(20):
        dualhook.compact(folder / "memory", segment_bytes=10**9 if turn % 2 else 1)
    say("done")


def run_and_kill(do: Callable[[Say], None], seconds: float) -> dict[str, Any]:
    """Do something in a child that is killed after some time, if it has not ended: what it said, and whether it was."""
    there, here = os.pipe()
    child = os.fork()
    if not child:
        os.close(there)
        try:
            do(lambda text: os.write(here, f"{text}\n".encode()) and None)
        except BaseException:
            os.write(here, f"failed {traceback.format_exc()}".encode())
        finally:
            os._exit(0)
    os.close(here)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    said = b""
    while part := os.read(there, 4096):
        said += part
    signal.setitimer(signal.ITIMER_REAL, 0)
    _, status = os.waitpid(child, 0)
    os.close(there)
    text = said.decode()
    return {
        "kept": int((re.findall(r"^kept (\d+)$", text, re.MULTILINE) or ["0"])[-1]),
        "done": "done\n" in text,
        "killed": os.WIFSIGNALED(status),
        "failed": text.partition("failed ")[2],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    pool.WORTH_BYTES = 1  # these keys are small, and to be stored once all the same
    print("warm", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        scenario, folder = order["scenario"], Path(order["folder"])
        do = partial(whole_run, scenario, folder) if scenario else partial(compact_again_and_again, folder)
        print(json.dumps(run_and_kill(do, order["seconds"])), flush=True)
