"""Record the training of an image classifier, then ask which training images its answers are made of.

    python examples/image_classification.py                      # the 5,000 images that ship with dualhook, seconds
    python examples/image_classification.py --data DIR           # all 60,000 in torchvision's folder, 0.3 GB an epoch
    python examples/image_classification.py --data DIR --download

What dualhook needs is marked with ``# (1)`` to ``# (3)``; the rest is an ordinary training script.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dualhook
from dualhook.data import CLASSES, FashionMnist, load_fashion_mnist_subset


def main() -> None:
    options = arguments()
    torch.manual_seed(0)
    data = load_images(options.data, options.download)
    model = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    loader = DataLoader(TensorDataset(data.train_images, data.train_labels), batch_size=100, shuffle=True)

    recorder = dualhook.instrument(model, options.memory, overwrite=True)  # (1) the one line
    for epoch in range(options.epochs):
        for images, labels in recorder.track(loader):  # (2) so that every pattern knows its image
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
    memory = recorder.close()  # (3)

    with torch.no_grad():
        predicted = model(data.test_images).argmax(1)
    print(f"test accuracy {(predicted == data.test_labels).float().mean():.1%}\n")
    print(memory.verify(), end="\n\n")

    wrong = (predicted != data.test_labels).nonzero().flatten()[:2]
    for query, index in enumerate(wrong.tolist()):
        truth, given = CLASSES[data.test_labels[index]], CLASSES[predicted[index]]
        print(f"query {query}: test image {index}, a {truth}, taken for a {given}")
    memory.add_column("label", [CLASSES[label] for label in data.train_labels.tolist()])
    attention = memory.attend(model, data.test_images[wrong])
    print(attention.top(3, by="abs_contribution"), end="\n\n")  # what counts most in each layer, for or against
    print(attention.sum_by("label", layers="2"))  # the same of all patterns, by class

    assert memory.verify().max_error < 1e-5


def load_images(folder: Path, download: bool) -> FashionMnist:
    """All of Fashion-MNIST where it can be had, else the subset that ships with dualhook."""
    try:
        from torchvision.datasets import FashionMNIST

        train, test = (FashionMNIST(folder, train=split, download=download) for split in (True, False))
    except (ImportError, RuntimeError) as error:  # no torchvision, or nothing in the folder
        print(f"images: the subset that ships with dualhook (no Fashion-MNIST in {folder}: {error})")
        return load_fashion_mnist_subset()
    print(f"images: Fashion-MNIST in {folder}")
    return FashionMnist(
        train.data.flatten(1).float() / 255, train.targets, test.data.flatten(1).float() / 255, test.targets
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), metavar="DIR", help="torchvision's folder (data)")
    parser.add_argument("--download", action="store_true", help="fetch the images into it")
    parser.add_argument("--epochs", type=int, default=5, metavar="N")
    parser.add_argument(
        "--memory", type=Path, default=Path("runs/fashion-mnist"), metavar="DIR", help="where to record"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
