"""A pass as tasks that can be done anywhere, and an executor that does them.

What a task is and in which order results come together is fixed by the memory alone: no executor, no number of threads
and no lost worker changes a bit of an answer, as long as all processors multiply alike.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from threading import RLock
from typing import Any, Protocol

import torch
from torch import Tensor

from dualhook.errors import DualHookError, StoreError
from dualhook.query.collectors import TopPatterns, TopPatternsBy
from dualhook.query.scores import LayerQuery, Scores
from dualhook.query.screening import Screening
from dualhook.records import Piece

__all__ = ["HERE", "Collector", "Done", "Task", "Workers"]

IN_FLIGHT = 256  # tasks that an executor has at a time


class Collector(Protocol):
    """Something that sees every block of a pass once, or has it seen by others and takes what they found."""

    def fresh(self) -> Collector:
        """One that has seen nothing, for a task; it may know what others have found."""
        ...

    def add(self, scores: Scores) -> None:
        """Take one block."""
        ...

    def found(self) -> Any:
        """What a task sends back."""
        ...

    def merge(self, found: Any) -> None:
        """Take what a task has found; tasks come oldest first, unless all collectors look for the best only."""
        ...


@dataclass(frozen=True)
class Done:
    """What a task has found: in how many patterns, by every collector, and what they add to the output [q, p, o]."""

    patterns: int
    found: Sequence[Any]
    output: Tensor | None


@dataclass(frozen=True)
class Task:
    """Consecutive pieces of a pass with what is asked of them, ready to be pickled.

    ``replayed`` are their contributions [q, n], where a replay has found them before.
    """

    pieces: Sequence[Piece]
    asked: LayerQuery
    collectors: Sequence[Collector]
    block_rows: int
    outputs: bool
    replayed: Tensor | None = None
    device: str = "cpu"
    screened: bool = False
    """Whether a first look in 16 bits is to spare the collectors most scores."""

    def __call__(self, threads: int = 1) -> Done:
        """Read the pieces and show them to the collectors, on one accelerator or some ``threads``.

        More than one is for tasks that are ``screened``: sums within a product would depend on them.
        """
        if torch.get_num_threads() > threads:
            torch.set_num_threads(threads)
        asked, collectors = self.asked.on(torch.device(self.device)), [own.fresh() for own in self.collectors]
        screening = Screening.of(asked, replayed=self.replayed is not None) if self.screened else None
        start, output = 0, None
        for rows in (rows for piece in self.pieces for rows in piece.blocks(self.block_rows)):
            stop = start + len(rows)
            replayed = None if self.replayed is None else self.replayed[:, start:stop]
            scores = Scores(asked, rows, replayed, None if screening is None else screening.over(rows))
            for collector in collectors:
                collector.add(scores)
            if self.outputs:
                added = scores.output().double()
                output = added if output is None else output.add_(added)
            start = stop
        if start != (count := sum(piece.count for piece in self.pieces)):
            raise StoreError(f"{start} patterns of {asked.name!r} were read where {count} are: open the memory again")
        return Done(start, [own.found() for own in collectors], None if output is None else output.cpu())

    def leaves_few(self, collectors: Sequence[TopPatterns | TopPatternsBy]) -> bool:
        """Whether a first look at the first block leaves the collectors few of its scores; not if it cannot be."""
        asked = self.asked.on(torch.device(self.device))
        screening = Screening.of(asked, replayed=self.replayed is not None)
        if screening is None:
            return False
        rows = next(iter(self.pieces[0].blocks(self.block_rows)), None)
        if rows is None:
            return False
        replayed = None if self.replayed is None else self.replayed[:, : len(rows)]
        screen = screening.over(rows)
        scores = Scores(asked, rows, replayed, screen)
        return screen is not None and all(collector.leaves_few(scores) for collector in collectors)


@dataclass(frozen=True)
class Workers:
    """Who does the tasks of a pass, and on which device they compute.

    ``executor`` None: threads of this process, twice as many as torch uses for one product; this one where that is 1.
    """

    executor: Executor | None = None
    device: str = "cpu"

    @classmethod
    def checked(cls, executor: Any, device: str | torch.device | None) -> Workers:
        """From what a user has given.

        Raises:
            DualHookError: it is no executor, or there is no such device.
        """
        if executor is not None and not callable(getattr(executor, "submit", None)):
            raise DualHookError(
                f"executor={executor!r}: expected a concurrent.futures.Executor, such as ProcessPoolExecutor() or "
                "Dask's client.get_executor()"
            )
        if device is None:
            return cls(executor)
        try:
            torch.empty(1, device=device).cpu()
        except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
            reason = str(error).partition("\n")[0]
            raise DualHookError(f"device={device!r}: torch cannot compute there: {reason}") from error
        return cls(executor, str(device))

    @contextmanager
    def doing(self, tasks: Iterable[Task], *, screened: bool) -> Iterator[Iterator[Done]]:
        """While tasks are done: what each has found, in their order. One whose worker is lost is done here.

        One pass at a time; meanwhile a product takes one thread. Of one that is ``screened`` no bit depends on that:
        if it is done here, it takes one task after the other with all threads, which is the faster way.
        """
        with _passing, ExitStack() as stack:
            threads = torch.get_num_threads()
            stack.callback(torch.set_num_threads, threads)
            in_turn = self.executor is None and (screened or threads == 1)
            torch.set_num_threads(threads if in_turn else 1)  # in threads that start from here on too
            if self.executor is not None:
                results = _ordered(self.executor, tasks, IN_FLIGHT)
            elif not in_turn:
                workers = 2 * threads  # half of them may wait for the disk
                results = _ordered(stack.enter_context(ThreadPoolExecutor(workers)), tasks, 2 * workers)
            else:
                results = (task(threads) for task in tasks)
            yield stack.enter_context(closing(results))


_passing = RLock()

HERE = Workers()
"""Threads of this process, on its processors."""


def _ordered(executor: Executor, tasks: Iterable[Task], most: int) -> Generator[Done]:
    """The results in order; at most so many tasks are with the executor."""
    waiting: deque[tuple[Task, Future[Done] | None]] = deque()
    try:
        for task in tasks:
            waiting.append((task, _submitted(executor, task)))
            if len(waiting) >= most:
                yield _result(*waiting.popleft())
        while waiting:
            yield _result(*waiting.popleft())
    finally:
        for _, future in waiting:
            if future is not None:
                future.cancel()


def _submitted(executor: Executor, task: Task) -> Future[Done] | None:
    """The task on its way; None: nobody is left to do it."""
    try:
        return executor.submit(_do, task)
    except BrokenExecutor:
        return None
    except RuntimeError as error:
        raise DualHookError(f"executor={executor!r} takes no tasks: {error}") from error


def _do(task: Task) -> Done:
    return task()


def _result(task: Task, future: Future[Done] | None) -> Done:
    """What a task has found; after any failure that does not come from the memory itself it is done here."""
    if future is None:
        return task()
    try:
        return future.result()
    except DualHookError:
        raise
    except (Exception, CancelledError):
        return task()
