"""The repeated blocks of a model and what in them is attention: found by structure, not by a list of architectures.

A stack is an ``nn.ModuleList`` or ``nn.Sequential`` whose elements of one class hold linear maps; the elements are its
blocks. A Transformer's stacks are the innermost ones with attention in their blocks: stages around them are none, nor
are the experts or the heads inside. Without any attention the outermost stacks of several blocks count. Attention is
every module inside a block whose name or class says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from torch import nn

from dualhook.capture.kinds import Tapped

__all__ = ["blocks_of", "is_attention", "is_within"]

ATTENTION = ("attn", "attention")


def blocks_of(model: nn.Module, maps: Iterable[Tapped]) -> list[str]:
    """The paths of the model's blocks that hold any of ``maps``, in the model's order."""
    paths = [tapped.path for tapped in maps]
    modules = dict(model.named_modules())
    stacks = [
        blocks
        for path, module in modules.items()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and (blocks := _repeated(path, module, paths))
    ]
    attending = [
        stack for stack in stacks if any(is_attention(modules, block, path) for block in stack for path in paths)
    ]
    if attending:
        innermost = [s for s in attending if not any(is_within(other[0], block) for other in attending for block in s)]
        return [block for stack in innermost for block in stack]
    several = [stack for stack in stacks if len(stack) > 1]
    outermost = [s for s in several if not any(is_within(s[0], block) for other in several for block in other)]
    return [block for stack in outermost for block in stack]


def is_attention(modules: Mapping[str, nn.Module], block: str, path: str) -> bool:
    """Whether the module at ``path`` lies in the attention of a block: something between the two is called so."""
    if not is_within(path, block):
        return False
    at = block
    for name in path[len(block) + 1 :].split("."):
        at = f"{at}.{name}"
        said = name, type(modules[at]).__name__
        if any(word in text.lower() for text in said for word in ATTENTION):
            return True
    return False


def _repeated(path: str, stack: nn.Module, maps: Iterable[str]) -> list[str]:
    """The elements of a stack that hold maps and are of a class with several, or are all there is."""
    elements = [(f"{path}.{name}" if path else name, type(child)) for name, child in stack.named_children()]
    holding = [(name, kind) for name, kind in elements if any(is_within(place, name) for place in maps)]
    times = Counter(kind for _, kind in holding)
    return [name for name, kind in holding if times[kind] > 1 or len(elements) == 1]


def is_within(path: str, module: str) -> bool:
    """Whether a path leads to the inside of a module."""
    return path.startswith(f"{module}.")
