"""The reading side: a recorded memory and everything that can be asked of it."""

from __future__ import annotations

import copy
import difflib
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dualhook.attention import Attention
from dualhook.capture import Observed, directions, observe
from dualhook.columns import Columns
from dualhook.composition import compose, unknown_composition
from dualhook.dual import DualLinear
from dualhook.errors import DualHookError, LayerError, RuleError, StoreError
from dualhook.model import Target, find_layers, predicted_scores, run_model, with_module
from dualhook.optimizers import Exactness, average_weights, rule_for
from dualhook.query import REPLAY_BYTES, Composition, LayerQuery, rebuild
from dualhook.records import AVERAGE, LayerSpec, Rows
from dualhook.store import AnswerFiles, Store
from dualhook.table import Table

__all__ = ["DualMemory", "VerifyReport", "load"]

ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-5}


def load(path: str | os.PathLike[str]) -> DualMemory:
    """Open the memory that was recorded at ``path``; needs neither the model nor the training script.

    Raises:
        StoreError: the directory is no memory, or one of a newer format.
    """
    return DualMemory(path)


class VerifyReport(Table):
    """The result of :meth:`DualMemory.verify`: columns layer, error, rule, exact, inexact_steps."""

    @property
    def max_error(self) -> float:
        """The largest relative error of any layer; NaN if a layer's is, or if there is no layer."""
        return float(np.max(self["error"])) if len(self) else math.nan


class DualMemory:
    """A recorded training run as a key-value memory.

    Steps count optimiser steps from 1; step 0 is where recording began. ``keep`` is held as long as the memory is.
    """

    def __init__(self, path: str | os.PathLike[str], *, keep: object = None) -> None:
        self._store = Store(Path(path))
        self._specs = {spec.name: spec for spec in self._store.layers}
        self._columns = Columns(self._store)
        self._average: tuple[str, dict[str, Any]] | None = None
        self._composed: dict[tuple[str, int], Composition] = {}
        self._keep = keep
        self.replay_bytes = REPLAY_BYTES
        """Bytes that a replay may keep at a time (elementwise and matrix rules), all its threads together.

        Half for the steps under way, a quarter for checkpoints, a quarter for contributions; an answer object keeps
        up to another quarter for its next questions. One step per thread and two checkpoints are always kept. Threads
        are ``torch.get_num_threads()``; results do not depend on them. Set it before asking.
        """

    # ---- what is in it ---------------------------------------------------------------------------------------

    @property
    def path(self) -> Path:
        """The memory's directory."""
        return self._store.layout.root

    @property
    def layers(self) -> list[str]:
        """The layers that were trained, in the model's order."""
        return list(self._specs)

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
        """Call ``callback(patterns)`` for every block of patterns that any question has worked through; None stops.

        A question is one pass over the patterns of each of its layers.
        """
        self._store.on_rows = callback

    def info(self) -> Table:
        """Per layer: its shape, patterns, optimiser, rule, whether that is exact, and how many steps are not."""
        rows = [
            (
                spec.name,
                f"{spec.in_features}→{spec.out_features}",
                self._store.count(spec.name),
                ", ".join(name.rpartition(".")[2] for name in self._optimizers(spec)),
                self._rule(spec),
                self._is_exact(spec),
                self._inexact_steps(spec, self.steps),
            )
            for spec in self._specs.values()
        ]
        names = ("layer", "shape", "patterns", "optimizer", "rule", "exact", "inexact_steps")
        begin = f"steps {self._store.first_step + 1} to {self.steps}, earlier ones folded into the origin"
        return Table(
            {name: [row[k] for row in rows] for k, name in enumerate(names)},
            title=str(self.path),
            footer=f"{begin if self._store.first_step else f'{self.steps} steps'}, "
            f"{len(self.samples):,} samples, {self.nbytes / 1e9:.3g} GB in {len(self._store.segments)} segments; "
            f"columns {', '.join(self.columns)}",
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
        inputs: Any,
        *,
        target: Target = None,
        layers: str | Iterable[str] | None = None,
        step: int | None = None,
        cache: bool = False,
    ) -> Attention:
        """Which training patterns does this prediction attend to? Lazy: nothing is read until the answer is asked.

        Args:
            model: the trained model; it is run in evaluation mode and left as it was found.
            inputs: a tensor, a tuple of positional arguments, or a mapping of keyword arguments.
            target: the class whose logit counts (one, or one per query), or a function from the model's output to
                one number per query; default the predicted class.
            layers: the layers to ask, default all.
            step: the step whose weights ``model`` holds, default the last.
            cache: keep what replays find under ``answers/`` in the memory's directory, which may be deleted at any
                time: the same question is then answered without a replay, also after reopening, and one that was
                interrupted goes on from its finished layers, or within a long one from where it was a minute ago.
                Answers of a layer that take more than a quarter of ``replay_bytes`` are not kept.

        A layer that was trained by an optimiser without an exact rule has attention weights, but no contributions.

        Raises:
            LayerError: the model, the inputs or the target do not fit the memory.
        """
        horizon = self._horizon(step)
        if not self._specs:
            raise LayerError(f"{self.path} holds no patterns: no optimiser step on a recorded layer was seen")
        specs = [self._specs[name] for name in self._named(layers)]
        inner, modules = find_layers(model, specs)
        with torch.inference_mode(False), torch.enable_grad(), observe(modules) as calls:
            scores = predicted_scores(run_model(inner, inputs), target)
            seen = [(name, call) for name, own in calls.items() for call in own]
            along = directions(scores, [call for _, call in seen])
        asked = []
        for spec in dict.fromkeys(spec for spec, _ in modules):
            own = [(call, d) for (name, call), d in zip(seen, along, strict=True) if name == spec.name]
            if own:
                module = next(module for other, module in modules if other == spec)
                asked.append(self._query(spec, module, own, len(scores), horizon))
        if not asked:
            names = ", ".join(spec.name for spec in specs)
            raise LayerError(f"the model's forward pass calls none of {names}")
        files = AnswerFiles(self._store.layout.answers) if cache else None
        return Attention(self._store, asked, self._columns.grouping, keep=self._keep, files=files)

    def verify(self, model: nn.Module | None = None, *, step: int | None = None) -> VerifyReport:
        """Rebuild every weight from the memory and compare: ``error = |Ŵ - W| / |W|`` over weight and bias.

        A layer is ``exact`` if its rule is, no step is marked otherwise, and the error is one that rounding can
        explain: 1e-5 in float32, 1e-9 in float64, more in narrower dtypes.

        ``model`` holds the weights to compare with, after ``step``; default the stored weights after the last step.

        Raises:
            StoreError: no weights to compare with: the recording was cut off and no model is given.
            RuleError: a layer was trained by an optimiser without an exact rule.
        """
        horizon = self._horizon(step)
        actual = self._actual(model, horizon)
        rows = []
        for spec in self._specs.values():
            rebuilt = rebuild(self._store, self._composition(spec, horizon))
            known = [name for name in spec.parameters if name in actual]
            left = sum(float((rebuilt[name] - actual[name].double().cpu()).square().sum()) for name in known)
            size = sum(float(actual[name].double().square().sum()) for name in known)
            error = (left / size) ** 0.5 if size else left**0.5 if known else float("nan")
            inexact = self._inexact_steps(spec, horizon)
            exact = self._is_exact(spec) and not inexact and error <= self._rounding(spec)
            rows.append((spec.name, error, self._rule(spec), exact, inexact))
        names = ("layer", "error", "rule", "exact", "inexact_steps")
        report = VerifyReport(
            {name: [row[k] for row in rows] for k, name in enumerate(names)},
            title=f"verify: weights after step {horizon} rebuilt from the memory",
            bars=(("layer",), "error"),
        )
        report.footer = f"largest relative error {report.max_error:.3g}"
        return report

    def weight(self, layer: str, step: int | None = None) -> Tensor:
        """The layer's weight [o, i] after any recorded step (0: the origin), rebuilt from the memory."""
        spec = self._spec(layer)
        return self._rebuilt(spec, self._horizon(step))[spec.weight]

    def state_dict(self, step: int | None = None) -> dict[str, Tensor]:
        """All recorded parameters after any recorded step, rebuilt; for ``load_state_dict(..., strict=False)``."""
        horizon = self._horizon(step)
        return {n: value for spec in self._specs.values() for n, value in self._rebuilt(spec, horizon).items()}

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
        found: dict[str, Tensor] = {}
        for spec in self._specs.values():
            found |= self._rebuilt(spec, self.steps, lambda rows: torch.isin(rows.sample, wanted))
        return found

    def dual(self, model: nn.Module) -> nn.Module:
        """A copy of ``model`` whose recorded layers answer in dual form: origin, plus attention over every pattern.

        Without gradients; every call streams through the memory.

        Raises:
            LayerError: ``model`` is not the recorded one.
        """
        inner, modules = find_layers(model, list(self._specs.values()))
        twin = copy.deepcopy(inner)
        for spec, module in modules:
            for name, other in list(inner.named_modules(remove_duplicate=False)):
                if other is module:
                    made_of = self._composition(spec, self.steps)
                    twin = with_module(twin, name, DualLinear(self._store, made_of, keep=self._keep))
        return twin

    def averaged(self, name: str, *, start: int = 1, every: int = 1, decay: float = 0.999) -> DualMemory:
        """This memory, asked about an average of the weights instead of the last ones; exact like them.

        ``"ema"`` and ``"swa"`` as ``torch.optim.swa_utils.AveragedModel`` keeps them when updated after steps
        ``start``, ``start + every``, … (``start=0``: a copy of the untrained weights to begin with); ``"asgd"``: the
        mean that ``torch.optim.ASGD`` keeps itself.

        Raises:
            RuleError: an unknown average, or settings that make none.
        """
        settings: dict[str, Any] = {"start": start, "every": every, "decay": decay}
        if name == "asgd":
            if not any("asgd" in self._rule(spec) for spec in self._specs.values()):
                raise RuleError(
                    f"{self.path} was not trained by torch.optim.ASGD: there is no mean of its own to ask about"
                )
        elif self._store.first_step:
            raise RuleError(
                f"{self.path} has folded its first {self._store.first_step} steps into the origin: "
                "an average needs every step; record with a larger max_bytes"
            )
        else:
            average_weights(name, horizon=self.steps, **settings)  # refuses settings that make no average
        twin = copy.copy(self)
        twin._average, twin._composed = (name, settings), {}
        return twin

    # ---- inside ----------------------------------------------------------------------------------------------

    def _composition(self, spec: LayerSpec, horizon: int) -> Composition:
        place = (spec.name, horizon)
        if place not in self._composed:
            if self._average is None:
                made_of = compose(self._store, spec, horizon=horizon, replay_bytes=self.replay_bytes)
            elif self._average[0] == "asgd":
                made_of = compose(self._store, spec, horizon=horizon, component=AVERAGE)
            else:
                weights = average_weights(self._average[0], horizon=horizon, **self._average[1])
                made_of = compose(self._store, spec, horizon=horizon, weights=weights, replay_bytes=self.replay_bytes)
            self._composed = {place: made_of} | {k: v for k, v in self._composed.items() if k[1] == horizon}
        return self._composed[place]

    def _rebuilt(
        self, spec: LayerSpec, horizon: int, leave_out: Callable[[Rows], Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The layer's parameters in the dtype the model has them in."""
        values = rebuild(self._store, self._composition(spec, horizon), leave_out)
        return {name: value.to(self._store.dtype(name)) for name, value in values.items()}

    def _query(
        self, spec: LayerSpec, module: nn.Module, calls: Sequence[tuple[Observed, Tensor]], queries: int, horizon: int
    ) -> LayerQuery:
        """A layer's calls as [q, p, …]: calls and places of a sequence side by side as positions."""
        for call, _ in calls:
            if queries > 1 and call.query.shape[0] != queries:
                raise LayerError(
                    f"layer {spec.name!r} saw inputs of shape {list(call.query.shape)} for {queries} queries: which "
                    "row belongs to which query is not known; ask one query at a time"
                )
        query = torch.cat([call.query.reshape(queries, -1, spec.in_features) for call, _ in calls], 1).cpu()
        direction = torch.cat([d.reshape(queries, -1, spec.out_features) for _, d in calls], 1).cpu()
        output = query.double() @ module.weight.detach().double().cpu().T  # type: ignore[operator]
        if module.bias is not None:
            output = output + module.bias.detach().double().cpu()  # type: ignore[operator]
        try:
            made_of = self._composition(spec, horizon)
        except RuleError as error:  # attention weights need no rule
            made_of = unknown_composition(spec, horizon, str(error))
        return LayerQuery(made_of, query, direction, output, f"{self._store.fingerprint} {self._average}")

    def _actual(self, model: nn.Module | None, horizon: int) -> Mapping[str, Tensor]:
        if model is not None:
            inner, _ = find_layers(model, list(self._specs.values()))
            return {name: parameter.detach() for name, parameter in inner.named_parameters()}
        latest = self._store.latest()
        if latest is None or latest[0] != horizon or self._average is not None:
            held = "holds no weights" if latest is None else f"holds the weights after step {latest[0]}"
            raise StoreError(f"{self.path} {held}: pass the model whose weights verify() is to compare with")
        return latest[1]

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

    def _optimizers(self, spec: LayerSpec) -> list[str]:
        histories = [self._store.histories[name] for name in spec.parameters if name in self._store.histories]
        return list(dict.fromkeys(name for history in histories for name in history.optimizer))

    def _rule(self, spec: LayerSpec) -> str:
        rules = [rule_for(name) for name in self._optimizers(spec)]
        return ", ".join("none" if rule is None else rule.name for rule in rules)

    def _rounding(self, spec: LayerSpec) -> float:
        """The error that the steps' rounding can explain, for the dtype of the layer's weight."""
        return ROUNDING.get(self._store.dtype(spec.weight), 1e-2)

    def _inexact_steps(self, spec: LayerSpec, horizon: int) -> int:
        return max(self._store.inexact_steps(name, horizon) for name in spec.parameters)

    def _is_exact(self, spec: LayerSpec) -> bool:
        return all(
            (rule := rule_for(name)) is not None and rule.exactness is not Exactness.APPROXIMATE
            for name in self._optimizers(spec)
        )
