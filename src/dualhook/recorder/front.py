"""The recorder that users hold."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import warnings
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from dualhook.capture import (
    Audit,
    RootHook,
    Selection,
    StepWatcher,
    TrackedLoader,
    Verdict,
    as_batch,
    coverage_table,
    forget_compiled_code,
    innermost,
    install,
    sequence_number,
)
from dualhook.errors import BudgetError, DualHookError, StoreError
from dualhook.memory import DualMemory
from dualhook.optimizers import LOOKAHEAD, rule_for
from dualhook.recorder.costs import estimate, human, row_sizes
from dualhook.recorder.folding import folding_to
from dualhook.recorder.heads import HeadGrads, Heads
from dualhook.recorder.notices import tell_of_latest
from dualhook.recorder.ranks import Ranks
from dualhook.recorder.scope import BatchScope, TemporaryRoot, weakly
from dualhook.recorder.steps import StepBook
from dualhook.records import Batch
from dualhook.store import Layout, Manifest, Store, Writer
from dualhook.store.writer import SEGMENT_BYTES
from dualhook.table import Table

__all__ = ["OPEN", "OnFull", "Recorder"]

T = TypeVar("T")
OnFull = Literal["fold", "stop", "error"]

OPEN: weakref.WeakValueDictionary[Path, Recorder] = weakref.WeakValueDictionary()
"""The recorders of this process that are writing, by their directory."""


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
        dtype: torch.dtype | None,
        budget: int,
        on_full: OnFull,
        head_grads: HeadGrads,
        ranks: Ranks,
        verbose: bool,
        temporary: TemporaryRoot | None,
        resumed_at: int | None = None,
    ) -> None:
        self._model = model
        self._selection = selection
        self._layout = layout
        self._dtype = dtype
        self._budget = budget
        self._on_full = on_full
        self._ranks = ranks
        self._verbose = verbose and ranks.rank == 0
        self._temporary = temporary
        self._memory: DualMemory | None = None
        self._closed = False
        self.stopped = False
        """Whether recording has ended before training: the budget was used up, or the disk failed."""
        self._pid = os.getpid()
        self._writer = Writer(
            layout,
            segment_bytes=max(1, min(SEGMENT_BYTES, budget // 8)),  # folding goes by segments
            after_write=folding_to(budget) if on_full == "fold" else None,
            rank=ranks.rank,
        )
        # the model's hooks hold the book, the book the recorder: it lives as long as the model, whoever holds it
        self._book = StepBook(
            selection, self._writer, ranks=ranks, dtype=dtype, heads=Heads(head_grads), on_step=self._on_step
        )
        if resumed_at is not None:
            self._writer.go_on()
            self._book.go_on(resumed_at, Store(layout.root).origin_steps)
        for optimizer in optimizers:
            self._book.meet(innermost(optimizer))
        forget_compiled_code()
        self._handles = install(model, [(intake.tapped, intake) for intake in self._book.layers.intakes])
        self._is_audited = resumed_at is not None  # the first part was
        self._verdict: Verdict | None = None  # of this process, until the first step brings those of all together
        self._root = RootHook(self._begin_audit, self._end_audit).attach(model)
        self._watcher = StepWatcher(self._before_step, self._after_step)
        self._at_exit = weakly(self.close_alone)  # a script that forgets to close loses nothing
        atexit.register(self._at_exit)
        OPEN[layout.root] = self

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        if kind is None:
            self.close()
        else:  # the other processes may still be training
            self.close_alone()

    def __del__(self) -> None:
        if getattr(self, "_closed", True):
            return
        if self._temporary is None:
            self.close_alone()
        else:  # its directory goes with it
            self.discard()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "stopped" if self.stopped else "recording"
        return f"Recorder({state}, {len(self._selection.specs)} layers, {self.steps} steps, {self.path})"

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
        return self._writer.builder.recorded_rows

    @property
    def nbytes(self) -> int:
        """Bytes of all rows so far, of all processes; those that were folded into the origin included."""
        return self._book.measuring.recorded_bytes

    def track(self, loader: Iterable[T]) -> Iterable[T]:
        """Iterate over ``loader`` and let every pattern know its dataset row.

        Any ``DataLoader``, one that accelerate has prepared too; an ``IterableDataset`` or another iterable is counted
        in order of arrival, from 0 in every pass. Batches, their order and the random numbers stay as they are.

        The batch that was yielded last is the one a forward pass belongs to: a loop that fetches batches ahead, or
        works on two loaders at once, names its rows with :meth:`batch`. A row's sample is the place in the first
        dimension of the layer's input, if that is as long as the batch; otherwise the row has no sample (-1).
        """
        return TrackedLoader(loader, self._announce)

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
        for parameter, name in self._book.trained_by.items():
            rule = rule_for(name)
            synced = f", {LOOKAHEAD}" if self._book.layers.watched[parameter].synchronized else ""
            rules[parameter] = f"{rule.name}{synced} ({rule.exactness.value})"
        sizes = row_sizes(self._model, self._selection, self._dtype)
        return coverage_table(self._model, self._selection, rules, sizes, self._book.layers.heads.forms)

    def estimate(self, inputs: Any) -> Table:
        """What one training step on ``inputs`` (a tensor, a tuple of arguments or a mapping) will write.

        Runs the model once in evaluation mode; random state and gradients stay as they are. Columns layer, patterns
        (rows whose output gradient turns out zero will be dropped), bytes; below in words bytes a step and a token
        (of whole numbers [b, n]) or sample, what takes most of them, and what would take less.
        """
        return estimate(self._model, self._selection, inputs, dtype=self._dtype, budget=self._budget)

    def flush(self) -> None:
        """Put everything recorded so far on disk, so that ``dualhook.load`` sees it; for between two steps.

        Of several processes that train together each has to call it.

        Raises:
            StoreError: the disk refused.
        """
        self._check_open("flush")
        self._book.notice()
        try:
            self._writer.flush()
            if not self.stopped:
                self._write_latest()
        finally:
            self._ranks.wait()

    def close(self) -> DualMemory:
        """Take every hook off the model, write what is left, and return the memory.

        Of several processes that train together each has to call it; they wait for each other.

        Raises:
            StoreError: the disk refused.
        """
        if not self._closed:
            try:
                self._finish(whole=not self.stopped and (self._ranks.connected or not self._ranks.sharded))
            finally:
                self._ranks.wait()
        if self._memory is None:
            self._memory = DualMemory(self._layout.root, keep=self._temporary)
        return self._memory

    def close_alone(self) -> None:
        """Close without asking other processes: what only all of them together have is left out."""
        if not self._closed:
            self._finish(whole=not (self.stopped or self._ranks.sharded))

    def _finish(self, *, whole: bool) -> None:
        self._closed = True
        self._detach()
        if os.getpid() == self._pid:  # not in a forked worker: the files are the parent's
            if whole:
                self._book.notice()
            self._writer.close()
            if whole:
                self._write_latest()
                self._book.snapshots.after(self.steps, final=True)

    def discard(self) -> None:
        """Let go of the model and write nothing more; what is on disk stays as it is."""
        if not self._closed:
            self._closed = True
            self._detach()
            self._writer.close(discard=True)

    def save(self, path: str | os.PathLike[str]) -> DualMemory:
        """Copy the memory to ``path``: how one without a path of its own outlives the process.

        Raises:
            StoreError: ``path`` exists and is not empty.
        """
        if not self._closed:
            self.flush()
        target = Path(path)

        def copy() -> str:
            if target.exists() and (not target.is_dir() or any(target.iterdir())):
                raise StoreError(f"{target} exists and is not empty: choose another path for the copy of the memory")
            shutil.copytree(self._layout.root, target, dirs_exist_ok=True)
            return ""

        self._ranks.share(copy)
        return DualMemory(target)

    # ---- inside ----------------------------------------------------------------------------------------------

    def _announce(self, batch: Batch | None) -> None:
        self._book.batch, self._book.batch_since = batch, sequence_number()

    def _before_step(self, optimizer: Optimizer, has_closure: bool) -> None:
        if self.stopped:
            return
        if not has_closure:  # else the forward pass is still to come
            self._agree(optimizer)
        self._book.before(optimizer, has_closure)

    def _after_step(self, optimizer: Optimizer) -> None:
        if self.stopped:
            return
        self._agree(optimizer)
        self._book.after(optimizer)
        measuring = self._book.measuring
        if measuring.error is not None:
            self._stop(f"{measuring.error} while writing to {self.path}: free the disk and record again")
        elif self._on_full != "fold" and measuring.recorded_bytes > self._budget:
            message = (
                f"the memory at {self.path} has used its budget of {human(self._budget)}: "
                "raise max_bytes=, choose fewer layers="
                + ("" if self._ranks.several else ", or let on_full='fold' keep the newest patterns")
            )
            self._stop(message, warn=self._on_full == "stop")
            if self._on_full == "error":
                raise BudgetError(f"step {self.steps}: {message}")

    def _on_step(self, step: int) -> None:
        if step != 1 or not self._verbose:
            return
        size = max(1, self._writer.builder.nbytes * self._ranks.size)
        then = {"fold": "the oldest patterns fold into the origin", "stop": "recording stops", "error": "it raises"}
        print(
            f"dualhook: recording {len(self._selection.specs)} layers, {human(size)} a step; the budget of "
            f"{human(self._budget)} is reached after about {self._budget // size:,} steps, then "
            f"{then[self._on_full]} (max_bytes=, layers= and dtype= change that)",
            file=sys.stderr,
        )

    def _stop(self, why: str, *, warn: bool = True) -> None:
        """Stop recording while training goes on; what was recorded up to now stays a whole memory."""
        self.stopped, self._book.recording = True, False
        if self._writer.error is None:
            self._writer.flush()
            self._write_latest()
        if warn:
            warnings.warn(f"recording stopped after step {self.steps}: {why}", UserWarning, stacklevel=2)

    def _write_latest(self) -> None:
        values, changed = self._book.latest()
        present = set(self._model.modules())
        gone = [tapped.spec.name for tapped in self._selection.layers if tapped.module not in present]
        tell_of_latest(self.steps, changed, gone, is_empty=self._book.pending.seen and not self._book.stepped)
        self._writer.write_latest(self.steps, values)

    def _detach(self) -> None:
        for handle in [*self._handles, *self._root]:
            handle.remove()
        for intake in self._book.layers.intakes:
            intake.detach()
        self._watcher.close()
        self._book.recording = False
        atexit.unregister(self._at_exit)

    def _begin_audit(self, sizes: frozenset[int]) -> None:
        self._book.input_sizes = sizes
        if self._is_audited:
            return
        if torch.is_grad_enabled() and self._book.recording and not self._book.pending.seen:
            self._book.audit = Audit()

    def _end_audit(self, outputs: Any) -> None:
        """The first differentiable forward pass is over: layers with uses that no tap has seen are not recorded."""
        audit, self._book.audit = self._book.audit, None
        if audit is None:
            return
        self._verdict = audit.verdict(outputs, self._book.layers.parameters())
        if not self._ranks.several:
            self._narrow(self._verdict)

    def _agree(self, optimizer: Optimizer) -> None:
        """With the first step at last: what one process sees of a model another one may not, all record the same.

        Of a model whose forward pass could not be looked at, such as a compiled one, the calls tell.
        """
        if not self._is_audited and any(self._book.members(optimizer)):
            own = self._book.layers.verdict() if self._verdict is None else self._verdict
            verdict = reduce(Verdict.joined, self._ranks.gather(own))
            if verdict.seen:  # else the step works with gradients that came another way
                self._narrow(verdict)

    def _narrow(self, verdict: Verdict) -> None:
        self._is_audited = True
        audited = self._selection.audited(verdict)
        if audited == self._selection:
            return
        self._selection = audited
        self._book.narrow(audited)
        if not self._ranks.rank:
            replace(Manifest.read(self._layout), layers=self._selection.specs).write(self._layout)

    def _check_open(self, what: str) -> None:
        if self._closed:
            raise DualHookError(f"{what}() of a recorder that is closed: instrument the model again")
