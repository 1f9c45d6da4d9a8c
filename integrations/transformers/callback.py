"""A callback that records what a Trainer trains."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from dualhook.integrations.transformers.rows import RowTape
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dualhook import DualHookError, DualMemory, Recorder, instrument, load

__all__ = ["DualMemoryCallback"]

CHECKPOINTS = "trainer.json"  # beside the memory: which of its steps each checkpoint of the Trainer stands for


class DualMemoryCallback(TrainerCallback):
    """Records the dual memory of a model while a Hugging Face ``Trainer`` trains it.

    .. code-block:: python

        trainer = Trainer(model, args, train_dataset=dataset, callbacks=[DualMemoryCallback("runs/lm")])
        trainer.train()
        memory = dualhook.load("runs/lm")

    Every pattern knows its row of the training data set (of a stream: its place in the order of arrival). The memory is
    on disk up to every checkpoint and evaluation, and ``trainer.train(resume_from_checkpoint=...)`` goes on with it.
    The Trainer's logs show ``dualhook_rows``, ``dualhook_bytes`` and ``dualhook_bytes_per_second``.

    Args:
        path: directory of the memory.
        layers: which layers, as ``dualhook.instrument`` takes them; by default all that are linear, the head of a
            language model included.
        dtype: dtype of the stored rows, or of those of some layers; default the one they were computed in.
        max_bytes: budget on disk; default half of what is free there.
        on_full: ``"fold"``, ``"stop"`` or ``"error"`` beyond the budget.
        on_error: when recording fails, ``"warn"`` lets training go on, ``"raise"`` stops both.
        head_grads: how output gradients as wide as the vocabulary are kept, as ``dualhook.instrument`` takes it; by
            default they are computed again when they are asked for, where the loss is cross-entropy.
        overwrite: replace a memory that is already there; one that a checkpoint belongs to is continued, not replaced.
        verbose: say once what is recorded and what it costs.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        layers: Any = None,
        dtype: torch.dtype | Mapping[str, torch.dtype | None] | None = None,
        max_bytes: int | None = None,
        on_full: Literal["fold", "stop", "error"] | None = None,
        on_error: Literal["warn", "raise"] = "warn",
        head_grads: Literal["computed", "dense"] | int = "computed",
        overwrite: bool = False,
        verbose: bool = True,
    ) -> None:
        self.path = Path(path)
        self._settings = {
            "layers": layers, "dtype": dtype, "max_bytes": max_bytes, "on_full": on_full,
            "on_error": on_error, "head_grads": head_grads, "verbose": verbose,
        }  # fmt: skip
        self._overwrite = overwrite
        self._recorder: Recorder | None = None
        self._memory: DualMemory | None = None
        self._tape: RowTape | None = None
        self._logged = (0.0, 0)  # when, and the bytes by then

    @property
    def recorder(self) -> Recorder:
        """The recorder of the training under way or over.

        Raises:
            DualHookError: no training has begun.
        """
        if self._recorder is None:
            raise DualHookError("nothing is recorded yet: the callback records once trainer.train() runs")
        return self._recorder

    @property
    def memory(self) -> DualMemory:
        """The memory, once training is over.

        Raises:
            DualHookError: it is not.
        """
        if self._memory is None:
            raise DualHookError("training is not over: dualhook.load(path) shows what is on disk by now")
        return self._memory

    # ---- the Trainer's events --------------------------------------------------------------------------------

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Begin to record, or go on from the checkpoint that the Trainer has loaded.

        Raises:
            DualHookError: the callback has recorded a training already, or this one cannot be recorded.
        """
        if getattr(args, "deepspeed", None):
            raise DualHookError("DeepSpeed steps on parameters of its own, which cannot be recorded: use DDP or FSDP2")
        assert model is not None
        again = self._close_earlier(args, state) or self._overwrite
        how = self._resumed(state.global_step) if state.global_step else {}
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self._recorder = instrument(
            model,
            self.path,
            optimizer=getattr(optimizer, "optimizer", optimizer),
            group=dist.group.WORLD if several else None,
            **(how or {"overwrite": again}),
            **self._settings,
        )
        self._memory = None
        if not how:
            (self.path / CHECKPOINTS).unlink(missing_ok=True)
        dispatches = type(train_dataloader).__name__ == "DataLoaderDispatcher"
        moves = dispatches or getattr(train_dataloader, "device", None) is not None  # batches to the device
        if not (moves and hasattr(train_dataloader, "base_dataloader")):
            warnings.warn(
                "the training loader is none that accelerate has prepared: patterns get no sample; name them with "
                "callback.recorder.batch(samples=...)",
                UserWarning,
                stacklevel=2,
            )
        elif several and dispatches:
            warnings.warn(
                "process 0 fetches the batches of all and hands parts of them on: patterns get no sample; pass "
                "accelerator_config={'dispatch_batches': False}",
                UserWarning,
                stacklevel=2,
            )
        else:
            self._tape = RowTape(train_dataloader)
        self._logged = time.monotonic(), self._recorder.nbytes

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The first batch of a step comes; those of the whole step have been fetched, and after a resume some more."""
        if self._tape is not None:
            self._tape.drop_but(args.gradient_accumulation_steps)
            self._announce()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The next batch of the step comes."""
        self._announce()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """What has been recorded is put on disk."""
        if self._is_recording:
            self.recorder.flush()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A checkpoint was saved: the memory is on disk up to its step."""
        if not self._is_recording:
            return
        self.recorder.flush()
        if state.is_world_process_zero and not self.recorder.stopped:  # else the memory ends before the checkpoint
            known = {**self._checkpoints(), str(state.global_step): self.recorder.steps}
            partial = self.path / f"{CHECKPOINTS}.partial"
            partial.write_text(json.dumps(known))
            partial.replace(self.path / CHECKPOINTS)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the recorder's share to the logs; the last ones come before the best model is loaded."""
        if not self._is_recording or logs is None:
            return
        now, nbytes = time.monotonic(), self.recorder.nbytes
        seconds, before = now - self._logged[0], self._logged[1]
        share = {"dualhook_rows": self.recorder.rows, "dualhook_bytes": nbytes}
        if seconds > 0:
            share["dualhook_bytes_per_second"] = round((nbytes - before) / seconds)
        self._logged = now, nbytes
        logs.update(share)
        if state.log_history:
            state.log_history[-1].update(share)
        if "train_runtime" in logs:
            self._close()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the memory."""
        self._close()

    # ---- inside ----------------------------------------------------------------------------------------------

    @property
    def _is_recording(self) -> bool:
        return self._recorder is not None and self._memory is None

    def _announce(self) -> None:
        if self._tape is None or not self._is_recording:
            return
        found = self._tape.next()
        if found is None:
            warnings.warn(
                "the batches do not tell which rows of the data set they are (a collator that returns no mapping?): "
                "patterns get no sample",
                UserWarning,
                stacklevel=2,
            )
            found = (torch.zeros(0, dtype=torch.int64),) * 2
        rows, positions = found
        self.recorder.batch(samples=rows, positions=positions)

    def _close(self) -> None:
        if self._tape is not None:
            self._tape.restore()
            self._tape = None
        if self._is_recording:
            self._memory = self.recorder.close()

    def _close_earlier(self, args: TrainingArguments, state: TrainerState) -> bool:
        """End a training that an exception has ended; whether it is one that the Trainer itself begins again."""
        unfinished = self._is_recording
        if unfinished and args.auto_find_batch_size:
            self.recorder.discard()
        self._close()
        if self._recorder is None or self._overwrite or state.global_step:
            return False
        if unfinished and args.auto_find_batch_size:
            return True
        raise DualHookError(
            f"this callback has recorded a training at {self.path} already: make another one with a path of its own, "
            "or with overwrite=True"
        )

    def _resumed(self, global_step: int) -> Mapping[str, Any]:
        """What tells ``instrument`` to go on from a checkpoint; nothing if there is no memory to go on with."""
        if not (self.path / "dualhook.json").is_file():
            warnings.warn(
                f"the checkpoint of step {global_step} is resumed, but {self.path} holds no memory: what comes from "
                "here on is recorded",
                UserWarning,
                stacklevel=2,
            )
            return {}
        step = self._checkpoints().get(str(global_step))
        if step is None:
            raise DualHookError(
                f"the memory at {self.path}, whole up to step {load(self.path).steps}, knows of no checkpoint of step "
                f"{global_step}, only of {', '.join(self._checkpoints()) or 'none'}: is it of another run? Resume from "
                "one of these, or record to another path"
            )
        return {"resume_at": step}

    def _checkpoints(self) -> dict[str, int]:
        path = self.path / CHECKPOINTS
        return dict(json.loads(path.read_text())) if path.is_file() else {}
