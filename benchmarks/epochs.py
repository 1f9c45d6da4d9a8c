"""What keys that come again in every epoch save: bytes a step and the writing thread's time, epoch by epoch.

The network of the paper (784-800-800-10, batch 128) on shuffled Fashion-MNIST images. Where the loop names its samples,
the keys of the first layer are stored once; where it does not, with their rows in every epoch.

    python benchmarks/epochs.py [--epochs 3] [--images FOLDER] [--threads N]

``--images``: where torchvision keeps Fashion-MNIST; default the 5,000 images that are shipped.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from pathlib import Path

import torch
from recorded import all_of_fashion_mnist
from torch.nn import functional as F

import dualhook
from dualhook.data import FashionMnist, load_fashion_mnist_subset
from dualhook.demo import network

BATCH = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="where torchvision keeps Fashion-MNIST")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    data = all_of_fashion_mnist(arguments.images) if arguments.images else load_fashion_mnist_subset()
    print(f"784-800-800-10, batch {BATCH}, {len(data.train_images):,} images, {arguments.threads} threads")
    print(f"{'rows':<8}{'samples':<10}{'epoch':>6}{'MB/step':>10}{'writing, ms/step':>18}")
    for sparse in (False, True):
        for named in (False, True):
            for epoch, (size, spent) in enumerate(recorded(data, arguments.epochs, sparse=sparse, named=named), 1):
                rows, samples = "sparse" if sparse else "whole", "named" if named else "unknown"
                print(f"{rows:<8}{samples:<10}{epoch:>6}{size / 1e6:>10.2f}{1e3 * spent:>18.2f}", flush=True)


def recorded(data: FashionMnist, epochs: int, *, sparse: bool, named: bool) -> list[tuple[float, float]]:
    """Bytes and seconds of the writing thread a step, of every epoch."""
    torch.manual_seed(0)
    model, found, before = network(), [], (0, 0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=3e-3)
    with tempfile.TemporaryDirectory(prefix="dualhook-benchmark-") as folder:
        recorder = dualhook.instrument(model, Path(folder) / "memory", sparse=sparse, verbose=False)
        (writer,) = (thread for thread in threading.enumerate() if thread.name == "dualhook-writer")
        clock = time.pthread_getcpuclockid(writer.ident)
        for _ in range(epochs):
            batches = torch.randperm(len(data.train_images)).split(BATCH)
            for batch in batches:
                if named:
                    recorder.batch(samples=batch)
                optimizer.zero_grad()
                F.cross_entropy(model(data.train_images[batch]), data.train_labels[batch]).backward()
                optimizer.step()
            recorder.flush()
            size = sum(path.stat().st_size for path in (recorder.path / "segments").iterdir())
            now = size, time.clock_gettime(clock)
            found.append(((now[0] - before[0]) / len(batches), (now[1] - before[1]) / len(batches)))
            before = now
        recorder.close()
    return found


if __name__ == "__main__":
    main()
