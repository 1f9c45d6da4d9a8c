"""Streaming answers against the dense computation: every row in one matrix, float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from held import Held, cases, dense, ranked
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dualhook.query import GroupSums, LayerQuery, Receipt, TopPatterns, dual_output, rebuild, scan
from dualhook.query.scores import Scores
from dualhook.records import Rows


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr("dualhook.query.streaming.BLOCK_ROWS", 5)
    monkeypatch.setattr("dualhook.query.streaming.TASK_ROWS", 12)
    monkeypatch.setattr("dualhook.query.weights.BLOCK_ROWS", 4)


def close(found: Tensor, true: Tensor) -> bool:
    return torch.allclose(found, true, rtol=1e-9, atol=1e-9)


BY = st.sampled_from(["weight", "abs_weight", "contribution", "abs_contribution"])


@given(cases(), BY, st.booleans(), st.integers(1, 12))
def test_top_patterns_ties_in_the_order_of_recording(case, by, largest, k):
    rows, made_of, query, direction, source, _ = case
    asked = LayerQuery(made_of, query, direction, direction)
    top = TopPatterns(k, by, largest)
    scan(source, asked, [top])
    found = top.result(len(asked))
    weight, contribution, _ = dense(rows, made_of, query, direction)
    rank = {"weight": weight, "contribution": contribution}[by.removeprefix("abs_")]
    rank = rank.abs() if by.startswith("abs_") else rank
    rank = rank.mul(2**20).round() / 2**20  # the same sum in another order may differ in its last bit
    for q in range(len(asked)):
        order = sorted(range(len(rows)), key=lambda n: ((-1 if largest else 1) * float(rank[q, n]), n))[:k]
        assert found["pattern"][q].long().tolist() == order
        assert close(found["weight"][q].double(), weight[q, order])
        assert close(found["contribution"][q].double(), contribution[q, order])
        assert found["sample"][q].long().tolist() == rows.sample[order].tolist()
        assert found["step"][q].long().tolist() == rows.step[order].tolist()
        assert found["position"][q].long().tolist() == rows.position[order].tolist()


@given(
    cases(), BY, st.booleans(), st.sampled_from([1, 2, 3, 5, 60]), st.sampled_from([torch.float32, torch.float64]),
    st.booleans(), st.booleans(), st.sampled_from([None, 0.3, 0.9]),
)  # fmt: skip
def test_whatever_the_blocks_their_order_and_the_dtypes(case, by, largest, k, dtype, backwards, receipt, unknown):
    rows, made_of, query, direction, source, block_rows = case
    made_of = replace(made_of, weight=made_of.weight.round())
    if made_of.bias is not None:
        made_of = replace(made_of, bias=made_of.bias.round())
    query, direction = query.round().to(torch.float64), direction.round().half()  # whole numbers: no sum is rounded
    key = rows.key.round()
    if unknown is not None and len(rows):
        key[int(unknown * len(rows))] = torch.nan
    source.rows = replace(rows, key=key.to(dtype), output_grad=rows.output_grad.round().to(dtype))
    asked = LayerQuery(made_of, query, direction, direction)
    top, sums = TopPatterns(k, by, largest), GroupSums(len(asked), lambda block: block.sample)
    blocks = list(source.blocks("fc", last_step=made_of.horizon, block_rows=block_rows))
    for block in reversed(blocks) if backwards else blocks:
        scores = Scores(asked, block)
        if receipt:  # which has all contributions computed
            assert len(scores.contribution) == len(asked)
        top.add(scores)
        sums.add(scores)
    true = replace(rows, key=key, output_grad=rows.output_grad.round())
    weight, contribution, _ = dense(true, made_of, query, direction.double())
    order = ranked(weight, contribution, by, largest, k)
    found = top.result(len(asked))
    assert found["pattern"].long().equal(order)
    for name, whole in {"weight": weight, "contribution": contribution}.items():
        assert torch.allclose(found[name].double(), whole.gather(1, order), rtol=0, atol=0, equal_nan=True)
    groups, counts, totals = sums.result()
    assert groups.tolist() == torch.unique(rows.sample).tolist()
    assert counts.tolist() == [int((rows.sample == group).sum()) for group in groups]
    for name, total in totals.items():
        whole = {"weight": weight, "contribution": contribution}[name.removeprefix("abs_")]
        whole = whole.abs() if name.startswith("abs_") else whole
        expected = torch.zeros_like(total).index_add_(1, torch.searchsorted(groups, rows.sample), whole)
        assert torch.allclose(total, expected, rtol=0, atol=0, equal_nan=True)


@given(cases())
def test_group_sums(case):
    rows, made_of, query, direction, source, _ = case
    asked = LayerQuery(made_of, query, direction, direction)
    sums = GroupSums(len(asked), lambda block: block.sample + 1)
    scan(source, asked, [sums])
    groups, counts, totals = sums.result()
    assert groups.tolist() == sorted(set((rows.sample + 1).tolist()))
    weight, contribution, _ = dense(rows, made_of, query, direction)
    for k, group in enumerate(groups.tolist()):
        member = rows.sample == group - 1
        assert int(counts[k]) == int(member.sum())
        assert close(totals["weight"][:, k], weight[:, member].sum(1))
        assert close(totals["abs_weight"][:, k], weight[:, member].abs().sum(1))
        assert close(totals["contribution"][:, k], contribution[:, member].sum(1))
        assert close(totals["abs_contribution"][:, k], contribution[:, member].abs().sum(1))


@given(cases())
def test_receipt_dual_output_and_rebuilt_weight(case):
    rows, made_of, query, direction, source, _ = case
    _, contribution, output = dense(rows, made_of, query, direction)
    assert close(dual_output(source, made_of, query), output)
    rebuilt = rebuild(source, made_of)
    assert close(query @ rebuilt["fc.weight"].T + rebuilt.get("fc.bias", 0), output)
    chosen = rows.sample == 2
    kept = Rows(
        rows.key[~chosen], rows.output_grad[~chosen], rows.step[~chosen], rows.sample[~chosen], rows.position[~chosen]
    )
    left = rebuild(source, made_of, lambda block: block.sample == 2)
    assert all(close(left[name], value) for name, value in rebuild(Held(kept, []), made_of).items())
    asked = LayerQuery(made_of, query, direction, output)
    receipt = Receipt(asked)
    receipt.parts = scan(source, asked, [receipt.sums]).parts
    assert (receipt.explained > 1 - 1e-9).all()
    true = contribution.abs().sum(1) / contribution.sum(1).abs()
    assert close(receipt.cancellation[true < 1e6], true[true < 1e6])


@given(cases(), st.floats(0.2, 0.8))
def test_receipt_sees_what_is_missing(case, share):
    rows, made_of, query, direction, source, _ = case
    _, _, output = dense(rows, made_of, query, direction)
    origin = dense(Rows(rows.key[:0], rows.output_grad[:0], *(rows.step[:0],) * 3), made_of, query, direction)[2]
    grown = output + share / (1 - share) * (output - origin)  # the patterns are then 1 - share of what training did
    asked = LayerQuery(made_of, query, direction, grown)
    receipt = Receipt(asked)
    receipt.parts = scan(source, asked, [receipt.sums]).parts
    moved = (output - origin).flatten(1).norm(dim=1) > 1e-6
    assert close(receipt.explained[moved], torch.full_like(receipt.explained[moved], 1 - share))
