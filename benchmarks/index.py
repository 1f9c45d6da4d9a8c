"""Do approximate indexes beat the exact scan for single queries, on real penultimate keys?

The paper's network (784-800-800-10) is trained on Fashion-MNIST images and recorded; the keys of its last layer, 800
wide, go into FAISS indexes: inverted lists by inner product, and after the reduction of inner product to distance (one
more component, which makes all keys equally long) inverted lists, product-quantised ones whose candidates are ranked
again by their keys, and a graph. Every one is searched with a growing effort until recall@10 is at least .95 or the
effort is at its end; its time is then compared with that of torch's exact top 10 in chunks on the keys in memory. One
query at a time, one thread.

    python benchmarks/index.py [--patterns 200000] [--queries 50] [--graph-links 32]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import faiss
import numpy as np
import torch
from query import BATCH, K, in_memory, top_of_torch
from recorded import record

from dualhook.data import load_fashion_mnist_subset
from dualhook.demo import network

RECALL = 0.95
TRAINED_ON = 50_000  # keys that lists and codes are learned from


def lengthened(keys: np.ndarray) -> np.ndarray:
    """Keys [n, i + 1], all of one length: the nearest to (query, 0) then has the largest inner product."""
    squares = (keys**2).sum(1)
    return np.hstack([keys, np.sqrt(squares.max() - squares)[:, None].astype(np.float32)])


def searched(search: Callable[[np.ndarray], np.ndarray], queries: np.ndarray, true: np.ndarray) -> tuple[float, float]:
    """Recall@10 and the median seconds of one query."""
    spent, hits = [], 0
    for query, names in zip(queries, true, strict=True):
        started = time.perf_counter()
        found = search(query[None])
        spent.append(time.perf_counter() - started)
        hits += len(set(found[0].tolist()) & set(names.tolist()))
    return hits / true.size, statistics.median(spent)


def lists(count: int) -> int:
    return int(4 * count**0.5)


def built(name: str, keys: np.ndarray, links: int) -> faiss.Index:
    """An index by its name, filled with keys."""
    width, factory = keys.shape[1], {
        "IVF": f"IVF{lists(len(keys))},Flat",
        "PQ": f"OPQ80_160,IVF{lists(len(keys))},PQ80,RFlat",
        "HNSW": f"HNSW{links},Flat",
    }  # fmt: skip
    metric = faiss.METRIC_INNER_PRODUCT if name == "IVF, inner product" else faiss.METRIC_L2
    index = faiss.index_factory(width, factory[name.partition(",")[0]], metric)
    chosen = np.random.default_rng(0).permutation(len(keys))[:TRAINED_ON]
    index.train(keys[chosen])
    index.add(keys)
    return index


def efforts(name: str, count: int) -> Sequence[int]:
    if name == "HNSW":
        return [10 * 2**step for step in range(11)]
    return [effort for step in range(12) if (effort := 2**step) <= lists(count)]


def set_effort(index: faiss.Index, name: str, effort: int) -> None:
    """How many lists are looked at, or how many places of the graph."""
    if name == "HNSW":
        index.hnsw.efSearch = effort
    elif name == "PQ":
        index.k_factor = 20.0
        faiss.extract_index_ivf(index.base_index).nprobe = effort
    else:
        index.nprobe = effort


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patterns", type=int, default=200_000)
    parser.add_argument("--queries", type=int, default=50)
    parser.add_argument("--graph-links", type=int, default=32)
    parser.add_argument("--indexes", nargs="+", default=["IVF, inner product", "IVF", "PQ", "HNSW"])
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = network()
    with tempfile.TemporaryDirectory(prefix="dualhook-index-") as folder:
        memory = record(model, Path(folder) / "memory", arguments.patterns, layers=["fc3"], batch=BATCH)
        keys = in_memory(memory.path, "fc3")
    with torch.no_grad():
        asked = model[:-1](load_fashion_mnist_subset().test_images[: arguments.queries])
    true, queries = top_of_torch(keys, asked).numpy(), asked.numpy()
    torch.set_num_threads(1)
    _, exact = searched(lambda query: top_of_torch(keys, torch.from_numpy(query)).numpy(), queries, true)
    print(
        f"{len(keys):,} keys, {keys.shape[1]} wide, {len(queries)} queries; the exact scan {exact * 1e3:.1f} ms a query"
    )
    print(f"{'index':<22}{'built in s':>12}{'effort':>9}{'recall@10':>11}{'ms':>9}{'of exact':>10}")
    longer = lengthened(keys.numpy())
    padded = np.hstack([queries, np.zeros((len(queries), 1), np.float32)])
    for name in arguments.indexes:
        own = (keys.numpy(), queries) if name.endswith("product") else (longer, padded)
        started = time.perf_counter()
        index = built(name, own[0], arguments.graph_links)
        spent = time.perf_counter() - started
        faiss.omp_set_num_threads(1)
        for effort in efforts(name, len(keys)):
            set_effort(index, name, effort)
            recall, seconds = searched(lambda query, index=index: index.search(query, K)[1], own[1], true)
            if recall >= RECALL:
                break
        faiss.omp_set_num_threads(torch.get_num_interop_threads())
        print(
            f"{name:<22}{spent:>12.0f}{effort:>9}{recall:>11.3f}{seconds * 1e3:>9.1f}{seconds / exact:>10.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
