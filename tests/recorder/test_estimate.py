"""What a step will write, told before training, is what it writes; and asking changes nothing."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from capture.test_kinds import CASES, network
from safetensors.torch import load_file
from torch import nn

import dualhook
from dualhook.recorder.costs import human


@pytest.mark.parametrize("case", CASES)
def test_an_estimate_is_what_a_step_records_and_changes_nothing(case):
    model, x = network(case), CASES[case][1]()
    recorder = dualhook.instrument(model, layers="all", verbose=False)
    table = recorder.estimate(x)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with recorder.batch(samples=range(len(x))):
        model(x).square().sum().backward()
    optimizer.step()
    memory = recorder.close()
    assert memory.verify()["exact"].all()
    recorded = {use for layer in memory.layers for use in memory.uses(layer)}
    estimated = dict(zip(table["layer"], table["patterns"], strict=True))
    assert recorded == {layer for layer, patterns in estimated.items() if patterns}
    for layer in recorded:
        stored = [segment.stored(memory._spec(layer)) for segment in memory._store.segments]
        written = sum(part.patterns(len(part.step)) for part in stored if part is not None)
        assert 0 < written <= estimated[layer]  # rows whose output gradient is zero are not written


@pytest.mark.parametrize("case", CASES)
def test_an_estimate_in_8_bits_is_what_is_written(case, tmp_path):
    model, x = network(case), CASES[case][1]()
    recorder = dualhook.instrument(model, tmp_path / "run", layers="all", dtype=torch.int8, verbose=False)
    table = recorder.estimate(x)
    with recorder.batch(samples=range(len(x))):
        model(x).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    sizes = {row["layer"]: row["bytes_per_row"] for row in recorder.coverage if row["bytes_per_row"]}
    memory = recorder.close()
    (segment,) = memory._store.segments
    written = load_file(segment.path)
    for layer, patterns, size in zip(table["layer"], table["patterns"], table["bytes"], strict=True):
        own = segment.header["rows"].get(layer)
        if own is None or "key_of" in own:
            continue
        found = sum(values.nbytes for name, values in written.items() if name.startswith(f"rows/{layer}/"))
        assert found <= size
        if own["count"] == patterns:  # else rows whose output gradient is zero are not written, or rows are maps
            assert found == size
            assert sizes.get(layer, found / patterns) == found / patterns  # coverage has tied weights once


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 16), nn.Linear(16, 4)

    def forward(self, x):
        return x + self.down(self.up(x))


def language_model():
    blocks = nn.Sequential(Block(), Block())
    return nn.Sequential(OrderedDict(embed=nn.Embedding(50, 4), blocks=blocks, out=nn.Linear(4, 50)))


def footer(inputs, **how):
    recorder = dualhook.instrument(language_model(), verbose=False, max_bytes=10_000_000, **how)
    table = recorder.estimate(inputs)
    recorder.discard()
    return int(table["bytes"].sum()), table.footer


def test_an_estimate_says_in_words_what_a_token_costs_and_what_would_cost_less():
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    total, words = footer(tokens)
    assert total == 16 * (4 * (4 * 20 + 54) + 5 * 24)
    ways = ({"dtype": torch.bfloat16}, {"dtype": torch.int8}, {"layers": "head"})
    narrow, least, head = (footer(tokens, **way)[0] for way in ways)
    first, second, third = words.splitlines()
    assert first == f"{human(total)} a step, {human(total / 16)} a token; the budget of 10 MB holds 952 steps"
    up, out = (round(100 * 16 * size / total) for size in (2 * (4 * 20 + 24), 4 * 54 + 24))
    assert second == f"the largest are out {out}%, blocks.*.up {up}%, blocks.*.down {up}%"
    assert third == (
        f"it would be {human(narrow)} with dtype=torch.bfloat16, {human(least)} with dtype=torch.int8, "
        f"{human(head)} with layers='head'"
    )


def test_an_estimate_tells_of_keys_that_are_stored_once():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x):
            return self.down(self.gate(x) * self.up(x))

    recorder = dualhook.instrument(Both(), verbose=False)
    words = recorder.estimate(torch.randn(10, 4)).footer
    recorder.discard()
    assert "about 160 B of it are keys that another layer reads too: these are stored once" in words.splitlines()


@pytest.mark.parametrize(("dtype", "told"), [(None, "2.56 kB"), (torch.bfloat16, "1.28 kB"), (torch.int8, None)])
def test_an_estimate_tells_of_keys_that_later_epochs_find_again(dtype, told):
    recorder = dualhook.instrument(nn.Sequential(nn.Linear(128, 8), nn.Linear(8, 128)), verbose=False, dtype=dtype)
    words = recorder.estimate(torch.randn(5, 128)).footer.splitlines()
    recorder.discard()
    found = [line for line in words if "no trained weight has made" in line]
    assert [line.partition(" of it ")[0] for line in found] == ([] if told is None else [f"about {told}"])


@pytest.mark.parametrize(
    ("inputs", "each"),
    [
        (torch.zeros(2, 8, dtype=torch.int64), "a token"),
        ((torch.zeros(2, dtype=torch.int64),), "a sample"),
        ({"input": torch.zeros(2, 8, dtype=torch.int32)}, "a token"),
        (torch.zeros(1, dtype=torch.int64), "a step"),
    ],
)
def test_an_estimate_counts_what_the_step_is_given(inputs, each):
    words = footer(inputs, layers="out", dtype=torch.int8)[1]
    assert words.splitlines() == [words]  # one layer, already narrow: no more to say
    assert words.partition(";")[0].endswith(each)


def test_a_head_that_is_computed_again_says_what_it_takes():
    model = nn.Sequential(nn.Embedding(600, 8), nn.Linear(8, 600, bias=False))
    recorder = dualhook.instrument(model, layers="all", verbose=False)
    words = str(recorder.estimate(torch.zeros(4, 32, dtype=torch.int64)))
    kept, whole = 128 * (2 * 4 + 4) + 600 * 8 * 4, 128 * 600 * 4
    assert f"they take {human(kept)} instead of {human(whole)}" in words
    assert "computed again" not in str(recorder.estimate(torch.zeros(1, 12, dtype=torch.int64)))
