"""Models on a device that is not the processor: some of every sort, on one that the processor plays."""

from __future__ import annotations

import pytest
from sweep import torchvision_families, transformers_families
from sweep.harness import check

IMAGES = [
    ("alexnet", "alexnet"),
    ("resnet", "resnet"),
    ("swin_transformer", "v1"),
    ("vision_transformer", "vit"),
]
TEXT = [("decoder", "gpt2"), ("decoder", "llama"), ("encoder", "bert_mlm"), ("encoder_decoder", "t5")]
CASES = [torchvision_families.FAMILIES[family][member] for family, member in IMAGES]
CASES += [transformers_families.FAMILIES[family][member] for family, member in TEXT]


@pytest.mark.parametrize("case", CASES, ids=[member for _, member in IMAGES + TEXT])
def test_every_map_is_rebuilt_and_the_rest_is_as_expected(monkeypatch, case):
    monkeypatch.setenv("DUALHOOK_DEVICE", "elsewhere")
    check(case)
