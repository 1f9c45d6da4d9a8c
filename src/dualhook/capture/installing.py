"""Puts taps on a model: on modules, on recurrent layers, and scopes around functional uses."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from torch import nn

from dualhook.capture.functional import WhileCompiled, scopes_of, watch_compilations
from dualhook.capture.kinds import Tapped
from dualhook.capture.recurrent_tap import RecurrentTap
from dualhook.capture.sites import Site
from dualhook.capture.taps import Listener, ModuleTap

__all__ = ["Removable", "install"]


class Removable(Protocol):
    """Something that can be taken off again; torch's handles are."""

    def remove(self) -> None:
        """Take it off."""
        ...


def install(model: nn.Module, layers: Iterable[tuple[Tapped, Listener]]) -> list[Removable]:
    """Let every listener hear of the calls of its layer; the handles take all of it off again."""
    handles: list[Removable] = []
    sites, recurrent = [], dict[nn.Module, dict[str, Listener]]()
    for tapped, listener in layers:
        if tapped.by == "recurrent":
            recurrent.setdefault(tapped.module, {})[tapped.attributes[0]] = listener
            continue
        tap = None
        # what an embedding's own forward is given need not be token ids: only F.embedding inside tells
        if tapped.by == "module" and not (tapped.has_own_forward and isinstance(tapped.module, nn.Embedding)):
            tap = ModuleTap(tapped.module, listener, has_own_forward=tapped.has_own_forward)
            handles.append(tap.attach())
        sites.append(Site(tapped, listener, tap))
    for module, listeners in recurrent.items():
        handles += RecurrentTap(module, listeners).attach()
    scopes = scopes_of(model, sites)
    for scope in scopes:
        handles += scope.attach()
    if scopes:
        handles.append(WhileCompiled(sites))
        for site in sites:
            if site.tap is not None and site.is_seen_inside:
                site.tap.is_seen_inside = True
    watch_compilations()
    return handles
