"""Keys that no trained weight has made lie in a memory once, and come back bit for bit wherever they are asked for."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from store.test_compacting import same_rows
from store.test_store import bits, entry, everything, written
from torch import Tensor, nn
from torch.nn import functional as F

import dualhook
from dualhook.records import LayerSpec, Rows
from dualhook.store import Layout, Manifest, Store, Writer, inspected
from dualhook.store.layout import open_tensors, read_header, tensor_names, write_tensors
from dualhook.store.pool import _Table

SPECIAL = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-8, -1.5, 2.0], dtype=torch.float64)
SPEC = LayerSpec("fc", 8, 2, "fc.weight", None)
WIDE, SAMPLES, BATCH = 160, 24, 8  # keys of 320 bytes and more
INPUTS = SPECIAL[torch.randint(0, 8, (SAMPLES, 8), generator=torch.Generator().manual_seed(1))]


def headers(root: Path) -> list[dict]:
    return [read_header(path, open_tensors(path))["rows"] for path in Layout(root).segments()]


def key_files(root: Path) -> list[Path]:
    return Layout(root).key_files()


def size(root: Path) -> int:
    return sum(path.stat().st_size for path in (root / "segments").iterdir())


def damage(root: Path) -> list[str]:
    return [str(one) for one in inspected(Layout(root), Manifest.read(Layout(root)), deep=True).damage]


def version(root: Path) -> int:
    return json.loads((root / "dualhook.json").read_text())["version"]


def of_samples(sample: Tensor, position: Tensor, change: Tensor, dtype: torch.dtype, fixed: bool = True) -> Rows:
    """Rows whose keys the sample, the position and how often that has changed tell."""
    key = INPUTS[sample.clamp(min=0)].clone()
    key[:, 0] = SPECIAL[(position + change) % 8]
    number = torch.arange(len(sample))
    output_grad = torch.randn(len(sample), 2, generator=torch.Generator().manual_seed(int(sample.sum())))
    step = torch.zeros_like(number)
    return Rows(key.to(dtype), output_grad.to(dtype), step, sample, position, fixed_keys=fixed)


@given(
    steps=st.lists(
        st.lists(st.tuples(st.integers(-1, 5), st.integers(0, 2), st.sampled_from([0] * 9 + [1, 2])), max_size=8),
        min_size=1,
        max_size=8,
    ),
    unknown=st.booleans(),
    fixed=st.lists(st.sampled_from([True] * 5 + [False]), min_size=8, max_size=8),
    seals=st.sets(st.integers(1, 8)),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    sparse=st.booleans(),
    share=st.sampled_from([2, 1000]),
    block_rows=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_rows_come_back_bit_for_bit_whatever_repeats(
    tmp_path_factory, steps, unknown, fixed, seals, dtype, sparse, share, block_rows, seed
):
    """Samples in any order and any number, of another content now and then, in any segments."""
    root = tmp_path_factory.mktemp("run") / "memory"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dualhook.store.pool.WORTH_BYTES", 1)
        patch.setattr("dualhook.store.pool.WORTH_SHARE", 1000)
        patch.setattr("dualhook.store.pool.WORTH_FOUND", 2 / share)
        patch.setattr("dualhook.store.pool.BLOCK_BYTES", 100)
        patch.setattr("dualhook.store.keyfiles.OPEN", 1)
        patch.setattr("dualhook.store.sparse.WORTH", 100.0)
        patch.setattr("dualhook.store.sparse.AT_ONCE", 16)
        writer, truth = written(root, (SPEC,), sparse=sparse), list[Rows]()
        for step, drawn in enumerate(steps, start=1):
            sample, position, change = torch.tensor(drawn, dtype=torch.int64).reshape(-1, 3).T
            sample = sample if unknown else sample.clamp(min=0)
            own = of_samples(sample, position, change, dtype, fixed[step - 1])
            writer.builder.append(SPEC.name, own)
            truth.append(replace(own, step=torch.full_like(own.step, step)))
            writer.builder.commit(SPEC.name, step)
            writer.builder.add(step, [entry(step)])
            if step in seals:
                writer.seal()
        writer.close()
        assert damage(root) == []
        expected = truth[0].joined(*truth[1:])
        if not len(expected):
            return
        found = everything(Store(root), SPEC.name, block_rows)
        for name in ("key", "output_grad", "step", "sample", "position"):
            assert torch.equal(bits(getattr(found, name)), bits(getattr(expected, name))), name
        dualhook.compact(root, segment_bytes=seed + 1)
        assert damage(root) == []
        again = everything(Store(root), SPEC.name, block_rows)
        assert torch.equal(bits(again.key), bits(expected.key))


class Net(nn.Module):
    """Two layers that read the raw input, one that reads some of its rows, and a head that reads none of it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(WIDE, 16), nn.Linear(WIDE, 16)
        self.some = nn.Linear(WIDE, 16, bias=False)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        some = torch.where(torch.arange(len(x))[:, None] % 3 > 0, self.some(x), 0)
        return self.head(F.relu(self.one(x) + self.other(x) + some))


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    found = torch.rand(SAMPLES, WIDE, generator=torch.Generator().manual_seed(2)) - 0.6
    found = found.relu()
    found[0, :3] = torch.tensor([-0.0, 1e-40, -1e-40])
    return found.to(dtype)


def train(model: nn.Module, recorder, epochs: range, *, named: bool = True, noise: float = 0.0, every: int = 1) -> None:
    """Epochs of three steps; the recorder is asked to flush after ``every`` so many."""
    data, optimizer = images(), torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for epoch in epochs:
        generator = torch.Generator().manual_seed(epoch)
        for at, batch in enumerate(torch.randperm(SAMPLES, generator=generator).split(BATCH)):
            x = data[batch] + noise * torch.randn(BATCH, WIDE, generator=generator) if noise else data[batch]
            if named:
                recorder.batch(samples=batch)
            optimizer.zero_grad()
            F.cross_entropy(model(x), batch % 5).backward()
            optimizer.step()
            if (3 * epoch + at + 1) % every == 0:
                recorder.flush()


def network(make=Net) -> nn.Module:
    torch.manual_seed(0)
    return make()


def recorded(path: Path, epochs: int = 5, make=Net, pool: bool = True, every: int = 1, noise: float = 0.0, **options):
    model = network(make)
    recorder = dualhook.instrument(model, path, layers="all", verbose=False, **options)
    if not pool:
        recorder._writer.pool.most_bytes = 0
    train(model, recorder, range(epochs), every=every, noise=noise)
    return model, recorder.close()


def frozen_head() -> nn.Module:
    """A head of many outputs on features that do not train."""
    model = nn.Sequential(nn.Linear(WIDE, WIDE), nn.ReLU(), nn.Linear(WIDE, 600))
    model[0].requires_grad_(False)
    return model


def convolution() -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (1, 16, 10)), nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(224, 5))


@pytest.mark.parametrize("make", [Net, frozen_head, convolution])
@pytest.mark.parametrize(
    "options", [{}, {"sparse": True}, {"dtype": torch.bfloat16}, {"dtype": torch.float16}], ids=str
)
def test_a_memory_is_the_same_with_and_without_in_fewer_bytes(tmp_path, make, options):
    model, memory = recorded(tmp_path / "pool", make=make, **options)
    twin, whole = recorded(tmp_path / "whole", make=make, pool=False, **options)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), twin.parameters(), strict=True))
    same_rows(memory, whole)
    assert (version(tmp_path / "pool"), version(tmp_path / "whole") < 8) == (8, True)
    assert not key_files(tmp_path / "whole")
    assert memory.nbytes == size(tmp_path / "pool") < whole.nbytes == size(tmp_path / "whole")
    files = key_files(tmp_path / "pool")
    layers = {layer for path in files for layer in read_header(path, open_tensors(path))["rows"]}
    assert len(files) == 3  # the first epoch's segments brought all there is
    for layer in layers:
        counts = [read_header(path, open_tensors(path))["rows"][layer]["count"] for path in files]
        assert sum(counts) == SAMPLES
    assert str(memory.verify()) == str(whole.verify())
    queries = images()[:3]
    for layer in memory.layers:
        one, other = (m.attend(model, queries, layers=layer) for m in (memory, whole))
        assert str(one.top(5)) == str(other.top(5))
        assert str(one.receipt) == str(other.receipt)
    assert damage(tmp_path / "pool") == []


def test_layers_that_read_the_same_input_share_what_is_stored_once(tmp_path):
    _, memory = recorded(tmp_path / "run")
    for found in headers(tmp_path / "run"):
        assert {name for name, own in found.items() if "key_files" in own} == {"one", "other", "some"}
        assert {found[name].get("key_of") for name in ("one", "other", "some")} == {None, "other"}
    for path in Layout(tmp_path / "run").segments():
        names = tensor_names(open_tensors(path))
        assert not [name for name in names if name.endswith("/key") and "head" not in name]
        assert {name for name in names if name.endswith("/key_row")} == {"rows/other/key_row", "rows/some/key_row"}
    assert memory.patterns("some") < memory.patterns("one") == memory.patterns("other")


def test_what_trained_weights_have_made_and_rows_of_no_known_sample_stay_where_they_are(tmp_path):
    recorder = dualhook.instrument(model := network(), tmp_path / "run", verbose=False)
    train(model, recorder, range(3), named=False)
    recorder.close()
    assert not key_files(tmp_path / "run")
    deep = nn.Sequential(nn.Linear(4, WIDE), nn.Linear(WIDE, 4), nn.Embedding(3, WIDE))
    recorder = dualhook.instrument(deep, tmp_path / "deep", layers="all", verbose=False)
    optimizer = torch.optim.SGD(deep.parameters(), lr=0.0)
    for _ in range(3):
        recorder.batch(samples=range(8))
        optimizer.zero_grad()
        (deep[:2](torch.ones(8, 4)).sum() + deep[2](torch.arange(8) % 3).sum()).backward()
        optimizer.step()
        recorder.flush()
    recorder.close()
    assert not key_files(tmp_path / "deep")


def test_inputs_that_differ_in_every_epoch_are_given_up(tmp_path):
    _, memory = recorded(tmp_path / "run", noise=0.1)
    _, whole = recorded(tmp_path / "whole", noise=0.1, pool=False)
    same_rows(memory, whole)
    assert len(key_files(tmp_path / "run")) == 3
    assert all("key_files" not in own for found in headers(tmp_path / "run")[3:] for own in found.values())
    assert size(tmp_path / "run") < 1.1 * size(tmp_path / "whole")


def test_a_sample_that_changes_its_content_is_stored_again_and_found_as_it_is_now(tmp_path, monkeypatch):
    monkeypatch.setattr("dualhook.store.pool.WORTH_BYTES", 1)
    monkeypatch.setattr("dualhook.store.pool.WORTH_SHARE", 1000)
    writer = written(tmp_path / "run", (SPEC,))
    sample, none = torch.arange(6), torch.zeros(6, dtype=torch.int64)
    changed = none.clone()
    changed[2] = 1
    for step, change in enumerate((none, changed, changed, changed, none), start=1):
        writer.builder.append(SPEC.name, of_samples(sample, none, change, torch.float32))
        writer.builder.commit(SPEC.name, step)
        writer.builder.add(step, [entry(step)])
        writer.flush()
    writer.close()
    counts = [
        keys["rows"]["fc"]["count"] for keys in (read_header(p, open_tensors(p)) for p in key_files(tmp_path / "run"))
    ]
    assert counts == [6, 1, 1]  # the first content was not looked for again, only the newest is


@pytest.mark.parametrize("lacks", [None, "a sample", "a flag"])
def test_a_segment_with_a_row_of_no_known_sample_keeps_its_keys(tmp_path, monkeypatch, lacks):
    monkeypatch.setattr("dualhook.store.pool.WORTH_BYTES", 1)
    writer, number = written(tmp_path / "run", (SPEC,)), torch.arange(6)
    samples = torch.where(number == 5, -1, number) if lacks == "a sample" else number
    for part in (slice(0, 5), slice(5, 6)):
        fixed = lacks != "a flag" or part.start > 0
        writer.builder.append("fc", of_samples(samples[part], number[part], 0 * number[part], torch.float32, fixed))
    writer.builder.commit("fc", 1)
    writer.builder.add(1, [entry(1)])
    writer.close()
    assert len(key_files(tmp_path / "run")) == (lacks is None)


@pytest.mark.parametrize(
    ("width", "outputs", "are_there"), [(63, 2, False), (64, 2, True), (64, 1100, False), (64, 800, True)]
)
def test_small_keys_and_small_parts_of_a_segment_stay_where_they_are(tmp_path, width, outputs, are_there):
    writer, number = written(tmp_path / "run", (LayerSpec("fc", width, outputs, "fc.weight", None),)), torch.arange(9)
    own = Rows(torch.randn(9, width), torch.randn(9, outputs), 0 * number, number, 0 * number, fixed_keys=True)
    writer.builder.append("fc", own)
    writer.builder.commit("fc", 1)
    writer.builder.add(1, [entry(1)])
    writer.close()
    assert bool(key_files(tmp_path / "run")) == are_there


def test_rows_that_wait_for_their_step_while_a_segment_is_written_are_stored_once_too(tmp_path, monkeypatch):
    monkeypatch.setattr("dualhook.store.pool.WORTH_BYTES", 1)
    writer, number = written(tmp_path / "run", (SPEC,)), torch.arange(6)
    for step in (1, 2, 3):
        if step == 1:
            writer.builder.append("fc", of_samples(number[:3], number[:3], 0 * number[:3], torch.float32))
        writer.builder.commit("fc", step)
        writer.builder.append("fc", of_samples(number[3:], number[3:], 0 * number[3:], torch.float32))
        writer.builder.add(step, [entry(step)])
        writer.flush()
    writer.close()
    counts = [read_header(path, open_tensors(path))["rows"]["fc"]["count"] for path in key_files(tmp_path / "run")]
    assert counts == [3, 3]


def test_bytes_that_are_found_are_not_counted_as_recorded(tmp_path):
    model = network()
    recorder = dualhook.instrument(model, tmp_path / "run", verbose=False)
    counted = []
    for epoch in range(3):
        train(model, recorder, range(epoch, epoch + 1))
        counted.append(recorder.nbytes)
    assert counted[2] - counted[1] == counted[1] - counted[0] < 0.5 * counted[0]
    assert counted[2] == pytest.approx(size(tmp_path / "run"), rel=0.6)  # headers weigh much in segments of a step
    recorder.close()


@pytest.mark.parametrize("sparse", [False, True])
def test_going_on_finds_what_is_there(tmp_path, sparse):
    model = network()
    train(model, recorder := dualhook.instrument(model, tmp_path / "run", verbose=False, sparse=sparse), range(2))
    recorder.close()
    there = {path: path.read_bytes() for path in key_files(tmp_path / "run")}
    again = dualhook.instrument(model, tmp_path / "run", verbose=False, sparse=sparse, resume=True)
    train(model, again, range(2, 4))
    memory = again.close()
    assert {path: path.read_bytes() for path in key_files(tmp_path / "run")} == there
    assert memory.patterns("one") == 4 * SAMPLES
    assert memory.verify()["exact"].all()
    assert torch.equal(all_keys(memory).unique(dim=0), images().unique(dim=0))


def test_going_on_in_another_dtype_begins_again(tmp_path):
    model = network()
    train(model, recorder := dualhook.instrument(model, tmp_path / "run", verbose=False), range(2))
    before = recorder.close()
    expected = all_keys(before).clone()
    again = dualhook.instrument(model, tmp_path / "run", verbose=False, dtype=torch.bfloat16, resume=True)
    train(model, again, range(2, 4))
    memory = again.close()
    counts = [read_header(path, open_tensors(path))["rows"]["other"]["count"] for path in key_files(tmp_path / "run")]
    assert counts == [BATCH] * 6  # three files of each dtype
    assert damage(tmp_path / "run") == []
    rows = list(memory._store.blocks("one", last_step=12, block_rows=7))
    assert torch.equal(bits(torch.cat([own.key for own in rows])[: len(expected)].float()), bits(expected))
    assert all(torch.equal(own.key.float(), images()[own.sample].bfloat16().float()) for own in rows[-6:])


def all_keys(memory: dualhook.DualMemory, layer: str = "one") -> Tensor:
    return torch.cat([block.key for block in memory._store.blocks(layer, last_step=memory.steps, block_rows=7)])


@pytest.mark.parametrize("step", [2, 4, 7])
@pytest.mark.parametrize("every", [1, 2, 5])
def test_going_on_from_an_earlier_step_keeps_what_is_referred_to(tmp_path, step, every):
    model, memory = recorded(tmp_path / "run", epochs=3, every=every)
    states = memory.state_dict(step=step)
    expected = all_keys(memory)[: step * BATCH].clone()
    model.load_state_dict(states)
    recorder = dualhook.instrument(model, tmp_path / "run", layers="all", verbose=False, resume_at=step)
    used = {path for segment in Store(tmp_path / "run").segments for path in segment.key_files}
    assert set(key_files(tmp_path / "run")) == used
    train(model, recorder, range(3, 5), every=every)
    memory = recorder.close()
    assert damage(tmp_path / "run") == []
    assert torch.equal(bits(all_keys(memory)[: step * BATCH]), bits(expected))
    assert memory.patterns("one") == (step + 6) * BATCH


def test_keys_without_their_segment_are_harmless_and_gone_when_recording_goes_on(tmp_path):
    """What is left if the process ends between the two."""
    model, memory = recorded(tmp_path / "run", epochs=2)
    layout = Layout(tmp_path / "run")
    left = layout.key_file(6)
    shutil.copy(layout.key_file(2), left)
    file = open_tensors(layout.key_file(2))
    header = read_header(layout.key_file(2), file) | {"number": 6}
    write_tensors(left, {name: file.get_tensor(name) for name in tensor_names(file)}, header)
    half = left.with_suffix(".partial")
    half.write_bytes(b"half")
    loaded = dualhook.load(tmp_path / "run")
    assert loaded.nbytes == memory.nbytes == size(tmp_path / "run") - left.stat().st_size - 4
    assert loaded.verify()["exact"].all()
    assert damage(tmp_path / "run") == []
    dualhook.instrument(model, tmp_path / "run", layers="all", verbose=False, resume=True).close()
    assert not left.exists()
    assert not half.exists()


@pytest.mark.parametrize("budget", [30_000, 60_000, 100_000])
def test_folding_keeps_to_the_budget_and_to_what_is_referred_to(tmp_path, budget):
    _, memory = recorded(tmp_path / "run", epochs=8, max_bytes=budget, on_full="fold", every=100)
    assert memory._store.first_step > 0
    assert size(tmp_path / "run") <= budget
    used = {path for segment in memory._store.segments for path in segment.key_files}
    assert set(key_files(tmp_path / "run")) == used
    assert memory.verify()["exact"].all()
    assert damage(tmp_path / "run") == []


@pytest.mark.parametrize("on_full", ["fold", "stop"])
def test_keys_that_take_much_of_the_memory_lie_with_their_rows(tmp_path, monkeypatch, on_full):
    monkeypatch.setattr("dualhook.recorder.settings._memory_bytes", lambda: 4 * 15_000)
    _, memory = recorded(tmp_path / "run", epochs=3, on_full=on_full)  # one of the three files fits
    assert len(key_files(tmp_path / "run")) == 1
    assert sum(path.stat().st_size for path in key_files(tmp_path / "run")) <= 15_000
    assert memory.verify()["exact"].all()
    monkeypatch.setattr("dualhook.recorder.settings._memory_bytes", lambda: None)
    recorded(tmp_path / "other", epochs=3, on_full=on_full)
    assert len(key_files(tmp_path / "other")) == 3


def test_folding_forgets_keys_that_went_with_their_files(tmp_path):
    """A first epoch of other samples: no later segment refers to its keys."""
    model = network()
    recorder = dualhook.instrument(model, tmp_path / "run", verbose=False, max_bytes=250_000, on_full="fold")
    data, optimizer = images(), torch.optim.SGD(model.parameters(), lr=0.05)
    sizes = []
    for step in range(60):
        batch = torch.arange(BATCH) + BATCH * (0 if step < 3 or step == 50 else 1 + step % 2)
        recorder.batch(samples=batch)
        optimizer.zero_grad()
        F.cross_entropy(model(data[batch]), batch % 5).backward()
        optimizer.step()
        recorder.flush()
        sizes.append(size(tmp_path / "run"))
    memory = recorder.close()
    assert max(sizes) <= 250_000
    assert memory._store.first_step > 3
    assert not Layout(tmp_path / "run").key_file(0).exists()
    assert damage(tmp_path / "run") == []
    assert memory.verify()["exact"].all()


def test_the_table_forgets_rows_of_files_and_numbers_the_rest_as_before():
    table = _Table(4, torch.float32)
    for number in (3, 5, 9):
        begin = table.add(number, 10)
        table.put(np.arange(10) + 10 * number, begin + np.arange(10))
    table.forget([5])
    assert table.find(np.array([30, 39, 50, 59, 90, 99, 7])).tolist() == [0, 9, -1, -1, 20, 29, -1]
    where = table.refer(np.array([29, 0, 20]))
    assert (where.files, where.rows.tolist()) == ([(3, 10), (9, 10)], [19, 0, 10])


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("sparse", [None, True])
def test_compacting_keeps_what_is_referred_to_and_no_more(tmp_path, dtype, sparse):
    recorded(tmp_path / "run", epochs=4)
    recorded(tmp_path / "whole", epochs=4, pool=False)
    compact, plain = (dualhook.compact(tmp_path / name, dtype=dtype, sparse=sparse) for name in ("run", "whole"))
    if dtype != torch.int8:
        same_rows(compact, plain)
        assert compact.nbytes < plain.nbytes - SAMPLES * WIDE
        (path,) = key_files_of(compact)
        assert read_header(path, open_tensors(path))["rows"].keys() == {"other"}
        assert read_header(path, open_tensors(path))["rows"]["other"]["count"] == SAMPLES
        assert version(tmp_path / "run") == 8
    else:
        assert not key_files_of(compact)
    assert not key_files(tmp_path / "run") or compact._store.manifest.generation == 0
    found = inspected(compact._store.layout, compact._store.manifest, deep=True)
    assert not found.damage


def test_a_memory_of_which_only_such_keys_are_sparse_is_a_sparse_one(tmp_path):
    """And stays so when it is compacted."""
    _, memory = recorded(tmp_path / "run", epochs=3, make=lambda: nn.Linear(WIDE, 5), sparse=True)
    assert "sparse rows" in str(memory)
    compact = dualhook.compact(tmp_path / "run")
    assert "sparse rows" in str(compact)
    (path,) = key_files_of(compact)
    assert "sparse" in next(iter(read_header(path, open_tensors(path))["rows"].values()))


def key_files_of(memory: dualhook.DualMemory) -> list[Path]:
    return memory._store.layout.key_files()


def test_compacting_leaves_out_keys_of_rows_that_are_dropped(tmp_path):
    recorded(tmp_path / "run", epochs=2)
    compact = dualhook.compact(tmp_path / "run", min_share=0.2)
    counts = {
        layer: own["count"]
        for path in key_files_of(compact)
        for layer, own in read_header(path, open_tensors(path))["rows"].items()
    }
    for layer, count in counts.items():
        kept = next(compact._store.blocks(layer, last_step=6, block_rows=10**6))
        assert count == len(set(kept.sample.tolist())) < SAMPLES
    assert counts


def test_two_processes_have_their_own(tmp_path):
    layout = Layout(tmp_path / "run")
    layout.create(overwrite=False)
    spec = LayerSpec("fc", WIDE, 2, "fc.weight", None)
    Manifest((spec,), {"dualhook": "test"}, 2).write(layout)
    both = [Writer(layout, rank=rank) for rank in range(2)]
    both[0].write_origin(0, {spec.weight: {"value": torch.ones(2, WIDE)}}, {spec.weight: torch.float32})
    for step in range(1, 5):
        for writer in both:
            own = torch.arange(4) + 4 * writer.rank
            zero = torch.zeros_like(own)
            writer.builder.append("fc", Rows(images()[own], torch.ones(4, 2), zero, own, zero, fixed_keys=True))
            writer.builder.commit("fc", step)
            writer.builder.add(step, [] if writer.rank else [entry(step)])
            writer.flush()
    for writer in both:
        writer.close()
    assert [path.name for path in layout.key_files()] == [
        "keys-00000000.safetensors",
        "keys-r0001-00000000.safetensors",
    ]
    assert damage(tmp_path / "run") == []
    found = everything(Store(tmp_path / "run"), "fc")
    assert found.sample.tolist() == list(range(8)) * 4
    assert torch.equal(found.key, images()[found.sample])
    compact = dualhook.compact(tmp_path / "run")
    assert torch.equal(everything(compact._store, "fc").key, found.key)
    assert len(key_files_of(compact)) == 2
