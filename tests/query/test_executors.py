"""Passes through executors of every kind: the serial answer to the last bit, whatever becomes of the workers."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from held import Held, cases, dense, sample_group
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rays import MISSING, die, local_ray
from torch import nn
from torch.nn import functional as F

import dualhook
from dualhook.errors import StoreError
from dualhook.query import Composition, GroupSums, LayerQuery, Receipt, TopPatterns, Workers, scan
from dualhook.query.parts import SealedRows
from dualhook.query.tasks import Task
from dualhook.records import FactorVectors, LayerSpec, Rows

STEPS, BATCH = 16, 16
KINDS = ("threads", "processes", "dask", *(["ray"] if find_spec("ray") else []))


@pytest.fixture(scope="module")
def executors():
    """One of every kind, two workers each."""
    distributed = pytest.importorskip("distributed")
    with (
        ThreadPoolExecutor(2) as threads,
        ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as processes,
        distributed.LocalCluster(2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
        client.get_executor() as dask,
        ExitStack() as stack,
    ):
        kinds = {"threads": threads, "processes": processes, "dask": dask}
        if "ray" in KINDS:
            stack.enter_context(local_ray(2))
            kinds["ray"] = stack.enter_context(ray_executor())
        yield kinds


def ray_executor(**options) -> Executor:
    return import_module("dualhook.integrations.ray").RayExecutor(**options)


@pytest.fixture(params=["threads", "processes", "dask", "ray"])
def executor(request, executors) -> Executor:
    if request.param not in executors:
        pytest.skip(MISSING)
    return executors[request.param]


@pytest.fixture(autouse=True)
def small_tasks(monkeypatch):
    monkeypatch.setattr("dualhook.query.streaming.TASK_ROWS", 12)
    monkeypatch.setattr("dualhook.query.streaming.BLOCK_ROWS", 5)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A model and the path of its memory, which has many segments."""
    path = tmp_path_factory.mktemp("run") / "memory"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 20), nn.ReLU(), nn.Linear(20, 4))
    x, y = torch.randn(200, 7), torch.randint(0, 4, (200,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dualhook.recorder.front.SEGMENT_BYTES", 6_000)
        with dualhook.instrument(model, path, verbose=False) as recorder:
            for step in range(STEPS):
                chosen = torch.randint(0, 200, (BATCH,))
                with recorder.batch(samples=chosen, task=torch.full((BATCH,), step % 3)):
                    optimizer.zero_grad()
                    F.cross_entropy(model(x[chosen]), y[chosen]).backward()
                    optimizer.step()
    memory = dualhook.load(path)
    memory.add_column("label", y)
    assert len(list((path / "segments").iterdir())) > 5
    return model, path


def answers(recorded, **how) -> list[dict[str, np.ndarray]]:
    """Everything that can be asked, column by column."""
    model, path = recorded
    torch.manual_seed(1)
    attention = dualhook.load(path).attend(model, torch.randn(3, 7), **how)
    tables = [attention.top(6), attention.top(700, by="abs_weight", largest=False), attention.receipt, attention.parts]
    tables += [attention.sum_by(column) for column in ("label", "step", "task", ("sample", "position"))]
    return [{name: table[name] for name in table.columns} for table in tables]


def same(found, expected) -> None:
    for own, true in zip(found, expected, strict=True):
        assert own.keys() == true.keys()
        for name, values in own.items():
            assert values.dtype == true[name].dtype, name
            assert values.tolist() == true[name].tolist(), name  # to the last bit


@pytest.fixture(scope="module")
def serial(recorded):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dualhook.query.streaming.TASK_ROWS", 12)
        patch.setattr("dualhook.query.streaming.BLOCK_ROWS", 5)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return answers(recorded)
        finally:
            torch.set_num_threads(threads)


def test_every_executor_gives_the_serial_answer(recorded, serial, executor):
    same(answers(recorded, executor=executor), serial)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_number_of_threads_changes_nothing(recorded, serial, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        same(answers(recorded), serial)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_an_answered_replay_goes_through_executors_too(tmp_path, executor):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3, bias=False))
    optimizer = torch.optim.Adam(model[0].parameters()), torch.optim.SGD(model[2].parameters(), lr=0.1)
    with dualhook.instrument(model, tmp_path / "memory", optimizer=optimizer, verbose=False) as recorder:
        for step in range(9):
            with recorder.batch(samples=torch.arange(4) + step):
                model(torch.randn(4, 5)).square().mean().backward()
                for own in optimizer:
                    own.step()
                    own.zero_grad()
    memory, x = dualhook.load(tmp_path / "memory"), torch.randn(2, 5)
    here, there = memory.attend(model, x), memory.attend(model, x, executor=executor)
    for attention in (here, there):
        attention.top(3)
    for column in ("sample", "step"):
        one, other = here.sum_by(column), there.sum_by(column)
        assert all(one[name].tolist() == other[name].tolist() for name in one.columns)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cases(), st.sampled_from(["weight", "abs_weight", "contribution", "abs_contribution"]), st.booleans(),
    st.integers(1, 12), st.sampled_from([*KINDS, None]),
)  # fmt: skip
def test_top_and_sums_are_the_dense_ones(executors, case, by, largest, k, kind):
    rows, made_of, query, direction, source, _ = case
    asked = LayerQuery(made_of, query, direction, direction)
    top, sums, receipt = TopPatterns(k, by, largest), GroupSums(len(asked), sample_group), Receipt(asked)
    workers = Workers(None if kind is None else executors[kind])
    through = scan(source, asked, [top, sums, receipt.sums], workers=workers)
    weight, contribution, output = dense(rows, made_of, query, direction)
    rank = {"weight": weight, "contribution": contribution}[by.removeprefix("abs_")]
    rank = rank.abs() if by.startswith("abs_") else rank
    rank = rank.mul(2**20).round() / 2**20  # the same sum in another order may differ in its last bit
    found = top.result(len(asked))["pattern"].long().tolist()
    for q in range(len(asked)):
        assert found[q] == sorted(range(len(rows)), key=lambda n: ((-1 if largest else 1) * float(rank[q, n]), n))[:k]
    groups, counts, totals = sums.result()
    assert groups.tolist() == sorted(set((rows.sample + 1).tolist()))
    for g, group in enumerate(groups.tolist()):
        member = rows.sample == group - 1
        assert int(counts[g]) == int(member.sum())
        assert torch.allclose(totals["contribution"][:, g], contribution[:, member].sum(1), rtol=1e-9, atol=1e-9)
        assert torch.allclose(totals["abs_weight"][:, g], weight[:, member].abs().sum(1), rtol=1e-9, atol=1e-9)
    assert torch.allclose(through.parts["patterns"] + through.parts["origin"], output, rtol=1e-9, atol=1e-9)
    assert torch.allclose(receipt.sums.signed, contribution.sum(1), rtol=1e-9, atol=1e-9)


@pytest.fixture
def screened(monkeypatch) -> list[bool]:
    """Every pass that can takes a first look in 16 bits; whether each task does."""
    monkeypatch.setattr("dualhook.query.streaming.pays", lambda queries, width, device: True)
    monkeypatch.setattr(Task, "leaves_few", lambda task, collectors: True)
    found: list[bool] = []

    def noted(*arguments) -> Task:
        task = Task(*arguments)
        found.append(task.screened)
        return task

    monkeypatch.setattr("dualhook.query.streaming.Task", noted)
    return found


def test_rankings_after_a_first_look_are_the_same_everywhere(recorded, executor, screened):
    model, path = recorded
    torch.manual_seed(1)
    x, found = torch.randn(40, 7), []
    for how in ({}, {"executor": executor}):
        attention = dualhook.load(path).attend(model, x, **how)
        assert float(attention.receipt["explained"].min()) > 0.9999  # from here on only the best are looked for
        screened.clear()
        tables = [attention.top(6), attention.top(9, by="weight"), attention.top(300, by="abs_weight", largest=False)]
        tables.append(attention.top_by("label", 2, by="abs_contribution"))
        assert screened
        assert all(screened)
        found.append([{name: table[name] for name in table.columns} for table in tables])
    for one, other in zip(*found, strict=True):
        assert all(one[name].tolist() == other[name].tolist() for name in one)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cases(), st.sampled_from(["weight", "abs_weight", "contribution", "abs_contribution"]), st.booleans(),
    st.integers(1, 12), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.sampled_from([*KINDS, None]),
)  # fmt: skip
def test_rankings_after_a_first_look_are_the_dense_ones(executors, screened, case, by, largest, k, dtype, kind):
    rows, made_of, query, direction, source, _ = case
    rows = source.rows = replace(rows, key=rows.key.to(dtype), output_grad=rows.output_grad.to(dtype))
    asked = LayerQuery(made_of, query[:, :1].float(), direction[:, :1].float(), direction)
    top = TopPatterns(k, by, largest)
    screened.clear()
    scan(source, asked, [top], outputs=False, workers=Workers(None if kind is None else executors[kind]))
    assert all(screened)
    exact = replace(rows, key=rows.key.double(), output_grad=rows.output_grad.double())
    weight, contribution, _ = dense(exact, made_of, asked.query.double(), asked.direction.double())
    rank = {"weight": weight, "contribution": contribution}[by.removeprefix("abs_")].float()
    rank = rank.abs() if by.startswith("abs_") else rank
    found = top.result(len(asked))["pattern"].long()
    order = rank.sort(dim=1, descending=largest, stable=True).indices[:, :k]
    torch.testing.assert_close(rank.gather(1, found), rank.gather(1, order), rtol=2e-7, atol=1e-12)
    if bool((rank == rank.round()).all()):  # else those that are alike may differ by a rounding, and either comes first
        assert found.equal(order)


def test_what_travels_is_small():
    """Neither the origin nor rows, nor what tensors are views of."""
    count, width = 10**5, 300
    step = torch.arange(1, count + 1)
    rows = Rows(torch.zeros(count, 1), torch.zeros(count, 1), step, step, step)
    zeros = torch.zeros(width, width, dtype=torch.float64)
    by_step = FactorVectors(torch.zeros(count + 1, 3), torch.zeros(count + 1, 3))
    spec = LayerSpec("fc", width, width, "fc.weight", "fc.bias")
    coefficients = torch.zeros(count + 1, dtype=torch.float64)
    made_of = Composition(spec, coefficients, zeros, coefficients, zeros[0], factor=by_step, rounding=zeros)
    made_of = replace(made_of, sealed=SealedRows("left", torch.zeros(count, width), 0))
    every = torch.zeros(500, 1, width)
    asked = LayerQuery(made_of, every[:2], every[:2], every[:2], size=every)
    for piece in Held(rows, list(range(0, count, 1000))).pieces("fc", last_step=10**3):
        assert len(pickle.dumps(asked.of([piece]))) < 4 * 1000 * width + 100_000


# ---- lost workers --------------------------------------------------------------------------------------------


class Losing(Executor):
    """Does every task but some, whose futures end in another way."""

    def __init__(self, lose, every: int = 3) -> None:
        self._lose, self._every, self.asked = lose, every, 0

    def submit(self, do, /, *args, **kwargs):
        self.asked += 1
        future: Future = Future()
        if self.asked % self._every == 0:
            self._lose(future)
        else:
            try:
                future.set_result(do(*args, **kwargs))
            except Exception as error:
                future.set_exception(error)
        return future


@pytest.mark.parametrize(
    "lose", [Future.cancel, lambda future: future.set_exception(MemoryError()),
             lambda future: future.set_exception(ConnectionError("lost"))],
)  # fmt: skip
def test_what_a_lost_worker_had_to_do_is_done_here(recorded, serial, lose):
    executor = Losing(lose)
    same(answers(recorded, executor=executor), serial)
    assert executor.asked > 20


def test_a_killed_process_is_no_loss(recorded, serial):
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as dying:
        dying.submit(abs, 1).result()
        dying.submit(os._exit, 1)
        same(answers(recorded, executor=dying), serial)  # the pool is broken from its first or second task on


class Killing(Executor):
    """Hands every task to another executor, but for some that kill their worker."""

    def __init__(self, executor: Executor, every: int) -> None:
        self._executor, self._every, self.asked = executor, every, 0

    def submit(self, do, /, *args, **kwargs):
        self.asked += 1
        return self._executor.submit(do if self.asked % self._every else die, *args, **kwargs)


@pytest.mark.skipif("ray" not in KINDS, reason=MISSING)
def test_killed_workers_of_ray_are_no_loss(recorded, serial, executors):
    with ray_executor(max_retries=0) as workers:
        killing = Killing(workers, every=40)
        same(answers(recorded, executor=killing), serial)
    assert killing.asked > 80


def test_an_executor_that_was_shut_down_is_refused(recorded):
    with ThreadPoolExecutor(1) as over:
        pass
    with pytest.raises(dualhook.DualHookError, match="takes no tasks: cannot schedule"):
        answers(recorded, executor=over)


def test_an_error_of_a_task_itself_is_raised(recorded, monkeypatch):
    def fails(self, scores):
        raise ArithmeticError("no such sum")

    monkeypatch.setattr(TopPatterns, "add", fails)
    for executor in (None, Losing(Future.cancel)):
        with pytest.raises(ArithmeticError, match="no such sum"):
            answers(recorded, executor=executor)


def test_a_segment_that_disappears_is_named(recorded, executor, tmp_path):
    model, path = recorded
    shutil.copytree(path, tmp_path / "memory")
    attention = dualhook.load(tmp_path / "memory").attend(model, torch.randn(2, 7), executor=executor)
    gone = sorted((tmp_path / "memory" / "segments").iterdir())[4]
    gone.unlink()
    with pytest.raises(StoreError, match=f"{gone.name}.*(gone|No such file)"):
        attention.top(3)


def test_a_piece_that_reads_less_than_it_should_is_no_answer(monkeypatch):
    step = torch.ones(9, dtype=torch.int64)
    rows, ones = Rows(torch.ones(9, 3), torch.ones(9, 2), step, step, step), torch.ones(2, dtype=torch.float64)
    made_of = Composition(LayerSpec("fc", 3, 2, "fc.weight", None), ones, torch.zeros(2, 3, dtype=torch.float64))
    asked = LayerQuery(made_of, torch.ones(1, 1, 3), torch.ones(1, 1, 2), torch.ones(1, 1, 2))
    scan(Held(rows, [4]), asked, [TopPatterns(3, "weight", True)])
    monkeypatch.setattr("held.HeldPiece.count", property(lambda self: len(self.rows) + 1))
    with pytest.raises(StoreError, match="9 patterns of 'fc' were read where 11 are"):
        scan(Held(rows, [4]), asked, [TopPatterns(3, "weight", True)])


def test_what_is_no_executor_is_refused(recorded):
    with pytest.raises(dualhook.DualHookError, match="executor='threads': expected a concurrent.futures.Executor"):
        answers(recorded, executor="threads")
