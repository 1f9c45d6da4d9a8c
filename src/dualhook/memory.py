"""The reading side: a recorded memory and everything that can be asked of it."""

from __future__ import annotations

import copy
import difflib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from dualhook.attention import Attention
from dualhook.columns import Columns
from dualhook.composition import check_average, compose, unknown_composition
from dualhook.dual import DualLinear, dual_model
from dualhook.errors import DualHookError, LayerError, RuleError
from dualhook.maps import map_of
from dualhook.model import Positions, Target, find_layers, model_inputs
from dualhook.optimizers import average_weights
from dualhook.progress import ReplayProgress
from dualhook.query import REPLAY_BYTES, Composition, Workers, rebuild
from dualhook.questions import ask
from dualhook.records import AVERAGE, VALUE, LayerSpec, Rows
from dualhook.reporting import write_report
from dualhook.store import AnswerFiles, Store, inspected, located
from dualhook.table import Table
from dualhook.verification import VerifyReport, actual_weights, explained_layers, verified

__all__ = ["DualMemory", "VerifyReport", "load"]

Method = Literal["exact", "preview"]
OnDamage = Literal["raise", "skip"]
METHODS = ("exact", "preview")


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


class DualMemory:
    """A recorded training run as a key-value memory.

    Steps count optimiser steps from 1; step 0 is where recording began. ``keep`` is held as long as the memory is.
    """

    def __init__(self, path: str | os.PathLike[str], *, keep: object = None, on_damage: OnDamage = "raise") -> None:
        self._store = Store(located(path), on_damage=on_damage)
        self._specs = {spec.name: spec for spec in self._store.trained_uses}
        self._primary = {spec.name: spec for spec in self._store.layers}
        self._columns = Columns(self._store)
        self._average: tuple[str, dict[str, Any]] | None = None
        self._composed: dict[tuple[str, int, bool], Composition] = {}
        self._keep = keep
        self._progress = ReplayProgress()
        self.replay_bytes = REPLAY_BYTES
        """Bytes that a replay may keep at a time (elementwise and matrix rules), all its threads together.

        Half for the steps under way, a quarter for checkpoints, a quarter for contributions; an answer object keeps
        up to another quarter. One step per thread (``torch.get_num_threads()``; results do not depend on them) and two
        checkpoints are always kept. Set it before asking.
        """

    @property
    def path(self) -> Path:
        """The memory's directory."""
        return self._store.layout.root

    @property
    def layers(self) -> list[str]:
        """The layers that were trained, in the model's order; a weight that several share counts once.

        Questions can name its other uses too, see :meth:`uses`.
        """
        return list(self._primary)

    def uses(self, layer: str) -> list[str]:
        """The layer and those that share its weight: each has the patterns of all.

        The column ``use`` numbers them in this order.
        """
        weight = self._spec(layer).weight
        return [spec.name for spec in self._specs.values() if spec.weight == weight]

    @property
    def steps(self) -> int:
        """The last recorded step."""
        return self._store.last_step

    @property
    def samples(self) -> np.ndarray:
        """The dataset rows that patterns come from, ascending; empty if the run named none."""
        return self._columns.samples(self.layers)

    @property
    def columns(self) -> list[str]:
        """What :meth:`Attention.sum_by` takes: step, sample, position, recorded and added columns."""
        return self._columns.names

    def patterns(self, layer: str) -> int:
        """How many patterns a layer has."""
        return self._store.count(self._spec(layer).name)

    @property
    def nbytes(self) -> int:
        """Bytes of the recorded rows and the ledger on disk."""
        return self._store.nbytes

    def on_progress(self, callback: Callable[[int], None] | None) -> None:
        """Call ``callback(patterns)`` whenever a question, one pass a layer, has gone through some more; None stops."""
        self._store.on_rows = callback

    @property
    def verbose(self) -> bool:
        """Whether long replays are announced on standard error, with a bar on a terminal."""
        return self._progress.verbose

    @verbose.setter
    def verbose(self, value: bool) -> None:
        self._progress.verbose = value

    def info(self) -> Table:
        """Per layer: shape, patterns, and how the optimiser's steps on it are explained.

        ``kind`` is the rule's family (scalar, elementwise, matrix; fitted where none is known), ``cost`` what a
        question takes: one pass over the patterns, or a replay of the optimiser over them. ``exact`` says whether the
        rule is, if only up to the optimiser's own rounding, ``inexact_steps`` how many steps are marked otherwise.
        """
        begin = f"steps {self._store.first_step + 1} to {self.steps}, earlier ones folded into the origin"
        return Table(
            explained_layers(self._store, self._primary.values(), self.steps),
            title=str(self.path),
            footer=f"{begin if self._store.first_step else f'{self.steps} steps'}, "
            f"{len(self.samples):,} samples, {self.nbytes / 1e9:.3g} GB in {len(self._store.segments)} segments; "
            f"columns {', '.join(self.columns)}" + f"\n{self._store.note_of_loss}".rstrip(),
        )

    def __repr__(self) -> str:
        return str(self.info())

    def add_column(self, name: str, values: Sequence[Any] | np.ndarray | Tensor | Mapping[int, Any]) -> None:
        """Give every dataset row a value to group by: labels, classes, documents, …; kept beside the memory.

        ``values`` lists them by dataset row, or maps dataset rows to them: numbers or texts.

        Raises:
            DualHookError: a name that is taken or no identifier, or fewer values than there are samples.
        """
        self._columns.add(name, values, self.samples)

    # ---- questions -------------------------------------------------------------------------------------------

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
                Dask) whose workers see the memory under the same path. Answers are the same to the last bit; a lost
                worker's part is done here. Default ``torch.get_num_threads()`` threads, and always for replays.
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
        if not self._specs:
            raise LayerError(f"{self.path} holds no patterns: no optimiser step on a recorded layer was seen")
        specs = [self._specs[name] for name in self._named(layers)]
        asked = ask(model, specs, model_inputs(inputs, named), target, positions)
        memory = f"{self._store.fingerprint} {self._average}"
        questions = [
            layer.question(self._asked_about(layer.spec, horizon, preview=method == "preview"), memory)
            for layer in asked.layers
        ]
        files = AnswerFiles(self._store.layout.answers) if cache else None
        return Attention(
            self._store,
            questions,
            self._columns.grouping,
            queries=asked.queries,
            progress=self._progress,
            keep=self._keep,
            files=files,
            missing=self._store.note_of_loss,
            workers=workers,
        )

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

    def _composition(self, spec: LayerSpec, horizon: int, *, preview: bool = False) -> Composition:
        place = (spec.name, horizon, preview)
        if place not in self._composed:
            options: dict[str, Any] = {"horizon": horizon, "replay_bytes": self.replay_bytes, "preview": preview}
            options["tick"] = self._progress.tick
            if self._average is None:
                made_of = compose(self._store, spec, **options)
            elif self._average[0] == "asgd":
                made_of = compose(self._store, spec, component=AVERAGE, **options)
            else:
                weights = average_weights(self._average[0], horizon=horizon, **self._average[1])
                made_of = compose(self._store, spec, weights=weights, **options)
            self._composed = {place: made_of} | {k: v for k, v in self._composed.items() if k[1] == horizon}
        return self._composed[place]

    def _rebuilt(
        self, specs: Sequence[LayerSpec], horizon: int, leave_out: Callable[[Rows], Tensor] | None = None
    ) -> Iterator[tuple[LayerSpec, dict[str, Tensor]]]:
        """Layer by layer the parameters rebuilt, float64."""
        made_of = [self._composition(spec, horizon) for spec in specs]
        with self._progress.over(self._store, made_of):
            for one in made_of:
                natural, rebuilt = map_of(one.spec).natural, rebuild(self._store, one, leave_out)
                shapes = {name: self._store.origin(name).tensors[VALUE].shape for name in rebuilt}
                yield one.spec, {name: natural(name, values, shapes[name]) for name, values in rebuilt.items()}

    def _parameters(
        self, specs: Iterable[LayerSpec], horizon: int, leave_out: Callable[[Rows], Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Parameters rebuilt, in the dtype the model has them in."""
        return {
            name: value.to(self._store.dtype(name))
            for _, values in self._rebuilt(list(specs), horizon, leave_out)
            for name, value in values.items()
        }

    def _asked_about(self, spec: LayerSpec, horizon: int, *, preview: bool) -> Composition:
        """What a layer is made of, as far as it is known: attention weights need no rule."""
        try:
            return self._composition(spec, horizon, preview=preview)
        except RuleError as error:
            if preview:
                raise
            return unknown_composition(spec, horizon, str(error))

    def _named(self, layers: str | Iterable[str] | None) -> list[str]:
        if layers is None:
            return list(self._specs)
        return [self._spec(name).name for name in ([layers] if isinstance(layers, str) else layers)]

    def _spec(self, layer: str) -> LayerSpec:
        if layer not in self._specs:
            near = difflib.get_close_matches(layer, self._specs, n=3, cutoff=0.4)
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"expected {', '.join(self._specs)}"
            raise LayerError(f"{self.path} records no layer {layer!r}: {hint}")
        return self._specs[layer]

    def _horizon(self, step: int | None) -> int:
        last, first = self.steps, self._store.first_step
        if step is None:
            return last
        if not isinstance(step, int) or not first <= step <= last:
            folded = f", steps before {first} were folded into the origin" if first else ""
            raise DualHookError(f"step {step}: expected {first} to {last}{folded}")
        return step
