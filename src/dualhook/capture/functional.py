"""Linear maps that no module of their own computes: a module uses its parameter, or a child's, in a function.

So do ``nn.MultiheadAttention``, Swin's windows, routers, mixtures of experts and tied heads. While such a module runs,
the functions it may use are replaced by ones that look whether they are given a recorded parameter or a view of one.
Which tensor a parameter is then is asked when the module is entered: sharding and ``functional_call`` put others in
their place.
"""

from __future__ import annotations

import sys
import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from dualhook.capture.calls import Call, Places, embedding_call
from dualhook.capture.compiled_functions import (
    OPEN,
    compiled_convolution,
    compiled_embedding,
    compiled_grouped,
    compiled_linear,
)
from dualhook.capture.hooks import Guard, Hook
from dualhook.capture.kinds import Tapped
from dualhook.capture.sites import Site, grouped_call, has_settings, linear_call
from dualhook.capture.taps import report

__all__ = ["Scope", "WhileCompiled", "is_within", "leave_all", "scopes_of", "watch_compilations"]

FUNCTIONAL, EXPERTS = F.__name__, "transformers.integrations.moe"
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class _Active(threading.local):
    """The scopes that this thread is in, innermost last."""

    def __init__(self) -> None:
        self.scopes: list[_Entered] = []


_ACTIVE = _Active()
_LOCK = threading.Lock()
_ORIGINALS: dict[tuple[str, str], Callable[..., Tensor]] = {}  # by the names of module and function
_REPLACED: dict[tuple[str, str], Callable[..., Tensor]] = {}  # what stands there meanwhile
_BURIED: set[tuple[str, str]] = set()  # the places where somebody has put another function over ours
_DEPTH = 0


class Scope:
    """Hooks on one module: while it runs, functions on the parameters of its ``sites`` are seen."""

    def __init__(self, module: nn.Module, sites: Sequence[Site]) -> None:
        self._module = module
        self._sites = sites
        self.guard = sites[0].listener.guard

    def attach(self) -> list[RemovableHandle]:
        """Hook the module; an exception inside it is no reason to stay."""
        return [
            self._module.register_forward_pre_hook(_Enter(self)),
            self._module.register_forward_hook(_Leave(self), always_call=True),
        ]

    def entered(self) -> _Entered:
        """The sites by the identity of what their parameters are now."""
        found: dict[int, list[Site]] = {}
        for site in self._sites:
            weight = site.tapped.weight
            if weight is None:  # functional_call under a parametrisation
                continue
            found.setdefault(id(weight), []).append(site)
        return _Entered(self, found)


class _Entered:
    """A scope while its module runs."""

    def __init__(self, scope: Scope, sites: Mapping[int, list[Site]]) -> None:
        self.scope = scope
        self.sites = sites
        self.places: dict[int, Places] = {}  # of the rows of earlier calls, by their number: experts keep their order

    def of(self, weight: Tensor, kinds: Sequence[str]) -> list[Site]:
        """The sites of a parameter or a view of one."""
        found = self.sites.get(id(weight)) or self.sites.get(id(weight._base)) or ()
        return [site for site in found if site.tapped.spec.kind in kinds]


class _Enter(Hook):
    def __init__(self, scope: Scope) -> None:
        self._scope = scope

    def __call__(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        with self._scope.guard:
            _ACTIVE.scopes.append(self._scope.entered())
            _replace()


class _Leave(_Enter):
    def __call__(self, module: nn.Module, args: Any, output: Any = None) -> None:
        if torch.compiler.is_compiling():
            return
        if all(entered.scope is not self._scope for entered in _ACTIVE.scopes):
            return  # left already, with one that was entered before it
        with self._scope.guard:
            left = None
            while left is not self._scope:
                left = _ACTIVE.scopes.pop().scope
                _restore()


def is_within(guard: Guard) -> bool:
    """Whether a recorder believes this thread to be in one of its modules."""
    return any(entered.scope.guard is guard for entered in _ACTIVE.scopes)


def leave_all(guard: Guard) -> None:
    """Leave these modules: torch calls no hook after Ctrl-C."""
    for entered in [entered for entered in _ACTIVE.scopes if entered.scope.guard is guard]:
        _ACTIVE.scopes.remove(entered)
        _restore()


def _places() -> Iterator[tuple[Any, str]]:
    """Where the functions are."""
    for name in ("linear", "embedding", "conv1d", "conv2d", "conv3d", "grouped_mm"):
        if hasattr(F, name):
            yield F, name
    if hasattr(torch, "_grouped_mm"):
        yield torch, "_grouped_mm"
    experts = sys.modules.get(EXPERTS)
    if hasattr(experts, "_can_use_grouped_mm") and hasattr(experts, "_grouped_mm_fallback"):
        yield experts, "_grouped_mm"


def _replace() -> None:
    global _DEPTH
    with _LOCK:
        _DEPTH += 1
        if _DEPTH == 1:
            for owner, name in _places():
                place, found = (owner.__name__, name), getattr(owner, name)
                if found is _REPLACED.get(place) or (place in _BURIED and found is not _ORIGINALS[place]):
                    continue  # ours is there, or inside of what somebody has put over it
                _BURIED.discard(place)
                _ORIGINALS[place] = found
                setattr(owner, name, _REPLACED.setdefault(place, _seeing(owner, name)))


def _restore() -> None:
    global _DEPTH
    with _LOCK:
        _DEPTH -= 1
        if _DEPTH == 0:
            for place, original in _ORIGINALS.items():
                owner, name = sys.modules[place[0]], place[1]
                found = getattr(owner, name)
                if found is _REPLACED[place]:
                    setattr(owner, name, original)
                elif found is not original:
                    _BURIED.add(place)


class WhileCompiled:
    """Keeps the functions replaced from torch's next compilation on: compiled code is guarded on what they were.

    In that code they tell of every one of the ``sites``, whichever module it is in.
    """

    def __init__(self, sites: Sequence[Site]) -> None:
        self._has_begun = False
        self.sites = sites
        OPEN.add(self)

    def begin(self) -> None:
        """Code is about to be compiled."""
        if not self._has_begun:
            self._has_begun = True
            _replace()

    def remove(self) -> None:
        """Put them back, once nothing else needs them replaced."""
        OPEN.discard(self)
        if self._has_begun:
            self._has_begun = False
            _restore()


def watch_compilations() -> None:
    """Hear of torch's next compilation, if anything needs to: torch forgets who does with what it has compiled."""
    if OPEN:
        from torch._dynamo.callback import callback_handler  # takes as long to import as the rest of torch

        if _on_compile not in callback_handler.start_callbacks:
            callback_handler.register_start_callback(_on_compile)


def _on_compile(*args: Any) -> None:
    for one in list(OPEN):
        one.begin()


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    output = _ORIGINALS[FUNCTIONAL, "linear"](input, weight, bias)
    if torch.compiler.is_compiling():  # the tracer of attention, which is handed on as a whole, comes here as well
        return compiled_linear(output, input, weight, bias)
    found = _found(weight, ("linear", "experts"))
    if found is None:
        return output
    output = _told(found[0], lambda: _linear_call(found, input, weight), output)
    own = None if bias is None else _found(bias, ("bias",))
    if own is None or bias is None:
        return output
    one = input.new_ones(*input.shape[:-1], 1)
    return _told(own[0], lambda: _linear_call(own, one, bias), output)


def _embedding(input: Tensor, weight: Tensor, padding_idx: int | None = None, *args: Any, **kwargs: Any) -> Tensor:
    scaled = bool(args[2] if len(args) > 2 else kwargs.get("scale_grad_by_freq", False))
    if torch.compiler.is_dynamo_compiling():
        output = _ORIGINALS[FUNCTIONAL, "embedding"](input, weight, padding_idx, *args, **kwargs)
        return compiled_embedding(output, input, weight, padding_idx, scaled)
    output = _unseen(_ORIGINALS[FUNCTIONAL, "embedding"], input, weight, padding_idx, *args, **kwargs)
    found = _found(weight, ("embedding",))
    if found is None:
        return output
    return _told(found[0], lambda: embedding_call(input, weight.dtype, padding_idx, scaled), output)


def _grouped(name: str, owner: Any) -> Callable[..., Tensor]:
    place = owner.__name__, name

    def grouped_mm(input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        original = _ORIGINALS[place]
        if torch.compiler.is_dynamo_compiling():
            return _told_of_groups(original(input, weight, *args, **kwargs), input, weight, *args, **kwargs)
        return _told_of_groups(_unseen(original, input, weight, *args, **kwargs), input, weight, *args, **kwargs)

    return grouped_mm


def _unseen(original: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """What a function makes that may call one of ours: under a default device torch's call themselves by name."""
    scopes, _ACTIVE.scopes = _ACTIVE.scopes, []
    try:
        return original(*args, **kwargs)
    finally:
        _ACTIVE.scopes = scopes


def _told_of_groups(
    output: Tensor, input: Tensor, weight: Tensor, offs: Tensor | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    if offs is None or input.dim() != 2:
        return output
    if torch.compiler.is_dynamo_compiling():
        return compiled_grouped(output, input, weight, offs)
    found = _found(weight, ("experts", "transposed_experts"))
    if found is None:
        return output
    sites, entered = found
    return _told(sites, lambda: grouped_call(sites[0].tapped.spec, input, offs, _places_of(entered, input)), output)


def _grouped_of_transformers(input: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """Transformers' choice between torch's functions and an operator of its own."""
    experts: Any = sys.modules[EXPERTS]
    output: Tensor = _ORIGINALS[EXPERTS, "_grouped_mm"](input, weight, offs)
    return output if experts._can_use_grouped_mm(input, weight, offs) else _told_of_groups(output, input, weight, offs)


def _convolution(name: str) -> Callable[..., Tensor]:
    def convolution(input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        output = _ORIGINALS[FUNCTIONAL, name](input, weight, bias, *args, **kwargs)
        settings = dict(zip(("stride", "padding", "dilation", "groups"), args, strict=False)) | kwargs
        if torch.compiler.is_dynamo_compiling():
            return compiled_convolution(output, input, weight, settings)
        found = _found(weight, ("conv",))
        if found is None or not has_settings(found[0][0].tapped.module, settings):
            return output
        return _told(found[0], lambda: Call(input), output)

    return convolution


def _seeing(owner: Any, name: str) -> Callable[..., Tensor]:
    """What takes a function's place."""
    if owner is F and name in ("linear", "embedding"):
        return _linear if name == "linear" else _embedding
    if name.startswith("conv"):
        return _convolution(name)
    return _grouped(name, owner) if owner in (F, torch) else _grouped_of_transformers


def _found(weight: Tensor, kinds: Sequence[str]) -> tuple[list[Site], _Entered] | None:
    for entered in reversed(_ACTIVE.scopes):
        sites = entered.of(weight, kinds)
        if sites:
            return sites, entered
    return None


def _told(sites: Sequence[Site], made: Callable[[], Call], output: Tensor) -> Tensor:
    """Report a call once; the modules that share the weight are not to report it again."""
    replaced = report(sites[0].listener, made, output)
    output = output if replaced is None else replaced
    for site in sites:
        if site.tap is not None:
            site.tap.saw(output)
    return output


def _linear_call(found: tuple[list[Site], _Entered], input: Tensor, weight: Tensor) -> Call:
    tapped, entered = found[0][0].tapped, found[1]
    whole = tapped.weight
    assert whole is not None
    places = _places_of(entered, input) if tapped.spec.kind == "experts" else None
    return linear_call(tapped, whole, weight, input, places)


def _places_of(entered: _Entered, input: Tensor) -> Places | None:
    """Which tokens the rows of an expert are, as the graph tells: it was given rows of all tokens by an index."""
    node, index = input.grad_fn, None
    while node is not None and type(node).__name__ == "IndexBackward0":
        chosen = [one for one in node._saved_indices if one is not None]  # type: ignore[attr-defined]
        if len(chosen) != 1 or chosen[0].dim() != 1:
            break
        index = chosen[0] if index is None else chosen[0][index]
        found = Places(index, int(node._saved_self_sym_sizes[0]))  # type: ignore[attr-defined]
        entered.places[len(input)] = found
        node = node.next_functions[0][0]
    return entered.places.get(len(input))


def scopes_of(model: nn.Module, sites: Sequence[Site]) -> list[Scope]:
    """The modules in which parameters of the sites may be used in functions: whose code names them."""
    scopes = []
    for path, module in model.named_modules():
        if isinstance(module, CONTAINERS):
            continue
        prefix = f"{path}." if path else ""
        inside = [site for site in sites if f"{site.tapped.path}.".startswith(prefix)]
        own = [site for site in inside if site.tapped.module is module and _is_function(site.tapped)]
        names = _names_in(type(module))
        used = [site for site in inside if site in own or _uses(module, site.tapped, names)]
        if used:
            scopes.append(Scope(module, used))
    return scopes


def _is_function(tapped: Tapped) -> bool:
    return tapped.by == "function" or tapped.has_own_forward


def _uses(module: nn.Module, tapped: Tapped, names: set[str]) -> bool:
    attention = isinstance(module, nn.MultiheadAttention)  # names all of it in one call of a function
    return attention or (tapped.module is not module and tapped.attributes[0] in names)


_NAMES: dict[type, set[str]] = {}


def _names_in(kind: type) -> set[str]:
    """The attributes that the code of a module's class names, torch's own base class aside."""
    if kind not in _NAMES:
        own = [one for one in kind.__mro__ if one not in (nn.Module, object)]
        functions = [value for one in own for value in vars(one).values() if isinstance(value, types.FunctionType)]
        _NAMES[kind] = {name for function in functions for name in _names_of(function.__code__)}
    return _NAMES[kind]


def _names_of(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names_of(constant)
        elif isinstance(constant, str):
            yield constant
