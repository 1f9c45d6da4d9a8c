"""What recording costs: the ratio of a recorded to a bare training step, and the bytes it writes.

The network of the paper (784-800-800-10, batch 128), recorded by dualhook and by the two ways of the paper's own code:
references to all tensors kept in Python lists, and one float16 pickle per layer and step. All ways take turns in
blocks of steps within one process, so that a machine that changes its speed changes it for all.

    python benchmarks/capture.py [--rounds 12] [--block 25] [--threads N] [--device cuda] [--width 800] [--batch 128]
"""

from __future__ import annotations

import argparse
import pickle
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from turns import in_turns, spread

import dualhook
from dualhook.demo import network


class Way:
    """A model in training under one way of recording; :meth:`steps` runs some steps and returns the seconds each."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        torch.manual_seed(0)
        self.model = make()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=3e-3)
        self.count = 0

    def steps(self, batches: list[tuple[Tensor, Tensor]]) -> float:
        started = time.perf_counter()
        for x, y in batches:
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(x), y).backward()
            self.optimizer.step()
            self.count += 1
            self.after_step()
        if batches[0][0].is_cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - started) / len(batches)

    def after_step(self) -> None:
        pass

    def between(self) -> None:
        """Between two blocks, not timed."""

    def bytes_per_step(self) -> float:
        return 0.0

    def close(self) -> None:
        """After the last block."""


class Recorded(Way):
    """The one line of this package."""

    def __init__(self, make: Callable[[], nn.Module], path: Path, **options: Any) -> None:
        super().__init__(make)
        self.recorder = dualhook.instrument(self.model, path, verbose=False, **options)

    def bytes_per_step(self) -> float:
        self.recorder.flush()
        return sum(path.stat().st_size for path in (self.recorder.path / "segments").iterdir()) / self.count

    def close(self) -> None:
        self.recorder.close()


class Hooked(Way):
    """Forward and full backward hooks that keep the tensors they see."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__(make)
        self.linears = [module for module in self.model.modules() if isinstance(module, nn.Linear)]
        self.rows: list[list[Tensor]] = [[] for _ in self.linears]
        for number, module in enumerate(self.linears):
            module.register_forward_hook(self._keep(number, lambda inputs: inputs[0]))
            module.register_full_backward_hook(self._keep(number, lambda gradients: gradients[0], backward=True))

    def _keep(self, number: int, pick: Callable[..., Tensor], backward: bool = False) -> Callable[..., None]:
        def hook(module: nn.Module, first: tuple[Tensor, ...], second: object) -> None:
            self.rows[number].append(pick(second if backward else first).detach())

        return hook


class Lists(Hooked):
    """References to every tensor, kept for the whole run."""

    def between(self) -> None:
        self.rows[:] = [[] for _ in self.linears]  # the benchmark's machine is finite

    def bytes_per_step(self) -> float:
        return float("nan")


class Pickles(Hooked):
    """One float16 pickle per layer and step."""

    def __init__(self, make: Callable[[], nn.Module], folder: Path) -> None:
        super().__init__(make)
        self.folder = folder / "pickles"
        self.folder.mkdir()

    def after_step(self) -> None:
        for number, rows in enumerate(self.rows):
            with (self.folder / f"{self.count:06d}-{number}.pkl").open("wb") as file:
                pickle.dump([row.half().cpu().numpy() for row in rows], file)
            rows.clear()

    def bytes_per_step(self) -> float:
        return sum(path.stat().st_size for path in self.folder.iterdir()) / self.count


def batch_of(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images as sparse as those of the data set, and labels."""
    images = torch.rand(size, 784) * (torch.rand(size, 784) > 0.5)
    return images.to(device), torch.randint(0, 10, (size,)).to(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--block", type=int, default=25, help="steps of one way before the next one's turn")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--width", type=int, default=800, help="of the two hidden layers")
    parser.add_argument("--batch", type=int, default=128)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    batch, width, device = arguments.batch, arguments.width, torch.device(arguments.device)

    def make() -> nn.Module:
        return network(width).to(device)

    folder = Path(tempfile.mkdtemp(prefix="dualhook-benchmark-"))
    try:
        ways = {
            "bare": Way(make),
            "dualhook": Recorded(make, folder / "whole"),
            "dualhook, sparse rows": Recorded(make, folder / "sparse", sparse=True),
            "dualhook, bfloat16 rows": Recorded(make, folder / "narrow", dtype=torch.bfloat16),
            "tensors in lists": Lists(make),
            "float16 pickles": Pickles(make, folder),
        }
        torch.manual_seed(1)
        batches = [batch_of(batch, device) for _ in range(arguments.block)]

        def block(way: Way) -> float:
            spent = way.steps(batches)
            way.between()
            return spent

        seconds = in_turns({name: partial(block, way) for name, way in ways.items()}, arguments.rounds)
        threads = f"{arguments.threads} thread{'s' if arguments.threads > 1 else ''}"
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else threads
        size = f"784-{width}-{width}-10, batch {batch}"
        print(f"{size}, {arguments.rounds} rounds of {arguments.block} steps each, {where}")
        print(f"{'way of recording':<26}{'ms/step':>9}{'ratio to bare':>26}{'MB/step':>10}")
        for name, way in ways.items():
            ratio = spread(seconds[name], seconds["bare"])
            size = way.bytes_per_step() / 1e6
            written = "memory" if size != size else f"{size:.2f}"
            way.close()
            print(f"{name:<26}{1e3 * statistics.median(seconds[name]):>9.2f}{ratio:>26}{written:>10}")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
