"""A memory as it lies there: what was recorded, and what its layers are made of."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from dualhook.columns import Columns
from dualhook.composition import compose, unknown_composition
from dualhook.errors import DualHookError, LayerError, RuleError
from dualhook.host import asked_on_host
from dualhook.maps import map_of
from dualhook.optimizers import average_weights
from dualhook.progress import ReplayProgress
from dualhook.query import REPLAY_BYTES, Composition, rebuild
from dualhook.records import AVERAGE, VALUE, LayerSpec, Rows
from dualhook.store import Store, located
from dualhook.table import Table
from dualhook.verification import explained_layers

__all__ = ["OnDamage", "Reading"]

OnDamage = Literal["raise", "skip"]


@asked_on_host
class Reading:
    """What a memory holds. Steps count optimiser steps from 1; step 0 is where recording began."""

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
        kinds = [("sparse rows", self._store.is_sparse), ("rows in 8 bits", self._store.is_eight_bit)]
        told = " and ".join(kind for kind, is_so in kinds if is_so)
        segments = f"{len(self._store.segments)} segments{f' of {told}' if told else ''}"
        begin = f"steps {self._store.first_step + 1} to {self.steps}, earlier ones folded into the origin"
        return Table(
            explained_layers(self._store, self._primary.values(), self.steps),
            title=str(self.path),
            footer=f"{begin if self._store.first_step else f'{self.steps} steps'}, "
            f"{len(self.samples):,} samples, {self.nbytes / 1e9:.3g} GB in {segments}; "
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

    # ---- inside ----------------------------------------------------------------------------------------------

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
