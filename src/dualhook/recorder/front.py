"""The recorder that users hold."""

from __future__ import annotations

import os
import sys
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from dualhook.capture import Guard, Selection, TrackedLoader, as_batch, coverage_table, innermost, sequence_number
from dualhook.errors import BudgetError, DualHookError, StoreError
from dualhook.host import asked_on_host
from dualhook.memory import DualMemory
from dualhook.optimizers import LOOKAHEAD, rule_for
from dualhook.recorder.attached import Attached
from dualhook.recorder.costs import estimate, row_sizes
from dualhook.recorder.first_pass import FirstPass
from dualhook.recorder.folding import folding_to
from dualhook.recorder.heads import Heads
from dualhook.recorder.notices import tell_of_costs, tell_of_failure, tell_of_latest, used_up
from dualhook.recorder.ranks import Ranks
from dualhook.recorder.scope import AtExit, BatchScope, TemporaryRoot, copied, weakly
from dualhook.recorder.settings import HeadGrads, OnError, OnFull, pool_bytes
from dualhook.recorder.steps import StepBook
from dualhook.records import Batch
from dualhook.store import SEGMENT_BYTES, Layout, Store, Writer, WriterLock
from dualhook.table import Table

__all__ = ["OPEN", "Recorder"]

T = TypeVar("T")
WORTH_TELLING = 1.0  # seconds

OPEN: weakref.WeakValueDictionary[Path, Recorder] = weakref.WeakValueDictionary()
"""The recorders of this process that are writing, by their directory."""


@asked_on_host
class Recorder:
    """Records a model's dual memory until it is closed; :func:`instrument` makes one.

    .. code-block:: python

        with dualhook.instrument(model, "runs/fmnist") as recorder:
            for images, labels in recorder.track(loader):
                ...  # the loop as it was
        memory = recorder.close()  # closing again returns the same memory
    """

    def __init__(
        self,
        model: nn.Module,
        selection: Selection,
        layout: Layout,
        *,
        optimizers: Sequence[Optimizer],
        stored_in: Mapping[str, torch.dtype],
        sparse: bool,
        budget: int,
        on_full: OnFull,
        on_error: OnError,
        head_grads: HeadGrads,
        ranks: Ranks,
        verbose: bool,
        lock: WriterLock,
        temporary: TemporaryRoot | None,
        resumed_at: int | None = None,
    ) -> None:
        self._model = model
        self._layout = layout
        self._stored_in = stored_in
        self._budget = budget
        self._on_full = on_full
        self._on_error = on_error
        self._ranks = ranks
        self._verbose = verbose and ranks.rank == 0
        self._lock = lock
        self._temporary = temporary
        self._memory: DualMemory | None = None
        self._closed = True  # until it has begun
        self.stopped = False
        """Whether recording has ended before training: the budget is used up, or something failed."""
        self.error: Exception | None = None
        """What has failed, if anything has."""
        self._pid = os.getpid()
        self._writer = Writer(
            layout,
            segment_bytes=max(1, min(SEGMENT_BYTES, budget // 8)),  # folding goes by segments
            after_write=folding_to(budget) if on_full == "fold" else None,
            rank=ranks.rank,
            sparse=sparse,
            pool_bytes=pool_bytes(budget, on_full, ranks.size),
            eight_bit=[layer for layer, dtype in stored_in.items() if dtype == torch.int8],
        )
        self._guard = Guard(self._failed)
        try:
            self._begin(selection, head_grads, optimizers, resumed_at)
        except BaseException:
            self._writer.close(discard=True)
            raise
        self._closed = False
        self._at_exit = AtExit(weakly(self.close_alone))  # a script that forgets to close loses nothing
        OPEN[layout.root] = self

    def _begin(
        self, selection: Selection, head_grads: HeadGrads, optimizers: Sequence[Optimizer], resumed_at: int | None
    ) -> None:
        """Hook the model."""
        # the model's hooks hold the book, the book the recorder: it lives as long as the model, whoever holds it
        self._book = StepBook(
            selection, self._writer, ranks=self._ranks, stored_in=self._stored_in,
            heads=Heads(head_grads, self._stored_in), on_step=self._on_step, guard=self._guard,
        )  # fmt: skip
        if resumed_at is not None:
            self._writer.go_on()
            self._book.go_on(resumed_at, Store(self._layout.root).origin_steps)
        for optimizer in optimizers:
            self._book.meet(innermost(optimizer))
        self._first = FirstPass(selection, self._book, self._layout, self._ranks, is_over=resumed_at is not None)
        in_step = Guard(self._failed_in_step)
        self._attached = Attached(self._model, self._book, self._first, self._before_step, self._after_step, in_step)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        (self._close if kind is None else self.close_alone)()  # the other processes may still be training

    def __del__(self) -> None:
        if getattr(self, "_closed", True):
            return
        if self._temporary is None:
            self.close_alone()
        else:  # its directory goes with it
            self.discard()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "stopped" if self.stopped else "recording"
        waited = f", {self.waited:.1f} s waited for the disk" if self.waited >= WORTH_TELLING else ""
        return f"Recorder({state}, {len(self._first.selection.specs)} layers, {self.steps} steps{waited}, {self.path})"

    @property
    def path(self) -> Path:
        """The memory's directory."""
        return self._layout.root

    @property
    def steps(self) -> int:
        """How many steps have been recorded; optimisers that step on the same backward pass share one."""
        return self._book.step

    @property
    def rows(self) -> int:
        """How many rows this process has recorded, of all layers; a map that is stored as a whole counts once."""
        return self._book.pending.recorded_rows

    @property
    def nbytes(self) -> int:
        """Bytes of all rows so far, of all processes; those that were folded into the origin included."""
        return self._book.nbytes

    @property
    def waited(self) -> float:
        """Seconds for which training has waited for the disk."""
        return self._writer.waited

    def track(self, loader: Iterable[T]) -> Iterable[T]:
        """Iterate over ``loader`` and let every pattern know its dataset row.

        Any ``DataLoader``, one that accelerate has prepared too; an ``IterableDataset`` or another iterable is counted
        in order of arrival, from 0 in every pass. Batches, their order and the random numbers stay as they are.

        The batch that was yielded last is the one a forward pass belongs to: a loop that fetches batches ahead, or
        works on two loaders at once, names its rows with :meth:`batch`. A row's sample is the place in the first
        dimension of the layer's input, if that is as long as the batch; otherwise the row has no sample (-1).
        """
        return TrackedLoader(loader, self._announce, self._guard)

    def batch(self, samples: Any, *, positions: Any = None, **columns: Any) -> BatchScope:
        """Name the dataset rows [b] of the batch that comes next, with further columns [b] or single numbers.

        ``positions`` [b] say where in its row each sample begins, if that is not at 0: a window of a long text, or
        every token of sequences that are laid end to end. Holds until the next call; as a context manager, until the
        end of the block.

        Raises:
            DualHookError: samples that are no whole numbers, or a column that does not fit them.
        """
        scope = BatchScope(self._announce, self._book.batch)
        self._announce(as_batch(samples, columns, positions))
        return scope

    def pause(self) -> None:
        """Stop capturing, for backward passes that no optimiser step uses. Steps meanwhile are marked inexact."""
        self._check_open("pause")
        self._book.recording = False

    def resume(self) -> None:
        """Capture again after :meth:`pause`."""
        self._check_open("resume")
        self._book.recording = not self.stopped

    @property
    def coverage(self) -> Table:
        """Every trainable parameter: recorded in which layer, by which rule, at how many bytes a row, or why not."""
        rules: dict[str, str] = {}
        self._book.pending.settle()  # synchronisations on their way
        for parameter, name in self._book.trained_by.items():
            rule = rule_for(name)
            synced = f", {LOOKAHEAD}" if self._book.layers.watched[parameter].synchronized else ""
            rules[parameter] = f"{rule.name}{synced} ({rule.exactness.value})"
        sizes = row_sizes(self._model, self._first.selection, self._stored_in)
        return coverage_table(self._model, self._first.selection, rules, sizes, self._book.pending.heads.forms)

    def estimate(self, inputs: Any) -> Table:
        """What one training step on ``inputs`` (a tensor, a tuple of arguments or a mapping) will write.

        Runs the model once in evaluation mode; random state and gradients stay as they are. Columns layer, patterns
        (rows whose output gradient turns out zero will be dropped), bytes; below in words bytes a step and a token
        (of whole numbers [b, n]) or sample, what takes most of them, and what would take less.
        """
        return estimate(self._model, self._first.selection, inputs, stored_in=self._stored_in, budget=self._budget)

    def flush(self) -> None:
        """Put everything recorded so far on disk, so that ``dualhook.load`` sees it; for between two steps.

        Of several processes that train together each has to call it.

        Raises:
            StoreError: the disk refused, with ``on_error="raise"``; otherwise recording has stopped with a warning.
        """
        self._check_open("flush")
        try:
            with self._guard:
                self._book.notice()
                self._writer.flush()
                if not self.stopped:
                    self._write_latest()
        finally:
            self._ranks.wait()

    def close(self) -> DualMemory:
        """Take every hook off the model, write what is left, and return the memory.

        Of several processes that train together each has to call it; they wait for each other.

        Raises:
            StoreError: the disk refused, with ``on_error="raise"``; or it holds no memory any more.
        """
        self._close()
        if self._memory is None:
            self._memory = DualMemory(self._layout.root, keep=self._temporary)
        return self._memory

    def close_alone(self) -> None:
        """Close without asking other processes: what only all of them together have is left out."""
        if not self._closed:
            self._finish(whole=not (self.stopped or self._ranks.sharded))

    def _close(self) -> None:
        if not self._closed:
            try:
                self._finish(whole=not self.stopped and (self._ranks.connected or not self._ranks.sharded))
            finally:
                self._ranks.wait()

    def _finish(self, *, whole: bool) -> None:
        self._closed = True
        self._detach()
        if os.getpid() != self._pid:  # in a forked worker: the files are the parent's
            return
        with self._lock, self._guard:
            try:
                if whole:
                    self._book.notice()
                self._book.settle()
            except Exception:
                self._book.end(in_step=False)  # what stands is written all the same
                raise
            finally:
                self._writer.close()
            if whole:
                self._write_latest()
                self._book.snapshots.after(self.steps, final=True)
        if self._verbose and self.waited >= WORTH_TELLING:
            print(f"dualhook: training waited {self.waited:.0f} s for the disk of {self.path}", file=sys.stderr)

    def discard(self) -> None:
        """Let go of the model and write nothing more; what is on disk stays as it is."""
        if not self._closed:
            self._closed = True
            self._detach()
            with self._lock:
                self._writer.close(discard=True)

    def save(self, path: str | os.PathLike[str]) -> DualMemory:
        """Copy the memory to ``path``: how one without a path of its own outlives the process.

        Raises:
            StoreError: ``path`` exists and is not empty.
        """
        if not self._closed:
            self.flush()
        self._ranks.share(partial(copied, self._layout.root, Path(path)))
        return DualMemory(Path(path))

    # ---- inside ----------------------------------------------------------------------------------------------

    def _announce(self, batch: Batch | None) -> None:
        with self._guard:
            self._book.batch, self._book.batch_since = batch, sequence_number()

    def _before_step(self, optimizer: Optimizer, has_closure: bool) -> None:
        self._attached.settle(optimizer)
        if self.stopped:
            return
        if not has_closure:  # else the forward pass is still to come
            self._first.agree(optimizer)
        self._book.before(optimizer, has_closure)

    def _after_step(self, optimizer: Optimizer) -> None:
        if self.stopped:
            return
        self._first.agree(optimizer)
        self._book.after(optimizer)
        measuring = self._book.measuring
        if measuring.error is not None:
            if not self._failed(error := StoreError(f"{measuring.error} while writing to {self.path}")):
                raise error from self._writer.error
        elif self._on_full != "fold" and measuring.recorded_bytes > self._budget:
            self._book.settle()
            self._stop()
            message = used_up(self.path, self._budget, may_fold=not self._ranks.several)
            if self._on_full == "error":
                raise BudgetError(f"step {self.steps}: {message}")
            warnings.warn(f"recording stopped after step {self.steps}: {message}", UserWarning, stacklevel=2)

    def _on_step(self, step: int) -> None:
        if step != 1 or not self._verbose:
            return
        size = max(1, self._writer.builder.nbytes * self._ranks.size)
        layers, may_be_less = len(self._first.selection.specs), self._writer.may_write_less
        tell_of_costs(layers, size, self._budget, self._on_full, may_be_less=may_be_less)

    def _stop(self, *, is_current: bool = True) -> None:
        """Stop recording while training goes on; what was recorded up to now stays a whole memory."""
        self.stopped, self._book.recording = True, False
        if self._writer.error is None and not self._closed:
            self._writer.flush()
            if is_current and self.steps:
                self._write_latest()

    def _failed(self, error: Exception, *, in_step: bool = False) -> bool:
        """Something of ours went wrong while training runs; whether training goes on without a word."""
        if isinstance(error, DualHookError) and not isinstance(error, StoreError):
            return False  # said on purpose: this cannot be recorded, or the budget was to be an error
        if not self.stopped:
            self.error = self.error or error
            if self._ranks.several and not isinstance(error, StoreError):
                self._writer.error = self._writer.error or error  # at the next step all hear of it, and stop together
                return True
            is_current = self._book.end(in_step=in_step) and not self._ranks.sharded
            with suppress(Exception):  # it may go wrong once more
                self._stop(is_current=is_current)
            if self._on_error == "warn":
                several, on_disk = self._ranks.several, self._writer.last_step
                tell_of_failure(self.error, self.steps, on_disk, self.path, several=several)
        return self._on_error == "warn"

    def _failed_in_step(self, error: Exception) -> bool:
        """The same around an optimiser's step, where several processes wait for each other's measurements."""
        return not self._ranks.several and self._failed(error, in_step=True)

    def _write_latest(self) -> None:
        values, changed = self._book.latest()
        present = set(self._model.modules())
        gone = [tapped.spec.name for tapped in self._first.selection.layers if tapped.module not in present]
        tell_of_latest(self.steps, changed, gone, is_empty=self._book.pending.seen and not self._book.stepped)
        self._writer.write_latest(self.steps, values)

    def _detach(self) -> None:
        self._attached.remove()
        self._book.recording = False
        self._at_exit.cancel()

    def _check_open(self, what: str) -> None:
        if self._closed:
            raise DualHookError(f"{what}() of a recorder that is closed: instrument the model again")
