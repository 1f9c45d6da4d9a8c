"""A run of the paper's size: time, bytes and resident memory of recording, verifying and answering.

784-800-800-10, plain SGD at 3e-3, batch 128, 5,000 steps: 640,000 patterns a layer; then verify() and ten queries on
all layers, each with its top 10, class totals and receipt.

    python benchmarks/paper_size.py [--steps 5000] [--out DIR]
"""

from __future__ import annotations

import argparse
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import dualhook
from dualhook.data import load_fashion_mnist_subset
from dualhook.demo import network

T = TypeVar("T")


def peak_memory() -> float:
    """Largest resident memory of this process so far, in MB; mapped files count."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def timed(what: str, do: Callable[[], T]) -> T:
    started = time.perf_counter()
    result = do()
    print(f"{what:<34}{time.perf_counter() - started:>9.1f} s{peak_memory():>12,.0f} MB peak", flush=True)
    return result


def train(folder: Path, steps: int) -> tuple[torch.nn.Module, dualhook.DualMemory]:
    data = load_fashion_mnist_subset()
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=3e-3)
    recorder = dualhook.instrument(model, folder / "memory")
    # drop_last: every step has a whole batch, as in 640,000 patterns
    loader = DataLoader(TensorDataset(data.train_images, data.train_labels), 128, shuffle=True, drop_last=True)
    while recorder.steps < steps:
        for images, labels in recorder.track(loader):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            if recorder.steps == steps:
                break
    memory = recorder.close()
    memory.add_column("label", data.train_labels)
    return model, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--out", type=Path, help="keep the memory here")
    arguments = parser.parse_args()
    folder = arguments.out or Path(tempfile.mkdtemp(prefix="dualhook-paper-"))
    try:
        print(f"{'before':<36}{'':>9}{peak_memory():>12,.0f} MB peak")
        model, memory = timed(f"{arguments.steps:,} recorded steps", lambda: train(folder, arguments.steps))
        print(memory.info())
        report = timed("verify()", memory.verify)
        print(report)
        attention = memory.attend(model, load_fashion_mnist_subset().test_images[:10])
        timed("top(10) and receipt, 10 queries", lambda: attention.top(10))
        timed("sum_by('label'), 10 queries", lambda: attention.sum_by("label"))
        receipt = attention.receipt
        print(f"explained at least {receipt['explained'].min():.7f}")
        print(f"cancellation {receipt['cancellation'].min():.3g} to {receipt['cancellation'].max():.3g}")
    finally:
        if arguments.out is None:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
