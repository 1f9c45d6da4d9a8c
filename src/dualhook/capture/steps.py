"""Finds optimisers at their first step, through torch's hooks on every optimiser's step."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from dualhook.capture.hooks import Guard

__all__ = ["StepWatcher", "innermost"]

HELD_AS = ("optimizer", "base_optimizer", "_optimizer")  # by Lookahead, SAM, accelerate and the like


class StepWatcher:
    """Calls ``before(optimizer, has_closure)`` and ``after(optimizer)`` around every optimiser step in the process.

    A subclass that calls ``super().step()`` makes torch's hooks fire twice; only the outer step counts. An optimiser
    that holds another one of the same parameters does not count: the inner one's steps are the steps. The callbacks
    are bound methods, held weakly: a watcher keeps no recorder and no model alive.
    """

    def __init__(
        self, before: Callable[[Optimizer, bool], None], after: Callable[[Optimizer], None], guard: Guard
    ) -> None:
        self._guard = guard
        self._before = weakref.WeakMethod(before)
        self._after = weakref.WeakMethod(after)
        self._depth: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        self._last: weakref.WeakKeyDictionary[Optimizer, RemovableHandle] = weakref.WeakKeyDictionary()
        self._handles = [register_optimizer_step_pre_hook(self._pre), register_optimizer_step_post_hook(self._post)]

    def close(self) -> None:
        """Stop watching."""
        for handle in [*self._handles, *self._last.values()]:
            handle.remove()

    # torch takes what a hook returns for changed arguments, so both return None

    def _pre(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _held(optimizer) is not None:
            return
        depth = self._depth.get(optimizer, 0)
        if depth and not _steps_inside_itself(optimizer):
            depth = 0  # the step before ended in an exception, past torch's post hooks
        self._depth[optimizer] = depth + 1
        if depth:
            return
        self._unlook(optimizer)
        if optimizer._optimizer_step_pre_hooks:  # they may still clip the gradients: look after the last of them
            self._last[optimizer] = optimizer.register_step_pre_hook(self._look)
        else:
            self._look(optimizer, args, kwargs)

    def _look(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        before = self._before()
        if before is not None and self._depth[optimizer] == 1:
            with self._guard:
                before(optimizer, any(callable(a) for a in (*args[1:], *kwargs.values())))

    def _post(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _held(optimizer) is not None:
            return
        depth = self._depth.get(optimizer, 1) - 1
        self._depth[optimizer] = depth
        if depth:
            return
        self._unlook(optimizer)
        after = self._after()
        if after is not None:
            with self._guard:
                after(optimizer)

    def _unlook(self, optimizer: Optimizer) -> None:
        last = self._last.pop(optimizer, None)
        if last is not None:
            last.remove()


def innermost(optimizer: Optimizer) -> Optimizer:
    """The optimiser whose steps change the weights: the one that a wrapper holds, or itself."""
    while (held := _held(optimizer)) is not None:
        optimizer = held
    return optimizer


def _held(optimizer: Optimizer) -> Optimizer | None:
    """Another optimiser of the same parameters that this one holds, and steps in its own step."""
    for name in HELD_AS:
        held = getattr(optimizer, name, None)
        if isinstance(held, Optimizer) and held is not optimizer and _parameters(held) & _parameters(optimizer):
            return held
    return None


def _parameters(optimizer: Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def _steps_inside_itself(optimizer: Optimizer) -> bool:
    """Whether this thread is in more than one ``step`` of the optimiser: ``super().step()`` of a subclass."""
    steps, frame = 0, sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        steps += frame.f_code.co_name == "wrapper" and frame.f_locals.get("self") is optimizer  # torch's profile hook
    return steps > 1
