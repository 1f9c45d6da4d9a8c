"""Rankings after a first look in 16 bits: bounds that hold, and the answers of the dense computation."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from held import Held, HeldPiece, cases, dense, ranked
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dualhook.errors import StoreError
from dualhook.query import Composition, GroupSums, LayerQuery, TopPatterns, TopPatternsBy, Workers, scan
from dualhook.query.collectors import Bar
from dualhook.query.screening import ROUNDING, BlockScreen, Screening
from dualhook.query.tasks import Task
from dualhook.records import LayerSpec, Rows

BY = st.sampled_from(["weight", "abs_weight", "contribution", "abs_contribution"])
SHORT = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


@pytest.fixture
def always(monkeypatch):
    """Screening wherever it can be, whatever processor and question."""
    monkeypatch.setattr("dualhook.query.streaming.pays", lambda queries, width, device: True)
    monkeypatch.setattr(
        Task, "leaves_few", lambda task, collectors: Screening.of(task.asked, replayed=False) is not None
    )


@pytest.fixture
def looked_at(monkeypatch) -> list[int]:
    """The first pattern of every block that bounds were asked of."""
    found: list[int] = []
    bounds = BlockScreen.bounds

    def noted(screen: BlockScreen, quantity: str):
        found.append(screen._rows.first)
        return bounds(screen, quantity)

    monkeypatch.setattr(BlockScreen, "bounds", noted)
    return found


def question(rows: Rows, query: Tensor, direction: Tensor, bias: bool = True) -> LayerQuery:
    """To a layer whose steps have differing coefficients, with one position per query."""
    (_, inputs), outputs = rows.key.shape, rows.output_grad.shape[1]
    steps = int(rows.step.max()) + 1
    weight, of_bias = torch.linspace(0.5, 1.5, steps).double(), torch.linspace(2, -1, steps).double()
    made_of = Composition(
        LayerSpec("fc", inputs, outputs, "fc.weight", "fc.bias" if bias else None),
        weight, torch.zeros(outputs, inputs).double(),
        of_bias if bias else None, torch.zeros(outputs).double() if bias else None,
    )  # fmt: skip
    return LayerQuery(made_of, query[:, None], direction[:, None], direction[:, None])


def numbered(key: Tensor, output_grad: Tensor, steps: int = 5) -> Rows:
    count = torch.arange(len(key))
    return Rows(key, output_grad, 1 + count * steps // max(1, len(key)), count % 7, count % 3)


def scores(asked: LayerQuery, rows: Rows) -> dict[str, Tensor]:
    """Dense, in float64."""
    exact = replace(rows, key=rows.key.double(), output_grad=rows.output_grad.double())
    weight, contribution, _ = dense(exact, asked.made_of, asked.query.double(), asked.direction.double())
    return {"weight": weight, "contribution": contribution}


@given(
    st.integers(0, 10**6), st.integers(1, 300), SHORT, st.booleans(), st.integers(-30, 30), st.integers(-30, 30),
    st.sampled_from(["normal", "positive", "one sign and just below a half", "mixed sizes", "zeros"]),
)  # fmt: skip
def test_the_exact_scores_lie_between_the_bounds(seed, width, dtype, bias, key_size, query_size, kind):
    torch.manual_seed(seed)

    def values(count: int) -> Tensor:
        drawn = torch.randn(count, width)
        if kind == "positive":
            drawn = drawn.relu()
        elif kind == "one sign and just below a half":  # what is lost by rounding adds up
            drawn = (1 + 2.0**-8 * (1 - 2.0**-6)) * 2.0 ** torch.randint(-2, 3, (count, width))
        elif kind == "mixed sizes":
            drawn = drawn * 2.0 ** torch.randint(-60, 60, (count, width))
        elif kind == "zeros":
            drawn = drawn * (torch.rand(count, 1) < 0.5)
        return drawn

    wide = 1 if dtype == torch.float16 else 2.0**key_size
    rows = numbered((values(40) * wide).to(dtype), (values(40) * wide).to(dtype))
    asked = question(rows, values(9) * 2.0**query_size, values(9), bias)
    screening = Screening.of(asked, replayed=False)
    assert screening is not None
    screen = screening.over(rows)
    for quantity, exact in scores(asked, rows).items():
        lower, upper = screen.bounds(quantity)
        known = exact.isfinite()
        unlimited = lower.isnan() | upper.isnan()  # NaN is not behind anything
        assert ((lower <= exact.float()) & (exact.float() <= upper) | unlimited)[known].all()
        query, pattern = torch.ones_like(exact).nonzero().unbind(1)
        of_pairs = screen.of_pairs(quantity, query, pattern).reshape(exact.shape).double()
        size = 2 * asked.query.double().norm(dim=-1) * rows.key.double().norm(dim=1) + 3
        if quantity == "contribution":
            size *= asked.direction.double().norm(dim=-1) * rows.output_grad.double().norm(dim=1)
        known &= exact.abs() < torch.finfo(torch.float32).max
        assert ((of_pairs - exact).abs() <= 2.0**-23 * exact.abs() + 1e-13 * size + 1e-44)[known].all()


def test_the_bounds_are_no_wider_than_they_have_to_be():
    """Components that lose most by rounding, all to the same side, come close to them."""
    worst = torch.full((1, 256), 1 + ROUNDING * (1 - 2.0**-6))
    rows = numbered(worst, worst)
    asked = question(rows, worst, worst, bias=False)
    lower, upper = Screening.of(asked, replayed=False).over(rows).bounds("weight")
    exact, size = float(worst.double().square().sum()), float(worst.double().square().sum())
    assert float(upper) < exact + 0.015 * size
    assert 0.6 < (exact - float(lower + upper) / 2) / (float(upper - lower) / 2) <= 1


@pytest.mark.parametrize(
    ("key", "query"),
    [
        ([3.4e38, 0.0], [1.0, 0.0]),  # infinite in bfloat16, and its square in float32
        ([3.4e38], [1e-10]),  # the norm of a single number is no sum of squares
        ([1.8444e19, 0.0], [1.8444e19, 0.0]),  # products that are infinite in bfloat16 only
        ([-1.8444e19, 0.0], [1.8444e19, 0.0]),
        ([2.0e38, 2.0e38], [1.0, -1.0]),
        ([1.0037e-25, 1.0037e-25], [1.0, 1.0]),  # whose squares are zero
        ([1.0, 1.0], [1.0037e-25, 1.0037e-25]),
        ([1e-40, 1e-40], [1e20, 1e20]),  # zero for instructions without denormal numbers
    ],
)
def test_the_largest_and_the_smallest_numbers(key, query):
    rows, query = numbered(torch.tensor([key] * 3), torch.tensor([[1.0]] * 3)), torch.tensor([query] * 16)
    asked = question(rows, query, torch.ones(16, 1), bias=False)
    lower, upper = Screening.of(asked, replayed=False).over(rows).bounds("weight")
    exact = scores(asked, rows)["weight"].float()
    assert (((lower <= exact) | lower.isnan()) & ((exact <= upper) | upper.isnan())).all()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cases(), BY, st.booleans(), st.sampled_from([1, 2, 3, 5, 60]), SHORT, st.sampled_from([None, 0.3, 0.9]),
    st.sampled_from([torch.nan, torch.inf]), st.sampled_from([None, 1, 3]), st.booleans(),
)  # fmt: skip
def test_rankings_are_the_dense_ones(
    always, looked_at, monkeypatch, case, by, largest, k, dtype, unknown, what, threads, grouped
):
    rows, made_of, query, direction, source, block_rows = case
    monkeypatch.setattr("dualhook.query.streaming.BLOCK_ROWS", block_rows)
    monkeypatch.setattr("dualhook.query.streaming.TASK_ROWS", 7)
    bias = None if made_of.bias is None else made_of.bias.round()
    made_of = replace(made_of, weight=made_of.weight.round(), bias=bias)
    query, direction = query.round()[:, :1], direction.round()[:, :1]
    key = rows.key.round()
    if unknown is not None and len(rows):
        key[int(unknown * len(rows))] = what
    source.rows = replace(rows, key=key.to(dtype), output_grad=rows.output_grad.round().to(dtype))
    asked = LayerQuery(made_of, query.float(), direction.float(), direction)
    looked_at.clear()
    top = TopPatterns(k, by, largest)
    tops = TopPatternsBy(k, by, largest, sample_group)
    with ThreadPoolExecutor(threads or 1) as pool:
        scan(source, asked, [tops if grouped else top], outputs=False, workers=Workers(pool if threads else None))
    assert len(looked_at) >= (len(rows) > 0)
    weight, contribution, _ = dense(
        replace(rows, key=key, output_grad=rows.output_grad.round()), made_of, query, direction
    )
    groups = {g: (rows.sample + 1 == g).nonzero()[:, 0] for g in (rows.sample + 1).unique().tolist()}
    found = tops.result(len(asked)) if grouped else {None: top.result(len(asked))}
    assert list(found) == (list(groups) if grouped else [None])
    for group, ranking in found.items():
        among = groups[group] if grouped else torch.arange(len(rows))
        order = among[ranked(weight[:, among], contribution[:, among], by, largest, k)]
        assert ranking["pattern"].long().equal(order)
        for name, whole in {"weight": weight, "contribution": contribution}.items():
            torch.testing.assert_close(ranking[name].double(), whole.gather(1, order), rtol=0, atol=0, equal_nan=True)
        for name in ("sample", "step", "position"):
            assert ranking[name].long().equal(getattr(rows, name)[order])


def sample_group(rows: Rows) -> Tensor:
    return rows.sample + 1


@pytest.fixture(scope="module")
def real():
    """Some 3,000 patterns as a hidden layer has them, which grow while it is trained; every tenth is met again."""
    torch.manual_seed(0)
    count = 3000
    key = (torch.randn(count, 40) @ torch.randn(40, 800)).relu_() * torch.linspace(0.5, 1.0, count)[:, None]
    key[10::10] = key[5:-9:10]
    gradient = torch.randn(count, 90) * (torch.rand(count, 90) < 0.3)
    gradient[10::10] = gradient[5:-9:10]
    query = torch.cat([(torch.randn(30, 40) @ torch.randn(40, 800)).relu_(), torch.zeros(2, 800)])
    return numbered(key, gradient), query, torch.randn(32, 90)


@pytest.mark.parametrize("by", ["weight", "abs_weight", "contribution", "abs_contribution"])
@pytest.mark.parametrize("largest", [True, False])
def test_no_block_worker_or_thread_changes_a_bit(always, looked_at, monkeypatch, real, by, largest):
    rows, query, direction = real
    asked, source = question(rows, query, direction), Held(rows, [100, 700, 1500, 1600, 2500])
    exact = scores(asked, rows)
    found = []
    for block_rows, task_rows, threads, workers in [
        (2048, 10**6, 1, None), (64, 300, 1, None), (517, 1, 2, None), (100, 1, 1, 3), (2048, 1, 2, 4),
    ]:  # fmt: skip
        monkeypatch.setattr("dualhook.query.streaming.SCREENED_ROWS", block_rows)
        monkeypatch.setattr("dualhook.query.streaming.TASK_ROWS", task_rows)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        top = TopPatterns(10, by, largest)
        try:
            with ThreadPoolExecutor(workers or 1) as pool:
                scan(source, asked, [top], outputs=False, workers=Workers(pool if workers else None))
        finally:
            torch.set_num_threads(before)
        found.append(top.result(len(asked)))
    assert looked_at
    for one in found:
        assert all(values.equal(found[0][name]) for name, values in one.items())
        for name, whole in exact.items():
            true = whole.gather(1, one["pattern"].long())
            torch.testing.assert_close(one[name].double(), true, rtol=1e-6, atol=1e-9)
    rank = {name.removeprefix("abs_"): whole for name, whole in exact.items()}[by.removeprefix("abs_")].float()
    rank = rank.abs() if by.startswith("abs_") else rank
    order = rank.sort(dim=1, descending=largest, stable=True).indices[:, :10]
    same = found[0]["pattern"].long() == order  # the dense float64 sum may round the other way
    assert rank.gather(1, found[0]["pattern"].long())[~same].allclose(rank.gather(1, order)[~same], rtol=3e-7)
    assert same.float().mean() > 0.99


@pytest.fixture
def worked_out(monkeypatch) -> list[int]:
    """How many pairs were worked out exactly, time after time."""
    found: list[int] = []
    of_pairs = BlockScreen.of_pairs

    def noted(screen: BlockScreen, quantity: str, query: Tensor, pattern: Tensor):
        found.append(len(query))
        return of_pairs(screen, quantity, query, pattern)

    monkeypatch.setattr(BlockScreen, "of_pairs", noted)
    return found


def test_few_pairs_are_left(always, worked_out, monkeypatch, real):
    """Also of queries that are zero, whose scores are all alike, and of patterns that are ever better with time."""
    rows, query, direction = real
    monkeypatch.setattr("dualhook.query.streaming.SCREENED_ROWS", 100)
    monkeypatch.setattr("dualhook.query.streaming.TASK_ROWS", 1)
    asked, source = question(rows, query, direction, bias=False), Held(rows, list(range(100, 3000, 100)))
    for group_of, most in ((None, 0.05), (sample_group, 0.3)):
        worked_out.clear()
        top = TopPatternsBy(10, "weight", True, group_of) if group_of else TopPatterns(10, "weight", True)
        scan(source, asked, [top], outputs=False)
        assert 0 < sum(worked_out) < most * len(rows) * len(query)


def test_all_threads_are_used_where_no_bit_depends_on_them(monkeypatch, real):
    rows, query, direction = real
    asked, before, call, found = question(rows, query, direction), torch.get_num_threads(), Task.__call__, []
    monkeypatch.setattr("dualhook.query.screening._multiplies_short", lambda: True)

    def noted(task: Task, threads: int = 1):
        done = call(task, threads)
        found.append(torch.get_num_threads())
        return done

    monkeypatch.setattr(Task, "__call__", noted)
    torch.set_num_threads(3)
    try:
        scan(Held(rows, [50]), asked, [TopPatterns(10, "weight", True)], outputs=False)
        scan(Held(rows, [50]), asked, [TopPatterns(10, "weight", True)])
        assert torch.get_num_threads() == 3
        with ThreadPoolExecutor(1) as pool:  # in workers that were forked, more than one would wait for each other
            assert pool.submit(torch.get_num_threads).result() == 3
            scan(Held(rows, [50]), asked, [TopPatterns(10, "weight", True)], outputs=False, workers=Workers(pool))
    finally:
        torch.set_num_threads(before)
    assert found == [3, 1, 1]


@pytest.mark.parametrize("by", ["weight", "contribution"])
def test_sums_that_cancel_have_the_same_bits_too(always, monkeypatch, by):
    """Their last bits depend on the order in which they are summed up: there is one."""
    torch.manual_seed(0)
    half, gradient = torch.randn(600, 100), torch.randn(600, 16)
    rows = numbered(torch.cat([half, -half], 1), gradient - gradient.mean(1, keepdim=True))
    query = torch.randn(40, 100)
    asked = question(rows, torch.cat([query, query], 1), torch.randn(40, 1).expand(40, 16).clone(), bias=False)
    found = []
    for block_rows, threads, workers in [(2048, 1, None), (64, 2, None), (7, 1, 4), (64, 1, 4), (64, 1, 4)]:
        monkeypatch.setattr("dualhook.query.streaming.BLOCK_ROWS", block_rows)
        before, top = torch.get_num_threads(), TopPatterns(10, by, True)
        torch.set_num_threads(threads)
        try:
            with ThreadPoolExecutor(workers or 1) as pool:
                kind = Workers(pool if workers else None)
                scan(Held(rows, [100, 200, 350]), asked, [top], outputs=False, workers=kind)
        finally:
            torch.set_num_threads(before)
        found.append(top.result(40))
    assert all(values.equal(found[0][name]) for one in found for name, values in one.items())


@pytest.mark.parametrize("size", [1e-46, 2e-45, 1e-42, 1e-36])
def test_coefficients_that_float32_does_not_hold(always, looked_at, monkeypatch, size):
    """As long weight decay leaves them."""
    monkeypatch.setattr("dualhook.query.streaming.BLOCK_ROWS", 100)
    torch.manual_seed(0)
    rows = numbered(torch.rand(400, 4) * 1e5, torch.rand(400, 3) * 1e5)
    asked = question(rows, torch.rand(16, 4), -torch.rand(16, 3), bias=False)
    asked = replace(asked, made_of=replace(asked.made_of, weight=asked.made_of.weight * size))
    top = TopPatterns(5, "contribution", True)
    scan(Held(rows, [200]), asked, [top], outputs=False)
    assert looked_at
    exact = scores(asked, rows)["contribution"].float()
    assert top.result(16)["contribution"].equal(exact.gather(1, top.result(16)["pattern"].long()))
    assert top.result(16)["pattern"].long().equal(exact.sort(dim=1, descending=True, stable=True).indices[:, :5])


def test_bounds_that_say_nothing_put_nothing_first(always, looked_at):
    """Sums that overflow on their way are NaN in the first look, and zero."""
    key = (torch.rand(50, 64) + 1.0) * torch.linspace(1, 3, 50)[:, None]
    key[::10] = torch.cat([torch.full((32,), 3e38), torch.full((32,), -3e38)])
    top, rows = TopPatterns(7, "weight", True), numbered(key, torch.rand(50, 2))
    asked = question(rows, torch.full((16, 64), 2.0), torch.rand(16, 2), bias=False)
    scan(Held(rows, []), asked, [top], outputs=False)
    assert looked_at
    exact = scores(asked, rows)["weight"].float()
    assert top.result(16)["pattern"].long().equal(exact.sort(dim=1, descending=True, stable=True).indices[:, :7])


def screened(monkeypatch, asked: LayerQuery, source: Held, collectors: list) -> bool:
    """Whether a pass takes a first look in 16 bits, on a processor on which that pays."""
    monkeypatch.setattr("dualhook.query.screening._multiplies_short", lambda: True)
    asked_for = []
    call = Task.__call__

    def noted(task: Task, threads: int = 1):
        asked_for.append(task.screened)
        return call(task, threads)

    monkeypatch.setattr(Task, "__call__", noted)
    scan(source, asked, collectors, outputs=False)
    assert len(set(asked_for)) == 1
    return asked_for[0]


def test_where_it_spares_most_scores(monkeypatch, real):
    rows, query, direction = real
    source, top = Held(rows, [1000]), TopPatterns(10, "weight", True)
    assert screened(monkeypatch, question(rows, query, direction), source, [top])
    assert top.result(len(query))["pattern"].shape == (32, 10)
    assert not screened(
        monkeypatch, question(rows, query[:9], direction[:9]), source, [TopPatterns(10, "weight", True)]
    )
    sums = GroupSums(len(query), sample_group)
    assert not screened(monkeypatch, question(rows, query, direction), source, [TopPatterns(10, "weight", True), sums])
    wide = Held(replace(rows, key=rows.key.double()), [])
    assert not screened(monkeypatch, question(rows, query, direction), wide, [TopPatterns(10, "weight", True)])


def test_not_where_patterns_are_nearly_alike(monkeypatch, real):
    """As where few components are so large that the others hardly count: the bounds tell nothing apart."""
    rows, query, direction = real
    rows = replace(rows, key=torch.cat([rows.key, torch.full((len(rows), 1), 3e4)], 1))
    asked = question(rows, torch.cat([query, torch.ones(32, 1)], 1), direction)
    top = TopPatterns(10, "weight", True)
    assert not screened(monkeypatch, asked, Held(rows, [1000]), [top])
    order = scores(asked, rows)["weight"].sort(dim=1, descending=True, stable=True).indices[:, :10]
    whole = scores(asked, rows)["weight"]
    torch.testing.assert_close(
        whole.gather(1, top.result(32)["pattern"].long()), whole.gather(1, order), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("by", ["weight", "contribution"])
def test_many_that_are_alike_come_in_the_order_of_recording(always, looked_at, monkeypatch, by):
    """Where bounds leave everything open, all scores are made exactly."""
    monkeypatch.setattr("dualhook.query.streaming.BLOCK_ROWS", 50)
    torch.manual_seed(0)
    rows = numbered(torch.randn(1, 20).expand(400, 20).clone(), torch.randn(1, 8).expand(400, 8).clone(), steps=1)
    top = TopPatterns(7, by, True)
    scan(Held(rows, [90, 210]), question(rows, torch.randn(17, 20), torch.randn(17, 8)), [top], outputs=False)
    assert looked_at
    assert top.result(17)["pattern"].long().equal(torch.arange(7).expand(17, 7))


def test_older_patterns_are_asked_too(monkeypatch, real):
    """As where a layer's keys have been nearly alike before it was trained."""
    rows, query, direction = real
    key = torch.cat([rows.key, torch.zeros(len(rows), 1)], 1)
    key[:900, -1] = 3e4
    asked = question(rows := replace(rows, key=key), torch.cat([query, torch.ones(32, 1)], 1)[:30], direction[:30])
    monkeypatch.setattr("dualhook.query.streaming.TASK_ROWS", 1)
    monkeypatch.setattr("dualhook.query.screening.LEAST_QUERIES", 30)
    monkeypatch.setattr("dualhook.query.screening.LEAST_FACTORS", 1)
    newer = rows.part(900, len(rows))
    assert screened(monkeypatch, asked, Held(replace(newer, first=0), []), [TopPatterns(10, "weight", True)])
    assert not screened(monkeypatch, asked, Held(rows, [900]), [TopPatterns(10, "weight", True)])


def test_a_piece_without_its_patterns_is_named(monkeypatch, real):
    rows, query, direction = real
    monkeypatch.setattr("dualhook.query.screening._multiplies_short", lambda: True)
    monkeypatch.setattr(HeldPiece, "blocks", lambda piece, block_rows: iter(()))
    with pytest.raises(StoreError, match="0 patterns of 'fc' were read where 3000 are"):
        scan(Held(rows, []), question(rows, query, direction), [TopPatterns(10, "weight", True)], outputs=False)


@pytest.mark.parametrize("largest", [True, False])
def test_the_bar_goes_up_only(largest):
    """NaN is the largest; the earlier one of equals stays."""
    bar, sign = Bar(), 1.0 if largest else -1.0

    def lifted(rank: float, pattern: int) -> float:
        bar.lift(torch.tensor([[sign * rank]]), torch.tensor([[pattern]]), largest)
        least = bar.least(0, largest)
        assert least is not None
        return sign * float(least)

    assert bar.least(0, largest) is None
    assert lifted(1.0, 70) == 1.0
    assert lifted(0.5, 3) == 1.0
    assert lifted(2.0, 60) == 2.0
    assert lifted(2.0, 50) == 2.0
    before, after = (sign * float(bar.least(first, largest)) for first in (50, 51))
    assert before == 2.0 < after < 2.001
    if not largest:
        bar = Bar()
        assert math.isnan(lifted(math.nan, 1))
        assert lifted(1.0, 2) == 1.0


def test_a_processor_is_asked_first(monkeypatch):
    from dualhook.query import screening

    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert not screening._multiplies_short.__wrapped__()
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert screening._multiplies_short.__wrapped__()  # its sums are in float32, by instruction or by torch's own loops
    product = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda one, other: product(one, other) - 1.0)  # as stuck at 1
    assert not screening._multiplies_short.__wrapped__()
    monkeypatch.setattr(screening, "_multiplies_short", lambda: True)
    assert screening.pays(32, 768, "cpu")
    assert screening.pays(256, 96, "cpu")
    assert not screening.pays(31, 10**6, "cpu")
    assert not screening.pays(256, 95, "cpu")
    assert not screening.pays(32, 768, "cuda")
