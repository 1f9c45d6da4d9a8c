"""The reading side: a recorded memory and everything that can be asked of it."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from dualhook.attention import Attention
from dualhook.composition import check_average
from dualhook.dual import DualLinear, dual_model
from dualhook.errors import DualHookError, LayerError, RuleError, StoreError
from dualhook.estimates import by_contribution, by_cosine, by_decay, note_of
from dualhook.host import asked_on_host, on_host
from dualhook.index import KeyIndex, indexed
from dualhook.influence import Influence, InfluenceMethod, InfluenceUnit, check_asked, check_size
from dualhook.loss import Loss
from dualhook.maps import map_of
from dualhook.model import Measure, Positions, Target, find_layers, model_inputs
from dualhook.query import HERE, Workers
from dualhook.questions import Asked, ask
from dualhook.reading import OnDamage, Reading
from dualhook.records import LayerSpec
from dualhook.reporting import write_report
from dualhook.store import AnswerFiles, inspected
from dualhook.suspects import suspected
from dualhook.table import Table
from dualhook.units import Units, tokens_of
from dualhook.verification import VerifyReport, actual_weights, verified

__all__ = ["DualMemory", "VerifyReport", "load"]

Method = Literal["exact", "preview"]
METHODS = ("exact", "preview")


@on_host()
def load(path: str | os.PathLike[str], *, on_damage: OnDamage = "raise") -> DualMemory:
    """Open the memory that was recorded at ``path``; needs neither the model nor the training script.

    A URL that fsspec knows (``s3://bucket/run``) is read in ranges, and never written to.

    ``on_damage="skip"`` looks at every bit of it and goes on without what is damaged, which every table then says;
    steps that are lost count as inexact, and receipts tell what the patterns that are left explain.

    Raises:
        StoreError: the directory is no memory, or one of a newer format, or files of it are damaged or missing, or
            what the URL names cannot be reached.
    """
    if on_damage not in ("raise", "skip"):
        raise DualHookError(f"on_damage={on_damage!r}: expected 'raise' or 'skip'")
    return DualMemory(path, on_damage=on_damage)


@asked_on_host
class DualMemory(Reading):
    """A recorded training run as a key-value memory.

    Steps count optimiser steps from 1; step 0 is where recording began. ``keep`` is held as long as the memory is.
    """

    def attend(
        self,
        model: nn.Module,
        inputs: Any = None,
        *,
        target: Target = None,
        positions: Positions = None,
        layers: str | Iterable[str] | None = None,
        step: int | None = None,
        method: Method = "exact",
        cache: bool = False,
        executor: Executor | None = None,
        device: str | torch.device | None = None,
        **named: Any,
    ) -> Attention:
        """Which training patterns does this prediction attend to? Lazy: nothing is read until the answer is asked.

        Args:
            model: the trained model; it is run in evaluation mode and left as it was found.
            inputs: a tensor, a tuple of positional arguments, or a mapping of keyword arguments.
            target: the class or token whose logit counts (one, or one per query), or a function from the model's
                output to one number per query; default the predicted one.
            positions: of a sequence's logits [sequence, position, class] the places that count, one or several; each
                of each sequence is a query, see :attr:`Attention.queries`. They count real tokens, those that the
                model's ``attention_mask`` shows, negative ones from the end; default the last.
            layers: the layers to ask, default all.
            step: the step whose weights ``model`` holds, default the last.
            method: ``"exact"``, or ``"preview"``: under optimisers that would have to be replayed (Adam and its like)
                a few snapshots of their state stand for all steps. It names most of the right patterns in a fraction
                of the time; totals are rough, and the receipt says how much they explain. Under SGD's family both are
                the same.
            cache: keep what replays find under ``answers/`` in the memory's directory, which may be deleted at any
                time: the same question is then answered without a replay, also after reopening, and one that was
                interrupted goes on from its finished layers, or within a long one from where it was a minute ago.
                Answers of a layer that take more than a quarter of ``replay_bytes`` are not kept.
            executor: what goes through the patterns: threads, processes, or a cluster's (``client.get_executor()`` of
                Dask, :class:`dualhook.integrations.ray.RayExecutor`) whose workers see the memory under the same path.
                Answers are the same to the last bit; a lost worker's part is done here. Default twice
                ``torch.get_num_threads()`` threads where that is more than 1; replays always take that many once.
            device: where products are made, such as ``"cuda"``; default, and always for replays, the processor.
            **named: keyword arguments of the model, in place of ``inputs``:
                ``attend(model, **tokenizer(prompt, return_tensors="pt"))``.

        A layer whose optimiser's rule is not registered any more has attention weights, but no contributions.

        Raises:
            DualHookError: what is no executor, or a device on which torch cannot compute.
            LayerError: the model, the inputs, the target or the positions do not fit the memory.
            RuleError: a preview of an optimiser whose steps are made of more than its state (Lion, Muon, …).
        """
        if method not in METHODS:
            raise DualHookError(f"method={method!r}: expected one of {', '.join(METHODS)}")
        horizon, workers = self._horizon(step), Workers.checked(executor, device)
        asked = self._ask(model, model_inputs(inputs, named), target, positions, layers)
        return self._attention(asked, horizon, preview=method == "preview", cache=cache, workers=workers)

    def influence(
        self,
        model: nn.Module,
        inputs: Any = None,
        *,
        target: Target = None,
        of: Measure = "margin",
        method: InfluenceMethod = "decayed",
        per: InfluenceUnit = "sample",
        positions: Positions = None,
        layers: str | Iterable[str] | None = None,
        cache: bool | None = None,
        **named: Any,
    ) -> Influence:
        """Which training samples would have changed this prediction? An estimate, unlike :meth:`attend`.

        Args:
            model: the trained model, as it is after the last step.
            inputs: as :meth:`attend` takes them.
            target: the class or token asked about, likewise; default the predicted one.
            of: what would have changed: the ``"margin"`` of the target (its logit above the log-sum-exp of the
                others), its ``"logit"``, or its cross-entropy ``"loss"``.
            method: ``"decayed"``: every training gradient meets the prediction's as far as later training has left it,
                by the curvature that the rows of all recorded layers show; ``"cosine"``: the cosine between the two, at
                once; ``"contribution"``: the exact contributions, for comparison.
            per: what has an influence: each ``"sample"``, or each ``"token"``, a place in a sample (its row and
                position); they sum to the sample's. Norms that ``"cosine"`` divides by are those of samples.
            positions: the places of sequences that count, as :meth:`attend` takes them.
            layers: whose weights to look at, default all.
            cache: keep what ``"decayed"`` has fitted under ``answers/`` in the memory's directory; default where
                something can be written there.
            **named: keyword arguments of the model, in place of ``inputs``.

        Scores take 8 bytes for every query, layer, and sample or token, and while they are worked out a few times that.

        Raises:
            DualHookError: the run named no samples, a method, measure or unit that there is not, or scores of more than
                2 GiB (``influence.MOST_BYTES``).
            LayerError: the model, the inputs, the target or the positions do not fit the memory, or ``per="token"`` of
                a layer that sees samples as a whole.
            RuleError: ``"decayed"`` under an optimiser whose steps are made of more than its state, or of an average.
        """
        check_asked(method, of, per)
        if self._average is not None:
            raise RuleError("influence on an average of the weights is not known: ask the memory itself, or attend()")
        samples = torch.from_numpy(self._known_samples("have an influence"))
        asked = self._ask(model, model_inputs(inputs, named), target, positions, layers, of)
        names = [layer.spec.name for layer in asked.layers]
        units = tokens_of(self._store, names, samples) if per == "token" else Units(samples)
        check_size(len(asked.queries), len(names), len(units), per)
        note = note_of(self._store)
        if method == "contribution":
            attention = self._attention(asked, self.steps, cache=bool(cache))
            made_of = partial(self._asked_about, horizon=self.steps, preview=False)
            scores = by_contribution(self._store, asked.layers, made_of, attention, units)
        elif method == "cosine":
            scores = by_cosine(self._store, asked.layers, units)
        else:
            loss = Loss(self._store, self._weights_at)
            keep = self._store.layout.is_writable if cache is None else cache
            files = AnswerFiles(self._store.layout.answers) if keep else None
            scores, unknown = by_decay(self._store, asked.layers, units, loss, files)
            note = note_of(self._store, loss.note, unknown)
        column = self._columns.added_to
        return Influence(scores, units.sample, units.position, asked.queries, column, method=method, of=of, note=note)

    def index(self, layer: str, *, folder: str | os.PathLike[str] | None = None, rebuild: bool = False) -> KeyIndex:
        """An index of a layer's keys, for single questions to many patterns: ``top(k, by="weight", index=...)``.

        The first time it is made, which goes through all patterns twice and sorts their keys into lists: minutes for a
        million. It is kept in ``folder`` (default ``answers/`` in the memory's directory, which may be deleted at any
        time), with two bytes for every number of a key, so much memory takes making it too, and from then on opened at
        once. Answers are approximate. Needs ``dualhook[faiss]``.

        Raises:
            LayerError: no such layer, one whose weight others share, or one that is no linear layer.
            StoreError: the index that is there is of another state of the memory (``rebuild=True`` makes it anew), or
                nothing can be kept beside the memory and there is no ``folder``.
        """
        spec = self._spec(layer)
        if folder is None and not self._store.layout.is_writable:
            raise StoreError(f"{self.path} cannot be written to: name a folder=... for the index, or where it is")
        place = self._store.layout.answers if folder is None else Path(folder)
        return indexed(self._store, spec, place, rebuild=rebuild)

    def suspects(self, k: int = 100, *, neighbours: int = 10) -> Table:
        """The ``k`` samples that training has found hardest to fit: where labels are wrong, they are among the first.

        Columns rank, sample, the run-averaged ``loss``, its last value ``last_loss``, and rows, how many of the last
        layer's it is a mean of. It is in the recorded rows themselves: under softmax cross-entropy the sample's loss;
        under other losses the columns are ``gradient`` and ``last_gradient``, norms of its output gradient.

        Beside them, not ranked by: ``self_influence``, how far the sample's own steps have lowered its own loss (summed
        over its rows of a step), to first order: its squared gradients times what the optimiser made of them, in the
        loss's unit. And ``disagreement``, the share of other labels among its ``neighbours`` nearest samples, by the
        cosine of what the last layer read when each was trained on last. A column that the rows do not tell is absent,
        and the footer says why: of the first under optimisers whose steps are made of more than their state (Lion,
        Muon, …), of the second without a softmax head, or where samples have several labels (tokens).

        Raises:
            DualHookError: the run named no samples, or ``k`` or ``neighbours`` below 1.
        """
        for name, count in (("k", k), ("neighbours", neighbours)):
            if not isinstance(count, int) or count < 1:
                raise DualHookError(f"{name}={count!r}: expected at least 1")
        samples = self._known_samples("suspect")
        return suspected(self._store, Loss(self._store, self._weights_at), samples, k, neighbours)

    report = write_report

    def verify(self, model: nn.Module | None = None, *, step: int | None = None, deep: bool = False) -> VerifyReport:
        """Rebuild every weight from the memory and compare: ``error = |Ŵ - W| / |W|`` over weight and bias.

        A layer is ``exact`` if its rule is, no step is marked otherwise, and the error is one that rounding can
        explain: 1e-5 in float32, 1e-9 in float64, more in narrower dtypes.

        ``model`` holds the weights to compare with, after ``step``; default the stored weights after the last step.
        ``deep`` first compares every file with its checksums: ``report.damage`` names those that are damaged, and no
        weights are rebuilt.

        Raises:
            StoreError: no weights to compare with: the recording was cut off and no model is given.
            RuleError: a layer was trained by an optimiser whose rule is not registered any more.
        """
        horizon, damage = self._horizon(step), self._store.damage
        if deep and not damage and (damage := inspected(self._store.layout, self._store.manifest, deep=True).damage):
            return verified(self._store, (), {}, horizon, damage)
        specs, is_average = list(self._specs.values()), self._average is not None
        actual = actual_weights(self._store, specs, model, horizon, is_average=is_average)
        return verified(self._store, self._rebuilt(list(self._primary.values()), horizon), actual, horizon, damage)

    def weight(self, layer: str, step: int | None = None) -> Tensor:
        """The layer's weight as the model has it, after any recorded step (0: the origin), rebuilt from the memory."""
        spec = self._spec(layer)
        return self._parameters([spec], self._horizon(step))[spec.weight]

    def state_dict(self, step: int | None = None) -> dict[str, Tensor]:
        """All recorded parameters after any recorded step, rebuilt; for ``load_state_dict(..., strict=False)``."""
        horizon = self._horizon(step)
        return self._parameters(self._primary.values(), horizon)

    def without(self, samples: int | Iterable[int]) -> dict[str, Tensor]:
        """All recorded parameters after the last step, minus the values of these samples' patterns.

        Bookkeeping, not retraining: the values are what the weights are made of, far larger than what leaving the
        samples out of training would change.

        Raises:
            DualHookError: the run named no samples, or not these.
        """
        wanted = torch.tensor([samples] if isinstance(samples, int) else list(samples), dtype=torch.int64)
        unknown = np.setdiff1d(wanted.numpy(), self.samples)
        if unknown.size:
            remedy = "the run named none: record it with recorder.track(loader) or recorder.batch(samples=...)"
            raise DualHookError(
                f"no patterns of sample {unknown[0]}: "
                + ("expected samples out of memory.samples" if len(self.samples) else remedy)
            )
        return self._parameters(self._primary.values(), self.steps, lambda rows: torch.isin(rows.sample, wanted))

    def dual(self, model: nn.Module) -> nn.Module:
        """A copy of ``model`` whose recorded layers answer in dual form: origin, plus attention over every pattern.

        Without gradients; every call of a linear layer streams through the memory. Other kinds of layers (convolutions,
        embeddings, attention's inner projections, …) hold the weights that origin and patterns add up to.

        Raises:
            LayerError: ``model`` is not the recorded one.
        """
        inner, layers = find_layers(model, list(self._primary.values()))
        made = {
            tapped.module: DualLinear(
                self._store,
                self._composition(tapped.spec, self.steps),
                dtype=self._store.dtype(tapped.spec.weight),
                keep=self._keep,
            )
            for tapped in layers
            if DualLinear.stands_for(tapped.spec, tapped.by)
        }
        others = {tapped.spec for tapped in layers if tapped.module not in made}
        return dual_model(inner, made, self._parameters(others, self.steps))

    def averaged(self, name: str, *, start: int = 1, every: int = 1, decay: float = 0.999) -> DualMemory:
        """This memory, asked about an average of the weights instead of the last ones; exact like them.

        ``"ema"`` and ``"swa"`` as ``torch.optim.swa_utils.AveragedModel`` keeps them when updated after steps
        ``start``, ``start + every``, … (``start=0``: a copy of the untrained weights to begin with); ``"asgd"``: the
        mean that ``torch.optim.ASGD`` keeps itself.

        Raises:
            RuleError: an unknown average, or settings that make none.
        """
        settings: dict[str, Any] = {"start": start, "every": every, "decay": decay}
        check_average(self._store, self._specs.values(), name, self.steps, settings)
        twin = copy.copy(self)
        twin._average, twin._composed = (name, settings), {}
        return twin

    def _ask(
        self,
        model: nn.Module,
        inputs: Any,
        target: Target,
        positions: Positions,
        layers: str | Iterable[str] | None,
        of: Measure = "logit",
    ) -> Asked:
        """What a forward pass asks of the layers."""
        if not self._specs:
            raise LayerError(f"{self.path} holds no patterns: no optimiser step on a recorded layer was seen")
        return ask(model, [self._specs[name] for name in self._named(layers)], inputs, target, positions, of)

    def _known_samples(self, what: str) -> np.ndarray:
        """The samples of the run, of which there have to be some."""
        if not len(samples := self.samples):
            raise DualHookError(
                f"{self.path} knows no samples, so that there is nobody to {what}: record with "
                "recorder.track(loader) or recorder.batch(samples=...)"
            )
        return samples

    def _weights_at(self, spec: LayerSpec, step: int) -> tuple[Tensor, Tensor | None]:
        """A layer's weight [o, i] and bias after a step."""
        ((_, found),) = self._rebuilt([spec], max(step, self._store.first_step))
        weight, *bias = (map_of(spec).matrix(name, found[name]) for name in spec.parameters)
        return weight, bias[0] if bias else None

    def _attention(
        self, asked: Asked, horizon: int, *, preview: bool = False, cache: bool = False, workers: Workers = HERE
    ) -> Attention:
        """What the layers attend to."""
        memory = f"{self._store.fingerprint} {self._average}"
        return Attention(
            self._store,
            [layer.question(self._asked_about(layer.spec, horizon, preview=preview), memory) for layer in asked.layers],
            self._columns.grouping,
            queries=asked.queries,
            progress=self._progress,
            keep=self._keep,
            files=AnswerFiles(self._store.layout.answers) if cache else None,
            missing=self._store.note_of_loss,
            workers=workers,
        )
