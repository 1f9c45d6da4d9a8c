"""Rows know their sample and position through reshapes: the input itself carries both, as the oracle."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dualhook

B, T, WIDTH = 4, 6, 3


class Reshaping(nn.Module):
    """Its layer is given (batch, time, width) in another order."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layer, self.how = nn.Linear(WIDTH, 2), how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "batch first":
            return self.layer(x)
        if self.how == "time first":
            return self.layer(x.transpose(0, 1))
        if self.how == "flattened":
            return self.layer(x.flatten(0, 1))
        if self.how == "windows":
            return self.layer(x.reshape(B * 2, T // 2, WIDTH))
        return self.layer(x.reshape(B, 2, T // 2, WIDTH))


def coded(shape=(B, T)) -> Tensor:
    """Every row says which sample and position it is."""
    x = torch.randn(*shape, WIDTH, dtype=torch.float64)
    x[..., 0] = 100.0 * torch.arange(shape[0])[:, None] + torch.arange(shape[1])
    return x


def rows_of(model: nn.Module, *inputs: Tensor, layer: str = "layer", samples=None):
    recorder = dualhook.instrument(model, layers="all", verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    for x in inputs:
        with recorder.batch(samples=range(len(x)) if samples is None else samples):
            model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    memory = recorder.close()
    return list(memory._store.blocks(layer, last_step=memory.steps, block_rows=10**6))


@pytest.mark.parametrize("how", ["batch first", "time first", "flattened", "windows", "more dimensions"])
def test_samples_and_positions_are_those_that_the_rows_carry(how):
    (rows,) = rows_of(Reshaping(how).double(), coded())
    assert len(rows) == B * T
    assert torch.equal(rows.sample * 100.0 + rows.position, rows.key[:, 0])


def test_time_as_long_as_the_batch_is_told_by_other_batches():
    first, second = rows_of(Reshaping("time first").double(), coded(), coded((B, B)))[0].step.unique().tolist()
    (rows,) = rows_of(Reshaping("time first").double(), coded(), coded((B, B)))
    assert (first, second) == (1, 2)
    assert torch.equal(rows.sample * 100.0 + rows.position, rows.key[:, 0])


class Sorting(nn.Module):
    """Tokens sorted by expert, as Hugging Face's grouped mixtures do."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up_proj = nn.Parameter(torch.randn(3, 2, WIDTH))
        with torch.no_grad():
            self.first.weight.copy_(torch.eye(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.first(x.flatten(0, 1))
        expert, order = torch.sort(torch.arange(len(tokens)) % 3)
        chosen, parts = tokens[order], []
        for e in range(3):
            parts.append(F.linear(chosen[expert == e], self.up_proj[e]))
        return torch.cat(parts)


def test_rows_sorted_by_expert_are_those_of_their_tokens():
    (rows,) = rows_of(Sorting().double(), coded(), layer="up_proj")
    assert set(rows.slot.tolist()) == {0, 1, 2}
    assert torch.equal(rows.sample * 100.0 + rows.position, rows.key[:, 0])


class Positions(nn.Module):
    """A table that is looked up for all samples at once."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Embedding(T, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(torch.arange(x.shape[1])[None])


def test_a_broadcast_table_has_no_sample():
    (rows,) = rows_of(Positions().double(), coded())
    assert rows.slot.tolist() == list(range(T))
    assert rows.sample.tolist() == [-1] * T


class ByHand(nn.Linear):
    """A low-rank addition inside a class derived from ``nn.Linear``."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        self.down, self.up = nn.Linear(WIDTH, 1, bias=False), nn.Linear(1, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + 2.0 * self.up(self.down(x))


@pytest.mark.parametrize("frozen", [True, False])
def test_low_rank_adapters_are_the_linear_maps_they_are(frozen):
    model = nn.Sequential(ByHand(), nn.Tanh(), nn.Linear(WIDTH, 2)).double()
    model[0].weight.requires_grad_(not frozen)
    model[0].bias.requires_grad_(not frozen)
    recorder, optimizer = dualhook.instrument(model, verbose=False), torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(B, WIDTH, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
    memory = recorder.close()
    assert memory.layers == ["0.down", "0.up", "2"] if frozen else ["0", "0.down", "0.up", "2"]
    assert memory.verify().max_error < 1e-12


class Scaled(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return 3.0 * super().forward(ids)


class WeightNorm(nn.Module):
    """Uses that are no linear map of a recorded layer, beside one that is."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.bare, self.table = nn.Linear(WIDTH, 2), nn.Linear(WIDTH, WIDTH), nn.Embedding(T, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = (self.bare.weight @ x.transpose(1, 2)).transpose(1, 2) + self.bare.bias + self.table.weight[: x.shape[1]]
        return self.used(y)


def test_an_embedding_with_a_forward_of_its_own():
    model = nn.Sequential(Scaled(5, WIDTH), nn.Linear(WIDTH, 2)).double()
    recorder = dualhook.instrument(model, layers="all", verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randint(0, 5, (B, T))).square().sum().backward()
    optimizer.step()
    memory = recorder.close()
    assert memory.layers == ["0", "1"]
    assert memory.verify().max_error < 1e-12


def test_uses_that_no_tap_sees_are_left_out_by_name():
    model = WeightNorm()
    recorder = dualhook.instrument(model, layers="all", verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(B, T, WIDTH)).square().sum().backward()
    optimizer.step()
    notes = {row["parameter"]: row["note"] for row in recorder.coverage if row["layer"] is None}
    assert set(notes) == {"bare.weight", "bare.bias", "table.weight"}
    assert "which no tap sees" in notes["bare.weight"]
    memory = recorder.close()
    assert memory.layers == ["used"]
    assert memory.verify()["exact"].all()


def test_uses_that_no_tap_sees_are_left_out_where_a_closure_makes_the_first_pass():
    model = WeightNorm()
    recorder = dualhook.instrument(model, layers="all", verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.randn(B, T, WIDTH)).square().sum()
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    memory = recorder.close()
    assert memory.layers == ["used"]
    assert memory.verify()["exact"].all()


def test_a_sample_may_begin_within_its_dataset_row():
    """Windows of a text; the places of a convolution count from there as well."""
    model = torch.nn.Sequential(torch.nn.Conv1d(2, 2, 3, padding=1), torch.nn.Linear(4, 3))
    recorder = dualhook.instrument(model, layers="all", verbose=False)
    recorder.batch(samples=[7, 7, 8], positions=[0, 4, 10], window=[0, 1, 0])
    model(torch.randn(3, 2, 4)).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    memory = recorder.close()
    (linear,), (conv,) = (list(memory._store.blocks(layer, last_step=1, block_rows=99)) for layer in ("1", "0"))
    assert linear.sample.tolist() == [7, 7, 7, 7, 8, 8]
    assert linear.position.tolist() == [0, 1, 4, 5, 10, 11]
    assert conv.position.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12, 13]
    x = torch.randn(1, 2, 4)
    found = memory.attend(model, x, target=lambda y: y[:, 0, 0]).sum_by("position", layers="0")
    assert found["position"].tolist() == sorted(set(conv.position.tolist()))


def test_tokens_laid_end_to_end_are_samples_of_their_own():
    model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 3))
    recorder = dualhook.instrument(model, layers="all", verbose=False)
    recorder.batch(samples=[5, 5, 5, 2, 2], positions=[0, 1, 2, 0, 1])
    model(torch.tensor([[1, 2, 3, 4, 5]])).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    for layer in ("0", "1"):
        (rows,) = recorder.close()._store.blocks(layer, last_step=1, block_rows=99)
        assert rows.sample.tolist() == [5, 5, 5, 2, 2]
        assert rows.position.tolist() == [0, 1, 2, 0, 1]


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([0, 1, 2], "names 3 places, samples= 2 dataset rows"),
        ([0.5, 1], "where in its dataset row"),
        ([0, -1], "number -1"),
    ],
)
def test_positions_that_cannot_be(positions, message):
    recorder = dualhook.instrument(torch.nn.Linear(2, 2), verbose=False)
    with pytest.raises(dualhook.DualHookError, match=message):
        recorder.batch(samples=[1, 2], positions=positions)
    recorder.discard()
