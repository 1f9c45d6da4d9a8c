"""What a question costs beside the machine's ceilings and beside torch's own matmul on the same keys in memory.

The paper's network (784-800-800-10) is trained on Fashion-MNIST images and recorded; its layers fc2 (keys and output
gradients 800 wide) and fc3 (output gradients 10 wide) are asked from disk, through the page cache. torch multiplies the
same keys, which it has in memory, chunk by chunk in float32, takes the top 10 of each and merges. All ways take turns.

Ceilings, measured in the same run: read bandwidth (float32 numbers in memory, summed up, or with ``--device`` brought
there), matmul in float32 and bfloat16. Bytes are those of the keys and output gradients that a question has to see, all
in float32, operations those of its products. ``bfloat16`` says whether a first look in 16 bits can pay: not where it is
slower than float32, as on every x86 processor without AMX or AVX512-BF16. ``torch in bfloat16`` multiplies keys that it
has in 16 bits already and ranks what comes out: the least that a first look could take, were there no rows to read, to
round and to measure. recall is the share of the ten that ``top`` names whose float64 product is not below that of the
true tenth, by more than its rounding in float32.

    python benchmarks/query.py [--patterns 200000] [--queries 1 32 256] [--rounds 5] [--threads 1] [--device cuda]
        [--sparse]
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from recorded import record
from torch import Tensor
from turns import in_turns

import dualhook
from dualhook.data import load_fashion_mnist_subset
from dualhook.demo import network
from dualhook.store import Store

K = 10
CHUNK = 16384  # rows that torch multiplies at a time
BATCH = 500


CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
clock = time.perf_counter


def seconds(do: Callable[[], object]) -> float:
    started = clock()
    do()
    return clock() - started


@dataclass(frozen=True)
class Ceilings:
    """What the machine can do: bytes a second read, operations a second in two precisions."""

    bandwidth: float
    float32: float
    bfloat16: float

    @classmethod
    def measured(cls, keys: Tensor, rounds: int, device: torch.device) -> Ceilings:
        def fastest(do: Callable[[], Tensor]) -> float:
            # one number of the result: a device has to be through with it; the first time warms up
            return min(seconds(lambda: do().flatten()[0].item()) for _ in range(rounds + 1))

        def read() -> Tensor:
            return keys.sum() if device.type == "cpu" else keys.to(device)

        wide, small = torch.randn(2048, 2048, device=device), torch.randn(512, 512, device=device).bfloat16()
        return cls(
            keys.nbytes / fastest(read),
            2 * 2048**3 / fastest(lambda: wide @ wide),
            2 * 512**3 / fastest(lambda: small @ small),
        )


def in_memory(path: Path, layer: str) -> Tensor:
    """All keys of a layer [n, i]."""
    store = Store(path)
    keys = torch.empty(store.count(layer), next(s.in_features for s in store.layers if s.name == layer))
    start = 0
    for rows in store.blocks(layer, last_step=store.last_step, block_rows=CHUNK):
        keys[start : start + len(rows)] = rows.key
        start += len(rows)
    return keys


def top_of_torch(keys: Tensor, query: Tensor, k: int = K) -> Tensor:
    """The patterns [q, k] with the largest products, which are made where the query is."""
    best = torch.zeros(len(query), 0, dtype=query.dtype, device=query.device)
    where = torch.zeros(len(query), 0, dtype=torch.int64, device=query.device)
    for start in range(0, len(keys), CHUNK):
        chunk = keys[start : start + CHUNK].to(query)
        found, index = (query @ chunk.T).topk(min(k, len(chunk)), dim=1)
        best, where = torch.cat([best, found], 1), torch.cat([where, index + start], 1)
        best, order = best.topk(min(k, best.shape[1]), dim=1)
        where = where.gather(1, order)
    return where.cpu()


class Bench:
    """One layer's questions, in turns with torch."""

    def __init__(
        self, memory: dualhook.DualMemory, model: torch.nn.Module, layer: str, ceilings: Ceilings, device: torch.device
    ) -> None:
        self.memory, self.model, self.layer, self.ceilings, self.device = memory, model, layer, ceilings, device
        self.keys = in_memory(memory.path, layer)
        self.short = self.keys.to(device, torch.bfloat16)
        self.outputs = dict(model.named_modules())[layer].out_features

    def ask(self, images: Tensor, rounds: int) -> None:
        """The table of so many queries."""
        memory, model, layer = self.memory, self.model, self.layer
        with torch.no_grad():
            query = model[: list(dict(model.named_children())).index(layer)](images)
        known = memory.attend(model, images, layers=layer, device=self.device)
        named = known.top(K, by="weight")  # from here on its receipt is known

        def first() -> float:
            fresh = memory.attend(model, images, layers=layer, device=self.device)
            return seconds(lambda: fresh.top(K))

        products = {"torch, keys in memory": 1, "torch in bfloat16, inexact": 1}
        products |= {"top(10, by='weight')": 1, "top(10)": 2, "sum_by('label')": 2}
        products["the first top(10), with receipt"] = 3
        ways = {
            "torch, keys in memory": lambda: seconds(lambda: top_of_torch(self.keys, query.to(self.device))),
            "torch in bfloat16, inexact": lambda: seconds(lambda: top_of_torch(self.short, query.to(self.short))),
            "top(10, by='weight')": lambda: seconds(lambda: known.top(K, by="weight")),
            "top(10)": lambda: seconds(lambda: known.top(K)),
            "sum_by('label')": lambda: seconds(lambda: known.sum_by("label")),
            "the first top(10), with receipt": first,
        }
        taken = in_turns(ways, rounds)
        tenth = self._products(query, top_of_torch(self.keys, query.double()))[:, -1:]
        mine = torch.from_numpy(np.stack([named.where(query=q)["pattern"] for q in range(len(query))]))
        recall = float((self._products(query, mine) >= tenth * (1 - 1e-6)).double().mean())
        queries = "1 query" if len(query) == 1 else f"{len(query)} queries"
        count, inputs = self.keys.shape
        print(f"\n{layer}, {count:,} patterns, {inputs} to {self.outputs}, {queries}: recall {recall:.3f}")
        print(f"{'':<34}{'ms':>9}{'of torch':>10}{'of weight':>11}{'GB/s':>8}{'ceiling':>9}{'GF/s':>8}{'ceiling':>9}")
        for name, own in taken.items():
            spent, wide = statistics.median(own), (products[name] - 1) * self.outputs
            moved = 4 * count * (inputs + (self.outputs if wide else 0)) / spent
            worked = 2 * len(query) * count * (inputs + wide) / spent
            against = [
                statistics.median(a / b for a, b in zip(own, taken[base], strict=True))
                for base in ("torch, keys in memory", "top(10, by='weight')")
            ]
            print(
                f"{name:<34}{spent * 1e3:>9.1f}{against[0]:>10.2f}{against[1]:>11.2f}"
                f"{moved / 1e9:>8.1f}{moved / self.ceilings.bandwidth:>9.0%}"
                f"{worked / 1e9:>8.1f}{worked / self.ceilings.float32:>9.0%}",
                flush=True,
            )

    def _products(self, query: Tensor, patterns: Tensor) -> Tensor:
        """Of queries [q, i] and the keys of patterns [q, k], in float64."""
        return (self.keys[patterns].double() @ query.double()[..., None])[..., 0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patterns", type=int, default=200_000)
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--layers", nargs="+", default=["fc2", "fc3"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", type=torch.device, default="cpu", help="where products are made")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="processor: the steadier on a busy machine")
    parser.add_argument("--sparse", action="store_true", help="rows without their zeros, made whole by every question")
    parser.add_argument("--out", type=Path, help="keep the memory here; one that is there is asked as it is")
    arguments = parser.parse_args()
    global clock
    clock = CLOCKS[arguments.clock]
    torch.set_num_threads(arguments.threads)
    folder = arguments.out or Path(tempfile.mkdtemp(prefix="dualhook-query-"))
    torch.manual_seed(0)
    model = network()
    try:
        if not (folder / "memory").exists():
            record(
                model,
                folder / "memory",
                arguments.patterns,
                layers=arguments.layers,
                batch=BATCH,
                sparse=arguments.sparse,
            )
            torch.save(model.state_dict(), folder / "model.pt")
        model.load_state_dict(torch.load(folder / "model.pt"))
        memory = dualhook.load(folder / "memory")
        ceilings: Ceilings | None = None
        for layer in arguments.layers:
            ceilings = ceilings or Ceilings.measured(in_memory(memory.path, layer), arguments.rounds, arguments.device)
            bench = Bench(memory, model, layer, ceilings, arguments.device)
            if layer == arguments.layers[0]:
                print(
                    f"{arguments.device}, threads {arguments.threads}, {arguments.clock} time; "
                    f"ceilings: read {ceilings.bandwidth / 1e9:.1f} GB/s, matmul "
                    f"{ceilings.float32 / 1e9:.1f} GF/s in float32, {ceilings.bfloat16 / 1e9:.1f} GF/s in bfloat16"
                )
            for count in arguments.queries:
                bench.ask(load_fashion_mnist_subset().test_images[:count], arguments.rounds)
    finally:
        if arguments.out is None:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
