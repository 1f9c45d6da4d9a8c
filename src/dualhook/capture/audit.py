"""Looks at the autograd graph of a forward pass: is every use of a recorded parameter one that a tap has seen?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from dualhook.capture.taps import produced

__all__ = ["Audit", "RootHook"]

LAYOUT = (
    "T", "Transpose", "Permute", "View", "UnsafeView", "ReshapeAlias", "Slice", "Select", "Split", "SplitWithSizes",
    "Chunk", "Unbind", "Squeeze", "Unsqueeze", "ToCopy", "Alias", "AsStrided", "Expand", "Clone", "Detach",
)  # fmt: skip
"""Nodes that hand a parameter on as it is; the next one makes use of it."""

MADE_OF = ("View", "UnsafeView", "ReshapeAlias", "Add", "Transpose", "Squeeze", "Unsqueeze", "Addmm", "T")
"""Nodes that one linear map may consist of, the product itself behind them."""

OPAQUE = ("CheckpointFunction", "CompiledFunction", "CompiledAutograd", "GraphTask")
"""Nodes with a part of the model inside, which the graph does not show."""


class Audit:
    """One forward pass: what taps saw, then what the graph of its outputs shows."""

    def __init__(self) -> None:
        self._nodes: dict[str, set[Any]] = {}

    def saw(self, layer: str, output: Tensor) -> None:
        """A tap has seen a call of a layer."""
        node = produced(output).grad_fn
        if node is not None:
            self._nodes.setdefault(layer, set()).update(_inside(node))

    def unseen(self, outputs: Any, parameters: Mapping[str, Iterable[nn.Parameter]]) -> dict[str, str]:
        """The layers of whose ``parameters`` some use was not seen, with the operation that makes it.

        A layer that the graph does not reach is not among them.
        """
        roots = [leaf.grad_fn for leaf in _tensors(outputs) if leaf.grad_fn is not None]
        users = _users(roots)
        if any(_name(node) in OPAQUE or _name(node).startswith("Compiled") for node in users.every):
            return {}
        found: dict[str, str] = {}
        for layer, own in parameters.items():
            seen = self._nodes.get(layer, set())
            for parameter in own:
                unseen = [node for node in users.of(parameter) if node not in seen]
                if unseen:
                    found.setdefault(layer, _name(unseen[0]))
        return found


class _Graph:
    """Which nodes come before which."""

    def __init__(self) -> None:
        self.every: list[Any] = []
        self._before: dict[Any, list[Any]] = {}
        self._leaves: dict[int, Any] = {}

    def add(self, node: Any, behind: Any) -> None:
        self._before.setdefault(behind, []).append(node)
        variable = getattr(behind, "variable", None)
        if variable is not None:
            self._leaves[id(variable)] = behind

    def of(self, parameter: nn.Parameter) -> Iterator[Any]:
        """The nodes that make use of a parameter, past those that only lay it out."""
        waiting = [self._leaves[id(parameter)]] if id(parameter) in self._leaves else []
        while waiting:
            for node in self._before.get(waiting.pop(), ()):
                if _name(node) in LAYOUT:
                    waiting.append(node)
                else:
                    yield node


def _users(roots: Iterable[Any]) -> _Graph:
    graph, waiting, known = _Graph(), list(roots), set()
    while waiting:
        node = waiting.pop()
        if node in known:
            continue
        known.add(node)
        graph.every.append(node)
        for behind, _ in node.next_functions:
            if behind is not None:
                graph.add(node, behind)
                waiting.append(behind)
    return graph


def _inside(node: Any) -> Iterator[Any]:
    """The nodes of one linear map, from the one that made its output."""
    yield node
    if _name(node) in MADE_OF:
        for behind, _ in node.next_functions:
            if behind is not None and getattr(behind, "variable", None) is None:
                yield from _inside(behind)


def _name(node: Any) -> str:
    return type(node).__name__.rstrip("0123456789").removesuffix("Backward")


def _tensors(outputs: Any) -> Iterator[Tensor]:
    leaves = pytree.tree_leaves(outputs)
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            yield leaf
        elif hasattr(leaf, "__dict__"):
            yield from (value for value in vars(leaf).values() if isinstance(value, Tensor))


class RootHook:
    """Watches the model's first differentiable forward pass; ``begin()`` before it, ``end(outputs)`` after."""

    is_tap = True

    def __init__(self, begin: Callable[[], None], end: Callable[[Any], None]) -> None:
        self._begin = begin
        self._end = end

    def attach(self, model: nn.Module) -> list[RemovableHandle]:
        """Hook the model."""
        return [model.register_forward_pre_hook(self._before), model.register_forward_hook(self._after)]

    def _before(self, module: nn.Module, args: Any) -> None:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._begin()

    def _after(self, module: nn.Module, args: Any, outputs: Any) -> None:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._end(outputs)
