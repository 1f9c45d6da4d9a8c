"""What `memory.influence` costs on the demo's memory (784-800-800-10, SGD with momentum, 74,880 patterns a layer).

    python benchmarks/influence_cost.py [--threads 2] [--queries 50]

The first decayed influence fits what training has left of each layer's gradients, and keeps that beside the memory.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

import dualhook
from dualhook.data import load_fashion_mnist_subset
from dualhook.demo import network, run_demo
from dualhook.table import Table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--queries", type=int, default=50, help="asked in one call")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    images = load_fashion_mnist_subset().test_images[: arguments.queries]
    with tempfile.TemporaryDirectory(prefix="dualhook-influence-cost-") as folder:
        run_demo(Path(folder) / "demo")
        memory, model = dualhook.load(Path(folder) / "demo" / "memory"), network()
        model.load_state_dict(memory.state_dict())
        questions = [("decayed, with the fit", "decayed", 1)]
        questions += [(method, method, count) for method in ("decayed", "cosine") for count in (1, arguments.queries)]
        seconds = []
        for _, method, count in questions:
            started = time.perf_counter()
            memory.influence(model, images[:count], method=method)
            seconds.append(time.perf_counter() - started)
        counts = [count for *_, count in questions]
        print(
            Table(
                {
                    "influence": [name for name, *_ in questions],
                    "queries": counts,
                    "seconds": seconds,
                    "ms a query": [1e3 * taken / count for taken, count in zip(seconds, counts, strict=True)],
                },
                title=f"{memory.patterns(memory.layers[0]):,} patterns a layer, threads {arguments.threads}",
            )
        )


if __name__ == "__main__":
    main()
