"""From a row that was seen to a row that counts: only what a parameter's gradient has accumulated.

A row arrives in a backward pass. It is kept once the pass accumulates into the layer's parameters (``autograd.grad``
never does), and dropped again when the gradient is zeroed before an optimiser step used it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dualhook.capture.audit import Audit
from dualhook.capture.autograd import at_task_end, current_task
from dualhook.capture.calls import Call, as_rows, compiled_call, is_sequence_first
from dualhook.capture.compiled import register
from dualhook.capture.hooks import Guard
from dualhook.capture.kinds import Tapped
from dualhook.capture.recompute import note_batch, noted_batch
from dualhook.capture.sharded import Place, local
from dualhook.records import Batch, Rows

__all__ = ["Intake", "Sink"]

FIRST = 64  # entries of a gradient that are looked at before all of them


class Sink(Protocol):
    """Where rows go that have been accumulated; the recorder is one."""

    guard: Guard  # what goes wrong on the way of the rows is told to it
    recording: bool  # whether anything is captured at all
    batch: Batch | None  # what the training loop is working on
    batch_since: int  # autograd's number of nodes when it began to
    audit: Audit | None  # of the forward pass that is looked at
    input_sizes: frozenset[int]  # those of the model's inputs that may be the batch's

    def take(self, layer: str, rows: Rows) -> None:
        """Keep rows as pending: accumulated, used by no step yet."""
        ...

    def drop(self, layer: str) -> None:
        """Forget the layer's pending rows."""
        ...

    def holds(self, layer: str) -> bool:
        """Whether the layer has pending rows."""
        ...


@dataclass
class Arrival:
    """One call's rows, between their arrival in a backward pass and their accumulation."""

    task: int
    call: Call
    output_grad: Tensor
    batch: Batch | None


class Intake:
    """The gate of one layer: decides which of its rows are in the gradients."""

    def __init__(self, tapped: Tapped, sink: Sink) -> None:
        self.spec = tapped.spec
        self.tapped = tapped
        self.module = tapped.module
        self.guard = sink.guard
        self.is_left_out = False
        """Whether its layer is not recorded after all."""
        self.was_called = False
        """Whether it has heard of any call."""
        self._is_sequence_first = tapped.is_sequence_first
        self.number = register(self)
        self._sink = sink
        self._arrived: list[Arrival] = []
        self._left: tuple[int, int] | None = None  # the first gradient after the last accumulation: which, and version
        self._watched: dict[str, tuple[nn.Parameter, RemovableHandle, bool]] = {}
        names = zip(self.spec.parameters, tapped.attributes, strict=False)
        self.places = {name: Place(self.module, attribute) for name, attribute in names}
        """Where the layer's parameters stand in its module, by their names."""
        self._any: Tensor | None = None  # whether anything of the gradient's shard was not zero then

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The layer's parameters by their names in the model, as the module has them now."""
        found = {name: place.used for name, place in self.places.items()}
        return {name: value for name, value in found.items() if value is not None}

    def called_with(self, name: str) -> nn.Parameter | None:
        """The parameter that the last differentiable call has used: of a sharded one the whole, put in its place."""
        return self._watched[name][0] if name in self._watched else None

    def on_call(self, call: Call) -> Callable[[Tensor], None] | None:
        """A differentiable call of the layer; returns what its output gradient is to do."""
        arrive = self.on_late_call()
        if arrive is None:
            return None
        # autograd refuses in-place changes of x only if it needs x for the weight's gradient
        weight = self.parameters.get(self.spec.weight)
        call = call.owned(copy=weight is None or not weight.requires_grad)

        def on_grad(output_grad: Tensor) -> None:
            arrive(call, output_grad)

        return on_grad

    def on_late_call(self) -> Callable[[Call, Tensor], None] | None:
        """The same where the call's rows are known with their gradients only."""
        trained = {name: parameter for name, parameter in self.parameters.items() if parameter.requires_grad}
        if self.is_left_out or not (self._sink.recording and trained):
            return None
        self.was_called = True
        self._watch(trained)
        batch = self._batch_of_call()

        def arrive(call: Call, output_grad: Tensor) -> None:
            self._arrive(call, output_grad.detach(), batch)

        return arrive

    def on_compiled_call(self, key: Tensor, *, is_fixed: bool) -> Callable[[Tensor], None] | None:
        """The same in compiled code, which hands over the input in the backward pass."""
        return self.on_call(replace(compiled_call(self.module, self.spec, key), is_fixed=is_fixed))

    def on_output(self, call: Call, output: Tensor) -> None:
        """What a call has made: nothing is put in its place; an audit hears of it."""
        if self._sink.audit is not None:
            self._sink.audit.saw(self.spec.name, output)

    def on_silent_call(self) -> None:
        """A call without gradients; gradient checkpointing makes it again in the backward pass."""
        if self._sink.recording:
            self.was_called = True
            note_batch(self._sink, self._batch_of_call())

    def detach(self) -> None:
        """Take the hooks off the parameters."""
        for parameter, handle, untouched in reversed(self._watched.values()):
            handle.remove()
            if untouched and not parameter._post_accumulate_grad_hooks:
                parameter._post_accumulate_grad_hooks = None  # type: ignore[assignment]
        self._watched = {}

    def settle(self) -> None:
        """An optimiser is about to step.

        Outside a backward pass, what still waits belongs to one that an exception cut off. Inside one (optimisers that
        step as soon as a gradient is there), what has arrived is in the gradient.
        """
        if current_task() < 0:
            self._arrived = []
        else:
            self.accumulate()

    def accumulate(self) -> None:
        """The current backward pass has accumulated: its rows are in the gradient."""
        task = current_task()
        ready = [arrival for arrival in self._arrived if arrival.task == task]
        if ready:
            self._arrived = [arrival for arrival in self._arrived if arrival.task != task]
            for arrival in ready:
                self._sink.take(self.spec.name, as_rows(self.spec, arrival.call, arrival.output_grad, arrival.batch))
        self._left = _state(self._gradient())
        if ready and any(place.is_sharded for place in self.places.values()):
            at_task_end(self._reduced)  # a shard's gradient is there once those of all processes have been summed

    def _reduced(self) -> None:
        with self.guard:
            self._left = _state(self._gradient())
            held = [local(gradient).any() for gradient in self._gradients()]
            self._any = torch.stack(held).any() if held else None

    def discard_if_zeroed(self) -> None:
        """Drop pending rows whose gradient has been zeroed since they were accumulated."""
        if not self._sink.holds(self.spec.name):
            return
        gradient = self._gradient()
        if _state(gradient) == self._left:
            return  # untouched since
        # all-zero gradients without rows are as exact as with them, so a zero that came by chance costs nothing
        zero = not any(_any(local(one)) for one in self._gradients())
        # a shard may well be zero all along: then what wrote to it has zeroed between passes, or scaled before a step
        told = self._any is None or current_task() >= 0 or bool(self._any)
        if gradient is None or (zero and told):
            self._sink.drop(self.spec.name)

    def _gradient(self) -> Tensor | None:
        """The gradient that tells whether a loop has zeroed: of the weight, or of the bias where only that trains."""
        lead = next(self._trained(), None)
        return None if lead is None else lead.grad

    def _batch_of_call(self) -> Batch | None:
        """The batch of a call that is made now, or of one whose output gradient is there now."""
        sink = self._sink
        return sink.batch if current_task() < 0 else noted_batch(sink, sink.batch, sink.batch_since)

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self._trained() if parameter.grad is not None]

    def _trained(self) -> Iterator[nn.Parameter]:
        """The parameters that train, as an optimiser has them."""
        found = (place.trained for place in self.places.values())
        return (parameter for parameter in found if parameter is not None and parameter.requires_grad)

    def _watch(self, trained: Mapping[str, nn.Parameter]) -> None:
        """Hook the parameters that train: their gradients' accumulation is what makes rows count."""
        for name, parameter in trained.items():
            if not (name in self._watched and self._watched[name][0] is parameter):
                untouched = parameter._post_accumulate_grad_hooks is None
                hook = _Accumulated(self)
                handle = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
                self._watched[name] = (parameter, handle, untouched)

    def _arrive(self, call: Call, output_grad: Tensor, batch: Batch | None) -> None:
        self.discard_if_zeroed()
        task = current_task()
        if not any(arrival.task == task for arrival in self._arrived):
            at_task_end(lambda: self._forget(task))
        self._arrived.append(Arrival(task, self._in_order(call, output_grad, batch), output_grad, batch))

    def _in_order(self, call: Call, output_grad: Tensor, batch: Batch | None) -> Call:
        """The call with what is known of the order of its rows, from other calls of the layer too."""
        if batch is None:
            return call
        size, sizes = batch.samples.numel(), self._sink.input_sizes  # of compiled models unknown
        told = is_sequence_first(output_grad.shape[:-1], size)
        self._is_sequence_first = self._is_sequence_first if told is None else told
        first = self._is_sequence_first if call.is_sequence_first is None else call.is_sequence_first
        return replace(call, is_sequence_first=first, may_be_flat=not sizes or size in sizes)

    def _forget(self, task: int) -> None:
        self._arrived = [arrival for arrival in self._arrived if arrival.task != task]


def _any(values: Tensor) -> bool:
    """Whether a number is not zero; the first ones mostly tell."""
    return bool(values.flatten()[:FIRST].any()) or bool(values.any())


def _state(gradient: Tensor | None) -> tuple[int, int] | None:
    return None if gradient is None else (id(gradient), gradient._version)


class _Accumulated:
    """The hook on a parameter; weak, since the garbage collector does not see through torch's parameter hooks."""

    def __init__(self, intake: Intake) -> None:
        self._intake = weakref.ref(intake)

    def __call__(self, parameter: Tensor) -> None:
        intake = self._intake()
        if intake is None:
            return
        with intake.guard:
            # functional_call puts other parameters in the layer's place for a while: theirs is another gradient
            if any(place.used is parameter for place in intake.places.values()):
                intake.accumulate()
