"""Looks at the autograd graph of a forward pass: is every use of a recorded parameter one that a tap has seen?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from dualhook.capture.hooks import Guard, Hook, is_plain_call
from dualhook.capture.taps import produced

__all__ = ["Audit", "RootHook", "Verdict"]

LAYOUT = (
    "T", "Transpose", "Permute", "View", "UnsafeView", "ReshapeAlias", "Slice", "Select", "Split", "SplitWithSizes",
    "Chunk", "Unbind", "Squeeze", "Unsqueeze", "ToCopy", "Alias", "AsStrided", "Expand", "Clone", "Detach",
)  # fmt: skip
"""Nodes that hand a parameter on as it is; the next one makes use of it."""

AFTER = ("View", "UnsafeView", "ReshapeAlias", "Add", "Transpose", "Squeeze", "Unsqueeze", "T")
"""Nodes that may lie between the output of a linear map and its product."""

PRODUCTS = ("Mm", "Bmm", "Addmm", "Linear", "Embedding", "GroupedMm", "Convolution", "Trilinear")
"""Nodes that may be the product."""

OPAQUE = ("CheckpointFunction", "CompiledFunction", "CompiledAutograd", "GraphTask")
"""Nodes with a part of the model inside, which the graph does not show."""


@dataclass(frozen=True)
class Verdict:
    """What an audit has found: the layers of which a tap has ``seen`` a call, and the parameters with a use unseen.

    ``unseen`` says where.
    """

    seen: frozenset[str] = frozenset()
    unseen: Mapping[str, str] = field(default_factory=dict)

    def joined(self, other: Verdict) -> Verdict:
        """What two passes have shown, one of which may have been another process's."""
        return Verdict(self.seen | other.seen, {**other.unseen, **self.unseen})


class Audit:
    """One forward pass: what taps saw, then what the graph of its outputs shows."""

    def __init__(self) -> None:
        self._nodes: dict[str, set[Any]] = {}

    def saw(self, layer: str, output: Tensor) -> None:
        """A tap has seen a call of a layer."""
        node = produced(output).grad_fn
        if node is not None:
            self._nodes.setdefault(layer, set()).update(_inside(node))

    def verdict(self, outputs: Any, parameters: Mapping[str, nn.Parameter]) -> Verdict:
        """What the graph of the ``outputs`` shows of some ``parameters``; of one that it does not reach nothing."""
        return Verdict(frozenset(self._nodes), self._unseen(outputs, parameters))

    def _unseen(self, outputs: Any, parameters: Mapping[str, nn.Parameter]) -> dict[str, str]:
        roots = [leaf.grad_fn for leaf in _tensors(outputs) if leaf.grad_fn is not None]
        users = _users(roots)
        if any(_name(node) in OPAQUE or _name(node).startswith("Compiled") for node in users.every):
            return {}
        seen = set().union(*self._nodes.values())
        uses = {name: [node for node in users.of(own) if node not in seen] for name, own in parameters.items()}
        return {name: f"used in {_name(nodes[0])}, which no tap sees" for name, nodes in uses.items() if nodes}


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
    if _name(node) in AFTER:
        for behind, _ in node.next_functions:
            if behind is not None and _name(behind) in (*AFTER, *PRODUCTS):
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
    """Watches the model's forward passes.

    ``begin(sizes)`` is called before one, with those sizes of its inputs that may be the batch's; ``end(outputs)``
    after one that is differentiable.
    """

    def __init__(self, begin: Callable[[frozenset[int]], None], end: Callable[[Any], None], guard: Guard) -> None:
        self._begin = begin
        self._end = end
        self.guard = guard

    def attach(self, model: nn.Module) -> list[RemovableHandle]:
        """Hook the model."""
        return [
            model.register_forward_pre_hook(_Before(self), with_kwargs=True),
            model.register_forward_hook(_After(self)),
        ]

    def before(self, args: Any, kwargs: Any) -> None:
        """The model is called."""
        leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.dim()]
        # the second dimension may be the batch too, of anything but a table of features
        second = {
            int(leaf.shape[1])
            for leaf in leaves
            if leaf.dim() > 2 or (leaf.dim() == 2 and not leaf.is_floating_point())
        }
        self._begin(frozenset({int(leaf.shape[0]) for leaf in leaves} | second))

    def after(self, outputs: Any) -> None:
        """The model has been called."""
        if torch.is_grad_enabled():
            self._end(outputs)


class _Before(Hook):
    def __init__(self, hook: RootHook) -> None:
        self._hook = hook

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if is_plain_call():
            with self._hook.guard:
                self._hook.before(args, kwargs)


class _After(_Before):
    def __call__(self, module: nn.Module, args: Any, outputs: Any) -> None:
        if is_plain_call():
            with self._hook.guard:
                self._hook.after(outputs)
