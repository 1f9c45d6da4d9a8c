"""What one optimiser step leaves behind: patterns, ledger entries and, the first time, an origin.

1. Before the step the origin of parameters seen for the first time is kept, the gradient is compared with what the
   pending rows rebuild, and the hyper-parameters in force are noted.
2. After it the pending rows become patterns of this step, with a ledger entry for every parameter that was stepped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor
from torch.optim import Optimizer

from dualhook.capture import Audit, Guard, LayerProbe, Seen, Selection, Use, whole
from dualhook.optimizers import FittedRule, Rule, StepFit, class_name, rule_for
from dualhook.recorder.backlog import Backlog
from dualhook.recorder.changes import Changes, Look
from dualhook.recorder.fitting import Fitting
from dualhook.recorder.heads import Heads
from dualhook.recorder.layers import Layers
from dualhook.recorder.measuring import Measuring, is_whole
from dualhook.recorder.notices import Notices
from dualhook.recorder.origins import keep_origins
from dualhook.recorder.pending import PATIENCE, PENDING_BYTES, Pending
from dualhook.recorder.ranks import Ranks
from dualhook.recorder.selfcheck import is_due, predict
from dualhook.recorder.settings import loss_scale_of, numbers_of, refuse, state_numbers
from dualhook.recorder.snapshots import Snapshots
from dualhook.recorder.staging import at_once, is_elsewhere
from dualhook.recorder.step import Glance, Step
from dualhook.recorder.watched import Left, Watched, fingerprints, gradient_of, state_of
from dualhook.records import Batch, LayerSpec, Mark, Rows
from dualhook.store import Writer

__all__ = ["StepBook"]


class StepBook:
    """Keeps the rows until a step uses them, and the ledger of the steps. The sink of the intakes.

    ``on_step(step)`` is called once a step is over: with the first backward pass or optimiser step that follows.
    """

    def __init__(
        self,
        selection: Selection,
        writer: Writer,
        *,
        ranks: Ranks,
        stored_in: Mapping[str, torch.dtype],
        heads: Heads,
        on_step: Callable[[int], None],
        guard: Guard,
    ) -> None:
        self.guard = guard
        self.writer = writer
        self.ranks = ranks
        self.step = 0
        self._whole = 0  # the last step with nothing missing, as far as is known
        self._moves = False  # whether the current step has changed the weights and is not in the book yet
        self.recording = True
        self.batch: Batch | None = None
        self.batch_since = 0
        self.trained_by: dict[str, str] = {}
        """The class of the optimiser that holds each parameter, as far as it has been seen."""
        self.pending = Pending(writer, ranks, stored_in, heads)
        self._on_step = on_step
        self.layers = Layers(selection, self)
        self.measuring = Measuring(ranks, writer, self.layers.probes())
        self.audit: Audit | None = None
        self.input_sizes: frozenset[int] = frozenset()
        self.snapshots = Snapshots(writer)
        self._fitting = Fitting()
        self._stepping: list[Optimizer] = []  # the optimisers that have stepped in the current step
        self._current: Step | None = None
        self._skipping: list[Watched] = []  # the parameters of a step that is called and will skip itself
        self._broken: set[str] = set()  # parameters whose optimiser raised in the middle of a step
        self._notices = Notices(silent=ranks.rank > 0)
        self._backlog = Backlog(writer, ranks, self._notices)
        self._changes = Changes(ranks, writer)
        self._arriving: deque[int] = deque()  # the steps that are over and not in host memory yet

    def go_on(self, step: int, begun: Container[str]) -> None:
        """Continue after a step; the recording of some parameters has begun."""
        self.step = self._whole = step
        self.snapshots.go_on(step)
        for name, watched in self.layers.watched.items():
            if name in begun:
                watched.go_on(step)

    @property
    def stepped(self) -> bool:
        """Whether any optimiser has stepped on a recorded parameter."""
        return any(watched.stepped for watched in self.layers.watched.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all rows so far."""
        self.pending.settle()
        return self.measuring.recorded_bytes

    def narrow(self, selection: Selection) -> None:
        """Go on with what a smaller selection holds; no step has used rows of the rest."""
        gone = set(self.layers.names) - {spec.name for spec in selection.specs}
        self.pending.drop(gone)
        self.layers.narrow(selection)
        self.measuring = Measuring(self.ranks, self.writer, self.layers.probes())

    # ---- rows ------------------------------------------------------------------------------------------------

    def take(self, layer: str, rows: Rows) -> None:
        """Keep accumulated rows until a step uses them."""
        with self.pending.lock:
            self._end_step()
            if self.pending.holds(layer) and self.pending.is_full:  # of a step's first rows there is no need to look
                self._give_up(self.layers.names, f"{PENDING_BYTES / 1e9:.1f} GB of rows without an optimiser step")
            self.pending.take(self.layers.spec(layer), rows, self.layers.in_use(layer))

    def drop(self, layer: str) -> None:
        """Forget rows whose gradient was zeroed."""
        self.pending.drop([layer])

    def holds(self, layer: str) -> bool:
        """Whether the layer has rows that no step has used."""
        return self.pending.holds(layer)

    # ---- steps -----------------------------------------------------------------------------------------------

    def members(self, optimizer: Optimizer) -> Iterator[tuple[Watched, int]]:
        """The recorded parameters of an optimiser with the number of their group."""
        own = {id(w.parameter): w for w in self.layers.watched.values() if w.parameter is not None}
        for number, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                if id(parameter) in own:
                    yield own[id(parameter)], number

    def meet(self, optimizer: Optimizer, members: Sequence[tuple[Watched, int]] | None = None) -> str:
        """Note which parameters an optimiser holds (its ``members``); returns what the ledger calls it: its class.

        With a setting that its class's rule does not know it is called by that as well, and fitted.

        Raises:
            RuleError: an optimiser whose steps cannot be recorded at all.
        """
        refuse(optimizer, (watched.parameter for watched in self.layers.watched.values()))
        name = class_name(type(optimizer))
        rule = rule_for(name)
        refused = {rule.refuses(numbers_of(group, rule)) for group in optimizer.param_groups}
        name += "".join(f" ({why})" for why in sorted(refused) if why)
        self.trained_by |= {watched.name: name for watched, _ in members or self.members(optimizer)}
        return name

    def before(self, optimizer: Optimizer, has_closure: bool) -> None:
        """An optimiser is about to step; with a closure the backward pass is still to come."""
        if self._current is not None:  # its step ended in an exception, half done perhaps
            self.pending.then(partial(self._note, self._current.look))
            self._broken |= {watched.name for watched, _, _ in self._current.stepped}
            self._current = None
        members = list(self.members(optimizer))
        self.ranks.check(watched.parameter for watched, _ in members)
        loss_scale = loss_scale_of(optimizer)
        if loss_scale is None:  # nothing will happen, but to the versions of the state's tensors
            self._skipping = [watched for watched, _ in members if not watched.state_changed_since(optimizer)]
        if not members or loss_scale is None:
            return
        name = self.meet(optimizer, members)
        rule = rule_for(name)
        if isinstance(rule, FittedRule):
            self._notices.fitted(name)
        if any(known is optimizer for known in self._stepping):
            self._end_step()
        if self.ranks.sharded and not self._stepping:  # the same place in all processes, unlike in a backward pass
            self.snapshots.after(self.step)
        among = [watched for watched, _ in members] if self._stepping else list(self.layers.watched.values())
        if self.ranks.sharded:
            self.pending.settle()
        if not self._stepping:
            self._seal_if_full()  # what a device brings: its backward pass has a thread of its own, and is not held up
        look = self._changes.look(among, self.step, self.pending.bring)
        for watched, _ in members:
            for intake in self.layers.intakes_of(watched.spec):
                intake.settle()
        stepped = [
            (watched, group, watched.mark_before(optimizer, rule))
            for watched, group in members
            if has_closure or gradient_of(watched) is not None  # torch skips the others
        ]
        before = self.step - 1 if self._stepping else self.step  # a later optimiser of the current step
        keep_origins(self.writer, self.layers.watched, optimizer, [watched for watched, _, _ in stepped], before, look)
        hyper = [numbers_of(group, rule) for group in optimizer.param_groups]
        states = {w.name: (state_of(optimizer, w.parameter), hyper[group]) for w, group, _ in stepped}
        state = state_numbers(rule, states, self.pending.bring)
        broken = {watched.name for watched, _, _ in stepped if watched.name in self._broken}
        step = Step(optimizer, name, has_closure, stepped, hyper, state, look, broken, loss_scale)
        if isinstance(rule, FittedRule):
            step.fitting = {w.name: whole(w.parameter).clone() for w, _, _ in stepped if w.parameter is not None}
        if not has_closure:
            self._measure(step)
            self._fitting.see(step)
            self._predict(step, rule)
        self._current = step

    def after(self, optimizer: Optimizer) -> None:
        """The step has happened."""
        for watched in self._skipping:
            watched.remember_state(optimizer)
        step, self._current, self._skipping = self._current, None, []
        if step is None or step.optimizer is not optimizer:
            return
        self._moves = True
        if step.has_closure:  # its forward pass may have been the first, which tells what is recorded at all
            watched_now = self.layers.watched
            step.stepped = [one for one in step.stepped if watched_now.get(one[0].name) is one[0]]
            self._measure(step)
            self._fitting.see(step)
        if not self._stepping:
            self.step += 1
        self._stepping.append(optimizer)
        for predicted in step.predicted.values():
            predicted.see(self.pending.bring)
        stepped = [watched for watched, _, _ in step.stepped]
        entries = zip(stepped, fingerprints(stepped, self.pending.bring), strict=True)
        left = [watched.remember(optimizer, own) for watched, own in entries]
        # once these copies have begun: rows without their ledger entries would be sealed without them
        for spec in dict.fromkeys(watched.spec for watched in stepped):
            for layer in self.layers.uses(spec):
                self.pending.commit(layer, self.step)
        self._broken -= {watched.name for watched in stepped}
        self._arriving.append(self.step)
        fits = self._fitting.of(step)
        self.pending.then(partial(self._arrived, step, self.step, left, fits, recording=self.recording))
        self.snapshots.stepped(optimizer, step.name, stepped)
        self._whole, self._moves = self.step, False
        self.pending.arrive()

    def _arrived(
        self, step: Step, number: int, left: Sequence[Left], fits: Mapping[str, StepFit], *, recording: bool
    ) -> None:
        """All that there is to know of a step is in host memory."""
        changed = self._note(step.look) | step.broken
        now = {watched.name: entries for watched, entries in step.look.seen}
        for watched, _, _ in step.stepped:
            if watched.name in changed:
                watched.accept(number - 1, now.get(watched.name))
        taken = step.taken(number, fits, changed, recording=recording)
        for one in left:
            one.recorded(number)
        self._arriving.popleft()
        self._backlog.take(taken)

    def settle(self) -> None:
        """Put every step that is over in the ledger."""
        self.pending.settle()
        self._backlog.work()

    def end(self, *, in_step: bool) -> bool:
        """Go back to the last whole step for good; whether the weights are still those that it has left.

        ``in_step``: an optimiser's step has been cut off, on a backward pass on which others may have stepped.
        """
        with suppress(Exception):  # it may be what has gone wrong: then steps that are not in the ledger are lost
            self.pending.settle()
        with suppress(Exception):  # or this may be
            self._backlog.work()
        self.pending.give_up()
        lost = [*self._arriving, self._backlog.give_up()]
        self._arriving.clear()
        self._whole = min([self._whole, *(number - 1 for number in lost if number is not None)])
        if in_step and self._stepping:
            self._whole = min(self._whole, self.step - 1)
        is_current = self._whole == self.step and self._current is None and not self._moves
        self.step = self._whole
        self.pending.drop(self.layers.names)
        self.writer.builder.withdraw(self.step)
        return is_current

    def notice(self, among: Sequence[Watched] | None = None) -> set[str]:
        """Note Lookahead's synchronisations since the last step; the parameters that something else has changed.

        Called between two steps: what is new belongs to the one before.
        """
        self.pending.settle()
        seen = list(self.layers.watched.values()) if among is None else among
        return self._note(self._changes.look(seen, self.step, at_once))

    def _note(self, look: Look) -> set[str]:
        changed, entries = self._changes.found(look)
        if entries:
            self._backlog.work()  # of one parameter the ledger is in order
            self.writer.builder.add(look.step, [] if self.ranks.rank else entries)
        return changed

    def latest(self) -> tuple[dict[str, Tensor], list[str]]:
        """The parameters as the last step left them, and the names of those that something has changed since."""
        recorded = [watched for watched in self.layers.watched.values() if watched.stepped]
        changed = sorted(self.notice(recorded))
        layers = {watched.spec.name for watched in recorded}
        values = {
            watched.name: whole(parameter).to("cpu", copy=True).contiguous()
            for watched in self.layers.watched.values()
            if watched.spec.name in layers and (watched.name not in changed or self.ranks.sharded)
            if (parameter := watched.parameter) is not None
        }
        return {name: value for name, value in values.items() if name not in changed}, changed

    def _end_step(self) -> None:
        if not self._stepping:
            return
        self._stepping = []
        self.pending.end_step()
        if self.step == 1:
            self.pending.settle()  # what recording costs is told
        if late := self.pending.late(self.layers.names):
            self._give_up(late, f"rows that {PATIENCE} steps have not used")
        self._on_step(self.step)
        if not self.ranks.sharded:
            self.snapshots.after(self.step)
        if self.pending.is_idle:
            self._seal_if_full()

    def _seal_if_full(self) -> None:
        """Between two steps: whole ones, of what has come to the host so far."""
        if self.writer.full:
            _, last = self.writer.builder.steps or (0, 0)
            if self._arriving and self._arriving[0] <= last:  # of its optimisers some are in the ledger already
                self.pending.settle()
            self.writer.seal()

    def _give_up(self, layers: Sequence[str], why: str) -> None:
        """Drop pending rows before they fill the memory; a step that uses them after all is marked unexplained."""
        self.pending.drop(layers)
        trained = [layer for layer in layers if self.layers.spec(layer).weight in self.trained_by]
        if trained:  # the others belong to no optimiser: nobody will miss them
            self._notices.once(
                "dropped", f"after step {self.step}: dropped {why}, of layer {trained[0]!r} among others"
            )

    def _measure(self, step: Step) -> None:
        """Compare every gradient of the step with what the rows rebuild, or see some of it: that can be done later."""
        layers: dict[str, dict[str, Tensor]] = {}
        for watched, _, _ in step.stepped:
            if (gradient := gradient_of(watched)) is not None:
                layers.setdefault(watched.spec.name, {})[watched.name] = gradient
        whole = is_whole(self.step)
        seen = dict(self._glances(layers, whole=whole))
        brought = iter(self.pending.bring([values for own in seen.values() for values in own.tensors]))
        step.glances = [Glance(probe, own.each(lambda _: next(brought))) for probe, own in seen.items()]
        for glance in step.glances:
            del layers[glance.probe.spec.name]
        if layers:
            self.pending.settle()
            uses = {layer: self._uses_of(self.layers.spec(layer)) for layer in layers}
            step.measured = self.measuring.measure(layers, uses, whole=whole)

    def _glances(self, layers: Mapping[str, Mapping[str, Tensor]], *, whole: bool) -> Iterator[tuple[LayerProbe, Seen]]:
        """Those of the gradients, by layer, that can be compared with the rows later."""
        for layer, gradients in layers.items():
            probe = self.measuring.late_probe(layer)
            if probe is not None and (seen := self._glance(probe, gradients, whole=whole)) is not None:
                yield probe, seen

    def _glance(self, probe: LayerProbe, gradients: Mapping[str, Tensor], *, whole: bool) -> Seen | None:
        if any(map(is_elsewhere, gradients.values())):
            # whether they were zeroed is not asked, which would make training wait: such rows have the scale 0
            held = any(map(self.pending.holds, self.layers.uses(probe.spec)))
            return probe.glance(gradients, whole=whole) if held else None
        if whole or not probe.is_plain:
            return None
        for intake in self.layers.intakes_of(probe.spec):
            intake.discard_if_zeroed()
        return probe.glance(gradients, whole=whole) if self.pending.has_plain(probe.spec.name) else None

    def _uses_of(self, spec: LayerSpec) -> list[Use]:
        """The rows that a step on a layer uses, of all uses of its weight."""
        for intake in self.layers.intakes_of(spec):
            intake.discard_if_zeroed()
        # weight and bias in two optimisers: the first has committed the rows
        committed = self.step if self._stepping else None
        found = {layer: self.pending.of(layer, committed) for layer in self.layers.uses(spec)}
        return self.layers.seen_as(spec, {layer: rows for layer, rows in found.items() if rows is not None})

    def _predict(self, step: Step, rule: Rule) -> None:
        """The self-check, where it is due: what the rule says that the step will do."""
        if isinstance(rule, FittedRule) or not is_due(self.step + 1, rule):
            return
        for watched, _, mark in step.stepped:
            if (gradient := step.gradient_of(watched)) is not None:
                found = predict(watched, step.optimizer, rule, gradient, bool(mark & Mark.FRESH), self.pending.bring)
                if found is not None:
                    step.predicted[watched.name] = found
