"""What checksums cost: a recorded training step with and without them, and the writing thread's time that they take.

The network of the paper (784-800-800-10, batch 128). Both ways take turns in blocks of steps within one process; a
block ends with a flush, so that the writing of its rows is part of it.

    python benchmarks/checksums.py [--rounds 12] [--block 60] [--threads N]
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import xxhash
from torch.nn import functional as F
from turns import in_turns, spread

import dualhook
from dualhook.demo import network
from dualhook.store import layout

BATCH, BYTES = 128, 2**26
hashed = {"seconds": 0.0, "written": 0.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--block", type=int, default=60)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = torch.randint(0, 255, (BYTES,), dtype=torch.uint8).numpy()
    for name, function in {"XXH3": xxhash.xxh3_64_intdigest, "CRC-32": zlib.crc32}.items():
        seconds = statistics.median(timed(lambda: function(data)) for _ in range(9))  # noqa: B023
        print(f"{name}: {BYTES / seconds / 1e6:,.0f} MB/s")

    torch.manual_seed(0)
    model, path = network(), tempfile.mkdtemp()
    recorder = dualhook.instrument(model, f"{path}/run", max_bytes=4 * 10**9, on_full="fold", verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=3e-3)
    batches = [(torch.rand(BATCH, 784), torch.randint(0, 10, (BATCH,))) for _ in range(options.block)]

    def block() -> float:
        began = time.perf_counter()
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        recorder.flush()
        return (time.perf_counter() - began) / len(batches)

    def with_them() -> float:
        hashing, writing = noted(layout.with_checksums, "seconds"), noted(layout.put, "written")
        with replaced("with_checksums", hashing), replaced("put", writing):
            return block()

    def without_them() -> float:
        with replaced("with_checksums", lambda header, tensors: dict(header)):
            return block()

    seconds = in_turns({"without": without_them, "with": with_them}, options.rounds)
    for name, found in seconds.items():
        print(f"{name:8} {1e3 * statistics.median(found):6.2f} ms/step   {spread(found, seconds['without'])}")
    share = hashed["seconds"] / (hashed["seconds"] + hashed["written"])
    print(f"of the writing thread's time on files: {share:.1%}")
    recorder.discard()
    shutil.rmtree(path)


def timed(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def noted(function: Callable[..., Any], what: str) -> Callable[..., Any]:
    """The function, its time in the writing thread added up."""

    def call(*args: Any) -> Any:
        began = time.perf_counter()
        found = function(*args)
        if threading.current_thread().name == "dualhook-writer":
            hashed[what] += time.perf_counter() - began
        return found

    return call


@contextmanager
def replaced(name: str, function: Callable[..., Mapping[str, Any] | None]) -> Any:
    original = getattr(layout, name)
    setattr(layout, name, function)
    try:
        yield
    finally:
        setattr(layout, name, original)


if __name__ == "__main__":
    main()
