"""Sample identity: every recorded row names the dataset row it came from, and nothing else changes."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import dualhook

N, I = 37, 4


def features() -> torch.Tensor:
    return torch.arange(N * I, dtype=torch.float32).reshape(N, I) / 100  # every row is its own


class Plain(Dataset):
    def __len__(self):
        return N

    def __getitem__(self, index):
        return features()[index], index % 3


class Fetching(Plain):
    def __getitems__(self, indices):
        return [self[index] for index in indices]


class Stream(IterableDataset):
    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        workers, worker = (1, 0) if info is None else (info.num_workers, info.id)
        yield from ((features()[k], k) for k in range(worker, N, workers))


def as_dict(items):
    return {"x": torch.stack([x for x, _ in items]), "more": [y for _, y in items]}


def as_list(items):
    return [torch.stack([x for x, _ in items]), tuple(y for _, y in items)]


LOADERS = {
    "plain": lambda: DataLoader(TensorDataset(features()), batch_size=5),
    "shuffled": lambda: DataLoader(TensorDataset(features()), batch_size=5, shuffle=True),
    "drop_last": lambda: DataLoader(Plain(), batch_size=5, shuffle=True, drop_last=True),
    "workers": lambda: DataLoader(Plain(), batch_size=5, shuffle=True, num_workers=2),
    "persistent": lambda: DataLoader(Fetching(), batch_size=5, shuffle=True, num_workers=2, persistent_workers=True),
    "prefetch": lambda: DataLoader(Plain(), batch_size=3, num_workers=2, prefetch_factor=4),
    "dict": lambda: DataLoader(Plain(), batch_size=5, shuffle=True, collate_fn=as_dict),
    "list": lambda: DataLoader(Fetching(), batch_size=5, shuffle=True, collate_fn=as_list),
    "generator": lambda: DataLoader(Plain(), batch_size=5, shuffle=True, generator=torch.Generator().manual_seed(3)),
    "sampler": lambda: DataLoader(Plain(), batch_size=5, sampler=WeightedRandomSampler(torch.rand(N), 20)),
    "batch_sampler": lambda: DataLoader(Plain(), batch_sampler=BatchSampler(RandomSampler(Plain()), 4, False)),
    "batched_sampler": lambda: DataLoader(
        TensorDataset(features()), batch_size=None, sampler=BatchSampler(RandomSampler(Plain()), 4, False)
    ),
    "stream": lambda: DataLoader(Stream(), batch_size=5),
    "stream_workers": lambda: DataLoader(Stream(), batch_size=5, num_workers=2),
    "stream_dict": lambda: DataLoader(Stream(), batch_size=4, collate_fn=as_dict),
    "list_of_batches": lambda: [(features()[k : k + 6],) for k in range(0, N, 6)],
}
STREAMS = {"stream", "stream_workers", "stream_dict", "list_of_batches"}


def tensor_of(batch):
    return batch["x"] if isinstance(batch, dict) else batch[0]


def flat(batch):
    return list(batch.items()) if isinstance(batch, dict) else [type(batch), *batch]


def same(one, other) -> bool:
    return repr(flat(one)) == repr(flat(other))


@pytest.mark.parametrize("name", LOADERS)
def test_rows_name_their_dataset_rows_and_batches_are_untouched(name):
    def state():
        return torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()

    torch.manual_seed(5)
    bare_loader = LOADERS[name]()
    bare = [list(bare_loader), list(bare_loader)]
    bare_state = state()
    model = nn.Linear(I, 2)
    recorder = dualhook.instrument(model, verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    torch.manual_seed(5)
    loader = LOADERS[name]()
    attributes = dict(vars(loader)) if isinstance(loader, DataLoader) else None
    seen = []
    for epoch in range(2):
        tracked = recorder.track(loader)
        batches = []
        for batch in tracked:
            batches.append(batch)
            state_before = torch.get_rng_state()
            optimizer.zero_grad()
            (model(tensor_of(batch)) + 1).square().sum().backward()
            optimizer.step()
            assert torch.equal(state_before, torch.get_rng_state())
        assert all(same(one, other) for one, other in zip(batches, bare[epoch], strict=True))
        seen.append(torch.cat([tensor_of(batch) for batch in batches]))
    assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
               for a, b in zip(state(), bare_state, strict=True))  # fmt: skip
    if attributes is not None:
        assert dict(vars(loader)) == attributes
    memory = recorder.close()
    rows = torch.cat([block.key for block in memory._store.blocks("(model)", last_step=999, block_rows=99)])
    samples = torch.cat([block.sample for block in memory._store.blocks("(model)", last_step=999, block_rows=99)])
    assert torch.equal(rows, torch.cat(seen))
    if name in STREAMS:  # the order of arrival, from 0 in every pass
        assert samples.tolist() == [k for part in seen for k in range(len(part))]
    else:
        assert torch.equal(rows, features()[samples])


def test_tracked_loader_is_the_loader_in_everything_else():
    loader = DataLoader(Plain(), batch_size=5)
    tracked = dualhook.instrument(nn.Linear(I, 2), verbose=False).track(loader)
    assert len(tracked) == len(loader)
    assert tracked.dataset is loader.dataset
    assert tracked.batch_size == 5
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = tracked.nothing_like_it


def test_after_the_loop_no_sample_is_known():
    model = nn.Linear(I, 2)
    recorder = dualhook.instrument(model, verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for (x,) in recorder.track(DataLoader(TensorDataset(features()), batch_size=5)):
        model(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        break
    model(features()[:5]).sum().backward()
    optimizer.step()
    samples = next(recorder.close()._store.blocks("(model)", last_step=9, block_rows=99)).sample
    assert samples.tolist() == [0, 1, 2, 3, 4, -1, -1, -1, -1, -1]


def test_two_passes_over_one_loader_at_once():
    loader = DataLoader(TensorDataset(features()), batch_size=5, shuffle=True)
    recorder = dualhook.instrument(nn.Linear(I, 2), verbose=False)
    outer = iter(recorder.track(loader))
    for _ in range(3):
        (x,) = next(outer)
        inner = iter(recorder.track(loader))
        (y,) = next(inner)
        assert torch.equal(features()[recorder._book.batch.samples], y)
        inner.close()
    (x,) = next(outer)
    assert torch.equal(features()[recorder._book.batch.samples], x)


def test_accumulated_batches_keep_their_own_samples():
    model = nn.Linear(I, 2)
    recorder = dualhook.instrument(model, verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    losses = []
    for (x,) in recorder.track(DataLoader(TensorDataset(features()), batch_size=5, shuffle=True)):
        losses.append((model(x) + 1).square().sum())  # backward comes later, for all of them
    sum(losses).backward()
    optimizer.step()
    rows = next(recorder.close()._store.blocks("(model)", last_step=9, block_rows=99))
    assert torch.equal(rows.key, features()[rows.sample])
    assert sorted(rows.sample.tolist()) == list(range(N))


def test_batches_with_positions():
    model = nn.Linear(I, 2)
    recorder = dualhook.instrument(model, verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    x = torch.randn(3, 2, 5, I)
    with recorder.batch(samples=[7, 9, 8]):
        (model(x) + 1).square().sum().backward()
    optimizer.step()
    rows = next(recorder.close()._store.blocks("(model)", last_step=9, block_rows=99))
    assert rows.sample.tolist() == [7] * 10 + [9] * 10 + [8] * 10
    assert rows.position.tolist() == list(range(10)) * 3
    assert torch.equal(rows.key, x.reshape(-1, I))


def test_rows_that_do_not_match_the_batch_have_no_sample():
    model = nn.Linear(I, 2)
    recorder = dualhook.instrument(model, verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    recorder.batch(samples=[7, 9, 8])
    (model(torch.randn(6, I)) + 1).square().sum().backward()
    optimizer.step()
    rows = next(recorder.close()._store.blocks("(model)", last_step=9, block_rows=99))
    assert rows.sample.tolist() == [-1] * 6


def test_a_loader_that_changes_between_passes_is_followed():
    loader = DataLoader(Plain(), batch_size=5, collate_fn=as_list)
    recorder = dualhook.instrument(nn.Linear(I, 2), verbose=False)
    assert isinstance(next(iter(recorder.track(loader))), list)
    loader.collate_fn = as_dict
    assert isinstance(next(iter(recorder.track(loader))), dict)
    assert recorder._book.batch is None


@pytest.mark.parametrize("every", [1, 2])
def test_loaders_that_iterate_in_their_own_way_are_said(every):
    class Own(DataLoader):
        def __iter__(self):
            for number, batch in enumerate(super().__iter__()):
                if number % every == 0:
                    yield batch

    recorder = dualhook.instrument(nn.Linear(I, 2), verbose=False)
    with pytest.warns(UserWarning, match="Own iterates in a way of its own: patterns get no sample"):
        batches = list(recorder.track(Own(Plain(), batch_size=5)))
    assert len(batches) == -(-8 // every)


def test_samplers_that_draw_arrays():
    class Arrays:
        def __iter__(self):
            yield from (np.arange(k, k + 5) for k in range(0, 35, 5))

        def __len__(self):
            return 7

    recorder = dualhook.instrument(nn.Linear(I, 2), verbose=False)
    for number, _ in enumerate(recorder.track(DataLoader(Plain(), batch_sampler=Arrays()))):
        assert recorder._book.batch.samples.tolist() == list(range(5 * number, 5 * number + 5))


def test_copies_of_a_tracked_loader():
    tracked = dualhook.instrument(nn.Linear(I, 2), verbose=False).track(DataLoader(Plain(), batch_size=5))
    assert len(copy.copy(tracked)) == 8


def test_nested_batches_come_back():
    recorder = dualhook.instrument(nn.Linear(I, 2), verbose=False)
    with recorder.batch(samples=[1]):
        with recorder.batch(samples=[2], task=3):
            assert recorder._book.batch.columns["task"].tolist() == [3]
        assert recorder._book.batch.samples.tolist() == [1]
    assert recorder._book.batch is None
    recorder.batch([4, 5])
    assert recorder._book.batch.samples.tolist() == [4, 5]


@pytest.mark.parametrize(
    ("samples", "columns", "words"),
    [
        ([[1, 2]], {}, r"samples= of shape \[1, 2\]"),
        ([0.5], {}, "expected the dataset row of every sample"),
        (["a"], {}, "samples= of type list: expected the dataset row"),
        (None, {}, "samples= of type NoneType: expected the dataset row"),
        ([-3, 2], {}, "samples= with the number -3: expected the dataset row"),
        ([1, 2], {"step": [1, 2]}, "column 'step' is recorded with every pattern anyway"),
        ([1, 2], {"task": [1, 2, 3]}, r"column 'task' has shape \[3\]: expected one value for each of the batch's 2"),
        (
            [1, 2],
            {"name": ["a", "b"]},
            "column 'name': expected one number per sample; put texts into memory.add_column",
        ),
    ],
)
def test_batches_that_make_no_sense(samples, columns, words):
    recorder = dualhook.instrument(nn.Linear(I, 2), verbose=False)
    with pytest.raises(dualhook.DualHookError, match=words):
        recorder.batch(samples=samples, **columns)


def test_a_loader_without_order_is_said():
    loader = DataLoader(Plain(), batch_size=5, num_workers=1)
    loader.in_order = False  # the argument came with torch 2.6
    recorder = dualhook.instrument(nn.Linear(I, 2), verbose=False)
    with pytest.warns(UserWarning, match="in_order=False"):
        for _ in recorder.track(loader):
            assert recorder._book.batch is None
