"""Lightning's own Trainer, with the callback and without: the same training, and rows that name their dataset rows."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from dualhook.integrations.lightning import DualMemoryCallback
from numbered import I, N, Plain, Stream, features
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, WeightedRandomSampler

import dualhook

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),  # few workers, no validation, few logged batches
    pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
]


class Lengthless:
    """A batch sampler of no length: Lightning fetches one batch ahead."""

    def __iter__(self):
        yield from torch.randperm(N).split(5)


class Gaps:
    """What makes some batches None, which Lightning passes over."""

    def __call__(self, items):
        return None if items[0][1] == 1 else torch.utils.data.default_collate(items)


def module(package=pl, base=None, **changed):
    class Net(base or package.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            # no dead unit: a row without output gradient is no pattern
            self.net = nn.Sequential(nn.Linear(I, 6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 3))
            self.seen = []  # inputs of the training steps

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            x, y = batch
            self.seen.append(x)
            return F.cross_entropy(self(x), y)

        def validation_step(self, batch, batch_idx):
            self.log("loss", F.cross_entropy(self(batch[0]), batch[1]))

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    for name, value in changed.items():
        setattr(Net, name, value)
    return Net()


def trainer(tmp_path, *callbacks, package=pl, **settings):
    settings = {"max_epochs": 2, "enable_checkpointing": False, "log_every_n_steps": 1, **settings}
    return package.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, callbacks=list(callbacks), **settings,
    )  # fmt: skip


def fit(tmp_path, make_loader, *, record, make_module=module, validate=False, package=pl, **settings):
    torch.manual_seed(3)
    model = make_module()
    callback = DualMemoryCallback(tmp_path / "memory", verbose=False)
    runner = trainer(tmp_path, *([callback] if record else []), package=package, **settings)
    runner.fit(model, make_loader(), DataLoader(Plain(), batch_size=7) if validate else None)
    return model, callback, torch.get_rng_state(), runner


def rows_of(memory, layer="net.0"):
    blocks = list(memory._store.blocks(layer, last_step=10**6, block_rows=10**6))
    return torch.cat([block.key for block in blocks]), torch.cat([block.sample for block in blocks])


def same_training(bare, recorded):
    assert all(torch.equal(a, b) for a, b in zip(bare[0].parameters(), recorded[0].parameters(), strict=True))
    assert torch.equal(bare[2], recorded[2])
    assert all(torch.equal(a, b) for a, b in zip(bare[0].seen, recorded[0].seen, strict=True))


LOADERS = {
    "plain": lambda: DataLoader(Plain(), batch_size=5),
    "shuffled": lambda: DataLoader(Plain(), batch_size=5, shuffle=True, drop_last=True),
    "workers": lambda: DataLoader(Plain(), batch_size=4, shuffle=True, num_workers=2, prefetch_factor=3),
    "persistent": lambda: DataLoader(Plain(), batch_size=5, shuffle=True, num_workers=2, persistent_workers=True),
    "sampler": lambda: DataLoader(Plain(), batch_size=5, sampler=WeightedRandomSampler(torch.rand(N), 20)),
    "named": lambda: {"only": DataLoader(Plain(), batch_size=5, shuffle=True)},
    "lengthless": lambda: DataLoader(Plain(), batch_sampler=Lengthless()),
    "gaps": lambda: DataLoader(Plain(), batch_size=2, shuffle=True, collate_fn=Gaps()),
}


@pytest.mark.parametrize("name", LOADERS)
def test_rows_name_their_dataset_rows_and_training_is_untouched(name, tmp_path):
    def make_module():
        model = module()
        if name == "named":
            inner = type(model).training_step
            type(model).training_step = lambda self, batch, batch_idx: inner(self, batch["only"], batch_idx)
        return model

    runs = [fit(tmp_path, LOADERS[name], record=record, make_module=make_module) for record in (False, True)]
    same_training(*runs)
    model, callback, _, runner = runs[1]
    keys, samples = rows_of(callback.memory)
    assert torch.equal(keys, torch.cat(model.seen))
    assert torch.equal(keys, features()[samples])
    assert callback.memory.verify().max_error < 1e-5
    assert "process_dataloader" not in vars(runner.strategy)


def test_streams_are_counted_in_order_of_arrival(tmp_path):
    runs = [
        fit(tmp_path, lambda: DataLoader(Stream(), batch_size=5), record=record, limit_train_batches=4)
        for record in (False, True)
    ]
    same_training(*runs)
    assert rows_of(runs[1][1].memory)[1].tolist() == [*range(20), *range(20)]


def manual(self, batch, batch_idx):
    self.seen.append(batch[0])
    optimizer = self.optimizers()
    for _ in range(2):  # two steps on one batch
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
        optimizer.step()


def by_submodule(self, batch, batch_idx):
    self.seen.append(batch[0])
    return F.cross_entropy(self.net(batch[0]), batch[1])


WAYS = {
    "accumulation": {"accumulate_grad_batches": 3},
    "clipping": {"gradient_clip_val": 0.05},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "max_steps": {"max_steps": 7, "max_epochs": None},
    "validation": {"validate": True, "val_check_interval": 2, "accumulate_grad_batches": 3},
    "reloading": {"reload_dataloaders_every_n_epochs": 1},
    "submodule": {"make_module": lambda: module(training_step=by_submodule)},
    "manual": {"make_module": lambda: module(training_step=manual, automatic_optimization=False)},
}


@pytest.mark.parametrize("name", WAYS)
def test_ways_of_training(name, tmp_path):
    runs = [fit(tmp_path, LOADERS["shuffled"], record=record, **WAYS[name]) for record in (False, True)]
    same_training(*runs)
    model, callback, _, runner = runs[1]
    keys, samples = rows_of(callback.memory)
    seen = torch.cat([x for x in model.seen for _ in range(1 + (name == "manual"))])
    assert torch.equal(keys, seen.to(keys.dtype))
    assert torch.equal(seen, features()[samples])
    assert callback.memory.verify().max_error < (1e-2 if name == "bf16-mixed" else 1e-5)
    assert callback.recorder.steps == runner.global_step
    assert runner.callback_metrics["dualhook/rows"] == callback.recorder.rows == 2 * len(seen)
    assert runner.callback_metrics["dualhook/bytes"] > 0


def test_a_list_of_loaders_has_no_sample(tmp_path):
    def training_step(self, batch, batch_idx):
        return sum(F.cross_entropy(self(x), y) for x, y in batch)

    with pytest.warns(UserWarning, match="2 training loaders at once: patterns get no sample") as caught:
        _, callback, _, _ = fit(
            tmp_path,
            lambda: [DataLoader(Plain(), batch_size=5), DataLoader(Plain(), batch_size=4)],
            record=True,
            make_module=lambda: module(training_step=training_step),
        )
    assert sum("no sample" in str(one.message) for one in caught) == 1
    assert set(rows_of(callback.memory)[1].tolist()) == {-1}


def test_a_step_that_fetches_its_batches_itself_has_no_sample(tmp_path):
    def training_step(self, dataloader_iter):
        (x, y), _, _ = next(dataloader_iter)
        return F.cross_entropy(self(x), y)

    with pytest.warns(UserWarning, match="fetches its batches itself"):
        _, callback, _, _ = fit(
            tmp_path, LOADERS["plain"], record=True, make_module=lambda: module(training_step=training_step)
        )
    assert set(rows_of(callback.memory)[1].tolist()) == {-1}


class Backwards(DataLoader):
    def __iter__(self):
        return iter(list(super().__iter__())[::-1])


@pytest.mark.parametrize(
    ("make_loader", "why"),
    [
        (lambda: Backwards(Plain(), batch_size=5), "Backwards iterates in a way of its own"),
        (lambda: DataLoader(Plain(), batch_size=5, num_workers=2, in_order=False), "in_order=False"),
    ],
)
def test_loaders_that_cannot_be_followed_have_no_sample(make_loader, why, tmp_path):
    with pytest.warns(UserWarning, match=why):
        _, callback, _, _ = fit(tmp_path, make_loader, record=True)
    assert set(rows_of(callback.memory)[1].tolist()) == {-1}


def test_a_second_pass_over_the_loader_while_training(tmp_path):
    def on_train_batch_end(self, outputs, batch, batch_idx):
        if batch_idx == 1:
            next(iter(self.trainer.train_dataloader))

    _, callback, _, _ = fit(
        tmp_path,
        LOADERS["shuffled"],
        record=True,
        make_module=lambda: module(on_train_batch_end=on_train_batch_end),
    )
    keys, samples = rows_of(callback.memory)
    assert torch.equal(keys, features()[samples])


class StopError(Exception):
    pass


def test_after_an_exception_what_was_recorded_is_a_memory(tmp_path):
    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == 3:
            raise StopError

    model = module(on_train_batch_start=on_train_batch_start)
    callback = DualMemoryCallback(tmp_path / "memory", verbose=False)
    runner = trainer(tmp_path, callback)
    with pytest.raises(StopError):
        runner.fit(model, LOADERS["plain"]())
    assert callback.recorder.steps == 3
    assert callback.memory.verify().max_error < 1e-5
    assert torch.equal(rows_of(callback.memory)[0], torch.cat(model.seen))
    assert "process_dataloader" not in vars(runner.strategy)
    assert not any(one._forward_hooks for one in model.modules())


def test_everything_is_on_disk_at_checkpoints_and_validations(tmp_path):
    found = []

    class Look(pl.Callback):
        def on_validation_end(self, trainer, pl_module):
            if not trainer.sanity_checking:
                found.append(dualhook.load(tmp_path / "memory").steps)

    torch.manual_seed(3)
    callback = DualMemoryCallback(tmp_path / "memory", verbose=False)
    runner = trainer(tmp_path, callback, Look(), max_epochs=1, enable_checkpointing=True)
    runner.fit(module(), LOADERS["shuffled"](), DataLoader(Plain(), batch_size=7))
    assert found == [4]
    saved = torch.load(runner.checkpoint_callback.best_model_path, weights_only=False)
    assert torch.allclose(callback.memory.weight("net.0"), saved["state_dict"]["net.0.weight"])


@pytest.mark.parametrize("saved_at", [8, 6], ids=["within an epoch", "between epochs"])
def test_going_on_from_a_checkpoint_is_recorded_from_there(saved_at, tmp_path):
    torch.manual_seed(3)
    saving = pl.callbacks.ModelCheckpoint(tmp_path, filename="last", every_n_train_steps=saved_at)
    trainer(tmp_path, saving, enable_checkpointing=True, max_steps=8).fit(module(), LOADERS["workers"]())
    callback = DualMemoryCallback(tmp_path / "memory", verbose=False)
    model = module()
    trainer(tmp_path, callback, max_epochs=3).fit(model, LOADERS["workers"](), ckpt_path=tmp_path / "last.ckpt")
    keys, samples = rows_of(callback.memory)
    assert torch.equal(keys, torch.cat(model.seen))
    assert torch.equal(keys, features()[samples])
    assert callback.memory.verify().max_error < 1e-5


@pytest.mark.parametrize("saved_at", [8, 6], ids=["within an epoch", "between epochs"])
def test_a_fit_that_goes_on_from_a_checkpoint_goes_on_with_its_memory(saved_at, tmp_path):
    """Cut off two steps after the checkpoint: of the first fit counts what was there by then."""
    saving = pl.callbacks.ModelCheckpoint(tmp_path, filename="last", every_n_train_steps=saved_at)
    torch.manual_seed(3)
    first = DualMemoryCallback(tmp_path / "memory", verbose=False)
    stop = {"enable_checkpointing": True, "max_steps": saved_at + 2}
    trainer(tmp_path, first, saving, **stop).fit(module(), LOADERS["workers"]())
    assert first.memory.steps == saved_at + 2
    kept = list(first.memory._store.blocks("net.0", last_step=saved_at, block_rows=10**6))
    callback, model = DualMemoryCallback(tmp_path / "memory", verbose=False), module()
    trainer(tmp_path, callback, max_epochs=3).fit(model, LOADERS["workers"](), ckpt_path=tmp_path / "last.ckpt")
    keys, samples = rows_of(callback.memory)
    assert torch.equal(keys, torch.cat([*(rows.key for rows in kept), *model.seen]))
    assert torch.equal(keys, features()[samples])
    assert callback.memory.verify(model)["exact"].all()


def test_two_fits_with_one_callback(tmp_path):
    callback = DualMemoryCallback(tmp_path / "memory", verbose=False)
    trainer(tmp_path, callback).fit(module(), LOADERS["plain"]())
    with pytest.raises(dualhook.DualHookError, match="give each fit a callback or a path of its own"):
        trainer(tmp_path, callback).fit(module(), LOADERS["plain"]())
    assert callback.memory.verify().max_error < 1e-5
    callback.path = tmp_path / "other"
    trainer(tmp_path, callback).fit(module(), LOADERS["plain"]())
    callback.overwrite = True
    trainer(tmp_path, callback, max_epochs=1).fit(module(), LOADERS["plain"]())
    assert dualhook.load(tmp_path / "other").steps == 5
    assert dualhook.load(tmp_path / "memory").steps == 10
    with pytest.raises(dualhook.DualHookError, match="holds a memory"):
        trainer(tmp_path, DualMemoryCallback(tmp_path / "memory")).fit(module(), LOADERS["plain"]())


def test_without_a_path_the_memory_goes_with_the_callback(tmp_path):
    callback = DualMemoryCallback(verbose=False)
    trainer(tmp_path, callback).fit(module(), LOADERS["plain"]())
    first = callback.memory
    trainer(tmp_path, callback).fit(module(), LOADERS["plain"]())
    assert first.path != callback.memory.path
    assert first.verify().max_error < 1e-5


def test_the_older_name_of_the_package(tmp_path):
    older = pytest.importorskip("pytorch_lightning")
    _, callback, _, _ = fit(
        tmp_path, LOADERS["shuffled"], record=True, make_module=lambda: module(older), package=older, validate=True
    )
    keys, samples = rows_of(callback.memory)
    assert torch.equal(keys, features()[samples])
