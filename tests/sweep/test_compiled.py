"""Models of the sweep under ``torch.compile``: what a module does in functions is seen there too."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from sweep import test_torchvision, test_transformers
from sweep.harness import assert_truthful, assert_uncovered, built, train

import dualhook

CASES = {name[1]: case for name, case in [*test_torchvision.CASES.items(), *test_transformers.CASES.items()]}
LONG = pytest.mark.skipif(not os.environ.get("DUALHOOK_SWEEP"), reason="compiles for long: DUALHOOK_SWEEP=1 runs it")
MEMBERS = ["gpt2"]
MEMBERS += [
    pytest.param(member, marks=LONG) for member in ("vit", "whisper", "convnext", "swin", "mixtral", "gpt_oss", "mamba")
]


@pytest.mark.parametrize("member", MEMBERS)
def test_what_is_recorded_in_compiled_code_is_rebuilt(member):
    torch._dynamo.reset()
    case = CASES[member]
    model = built(case)
    bare = copy.deepcopy(model)
    expected = train(bare, lambda inner: case.loss(torch.compile(inner, backend="aot_eager")))
    torch._dynamo.reset()
    recorder = dualhook.instrument(model, layers="all", verbose=False)
    fast = torch.compile(model, backend="aot_eager")
    run = train(model, lambda _: case.loss(fast))
    coverage = recorder.coverage
    memory = recorder.close()
    assert run.losses == expected.losses
    for (name, one), two in zip(model.state_dict().items(), bare.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
    assert_uncovered(model, coverage, case.uncovered)
    assert_truthful(model, run, coverage, memory)
