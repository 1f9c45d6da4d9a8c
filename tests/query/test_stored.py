"""Streaming answers over memories on disk, however their rows are stored, against the dense computation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from held import cases, dense, ranked, sample_group
from hypothesis import given
from hypothesis import strategies as st
from store.test_store import entry, written
from torch import Tensor

from dualhook.packing import pack_scaled
from dualhook.query import GroupSums, LayerQuery, TopPatterns, scan
from dualhook.store import Store
from dualhook.store.eightbit import EightBitRows
from dualhook.store.sparse import SparseRows

WAYS = ("weight", "abs_weight", "contribution", "abs_contribution")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8)


@given(
    case=cases(), by=st.sampled_from(WAYS), largest=st.booleans(), k=st.integers(1, 50), dtype=st.sampled_from(DTYPES),
    sparse=st.booleans(), scaled=st.booleans(), seals=st.sets(st.integers(1, 6)), block_rows=st.integers(1, 9),
)  # fmt: skip
def test_top_and_sums_are_the_dense_ones_however_rows_are_stored(
    tmp_path_factory, case, by, largest, k, dtype, sparse, scaled, seals, block_rows
):
    rows, made_of, query, direction, _, _ = case
    query, direction = query.round(), direction.round()  # whole numbers: nothing is rounded, whatever the dtype
    bias = None if made_of.bias is None else made_of.bias.round()
    made_of = replace(made_of, weight=made_of.weight.round(), bias=bias)
    rows = replace(rows, key=rows.key.round(), output_grad=rows.output_grad.round())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dualhook.query.streaming.BLOCK_ROWS", block_rows)
        patch.setattr("dualhook.query.streaming.TASK_ROWS", 12)
        patch.setattr("dualhook.store.sparse.WORTH", 100.0 if sparse else 0.0)
        patch.setattr("dualhook.store.sparse.AT_ONCE", 4)
        writer = written(
            tmp_path_factory.mktemp("run") / "memory",
            (made_of.spec,),
            sparse=sparse,
            eight_bit=("fc",) if dtype == torch.int8 else (),
        )
        for step in range(1, made_of.horizon + 1):
            own = rows.where(rows.step == step)
            if scaled and dtype == torch.float16:
                own = replace(own, output_grad=own.output_grad[:, :0], packed=pack_scaled(own.output_grad))
            if len(own):
                writer.builder.append("fc", own, None, None if dtype == torch.int8 else dtype)
                writer.builder.commit("fc", step)
            writer.builder.add(step, [entry(step)])
            if step in seals:
                writer.seal()
        writer.close()
        store = Store(writer.layout.root)
        stored = [one for segment in store.segments if (one := segment.stored(made_of.spec)) is not None]
        form = EightBitRows if dtype == torch.int8 else SparseRows if sparse else Tensor
        assert all(isinstance(one.tensors["key"], form) for one in stored)
        asked = LayerQuery(made_of, query, direction, direction)
        top, sums = TopPatterns(k, by, largest), GroupSums(len(asked), sample_group)
        scan(store, asked, [top, sums])
    exactly = {"rtol": 0, "atol": 0}
    if dtype == torch.int8:  # what is read is to be added up, not what was recorded
        exactly, read = {"rtol": 1e-9, "atol": 1e-9}, list(store.blocks("fc", last_step=10, block_rows=100))
        rows = read[0].joined(*read[1:]) if read else rows
    weight, contribution, _ = dense(rows, made_of, query, direction)
    order = ranked(weight, contribution, by, largest, k)
    found = top.result(len(asked))
    if dtype != torch.int8:  # else those that are alike may differ by a rounding, and either comes first
        assert found["pattern"].long().equal(order)
    for name, whole in {"weight": weight, "contribution": contribution}.items():
        torch.testing.assert_close(found[name].double(), whole.gather(1, found["pattern"].long()), **exactly)
    ranked_by = {"weight": weight, "contribution": contribution}[by.removeprefix("abs_")]
    ranked_by = ranked_by.abs() if by.startswith("abs_") else ranked_by
    torch.testing.assert_close(ranked_by.gather(1, found["pattern"].long()), ranked_by.gather(1, order), **exactly)
    groups, _, totals = sums.result()
    for g, group in enumerate(groups.tolist()):
        member = rows.sample == group - 1
        torch.testing.assert_close(totals["contribution"][:, g], contribution[:, member].sum(1), **exactly)
        torch.testing.assert_close(totals["abs_weight"][:, g], weight[:, member].abs().sum(1), **exactly)
