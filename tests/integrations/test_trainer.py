"""The real Trainer with the callback: identity, dataset rows, resume, and training that is bit-identical without it."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from dualhook.integrations.transformers import DualMemoryCallback
from torch.utils.data import IterableDataset
from trainers import ROWS, WAYS, Sentences, Way, arguments, embeddings, gpt2, raw_rows, trainer_of
from transformers import Trainer

import dualhook


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Callable[[str], tuple[Trainer, Trainer, DualMemoryCallback]]:
    """A way's run without the callback and with it, each made once."""
    known: dict[str, tuple[Trainer, Trainer, DualMemoryCallback]] = {}

    def run(name: str) -> tuple[Trainer, Trainer, DualMemoryCallback]:
        if name not in known:
            folder = tmp_path_factory.mktemp(name)
            bare = trainer_of(folder / "bare", WAYS[name], [])
            bare.train()
            callback = DualMemoryCallback(folder / "memory", layers="all", verbose=False)
            recorded = trainer_of(folder / "recorded", WAYS[name], [callback])
            recorded.train()
            known[name] = bare, recorded, callback
        return known[name]

    return run


@pytest.mark.parametrize("name", WAYS)
class TestEveryWay:
    def test_training_is_what_it_was(self, runs, name):
        bare, recorded, _ = runs(name)
        for (parameter, one), two in zip(
            bare.model.state_dict().items(), recorded.model.state_dict().values(), strict=True
        ):
            assert torch.equal(one, two), parameter
        assert [log.get("loss") for log in bare.state.log_history] == [
            log.get("loss") for log in recorded.state.log_history
        ]

    def test_the_weights_are_rebuilt(self, runs, name):
        _, recorded, callback = runs(name)
        report = callback.memory.verify(recorded.model)
        assert callback.memory.steps == recorded.state.global_step
        assert report.max_error < WAYS[name].tolerance
        assert not any(report["inexact_steps"])

    def test_every_row_is_of_the_dataset_row_it_names(self, runs, name):
        _, _, callback = runs(name)
        memory, dataset = callback.memory, Sentences()
        embedding = next(n for n in ("transformer.wte", "model.embed_tokens", "shared") if n in embeddings(memory))
        per_row = np.zeros(ROWS)
        for rows in raw_rows(memory, embedding):
            assert bool((rows["sample"] >= 0).all())
            expected = dataset.ids[rows["sample"], rows["position"]]
            if name.startswith("t5"):  # the decoder reads the labels shifted; the encoder the ids
                shifted = torch.where(rows["position"] > 0, dataset.ids[rows["sample"], rows["position"] - 1], 0)
                assert bool(((rows["slot"] == expected) | (rows["slot"] == shifted)).all())
            else:
                assert torch.equal(rows["slot"].long(), expected)
            per_row += np.bincount(rows["sample"].numpy(), minlength=ROWS)
        dropped = ROWS % 4 * 2 if name == "drop-last" else 0
        assert (per_row > 0).sum() >= ROWS - dropped


@pytest.mark.parametrize("name", ["wide-head", "wide-head-bf16"])
def test_a_wide_head_is_computed_again(runs, name):
    _, recorded, callback = runs(name)
    rows = [segment.stored(callback.memory._spec("lm_head")) for segment in callback.memory._store.segments]
    assert ["softmax/target" in stored.tensors for stored in rows] == [
        False,
        True,
    ]  # the first step has not counted yet
    assert len(rows[-1].tensors["weight_step"]) == recorded.state.global_step - 1


@pytest.mark.parametrize(
    ("name", "workers", "accumulated"), [("gpt2", 0, 1), ("gpt2", 2, 3), ("llama-sgd", 0, 3), ("llama-sgd", 1, 1)]
)
def test_a_resumed_training_leaves_the_memory_of_an_uninterrupted_one(tmp_path, name, workers, accumulated):
    """Checkpoints every 3 steps, in the middle of an epoch too; cut off in step 5, the run goes on from the third.

    An epoch has six steps, or two.
    """
    settings = {
        "dataloader_num_workers": workers, "gradient_accumulation_steps": accumulated, "save_strategy": "steps",
        "save_steps": 3, "max_steps": 8,
    }  # fmt: skip

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise KeyboardInterrupt

    whole = DualMemoryCallback(tmp_path / "whole", layers="all", verbose=False)
    expected = trainer_of(tmp_path / "a", WAYS[name], [whole], **settings)
    expected.train()
    broken = trainer_of(
        tmp_path / "b",
        WAYS[name],
        [DualMemoryCallback(tmp_path / "cut", layers="all", verbose=False), Stop()],
        **settings,
    )
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    del broken
    callback = DualMemoryCallback(tmp_path / "cut", layers="all", verbose=False)
    resumed = trainer_of(tmp_path / "b", WAYS[name], [callback], **settings)
    resumed.train(resume_from_checkpoint=True)
    for one, two in zip(expected.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, two)
    memory = callback.memory
    assert memory.steps == whole.memory.steps == expected.state.global_step
    assert not any(memory.verify(resumed.model)["inexact_steps"])
    assert memory.verify(resumed.model).max_error < 1e-5
    for layer in memory.layers:
        for field_ in ("sample", "position", "step", "key"):
            own, other = (
                torch.cat([getattr(rows, field_) for rows in m._store.blocks(layer, last_step=99, block_rows=10**6)])
                for m in (memory, whole.memory)
            )
            assert torch.equal(own, other), (layer, field_)


def test_the_logs_show_what_is_recorded(runs):
    _, recorded, callback = runs("gpt2")
    logs = [log for log in recorded.state.log_history if "loss" in log]
    assert [log["dualhook_rows"] for log in logs] == sorted({log["dualhook_rows"] for log in logs})
    assert logs[-1]["dualhook_rows"] == callback.recorder.rows
    assert 0 < logs[0]["dualhook_bytes"] < callback.recorder.nbytes + 1
    assert all(log["dualhook_bytes_per_second"] > 0 for log in logs)


def test_the_best_model_that_is_loaded_at_the_end_is_not_the_last_step(tmp_path):
    callback = DualMemoryCallback(tmp_path / "memory", verbose=False)
    settings = {
        "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2,
        "load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True,
    }  # fmt: skip
    trainer = trainer_of(tmp_path / "out", WAYS["gpt2"], [callback], **settings)
    trainer.train()
    assert callback.memory.verify()["exact"].all()
    best = int(trainer.state.best_model_checkpoint.rpartition("-")[2])
    assert best < trainer.state.global_step
    assert callback.memory.verify(trainer.model, step=best).max_error < 1e-5


def test_torch_compile(tmp_path):
    torch._dynamo.reset()
    callback = DualMemoryCallback(tmp_path / "memory", layers="all", verbose=False)
    settings = {
        "torch_compile": True,
        "torch_compile_backend": "aot_eager",
        "max_steps": 4,
        "gradient_accumulation_steps": 2,
        "tf32": False if torch.cuda.is_available() else None,
    }
    way = Way(partial(gpt2, blocks=1))
    trainer = trainer_of(tmp_path / "out", way, [callback], Sentences(padded=False), **settings)
    if torch.cuda.is_available():  # both libraries turn TF32 on where they compile, for good
        torch.backends.cuda.matmul.allow_tf32 = False
    trainer.train()
    assert callback.memory.verify(trainer.model)["exact"].all()
    ids = Sentences(padded=False).ids
    for rows in raw_rows(callback.memory, "transformer.wte"):
        assert torch.equal(rows["slot"].long(), ids[rows["sample"], rows["position"]])
    torch._dynamo.reset()


class Stream(IterableDataset[dict[str, Any]]):
    def __iter__(self):
        return iter([Sentences()[k] for k in range(ROWS)])


def test_the_rows_of_a_stream_are_numbered_in_the_order_of_their_arrival(tmp_path):
    callback = DualMemoryCallback(tmp_path / "memory", layers="all", verbose=False)
    settings = {"max_steps": 5, "accelerator_config": {"dispatch_batches": False}}
    trainer_of(tmp_path / "out", WAYS["gpt2"], [callback], Stream(), **settings).train()
    ids = Sentences().ids
    for rows in raw_rows(callback.memory, "transformer.wte"):
        assert torch.equal(rows["slot"].long(), ids[rows["sample"], rows["position"]])
        assert rows["sample"].unique().tolist() == list(range(20))


class TestBadInput:
    def test_a_callback_is_for_one_training(self, tmp_path):
        callback = DualMemoryCallback(tmp_path / "memory", verbose=False)
        trainer = trainer_of(tmp_path / "out", WAYS["gpt2"], [callback], max_steps=1)
        trainer.train()
        with pytest.raises(dualhook.DualHookError, match="has recorded a training at .* already"):
            trainer.train()
        with pytest.raises(dualhook.DualHookError, match="already holds a memory"):
            trainer_of(tmp_path / "o", WAYS["gpt2"], [DualMemoryCallback(callback.path, verbose=False)]).train()
        other = DualMemoryCallback(callback.path, overwrite=True, verbose=False)
        trainer_of(tmp_path / "o", WAYS["gpt2"], [other], max_steps=2).train()
        assert other.memory.steps == 2
        trainer_of(tmp_path / "o", WAYS["gpt2"], [other], max_steps=3).train()
        assert other.memory.steps == 3

    def test_a_training_that_an_exception_has_ended_may_begin_again(self, tmp_path):
        class Stop(transformers.TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if args.max_steps == 3:
                    raise KeyboardInterrupt

        callback = DualMemoryCallback(tmp_path / "memory", overwrite=True, verbose=False)
        trainer = trainer_of(tmp_path / "o", WAYS["gpt2"], [callback, Stop()], max_steps=3)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        trainer.args.max_steps = 4
        trainer.train()
        assert callback.memory.steps == 4
        assert callback.memory.verify()["exact"].all()

    def test_a_model_that_is_instrumented_already(self, tmp_path):
        trainer = trainer_of(tmp_path / "out", WAYS["gpt2"], [DualMemoryCallback(tmp_path / "m", verbose=False)])
        recorder = dualhook.instrument(trainer.model, verbose=False)
        with pytest.raises(dualhook.DualHookError, match="already instrumented"):
            trainer.train()
        recorder.discard()

    def test_nothing_is_there_before_and_while_training_runs(self, tmp_path):
        callback = DualMemoryCallback(tmp_path / "m", verbose=False)
        with pytest.raises(dualhook.DualHookError, match="nothing is recorded yet"):
            _ = callback.recorder
        with pytest.raises(dualhook.DualHookError, match="training is not over"):
            _ = callback.memory

    def checkpoint(self, tmp_path, model="gpt2"):
        callback = DualMemoryCallback(tmp_path / "memory", verbose=False)
        settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
        trainer_of(tmp_path / "out", WAYS[model], [callback], **settings).train()
        return settings | {"max_steps": 6}

    def test_a_checkpoint_without_its_memory_begins_a_new_one(self, tmp_path):
        settings = self.checkpoint(tmp_path)
        callback = DualMemoryCallback(tmp_path / "elsewhere", verbose=False)
        with pytest.warns(UserWarning, match="holds no memory: what comes from here on is recorded"):
            trainer_of(tmp_path / "out", WAYS["gpt2"], [callback], **settings).train(resume_from_checkpoint=True)
        assert callback.memory.steps == 2
        assert callback.memory.verify()["exact"].all()

    def test_a_memory_of_another_run_is_refused(self, tmp_path):
        settings = self.checkpoint(tmp_path)
        (tmp_path / "memory" / "trainer.json").write_text(json.dumps({"7": 3}))
        with pytest.raises(dualhook.DualHookError, match="knows of no checkpoint of step 4, only of 7"):
            self.resume(tmp_path, settings)
        (tmp_path / "memory" / "trainer.json").write_text(json.dumps({"4": 2}))
        with pytest.raises(dualhook.DualHookError, match="off by .* of its norm"):
            self.resume(tmp_path, settings)

    def resume(self, tmp_path, settings):
        callback = DualMemoryCallback(tmp_path / "memory", verbose=False)
        trainer_of(tmp_path / "out", WAYS["gpt2"], [callback], **settings).train(resume_from_checkpoint=True)

    def test_a_loader_that_accelerate_has_not_prepared_costs_the_samples_only(self, tmp_path):
        class Plain(Trainer):
            def get_train_dataloader(self):
                return torch.utils.data.DataLoader(self.train_dataset, 4, collate_fn=transformers.default_data_collator)

        torch.manual_seed(0)
        callback = DualMemoryCallback(tmp_path / "memory", verbose=False)
        settings = arguments(tmp_path / "out", WAYS["gpt2"], max_steps=2)
        trainer = Plain(gpt2(), settings, train_dataset=Sentences(), callbacks=[callback])
        with pytest.warns(UserWarning, match="none that accelerate has prepared"):
            trainer.train()
        assert callback.memory.samples.tolist() == []
        assert callback.memory.verify()["exact"].all()

    def test_a_collator_that_returns_no_mapping_costs_the_samples_only(self, tmp_path):
        class Tuples(Trainer):
            def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                return model(input_ids=inputs[0], labels=inputs[1]).loss

            def _get_num_items_in_batch(self, batch_samples, device):
                return None

            def floating_point_ops(self, inputs):
                return 0

            def _track_num_input_tokens(self, inputs):
                return None

        torch.manual_seed(0)
        callback = DualMemoryCallback(tmp_path / "memory", verbose=False)
        trainer = Tuples(
            gpt2(), arguments(tmp_path / "out", WAYS["gpt2"], max_steps=2), train_dataset=Sentences(padded=False),
            data_collator=lambda items: tuple(torch.stack([i[k] for i in items]) for k in ("input_ids", "labels")),
            callbacks=[callback],
        )  # fmt: skip
        with pytest.warns(UserWarning, match="do not tell which rows"):
            trainer.train()
        assert callback.memory.samples.tolist() == []
        assert callback.memory.verify()["exact"].all()
