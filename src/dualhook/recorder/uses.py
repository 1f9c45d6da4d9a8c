"""Several uses of one weight: their rows explain its gradient together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from dualhook.maps import map_of
from dualhook.records import LayerSpec, Rows

__all__ = ["Uses"]


class Uses:
    """The recorded layers by their weights; the one without slots is looked at first, where there is one."""

    def __init__(self, specs: Sequence[LayerSpec]) -> None:
        self._of: dict[str, list[LayerSpec]] = {}
        for spec in specs:
            self._of.setdefault(spec.weight, []).append(spec)

    @property
    def primary(self) -> list[LayerSpec]:
        """One layer for every weight."""
        return [next((spec for spec in own if spec.slots == 1), own[0]) for own in self._of.values()]

    def of(self, spec: LayerSpec) -> list[str]:
        """The names of all layers that use a layer's weight."""
        return [own.name for own in self._of[spec.weight]]

    def together(self, spec: LayerSpec, rows: Mapping[LayerSpec, Rows]) -> Rows | None:
        """The rows of all uses as one of them sees them; None if there are none."""
        if len(self._of[spec.weight]) == 1:
            return rows.get(spec)
        seen = [map_of(own).seen_from(spec, replace(part, columns={})) for own, part in rows.items()]
        found = seen[0] if seen else None
        for part in seen[1:]:
            assert found is not None
            found = found.joined(part)
        return found
