"""What recording a torchvision classifier costs on disk: bytes per image in float32, from shapes alone.

python benchmarks/torchvision_cost.py            # the models of the README
python benchmarks/torchvision_cost.py resnet18   # others of the registry
"""

from __future__ import annotations

import sys

from dualhook.integrations.torchvision import estimate
from torchvision.models import get_model

MODELS = ("resnet50", "vgg16", "vit_b_16")


def main(names: list[str]) -> None:
    print(f"{'model':<24}{'head':>12}{'head+block':>14}{'all':>12}")
    for name in names or MODELS:
        sizes = dict(zip(*(estimate(get_model(name))[column] for column in ("choice", "bytes")), strict=True))
        print(f"{name:<24}{human(sizes['head']):>12}{human(sizes['head+block']):>14}{human(sizes['all']):>12}")


def human(size: float) -> str:
    return f"{size / 1e3:.3g} kB" if size < 1e6 else f"{size / 1e6:.3g} MB"


if __name__ == "__main__":
    main(sys.argv[1:])
