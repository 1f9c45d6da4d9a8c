"""Whether a long training at bounded memory stays so: resident size, files and time along many small steps.

A linear map (8 to 4, batch 4, SGD with momentum) is trained and recorded with ``on_full="fold"``, so that the
oldest patterns keep becoming part of the origin. Warm-up is the first tenth: figures are those of this process after
it, and the growth is the difference between the medians of its first and last quarter. In the end the memory is
opened, and the weights are rebuilt.

    python benchmarks/soak.py [--steps 100000] [--max-bytes 20000000] [--lines 20]

A day has 2,000,000 steps of 43 ms: --steps 2000000.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import threading
import time
from pathlib import Path

import torch
from torch import nn

import dualhook

BATCH, INPUTS, CLASSES = 4, 8, 4


def resident() -> float:
    """MB that this process holds, by Linux's /proc."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmRSS:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--max-bytes", type=int, default=20_000_000)
    parser.add_argument("--lines", type=int, default=20, help="how often figures are printed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    inputs, labels = torch.randn(4096, INPUTS).double(), torch.randint(0, CLASSES, (4096,))
    model = nn.Linear(INPUTS, CLASSES, bias=False).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    sizes: list[float] = []
    print(f"{'step':>10}{'resident MB':>14}{'objects':>12}{'threads':>9}{'on disk MB':>12}{'files':>7}{'ms/step':>9}")
    with tempfile.TemporaryDirectory(prefix="dualhook-soak-") as folder:
        path = Path(folder) / "memory"
        recorder = dualhook.instrument(model, path, max_bytes=arguments.max_bytes, on_full="fold", verbose=False)
        began = last = time.perf_counter()
        for step in range(1, arguments.steps + 1):
            start = BATCH * step % len(labels)
            own = slice(start, start + BATCH)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs[own]), labels[own]).backward()
            optimizer.step()
            if step % max(1, arguments.steps // 200) == 0 and step > arguments.steps // 10:
                sizes.append(resident())
            if step % max(1, arguments.steps // arguments.lines) == 0:
                now, files = time.perf_counter(), [file for file in path.rglob("*") if file.is_file()]
                speed = 1e3 * (now - last) / max(1, arguments.steps // arguments.lines)
                on_disk = sum(file.stat().st_size for file in files) / 1e6
                print(
                    f"{step:>10,}{resident():>14.1f}{len(gc.get_objects()):>12,}{threading.active_count():>9}"
                    f"{on_disk:>12.1f}{len(files):>7}{speed:>9.3f}",
                    flush=True,
                )
                last = time.perf_counter()
        memory = recorder.close()
        taken = time.perf_counter() - began
        report = memory.verify()
        quarter = len(sizes) // 4
        first, end = statistics.median(sizes[:quarter]), statistics.median(sizes[-quarter:])
        print(f"{arguments.steps:,} steps in {taken:,.0f} s; MB after warm-up {first:.1f}, at the end {end:.1f}")
        print(f"weights rebuilt: largest relative error {report.max_error:.2g}, exact: {bool(report['exact'].all())}")


if __name__ == "__main__":
    main()
