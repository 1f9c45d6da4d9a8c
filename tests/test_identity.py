"""The identity: any run of the SGD family, rebuilt from its recorded rows."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import TOLERANCE, Run, outcome, relative_error, runs


@given(runs(), st.data())
def test_every_weight_is_the_sum_of_its_patterns_at_any_step(run: Run, data: st.DataObject) -> None:
    names = [f"layers.{k}" for k in range(len(run.widths))]
    chosen = data.draw(st.lists(st.sampled_from(names), unique=True, min_size=1), label="recorded layers")
    result = outcome(run, record=True, layers=chosen)
    memory = result.memory
    trained = set(memory.layers)
    assert trained <= set(chosen)
    for name in set(chosen) - trained:  # a layer that never took part in a step has not changed
        for key, value in result.model.state_dict().items():
            if key.startswith(f"{name}."):
                assert torch.equal(value, result.weights[0][key])
    if not trained:
        return
    assert memory.verify().max_error < TOLERANCE[run.dtype]
    assert memory.verify()["exact"].all()
    for step in {0, memory.steps, data.draw(st.integers(0, memory.steps), label="earlier step")}:
        rebuilt = memory.state_dict(step=step)
        for layer in trained:
            assert relative_error(rebuilt, result.weights[step], layer) < TOLERANCE[run.dtype]


@given(runs(max_steps=6))
def test_dual_model_gives_the_trained_logits(run: Run) -> None:
    result = outcome(run, record=True)
    x, _ = run.batch(5)
    logits = result.model(x)
    dual = result.memory.dual(result.model)(x)
    assert dual.dtype == logits.dtype
    scale = float(logits.detach().abs().max())
    assert float((dual - logits).detach().abs().max()) <= 1e-5 * max(1.0, scale)


@given(runs(max_steps=6))
def test_training_is_bit_identical_with_and_without_the_recorder(run: Run) -> None:
    bare, recorded = outcome(run, record=False), outcome(run, record=True)
    assert bare.losses == recorded.losses
    assert torch.equal(bare.random_state, recorded.random_state)
    for one, other in zip(bare.weights, recorded.weights, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


@given(runs(max_steps=6), st.data())
def test_contributions_and_receipt_add_up_to_the_trained_output(run: Run, data: st.DataObject) -> None:
    result = outcome(run, record=True)
    queries = data.draw(st.integers(1, 4))
    x, _ = run.batch(queries)
    attention = result.memory.attend(result.model, x)
    for layer, asked in attention._layers.items():
        explained = torch.from_numpy(attention.explained.where(layer=layer)["explained"])
        output = asked.size.flatten(1).norm(dim=1)  # |W| |x|: what W's own rounding goes with
        change = (asked.output - attention._receipts[layer].parts["origin"]).flatten(1).norm(dim=1)
        assert ((1 - explained) * change <= TOLERANCE[run.dtype] * output).all()
    by_step = attention.sum_by("step")
    by_position = attention.sum_by("position")
    for layer in attention.layers:
        for query in range(queries):
            one = by_step.where(layer=layer, query=query)
            other = by_position.where(layer=layer, query=query)
            size = one["abs_contribution"].sum()
            assert abs(one["contribution"].sum() - other["contribution"].sum()) <= 1e-5 * max(size, 1e-30)
