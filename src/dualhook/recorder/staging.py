"""What is on its way to host memory; from a CUDA device without making training wait for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Bring", "Staging", "at_once", "in_one_go", "is_elsewhere"]

Bring = Callable[[Sequence[Tensor]], list[Tensor]]
"""Tensors in host memory from tensors anywhere, which nothing may write to any more; there now, or later."""

SMALL_BYTES = 2**16  # tensors that travel together
STAGED_BYTES = 2**30  # of pinned memory, before training has to wait


def is_elsewhere(values: Tensor) -> bool:
    """Whether numbers are somewhere else than in host memory."""
    return not values.is_cpu


def at_once(values: Sequence[Tensor]) -> list[Tensor]:
    """Tensors in host memory, now: training waits for each."""
    return [one.cpu() for one in values]


def in_one_go(values: Sequence[Tensor], bring: Bring) -> list[Tensor]:
    """Tensors [k] in host memory: of those elsewhere, which may be written to again at once, copies by ``bring``."""
    found, alike = list(values), dict[tuple[torch.device, torch.dtype], list[int]]()
    for number, one in enumerate(values):
        if is_elsewhere(one):
            alike.setdefault((one.device, one.dtype), []).append(number)
    if alike:
        brought = bring([torch.cat([values[number] for number in numbers]) for numbers in alike.values()])
        for numbers, there in zip(alike.values(), brought, strict=True):
            parts = torch.split(there, [len(values[number]) for number in numbers])
            for number, part in zip(numbers, parts, strict=True):
                found[number] = part
    return found


class Done(Protocol):
    """Copies that a courier has begun; torch's CUDA events are such."""

    def query(self) -> bool:
        """Whether they have ended."""
        ...

    def synchronize(self) -> None:
        """Wait until they have."""
        ...


class Courier(Protocol):
    """Copies to the host that end some time later, in the order in which they begin."""

    def copies(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Begin to copy tensors, which nothing writes to any more."""
        ...

    def done(self) -> Done:
        """What tells of all that has begun."""
        ...


class CudaCourier:
    """Copies on a stream of its own, into pinned memory, which torch keeps for the next ones."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copies(self, values: Sequence[Tensor]) -> list[Tensor]:
        together: dict[torch.dtype | int, list[int]] = {}
        for number, one in enumerate(values):
            together.setdefault(one.dtype if one.nbytes < SMALL_BYTES else number, []).append(number)
        loads = [
            values[numbers[0]] if len(numbers) == 1 else torch.cat([values[number].reshape(-1) for number in numbers])
            for numbers in together.values()
        ]
        found = list(values)
        for numbers, there in zip(together.values(), self._copies(loads), strict=True):
            parts = torch.split(there.view(-1), [values[number].numel() for number in numbers])
            for number, part in zip(numbers, parts, strict=True):
                found[number] = part.view(values[number].shape)
        return found

    def _copies(self, values: Sequence[Tensor]) -> list[Tensor]:
        there = [torch.empty(one.shape, dtype=one.dtype, pin_memory=True) for one in values]
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for here, copy in zip(values, there, strict=True):
                copy.copy_(here, non_blocking=True)
                here.record_stream(self._stream)  # its memory is not to be used again before the copy has ended
        return there

    def done(self) -> Done:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event


def courier_of(device: torch.device) -> Courier | None:
    """Who copies from a device; None: training waits for each copy."""
    return CudaCourier(device) if device.type == "cuda" else None


@dataclass
class Waiting:
    """What is to be done once copies have ended; ``ends_step``: with it a step is complete."""

    action: Callable[[], object]
    copies: tuple[Done, ...]
    nbytes: int
    ends_step: bool = False


class Staging:
    """Copies to the host, and what is to be done when they are there: everything in the order in which it came.

    :meth:`bring` begins copies; their numbers are there when an action is called that :meth:`then` takes afterwards.
    Where nothing is on its way actions are called at once.
    """

    def __init__(self) -> None:
        self._waiting: deque[Waiting] = deque()
        self._couriers: dict[torch.device, Courier | None] = {}
        self._begun: dict[torch.device, Courier] = {}  # those who have begun copies that nothing waits for yet
        self._begun_bytes = 0
        self._bytes = 0
        self._is_busy = False
        self._error: Exception | None = None  # what an action has ended with: until it is cleared nothing more is done

    @property
    def is_idle(self) -> bool:
        """Whether nothing is on its way."""
        return not (self._waiting or self._begun)

    def bring(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Tensors in host memory: of those elsewhere, which nothing may write to any more, copies under way."""
        found, alike = list(values), dict[torch.device, list[int]]()
        if not any(map(is_elsewhere, values)):
            return found
        for number, one in enumerate(values):
            if is_elsewhere(one):
                alike.setdefault(one.device, []).append(number)
        for device, numbers in alike.items():
            if device not in self._couriers:
                self._couriers[device] = courier_of(device)
            courier, own = self._couriers[device], [values[number] for number in numbers]
            if courier is None:
                copies = at_once(own)
            else:
                copies, self._begun[device] = courier.copies(own), courier
                self._begun_bytes += sum(one.nbytes for one in copies)
            for number, copy in zip(numbers, copies, strict=True):
                found[number] = copy
        return found

    def then(self, action: Callable[[], object], *, nbytes: int = 0) -> None:
        """Call ``action`` once everything is there that has been begun, and everything before it has been done.

        It keeps ``nbytes`` of host memory until then, beside what :meth:`bring` takes.
        """
        if self.is_idle:
            action()
            return
        self._wait(action, nbytes)
        if self._bytes > STAGED_BYTES:
            self.drain()

    def end_step(self) -> None:
        """With everything so far a step is complete."""
        if self._waiting:
            self._waiting[-1].ends_step = True

    def arrive(self) -> None:
        """Do what can be done without waiting, of complete steps."""
        whole = 0
        for count, one in enumerate(self._waiting, 1):
            if not all(copies.query() for copies in one.copies):
                break
            whole = count if one.ends_step else whole
        self._work(whole)

    def drain(self) -> None:
        """Wait for all copies, and do everything."""
        if self._begun:
            self._wait(_nothing)
        self._work(len(self._waiting))

    def clear(self) -> None:
        """Forget everything, errors too; copies end by themselves."""
        self._waiting.clear()
        self._begun, self._begun_bytes, self._bytes = {}, 0, 0
        self._error = None

    def _wait(self, action: Callable[[], object], nbytes: int = 0) -> None:
        copies, nbytes = tuple(courier.done() for courier in self._begun.values()), nbytes + self._begun_bytes
        self._waiting.append(Waiting(action, copies, nbytes))
        self._bytes += nbytes
        self._begun, self._begun_bytes = {}, 0

    def _work(self, count: int) -> None:
        if self._is_busy:  # an action asks for what came before it, all of which has been done
            return
        if self._error is not None:
            raise self._error
        self._is_busy = True
        try:
            for _ in range(count):
                for copies in self._waiting[0].copies:
                    copies.synchronize()
                one = self._waiting.popleft()
                self._bytes -= one.nbytes
                one.action()
        except Warning:  # somebody has made it an error; what it warns of has been done
            raise
        except Exception as error:
            self._error = error  # what comes after may not be done without it
            raise
        finally:
            self._is_busy = False


def _nothing() -> None:
    pass
