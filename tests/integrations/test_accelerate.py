"""A loop written with accelerate needs nothing but ``instrument``, and ``track`` on the prepared loader."""

from __future__ import annotations

import pytest
import torch
from numbered import I, N, Plain, Stream, features
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import dualhook

accelerate = pytest.importorskip("accelerate")
state = pytest.importorskip("accelerate.state")


@pytest.fixture(autouse=True)
def _no_state_of_other_tests():
    state.AcceleratorState._reset_state(reset_partial_state=True)
    state.GradientState._reset_state()
    yield
    state.AcceleratorState._reset_state(reset_partial_state=True)
    state.GradientState._reset_state()


LOADERS = {
    "plain": lambda: DataLoader(Plain(), batch_size=5),
    "shuffled": lambda: DataLoader(Plain(), batch_size=5, shuffle=True),
    "drop_last": lambda: DataLoader(Plain(), batch_size=5, shuffle=True, drop_last=True),
    "workers": lambda: DataLoader(Plain(), batch_size=4, shuffle=True, num_workers=2),
    "persistent": lambda: DataLoader(Plain(), batch_size=5, shuffle=True, num_workers=2, persistent_workers=True),
    "stream": lambda: DataLoader(Stream(), batch_size=5),
    "stream_workers": lambda: DataLoader(Stream(), batch_size=5, num_workers=1),
    "one_batch": lambda: DataLoader(Plain(), batch_size=N, shuffle=True),
}
WAYS = {
    "as it is": {},
    "accumulating": {"gradient_accumulation_steps": 3},
    "bf16": {"mixed_precision": "bf16"},
    "uneven": {"even_batches": False},
    "dispatched": {"dispatch_batches": True},
    "split": {"split_batches": True},
    "seedable": {"use_seedable_sampler": True},
}


DATA = {"even_batches", "dispatch_batches", "split_batches", "use_seedable_sampler"}


def train(make_loader, *, record, skipped=0, when="prepared", **ways):
    """Two epochs, the first one without its ``skipped`` batches; what accelerate's own examples do."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(I, 6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 3))
    recorder = dualhook.instrument(model, verbose=False) if record and when == "before" else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.7)
    data = {name: ways.pop(name) for name in list(ways) if name in DATA}
    accelerator = accelerate.Accelerator(
        cpu=True, dataloader_config=accelerate.DataLoaderConfiguration(**data), **ways
    )  # fmt: skip
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, make_loader(), scheduler)
    if record and recorder is None:
        recorder = dualhook.instrument(model, verbose=False)
    seen, flags = [], []
    for epoch in range(2):
        current = accelerate.skip_first_batches(loader, skipped) if skipped and not epoch else loader
        for x, y in recorder.track(current) if record else current:
            seen.append(x)
            with accelerator.accumulate(model):
                accelerator.backward(F.cross_entropy(model(x), y))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            flags.append((accelerator.sync_gradients, current.end_of_dataloader, current.remainder, current.iteration))
    return model, seen, flags, torch.get_rng_state(), recorder and recorder.close()


def check(make_loader, **ways):
    bare, recorded = (train(make_loader, record=record, **ways) for record in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(bare[0].parameters(), recorded[0].parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(bare[1], recorded[1], strict=True))
    assert bare[2] == recorded[2]
    assert torch.equal(bare[3], recorded[3])
    memory = recorded[4]
    blocks = list(memory._store.blocks("0", last_step=10**6, block_rows=10**6))
    keys, samples = torch.cat([block.key for block in blocks]), torch.cat([block.sample for block in blocks])
    seen = torch.cat(recorded[1])
    assert torch.equal(keys, seen.to(keys.dtype))
    assert torch.equal(seen, features()[samples])
    assert memory.verify().max_error < (1e-2 if keys.dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("way", ["accumulating", "dispatched"])
@pytest.mark.filterwarnings("error")
def test_rows_name_their_dataset_rows_and_training_is_untouched(name, way):
    check(LOADERS[name], **WAYS[way])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("when", ["before", "prepared"])
def test_ways_of_training(way, when):
    check(LOADERS["shuffled"], when=when, **WAYS[way])


@pytest.mark.parametrize("name", ["shuffled", "workers", "stream"])
@pytest.mark.parametrize("way", ["as it is", "dispatched"])
def test_skipped_batches_are_skipped(name, way):
    check(LOADERS[name], skipped=2, **WAYS[way])


def test_the_loader_is_left_as_it_was():
    accelerator = accelerate.Accelerator(cpu=True)
    loader = accelerator.prepare(LOADERS["shuffled"]())
    next(iter(loader))  # sets attributes of its own
    before = dict(vars(loader)), dict(vars(loader.base_dataloader))
    recorder = dualhook.instrument(nn.Linear(I, 2), verbose=False)
    for batch in recorder.track(loader):
        assert torch.equal(features()[recorder._book.batch.samples], batch[0])
        break
    assert recorder._book.batch is None
    assert dict(vars(loader)) == before[0]
    assert dict(vars(loader.base_dataloader)) == before[1]
