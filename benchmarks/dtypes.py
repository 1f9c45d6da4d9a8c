"""What a dtype of the stored rows costs in exactness, and saves in bytes; and what leaving out zeros saves.

The network of the paper (784-800-800-10, batch 128) is trained on Fashion-MNIST once for every way, alike to the bit,
and recorded, with all numbers of its rows or without the zeros (``sparse=True``). Per layer: the error of the rebuilt
weights, and the least share of the trained output that the parts explain in 100 test queries; over all layers MB a
step.

    python benchmarks/dtypes.py [--steps 400] [--optimizer sgd|adam] [--threads N]
"""

from __future__ import annotations

import argparse
import tempfile
from itertools import product
from pathlib import Path

import torch
from torch.nn import functional as F

import dualhook
from dualhook.data import load_fashion_mnist_subset
from dualhook.demo import network

BATCH = 128
DTYPES = {"as computed": None, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}


def recorded(folder: Path, dtype: torch.dtype | None, sparse: bool, steps: int, optimizer: str):
    """MB a step, the comparison of all weights, and the least explained share by layer."""
    data = load_fashion_mnist_subset()
    torch.manual_seed(0)
    model = network()
    kinds = {"sgd": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9), "adam": lambda p: torch.optim.Adam(p, lr=1e-3)}
    stepper = kinds[optimizer](model.parameters())
    recorder = dualhook.instrument(model, folder / f"{dtype}-{sparse}", dtype=dtype, sparse=sparse, verbose=False)
    for _ in range(steps):
        chosen = torch.randint(0, len(data.train_labels), (BATCH,))
        stepper.zero_grad()
        F.cross_entropy(model(data.train_images[chosen]), data.train_labels[chosen]).backward()
        stepper.step()
    memory = recorder.close()
    receipt = memory.attend(model, data.test_images[:100]).receipt
    explained = [float(min(receipt.where(layer=layer)["explained"])) for layer in memory.layers]
    return memory.nbytes / steps / 1e6, memory.verify(model), explained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--optimizer", choices=("sgd", "adam"), default="sgd")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"784-800-800-10, {options.optimizer}, {options.steps} steps of {BATCH}; torch {torch.__version__}")
    print(f"{'rows':20} {'MB/step':>8}   error of the weights, by layer        least share explained, by layer")
    with tempfile.TemporaryDirectory() as folder:
        for (name, dtype), sparse in product(DTYPES.items(), (False, True)):
            size, report, explained = recorded(Path(folder), dtype, sparse, options.steps, options.optimizer)
            errors = [float(max(report.where(layer=layer)["error"])) for layer in dict.fromkeys(report["layer"])]
            print(
                f"{name + ', sparse' * sparse:20} {size:8.2f}   {'  '.join(f'{error:9.1e}' for error in errors):36} "
                f"{'  '.join(f'{share:9.6f}' for share in explained)}"
            )


if __name__ == "__main__":
    main()
