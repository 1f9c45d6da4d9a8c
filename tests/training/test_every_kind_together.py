"""Every kind of linear map, trained by two processes: the suite of one process, on the rows of both."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from capture.test_kinds import CASES, network
from process_kinds import OWN, RUNS, STEPS, every_kind, train
from processes import WORLD, together

import dualhook


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Every kind once, in one pair of processes."""
    found = tmp_path_factory.mktemp("kinds")
    together(found, every_kind)
    return found


@pytest.mark.parametrize(("case", "wrap"), RUNS)
class TestEveryKind:
    def test_training_is_what_it_was(self, folder, case, wrap):
        expected = train(case, wrap, None)
        for rank in range(WORLD):
            plain, recorded = torch.load(folder / f"{case} {wrap} {rank}.pt")
            for name, value in expected.items():
                assert torch.equal(recorded[name], plain[name]), name
                assert (plain[name] - value).norm() <= 1e-9 * value.norm(), name  # the test's own oracle

    def test_everything_is_rebuilt(self, folder, case, wrap):
        memory = dualhook.load(folder / f"{case} {wrap}")
        report = memory.verify()
        assert report.max_error < 1e-9
        assert all(report["exact"])
        _, trained = torch.load(folder / f"{case} {wrap} 0.pt")
        rebuilt = memory.state_dict()
        parameters = {name for name, _ in network(case).named_parameters() if "norm" not in name}
        assert set(rebuilt) == parameters
        for name, value in rebuilt.items():
            assert (value - trained[name]).norm() <= 1e-9 * trained[name].norm(), name

    def test_a_question_adds_up_over_processes(self, folder, case, wrap):
        memory, model = dualhook.load(folder / f"{case} {wrap}"), network(case)
        model.load_state_dict(torch.load(folder / f"{case} {wrap} 0.pt")[1])
        torch.manual_seed(5)
        target = (lambda y: y[:, -1, 1]) if case.startswith("tied") else None
        attention = memory.attend(model, CASES[case][1]()[:2], target=target)
        assert set(memory.layers) <= set(attention.layers)
        assert attention.receipt["explained"].min() > 1 - 1e-6
        for layer in attention.layers:
            patterns = attention.parts.where(layer=layer, part="patterns")["contribution"].sum()
            by_rank = attention.sum_by("rank", layers=layer)
            assert by_rank["contribution"].sum() == pytest.approx(patterns, abs=1e-9)

    def test_patterns_come_step_by_step_with_their_process_and_sample(self, folder, case, wrap):
        memory = dualhook.load(folder / f"{case} {wrap}")
        for layer in memory.layers:
            blocks = list(memory._store.blocks(layer, last_step=STEPS, block_rows=7))
            step, sample = (torch.cat([getattr(rows, name) for rows in blocks]) for name in ("step", "sample"))
            rank = torch.cat([rows.columns["rank"] for rows in blocks])
            assert [rows.first for rows in blocks] == [sum(map(len, blocks[:k])) for k in range(len(blocks))]
            assert max(map(len, blocks)) <= 7
            assert memory.patterns(layer) == len(step)
            order = step * WORLD + rank
            assert torch.equal(order, order.sort().values), layer
            assert torch.equal(sample // 10 + 1, step), layer
            assert torch.equal(sample % 10 // OWN, rank), layer
