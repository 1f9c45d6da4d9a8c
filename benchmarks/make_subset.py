"""Make the subset of Fashion-MNIST that ships with the package: the first images of every class, in file order.

``python benchmarks/make_subset.py --source DIR``, where ``DIR`` holds the four ``*-ubyte.gz`` files as torchvision
downloads them (``FashionMNIST/raw``).
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

import numpy as np

SHIPPED = Path(__file__).parents[1] / "src" / "dualhook" / "data" / "fashion_mnist_subset.npz"
MAGIC = {1: 2049, 3: 2051}  # by number of dimensions: labels, images
PER_CLASS = {"train": 500, "test": 100}
PREFIX = {"train": "train", "test": "t10k"}


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """An IDX file of unsigned bytes: magic number and sizes as big-endian int32, then the values."""
    content = gzip.decompress(path.read_bytes())
    magic, *shape = np.frombuffer(content, ">i4", 1 + dimensions).tolist()
    if magic != MAGIC[dimensions]:
        raise SystemExit(f"{path}: magic number {magic}, expected {MAGIC[dimensions]}")
    return np.frombuffer(content, np.uint8, offset=4 * (1 + dimensions)).reshape(shape)


def first_of_each_class(labels: np.ndarray, count: int) -> np.ndarray:
    """The rows of the first ``count`` samples of every class, ascending."""
    return np.sort(np.concatenate([np.flatnonzero(labels == label)[:count] for label in np.unique(labels)]))


def subset(source: Path) -> dict[str, np.ndarray]:
    arrays = {}
    for split, count in PER_CLASS.items():
        images = read_idx(source / f"{PREFIX[split]}-images-idx3-ubyte.gz", 3)
        labels = read_idx(source / f"{PREFIX[split]}-labels-idx1-ubyte.gz", 1)
        rows = first_of_each_class(labels, count)
        arrays |= {
            f"{split}_images": images[rows],
            f"{split}_labels": labels[rows],
            f"{split}_rows": rows.astype(np.int32),
        }
    return arrays


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="folder with the four idx .gz files")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="the file to write (default: the shipped one)")
    options = parser.parse_args()
    arrays = subset(options.source)
    np.savez_compressed(options.out, **arrays)
    shapes = ", ".join(f"{name} {list(values.shape)}" for name, values in arrays.items())
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.2f} MB, {shapes}")


if __name__ == "__main__":
    main()
