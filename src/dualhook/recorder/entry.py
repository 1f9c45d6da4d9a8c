"""``instrument``: checks what it is given and makes the recorder."""

from __future__ import annotations

import os
import platform
import shutil
import uuid
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from dualhook.capture import Selection, innermost, select_layers, tapped, unwrapped
from dualhook.capture.selection import LayerChoice
from dualhook.errors import DualHookError, LayerError, StoreError
from dualhook.host import on_host
from dualhook.recorder.front import OPEN, Recorder
from dualhook.recorder.ranks import Ranks, ranks_of
from dualhook.recorder.resuming import resumed
from dualhook.recorder.scope import TemporaryRoot
from dualhook.recorder.settings import HeadGrads, OnError, OnFull, RowDtype, refuse
from dualhook.store import Layout, Manifest, WriterLock

__all__ = ["instrument"]


@on_host()
def instrument(
    model: nn.Module,
    path: str | os.PathLike[str] | None = None,
    *,
    layers: LayerChoice | None = None,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    dtype: RowDtype | None = None,
    sparse: bool = False,
    max_bytes: int | None = None,
    on_full: OnFull | None = None,
    on_error: OnError = "warn",
    head_grads: HeadGrads = "computed",
    group: Any = None,
    overwrite: bool = False,
    resume: bool = False,
    resume_at: int | None = None,
    verbose: bool = True,
) -> Recorder:
    """Record the dual memory of ``model`` from now on: the one line in an existing script.

    Args:
        model: trained by any loop; its results are bit-identical with and without the recorder.
        path: directory of the memory; None keeps it in a temporary directory that goes with the recorder and the
            memory it returns (:meth:`Recorder.save` keeps a copy).
        layers: names, globs, module types, a predicate ``(name, module) -> bool``, presets, or a list of these
            (``["head", "attention", "*.0.*"]``); default every linear layer and what is like one (Hugging Face's
            ``Conv1D``, attention projections, routers). Convolutions, embeddings, recurrent and expert weights have
            many rows: ``"all"`` or their names record them. A frozen layer is recorded from the moment it trains.
            Presets are ``"all"``, ``"head"`` (the last linear layer) and, in models of repeated blocks,
            ``"last_block"`` (with the head), ``"attention"`` (the projections of queries, keys, values and outputs)
            and ``"mlp"`` (the rest of all blocks, routers and experts included); a layer or module that the model
            itself calls so wins over a preset.
        optimizer: not needed, optimisers are found at their first step; named ones show in ``coverage`` before.
        dtype: dtype of the stored rows; default the one they were computed in (lossless). ``torch.float16`` keeps
            output gradients with a scale per row, so that small ones are not lost, and is the more exact of the 16-bit
            ones; keys have to stay below 65,504. ``torch.int8`` keeps keys and output gradients in 127 steps up and
            down with a scale per row, rounded by chance so that each number is itself on average; what is not finite,
            or too narrow for that to be less, stays whole. Keys that ``head_grads`` are computed from keep the dtype
            they had.
            Or layer by layer, by names, globs and presets: ``{"all": torch.float16, "head": None}``, of which the last
            that names a layer counts, and None is as computed.
        sparse: write rows that are mostly zeros, as behind a ReLU, as the numbers that are not zero and a bit for every
            place: lossless, and about half the disk for a network of ReLUs. Questions take longer, since rows are
            made whole again each time. Has to be said again with ``resume``. Rows in 8 bits are not made sparse.
        max_bytes: budget for patterns on disk; default half of what is free there. Keys that later epochs
            refer to take a quarter of the machine's memory at most, and of the budget where the oldest fold; where they
            would take more they lie with their rows.
        on_full: beyond the budget ``"fold"`` moves the origin forward over the oldest patterns (the identity stays
            exact), ``"stop"`` ends the recording with a warning, ``"error"`` raises in the training loop. Default
            ``"fold"``, but ``"stop"`` where several processes train the model: their patterns cannot be folded.
        on_error: when the disk fails, or anything of the recorder's own while training runs, ``"warn"`` stops recording
            with one warning and lets training go on, ``"raise"`` stops both. What was committed stays valid either way.
        head_grads: how the output gradients of linear layers with 512 outputs or more are kept, a language model's head
            among them. ``"computed"``: under softmax cross-entropy not at all, but computed again when they are asked
            for, from keys, targets and the weights of every step (exact but for rounding; where that takes less room);
            whole otherwise. ``"dense"``: whole. A number k: where they are not computed, the k largest of each row;
            what that loses shows in the receipts. ``coverage`` tells which it was.
        group: the ``torch.distributed`` process group that trains the model together, where the model is not wrapped
            in ``DistributedDataParallel`` yet; otherwise found by itself, of ``fully_shard`` too. Every process calls
            ``instrument`` with the same path, on one file system, and gets one memory of all.
        overwrite: replace a memory that is already at ``path``.
        resume: go on with the memory at ``path`` from its last step. The model holds the weights of that step already;
            ``layers`` and the number of processes are those of before, the optimiser's state has to be by the first
            step.
        resume_at: go on from this step instead: that of a checkpoint. What was recorded after it is cut away.
        verbose: say in one line on standard error, after the first step, what is recorded and what it costs.

    Raises:
        LayerError: the model has no linear map, ``layers`` matches none or is a preset that does not apply, the model
            is already instrumented, or distributed in a way that cannot be recorded.
        StoreError: ``path`` holds a memory (without ``overwrite`` or ``resume``) or something else, or is being written
            by somebody else; or there is nothing to resume, or the model is not at the step to resume at.
        RuleError: ``optimizer`` is LBFGS, here or at its first step: several backward passes make one step.
        DualHookError: an argument of a wrong kind.
    """
    if not isinstance(model, nn.Module):
        raise DualHookError(f"model={type(model).__name__}: expected a torch.nn.Module")
    inner = unwrapped(model)
    if tapped(inner):
        raise LayerError(f"this {type(inner).__name__} is already instrumented: close() its recorder first")
    if on_full not in (None, "fold", "stop", "error"):
        raise DualHookError(f"on_full={on_full!r}: expected 'fold', 'stop' or 'error'")
    if on_error not in ("warn", "raise"):
        raise DualHookError(f"on_error={on_error!r}: expected 'warn' or 'raise'")
    if max_bytes is not None and not (isinstance(max_bytes, int) and max_bytes > 0):
        raise DualHookError(f"max_bytes={max_bytes}: expected a number of bytes above 0, or None")
    if not isinstance(sparse, bool):
        raise DualHookError(f"sparse={sparse!r}: expected True or False")
    is_count = isinstance(head_grads, int) and not isinstance(head_grads, bool) and head_grads > 0
    if head_grads not in ("computed", "dense") and not is_count:
        raise DualHookError(f"head_grads={head_grads!r}: expected 'computed', 'dense' or a number above 0")
    given: list[Any] = list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer] if optimizer else []
    for one in given:
        if not isinstance(one, Optimizer):
            raise DualHookError(f"optimizer={type(one).__name__}: expected a torch.optim.Optimizer or several")
    selection = select_layers(inner, layers)
    stored_in = _stored_in(inner, selection, dtype)
    for one in given:
        refuse(innermost(one), (p for tapped in selection.layers for p in tapped.module.parameters(recurse=False)))
    ranks = ranks_of(model, [tapped.module for tapped in selection.layers], group)
    if ranks.several and on_full == "fold":
        raise DualHookError(
            f"on_full='fold' with {ranks.size} processes: what another one has not written yet cannot be folded; leave "
            "it out (recording stops at max_bytes), or pass 'stop' or 'error' and a larger max_bytes="
        )
    resume = resume or resume_at is not None
    if resume and (path is None or overwrite):
        raise DualHookError("resume= goes on with the memory at path=: expected a path, and no overwrite=True")
    layout, temporary = _directory(path, ranks)
    if (overwrite or resume) and (before := OPEN.get(layout.root)) is not None:
        # a notebook's cell run again: the recorder of the first time must not write any more
        before.discard() if overwrite else before.close_alone()
    resumed_at, lock = None, WriterLock()
    try:
        if resume:
            layout, selection, resumed_at = resumed(layout.root, selection, ranks, resume_at, lock)
        else:
            _create(layout, selection, ranks, lock, overwrite=overwrite)
        budget = shutil.disk_usage(layout.root).free // 2 if max_bytes is None else max_bytes
        return Recorder(
            inner, selection, layout, optimizers=given, stored_in=stored_in, sparse=sparse, budget=budget,
            on_full=on_full or ("stop" if ranks.several else "fold"), on_error=on_error, head_grads=head_grads,
            ranks=ranks, verbose=verbose, lock=lock, temporary=temporary, resumed_at=resumed_at,
        )  # fmt: skip
    except BaseException:
        lock.release()
        raise


def _stored_in(model: nn.Module, selection: Selection, dtype: RowDtype | None) -> dict[str, torch.dtype]:
    """The dtype of each layer's stored rows, where it is not the one they are computed in."""
    names, found = [spec.name for spec in selection.specs], dict[str, torch.dtype | None]()
    for wanted, own in dtype.items() if isinstance(dtype, Mapping) else [(None, dtype)]:
        if own not in (None, torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int8):
            of_which = "" if wanted is None else f" of {wanted!r}"
            raise DualHookError(
                f"dtype={own}{of_which}: expected torch.float64, float32, float16, bfloat16 or int8 for stored rows, "
                "or None"
            )
        chosen = names
        if wanted is not None:
            chosen = [spec.name for spec in select_layers(model, wanted, with_uses=False).specs]
        if not set(chosen) & set(names):
            raise LayerError(f"dtype= names {wanted!r}, which layers= does not record: expected some of {names}")
        found |= {name: own for name in chosen if name in names}
    return {name: own for name, own in found.items() if own is not None}


def _create(layout: Layout, selection: Selection, ranks: Ranks, lock: WriterLock, *, overwrite: bool) -> None:
    """Begin a memory, in a directory that all processes see."""

    def create() -> str:
        try:
            layout.create(overwrite=overwrite, lock=lock)
            Manifest(selection.specs, _versions(), ranks.size, id=uuid.uuid4().hex).write(layout)
        except OSError as error:
            raise StoreError(f"{layout.root} cannot be written: {error}") from error
        return ""

    ranks.wait()  # until no process writes to what is there
    ranks.share(create)
    if any(ranks.any([not layout.manifest.exists()])):
        raise StoreError(f"{layout.root} is not the same directory for all processes: expected a shared file system")


def _directory(path: str | os.PathLike[str] | None, ranks: Ranks) -> tuple[Layout, TemporaryRoot | None]:
    """Where the memory lies; without a path in a temporary directory of process 0."""
    if path is not None:
        return Layout(Path(path).absolute()), None
    own = TemporaryRoot() if ranks.rank == 0 else None
    root = Path(ranks.share(lambda: str(own.path if own else "")))
    return Layout(root), own or TemporaryRoot(root)


def _versions() -> dict[str, str]:
    return {
        "dualhook": metadata.version("dualhook"),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
