"""Recording in Lightning's Trainer: one callback.

.. code-block:: python

    callback = DualMemoryCallback("runs/mnist")
    Trainer(callbacks=[callback]).fit(model, loader)
    callback.memory.attend(model, images).top(10)

Works with ``lightning.pytorch`` and with ``pytorch_lightning``. Needs ``dualhook[lightning]``.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import os
import warnings
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, IterableDataset

import dualhook
from dualhook import DualHookError, DualMemory, Recorder
from dualhook.sampling import SamplerTape

__all__ = ["DualMemoryCallback"]

Samples = list[int]


def _callback_classes() -> tuple[Any, ...]:
    """The ``Callback`` of both names of the package: a Trainer accepts its own only."""
    found = []
    for name in ("lightning.pytorch", "pytorch_lightning"):
        try:
            found.append(importlib.import_module(name).Callback)
        except ModuleNotFoundError:
            continue
    if not found:
        raise ModuleNotFoundError("dualhook.integrations.lightning needs Lightning: pip install 'dualhook[lightning]'")
    return tuple(found)


_Callback: Any = type("_Callback", _callback_classes(), {})


class DualMemoryCallback(_Callback):  # type: ignore[misc]
    """Records the dual memory of one ``Trainer.fit``; training stays bit for bit what it was.

    Every pattern knows its dataset row, whatever workers, samplers, accumulation and prefetching there are; of an
    ``IterableDataset`` its place in the order of arrival, of several loaders at once nothing. The memory is whole on
    disk after every checkpoint and validation, and after an exception. ``"dualhook/rows"`` and
    ``"dualhook/bytes"`` are logged.

    A fit that goes on from a checkpoint (``ckpt_path=``) goes on with the memory at ``path``, if that checkpoint was
    saved while it was recorded or right after; else it is recorded from there, into a memory of its own.

    Args:
        path: directory of the memory; None keeps it in a temporary one that goes with the callback.
        layers: as in :func:`dualhook.instrument`, like all that follows.
        dtype: dtype of the stored rows, or of those of some layers.
        max_bytes: budget for patterns on disk.
        on_full: ``"fold"``, ``"stop"`` or ``"error"``.
        on_error: ``"warn"`` lets training go on when recording fails, ``"raise"`` stops both.
        head_grads: how the output gradients of wide layers are kept.
        overwrite: replace a memory that is already at ``path``, one of an earlier ``fit`` with this callback too.
        verbose: say in one line what is recorded and what it costs.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
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
        super().__init__()
        self.path = None if path is None else Path(path)
        self.overwrite = overwrite
        self.recorder: Recorder | None = None
        """The recorder of the fit that runs or was the last."""
        self.memory: DualMemory | None = None
        """The memory, once that fit is over."""
        self._options = {
            "layers": layers, "dtype": dtype, "max_bytes": max_bytes, "on_full": on_full, "on_error": on_error,
            "head_grads": head_grads,
        }  # fmt: skip
        self._verbose = verbose
        self._is_recording = False
        self._rows: _Rows | None = None
        self._named: Any = None
        self._flushed = 0
        self._resumed_at: int | None = None  # the step of a checkpoint that has been loaded

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Have the training loaders note their rows.

        Raises:
            DualHookError: an earlier fit has left its memory at the callback's path.
        """
        if stage != "fit":
            return
        used = None if self.recorder is None else self.recorder.path
        again = self.path is not None and self.path.absolute() == used
        if again and not self.overwrite and trainer.ckpt_path is None:
            raise DualHookError(
                f"this callback has recorded a fit at {self.path}: give each fit a callback or a path of its own "
                "(callback.path = ...), or let overwrite=True replace the memory"
            )
        process = trainer.strategy.process_dataloader  # the last that is done to a loader before it is iterated
        trainer.strategy.process_dataloader = lambda loader: (
            _taped(process(loader)) if trainer.training else process(loader)
        )

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the strategy as it was."""
        if stage == "fit":
            vars(trainer.strategy).pop("process_dataloader", None)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Instrument the model: weights and optimisers are set up, and restored from a checkpoint, by now."""
        there = self.path is not None and (self.path / "dualhook.json").is_file()
        step, self._resumed_at = self._resumed_at, None
        how = {"resume_at": step} if step and there else {"overwrite": self.overwrite}
        self.recorder = dualhook.instrument(trainer.model, self.path, **self._options, **how, verbose=self._verbose)
        self.memory, self._flushed, self._is_recording = None, 0, True
        self._rows = _Rows(trainer)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Name the batch's dataset rows."""
        if self.recorder is not None and self._rows is not None:
            samples = self._rows.of(trainer, batch, batch_idx)
            self._named = None if samples is None else self.recorder.batch(samples)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Forget the batch, and log what has been recorded."""
        if self._named is not None:
            self._named.__exit__()
        every = trainer.log_every_n_steps  # logging costs Lightning some tenths of a millisecond
        if self.recorder is not None and every and trainer.global_step % every == 0:
            for name, number in (("rows", self.recorder.rows), ("bytes", self.recorder.nbytes)):
                value = torch.tensor(number, dtype=torch.float64)  # Lightning copies other numbers to the device
                pl_module.log(f"dualhook/{name}", value, on_step=True, on_epoch=False, prog_bar=True, batch_size=1)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Put everything so far on disk."""
        self._flush()

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Put everything so far on disk."""
        self._flush()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the memory's step."""
        return {} if self.recorder is None or self.recorder.stopped else {"steps": self.recorder.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The memory's step when the checkpoint was saved."""
        self._resumed_at = state_dict.get("steps")

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Close the memory."""
        if self.recorder is not None and self._is_recording:
            self._is_recording = False
            self.memory = self.recorder.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Close the memory with what is in it; other processes may still be training."""
        self.teardown(trainer, pl_module, "fit")
        if self.recorder is not None and self._is_recording:
            self._is_recording = False
            self.recorder.__exit__(type(exception), exception, exception.__traceback__)
            self.memory = self.recorder.close()

    def _flush(self) -> None:
        if self.recorder is not None and self._is_recording and self.recorder.steps > self._flushed:
            self._flushed = self.recorder.steps
            self.recorder.flush()


# ---- dataset rows ------------------------------------------------------------------------------------------------


def _sampler_name(loader: DataLoader[Any]) -> str:
    """Where the loader's indices come from."""
    return "sampler" if loader.batch_sampler is None else "batch_sampler"


def _is_stream(loader: Any) -> bool:
    return not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset)


def _why_not(loader: DataLoader[Any]) -> str:
    """Why the order of the loader's batches is not that of its sampler, if so."""
    if type(loader).__iter__ is not DataLoader.__iter__:
        return f"{type(loader).__name__} iterates in a way of its own"
    if loader.num_workers and not getattr(loader, "in_order", True):
        return "a DataLoader with in_order=False yields batches in an order that cannot be followed"
    return ""


def _taped(loader: Any) -> Any:
    """A copy of the loader that notes its rows; streams and loaders that cannot be followed stay as they are."""
    if _is_stream(loader) or _why_not(loader):
        return loader
    taped, name = copy.copy(loader), _sampler_name(loader)
    vars(taped)[name] = SamplerTape(getattr(loader, name))  # DataLoader forbids setting it by attribute
    return taped


class _Rows:
    """Which dataset rows each training batch is, by its number in the epoch: Lightning may fetch batches ahead."""

    def __init__(self, trainer: Any) -> None:
        self._has_told = False
        self._first: int | None  # number of the first batch of this pass
        self._used: int  # batches of this pass so far; of a stream samples
        self._is_stream: bool
        self._drawn: deque[Any] | None
        self._begin(trainer)
        self._first = 0 if trainer.ckpt_path is None else None

    def of(self, trainer: Any, batch: Any, batch_idx: int) -> Samples | None:
        """The rows of a batch that is about to be trained on, or None."""
        if trainer.current_epoch != self._epoch:
            self._begin(trainer)
        if self._is_stream:
            arrived, self._used = self._used, self._used + _length(batch)
            return list(range(arrived, self._used))
        if self._first is None:  # in the middle of an epoch, whose loader begins anew
            self._first = batch_idx
        samples = None
        while self._drawn and self._used <= batch_idx - self._first:  # Lightning passes over batches that are None
            samples, self._used = self._drawn.popleft(), self._used + 1
        return _numbers(samples)

    def _begin(self, trainer: Any) -> None:
        """A pass over the data has begun: the first one before ``on_train_start``, others before their first batch."""
        self._epoch = trainer.current_epoch
        self._first, self._used = 0, 0
        loaders = pytree.tree_leaves(trainer.train_dataloader)
        loader: Any = loaders[0]
        if len(loaders) > 1:
            why = f"{len(loaders)} training loaders at once"
        elif "dataloader_iter" in inspect.signature(trainer.lightning_module.training_step).parameters:
            why = "training_step(dataloader_iter) fetches its batches itself"
        else:
            why = "" if _is_stream(loader) else _why_not(loader)
        self._is_stream = not why and _is_stream(loader)
        self._drawn = None if why or self._is_stream else getattr(loader, _sampler_name(loader)).drawn
        if why and not self._has_told:
            self._has_told = True
            warnings.warn(f"{why}: patterns get no sample", UserWarning, stacklevel=2)


def _numbers(indices: Any) -> Samples | None:
    """Dataset rows [b] as whole numbers, or None for a dataset that is indexed by something else."""
    try:
        return [int(index) for index in (indices if hasattr(indices, "__len__") else [indices])]
    except (TypeError, ValueError):
        return None


def _length(batch: Any) -> int:
    """The number of samples in a batch: the length of the first tensor in it."""
    return next((len(leaf) for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()), 0)
