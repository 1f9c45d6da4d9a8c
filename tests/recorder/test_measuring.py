"""What several processes measure together is what one measures that has all rows."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from dualhook.capture import LayerProbe, Use, fit_scales, looked
from dualhook.recorder.measuring import Measuring
from dualhook.recorder.ranks import Ranks
from dualhook.records import LayerSpec, Rows
from dualhook.store import Layout, Writer

SPEC = LayerSpec("fc", 70, 90, "fc.weight", "fc.bias")


class Pair(Ranks):
    """Two processes as two threads."""

    def __init__(self, rank: int, meeting: threading.Barrier, board: dict[int, list[np.ndarray]]) -> None:
        super().__init__()
        self.rank, self.size, self.counts = rank, 2, rank == 0
        self._meeting, self._board = meeting, board

    def sum(self, arrays):
        self._board[self.rank] = [array.copy() for array in arrays]
        self._meeting.wait(10)
        found = [a + b for a, b in zip(self._board[0], self._board[1], strict=True)]
        self._meeting.wait(10)
        return found


def rows(count: int, seed: int, dtype: torch.dtype = torch.float64) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, SPEC.in_features + SPEC.out_features, generator=generator, dtype=torch.float64)
    no = torch.zeros(count, dtype=torch.int64)
    return Rows(values[:, : SPEC.in_features].to(dtype), values[:, SPEC.in_features :].to(dtype), no, no, no)


def uses(*there: Rows | None) -> list[Use]:
    return [Use(SPEC, SPEC, part) for part in there if part is not None]


def gradients(both: list[Rows | None]) -> dict[str, torch.Tensor]:
    """The mean over processes, as DistributedDataParallel makes it."""
    there = [part for part in both if part is not None]
    d = torch.cat([part.output_grad.double() for part in there]) if there else torch.zeros(0, SPEC.out_features)
    x = torch.cat([part.key.double() for part in there]) if there else torch.zeros(0, SPEC.in_features)
    return {SPEC.weight: d.double().T @ x.double() / 2, SPEC.bias: d.double().sum(0) / 2}


def together(tmp_path, both: list[Rows | None], of: dict[str, torch.Tensor], whole: bool = False) -> list:
    meeting, board = threading.Barrier(2), {}
    found: list = [None, None]

    def measure(rank: int) -> None:
        writer = Writer(Layout(tmp_path / str(rank)), rank=rank)
        measuring = Measuring(Pair(rank, meeting, board), writer, [LayerProbe(SPEC)])
        found[rank] = measuring.measure({SPEC.name: of}, {SPEC.name: uses(both[rank])}, whole=whole)
        writer.close(discard=True)

    threads = [threading.Thread(target=measure, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return found


def at_the_corner(part: Rows, probe: LayerProbe) -> Rows:
    """The same rows with nothing where the probe usually looks."""
    key = part.key.clone()
    key[:, probe._inputs] = 0.0
    return Rows(key, part.output_grad, part.step, part.sample, part.position)


CORNER = LayerProbe(SPEC)


@pytest.mark.parametrize(
    ("whole", "many"), [(False, 4096), (True, 4096), (True, 80)], ids=["some", "whole", "of many outputs"]
)
@pytest.mark.parametrize(
    "both",
    [
        [rows(5, 1), rows(3, 2)],
        [rows(5, 1), None],
        [None, rows(3, 2)],
        [at_the_corner(rows(5, 1), CORNER), rows(3, 2)],
        [at_the_corner(rows(5, 1), CORNER), at_the_corner(rows(3, 2), CORNER)],
        [at_the_corner(rows(5, 1), CORNER), None],
    ],
    ids=["both", "first", "second", "one-corner-dead", "dead", "dead-and-none"],
)
def test_two_processes_measure_what_one_with_all_rows_does(tmp_path, monkeypatch, both, whole, many):
    monkeypatch.setattr("dualhook.capture.probe.MANY", many)
    monkeypatch.setattr("dualhook.capture.probe.SEEN", 32)
    of = gradients(both)
    first, second = together(tmp_path, both, of, whole)
    there = [part for part in both if part is not None]
    (alone,) = looked([LayerProbe(SPEC).measure(of, uses(*there), whole=whole)])
    for name, expected in alone.items():
        for found in (first[name], second[name]):
            for part in ("gradient", "rebuilt", "absolute"):
                np.testing.assert_allclose(getattr(found, part), getattr(expected, part), rtol=1e-12, atol=1e-12)
                if whole:
                    inner, outer = getattr(found.whole, part), getattr(expected.whole, part)
                    np.testing.assert_allclose(inner, outer, rtol=1e-12, atol=1e-12)
    for fit in fit_scales(list(second.values())):
        assert fit.explained
        assert fit.scale == pytest.approx(0.5)


def test_a_gradient_without_rows_anywhere_is_unexplained_in_both(tmp_path):
    of = gradients([rows(4, 1), rows(4, 2)])
    for found in together(tmp_path, [None, None], of):
        assert not any(fit.explained for fit in fit_scales(list(found.values())))
    nothing = {name: torch.zeros_like(value) for name, value in of.items()}
    for found in together(tmp_path, [None, None], nothing):
        assert all(fit.explained for fit in fit_scales(list(found.values())))


def test_rows_that_another_process_lost_are_missed_in_both(tmp_path):
    both = [rows(5, 1), rows(3, 2)]
    for found in together(tmp_path, [both[0], None], gradients(both)):
        assert not any(fit.explained for fit in fit_scales(list(found.values())))


def test_the_coarsest_dtype_of_any_process_sets_the_tolerance(tmp_path):
    both = [None, rows(3, 2, torch.bfloat16)]
    for found in together(tmp_path, both, {name: g.float() for name, g in gradients(both).items()}):
        assert {one.dtype for one in found.values()} == {torch.bfloat16}
