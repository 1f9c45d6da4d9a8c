"""Rows in 16 bits: how much of the training they still explain, whatever the size of the gradients."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import dualhook
from dualhook.errors import LayerError
from dualhook.packing import pack_scaled

SMALL = 1e-9  # a loss that is a mean over many tokens leaves gradients that float16 cannot hold


class Small(nn.Module):
    """Every kind whose rows are stored in a way of their own: tokens, maps, vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.convolution = nn.Conv1d(16, 8, 3)
        self.linear = nn.Linear(8, 4)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        maps = self.convolution(self.embedding(words).transpose(1, 2))
        return self.linear(torch.tanh(maps).amax(2))


def error(dtype: torch.dtype | None, optimizer: str) -> float:
    torch.manual_seed(0)
    model = Small()
    recorder = dualhook.instrument(model, layers="all", dtype=dtype, verbose=False)
    stepper = torch.optim.SGD(model.parameters(), lr=0.1 / SMALL) if optimizer == "sgd" else torch.optim.Adam(
        model.parameters(), lr=1e-2, eps=1e-30
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    for length in (5, 9, 9, 7, 5, 9):
        words = torch.randint(0, 20, (6, length), generator=generator)
        stepper.zero_grad()
        (SMALL * F.cross_entropy(model(words), words[:, 0] % 4)).backward()
        stepper.step()
    memory = recorder.close()
    assert memory.layers == ["embedding", "convolution", "linear"]
    assert not any(memory.verify()["inexact_steps"])
    return memory.verify().max_error


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_small_gradients_are_kept_as_well_as_large_ones(optimizer):
    with warnings.catch_warnings():
        warnings.simplefilter("error", dualhook.InexactWarning)
        assert error(None, optimizer) < 1e-5
        assert error(torch.float16, optimizer) < 1e-3
        assert error(torch.float16, optimizer) < error(torch.bfloat16, optimizer)


@given(
    st.integers(0, 2**20), st.integers(0, 9), st.integers(1, 9), st.sampled_from([torch.float32, torch.float64]),
    st.integers(-100, 100),
)  # fmt: skip
def test_a_row_keeps_eleven_bits_of_its_largest_number(seed, count, width, dtype, exponent):
    generator = torch.Generator().manual_seed(seed)
    grads = torch.randn(count, width, generator=generator, dtype=dtype) * 2.0**exponent
    grads[:1] = 0.0
    packed, key = pack_scaled(grads), torch.zeros(count, 1)
    found = packed.dense(key)
    assert packed.value.dtype == torch.float16
    assert found.dtype == dtype
    largest = grads.abs().amax(1, keepdim=True) if count else grads
    assert ((found - grads).abs() <= 2.0**-11 * largest).all()
    assert torch.equal(packed.dense(key, torch.tensor([width - 1])), found[:, width - 1 :])


def test_what_is_no_number_stays_none():
    grads = torch.tensor([[1.0, float("nan")], [float("inf"), 2.0], [1e-40, 0.0]])
    found = pack_scaled(grads).dense(torch.zeros(3, 1))
    assert found[0].isnan().tolist() == [False, True]
    assert found[1].tolist() == [float("inf"), 2.0]
    assert found[2, 0] == pytest.approx(1e-40, rel=1e-3)


def test_the_largest_of_a_row_stay_what_they_are(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 600, bias=False))
    recorder = dualhook.instrument(model, tmp_path / "m", dtype=torch.float16, head_grads=3, verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dualhook.InexactWarning)
        (SMALL * model(torch.randn(5, 4)).square().sum()).backward()
        optimizer.step()
    (rows,) = recorder.close()._store.blocks("0", last_step=1, block_rows=100)
    assert ((rows.output_grad != 0).sum(1) == 3).all()


BY_LAYER = {"all": torch.float16, "linear": None, "conv*": torch.bfloat16}


def test_layers_have_dtypes_of_their_own(tmp_path):
    torch.manual_seed(0)
    model = Small()
    recorder = dualhook.instrument(model, tmp_path / "m", layers="all", dtype=BY_LAYER, verbose=False)
    stepper = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        words = torch.randint(0, 20, (6, 9))
        stepper.zero_grad()
        F.cross_entropy(model(words), words[:, 0] % 4).backward()
        stepper.step()
    sizes = {row["layer"]: row["bytes"] for row in recorder.estimate(torch.zeros(6, 9, dtype=torch.int64))}
    memory = recorder.close()
    (segment,) = (tmp_path / "m" / "segments").iterdir()
    stored = {name: values.dtype for name, values in load_file(segment).items() if values.is_floating_point()}
    assert {name: dtype for name, dtype in stored.items() if name.endswith("/key")} == {
        "rows/embedding/key": torch.float16,
        "rows/convolution/key": torch.bfloat16,
        "rows/linear/key": torch.float32,
    }
    assert stored["rows/convolution/output_grad"] == torch.bfloat16
    assert stored["rows/linear/output_grad"] == torch.float32
    index = 3 * 8  # of step, sample and position
    assert sizes["linear"] == 6 * (4 * (8 + 4) + index)
    assert sizes["convolution"] == 6 * (2 * (16 * 9 + 8 * 7) + index + 2 * 8)
    assert sizes["embedding"] == 6 * 9 * (2 * (1 + 16) + index + 4)
    errors = {row["layer"]: row["error"] for row in memory.verify()}
    assert errors["linear"] < errors["embedding"] < errors["convolution"] < 1e-2


@pytest.mark.parametrize(
    ("dtype", "layers", "error", "says"),
    [
        ({"linear": 16}, None, dualhook.DualHookError, "dtype=16 of 'linear': expected torch.float64, float32"),
        (torch.float8_e5m2, None, dualhook.DualHookError, "expected torch.float64, float32"),
        ({"lineer": torch.float16}, None, LayerError, "did you mean 'linear'"),
        ({"embedding": torch.float16}, "linear", LayerError, "which layers= does not record"),
    ],
)
def test_a_dtype_that_cannot_be_is_refused(dtype, layers, error, says):
    with pytest.raises(error, match=says):
        dualhook.instrument(Small(), layers=layers, dtype=dtype, verbose=False)


@pytest.mark.parametrize("head", [None, torch.bfloat16])
def test_uses_of_one_weight_have_dtypes_of_their_own(tmp_path, head):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(12, 6), nn.Linear(6, 12, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, words):
            return self.head(torch.tanh(self.embedding(words)))

    torch.manual_seed(0)
    model, dtype = Tied(), {"all": torch.float16, "head": head}
    recorder = dualhook.instrument(model, tmp_path / "m", layers="all", dtype=dtype, verbose=False)
    F.cross_entropy(model(torch.arange(12)), torch.arange(12).flip(0)).backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    memory = recorder.close()
    (segment,) = (tmp_path / "m" / "segments").iterdir()
    stored = {name: values.dtype for name, values in load_file(segment).items() if name.endswith("/key")}
    assert stored == {"rows/embedding/key": torch.float16, "rows/head/key": head or torch.float32}
    assert memory.verify().max_error < 1e-2


def test_keys_in_other_dtypes_are_not_counted_as_shared(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 4), nn.Linear(64, 4)

        def forward(self, x):
            return self.a(x) + self.b(x)

    words = []
    for dtype in (None, {"a": torch.bfloat16}):
        recorder = dualhook.instrument(Two(), tmp_path / str(len(words)), dtype=dtype, verbose=False)
        words.append(str(recorder.estimate(torch.randn(8, 64))))
        recorder.close()
    assert ["stored once" in one for one in words] == [True, False]
