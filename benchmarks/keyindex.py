"""What ``memory.index`` saves: single questions with and without it, and how much of the first ten it finds.

The paper's network (784-800-800-10) is trained on Fashion-MNIST images and its last layer recorded: keys 800 wide. Test
images are the queries, one at a time: ``top(10, by="weight", index=...)``, and the same without index, which goes
through all patterns, read from the page cache as far as they fit into memory.

    python benchmarks/keyindex.py [--patterns 1000000] [--queries 50] [--images FOLDER] [--dtype bfloat16]

``--images``: where torchvision keeps Fashion-MNIST; default the 5,000 images that are shipped.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from recorded import all_of_fashion_mnist, record

import dualhook
from dualhook.data import load_fashion_mnist_subset
from dualhook.demo import network

K = 10
EXACT = 5  # queries that are asked without index, one at a time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patterns", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=50)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="where torchvision keeps Fashion-MNIST")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--folder", type=Path, help="where memory and model are kept; default a temporary one")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model, data = network(), all_of_fashion_mnist(arguments.images) if arguments.images else load_fashion_mnist_subset()
    with tempfile.TemporaryDirectory(prefix="dualhook-keyindex-") as temporary:
        folder = arguments.folder or Path(temporary)
        path, weights = folder / "memory", folder / "model.pt"
        if weights.is_file():
            memory = dualhook.load(path)
            model.load_state_dict(torch.load(weights, weights_only=True))
        else:
            dtype = getattr(torch, arguments.dtype)
            memory = record(
                model, path, arguments.patterns, layers=["fc3"], batch=arguments.batch, dtype=dtype, data=data
            )
            torch.save(model.state_dict(), weights)
        measure(memory, model, data.test_images[: arguments.queries])


def measure(memory: dualhook.DualMemory, model: torch.nn.Module, queries: torch.Tensor) -> None:
    """Print one line each."""
    print(f"{memory.patterns('fc3'):,} patterns, {memory.nbytes / 1e9:.2f} GB, {torch.get_num_threads()} threads")
    started = time.perf_counter()
    index = memory.index("fc3")
    size = sum(file.stat().st_size for file in (memory.path / "answers").iterdir())
    print(f"made in {time.perf_counter() - started:.0f} s, {size / 1e9:.2f} GB: {index!r}", flush=True)

    def asked(own: torch.Tensor, **settings: object) -> tuple[dualhook.Table, float]:
        started = time.perf_counter()
        found = memory.attend(model, own, layers="fc3").top(K, by="weight", **settings)
        return found, time.perf_counter() - started

    true, _ = asked(queries)
    names = true["pattern"].reshape(len(queries), K)
    asked(queries[:1], index=index)
    hits, spent, exact = 0, [], []
    for number in range(len(queries)):
        found, seconds = asked(queries[number : number + 1], index=index)
        hits += len(set(found["pattern"].tolist()) & set(names[number].tolist()))
        spent.append(seconds)
        if number < EXACT:
            exact.append(asked(queries[number : number + 1])[1])
    with_index, without = statistics.median(spent), statistics.median(exact)
    print(
        f"recall@{K} {hits / names.size:.3f} over {len(queries)} test images; one question {with_index * 1e3:.1f} ms "
        f"with the index, {without * 1e3:.1f} ms without: {with_index / without:.3f} of it"
    )


if __name__ == "__main__":
    main()
