"""Streaming answers over memories on disk, however their rows are stored, against the dense computation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from held import cases, dense, ranked, sample_group
from hypothesis import given
from hypothesis import strategies as st
from store.test_store import entry, written

from dualhook.packing import pack_scaled
from dualhook.query import GroupSums, LayerQuery, TopPatterns, scan
from dualhook.store import Store
from dualhook.store.sparse import SparseRows

WAYS = ("weight", "abs_weight", "contribution", "abs_contribution")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


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
        writer = written(tmp_path_factory.mktemp("run") / "memory", (made_of.spec,), sparse=sparse)
        for step in range(1, made_of.horizon + 1):
            own = rows.where(rows.step == step)
            if scaled and dtype == torch.float16:
                own = replace(own, output_grad=own.output_grad[:, :0], packed=pack_scaled(own.output_grad))
            if len(own):
                writer.builder.append("fc", own, None, dtype)
                writer.builder.commit("fc", step)
            writer.builder.add(step, [entry(step)])
            if step in seals:
                writer.seal()
        writer.close()
        store = Store(writer.layout.root)
        stored = [one for segment in store.segments if (one := segment.stored(made_of.spec)) is not None]
        assert all(isinstance(one.tensors["key"], SparseRows) == sparse for one in stored)
        asked = LayerQuery(made_of, query, direction, direction)
        top, sums = TopPatterns(k, by, largest), GroupSums(len(asked), sample_group)
        scan(store, asked, [top, sums])
    weight, contribution, _ = dense(rows, made_of, query, direction)
    order = ranked(weight, contribution, by, largest, k)
    found = top.result(len(asked))
    assert found["pattern"].long().equal(order)
    for name, whole in {"weight": weight, "contribution": contribution}.items():
        assert found[name].double().equal(whole.gather(1, order))
    groups, _, totals = sums.result()
    for g, group in enumerate(groups.tolist()):
        member = rows.sample == group - 1
        assert totals["contribution"][:, g].equal(contribution[:, member].sum(1))
        assert totals["abs_weight"][:, g].equal(weight[:, member].abs().sum(1))
