"""A step's gradients against the rows that rebuild them, in whichever process those lie."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dualhook.capture import Corner, LayerProbe, Measurement, Use, looked
from dualhook.recorder.ranks import Ranks
from dualhook.store import Writer

__all__ = ["Measuring", "is_whole"]

WHOLE_EVERY = 16  # steps between two looks at the whole gradient; the first few have one each

Array = npt.NDArray[np.float64]
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # the coarsest last


def is_whole(step: int) -> bool:
    """Whether the whole gradient is looked at after ``step``."""
    return step < 4 or step % WHOLE_EVERY == 0


class Measuring:
    """The probes of all layers; what they find is the same in every process."""

    def __init__(self, ranks: Ranks, writer: Writer, probes: Iterable[LayerProbe]) -> None:
        self._ranks = ranks
        self._writer = writer
        self._probes = {probe.spec.name: probe for probe in probes}
        self._told = np.zeros(2)  # by all processes, at the last step: bytes recorded, writers in trouble

    @property
    def recorded_bytes(self) -> int:
        """Bytes of all rows so far; of several processes, what they had before the last step."""
        return int(self._told[0]) if self._ranks.several else self._writer.recorded_bytes

    @property
    def error(self) -> str | None:
        """What keeps rows from being written, in this process or, by the last step, in another one."""
        if not self._ranks.several:
            return None if self._writer.error is None else str(self._writer.error)
        return str(self._writer.error or "another process failed") if self._told[1] else None

    def late_probe(self, layer: str) -> LayerProbe | None:
        """The probe of a layer whose rows may be looked at later than its gradients; None: only together."""
        return None if self._ranks.several or self._ranks.sharded else self._probes[layer]

    def measure(
        self, gradients: Mapping[str, Mapping[str, Tensor]], uses: Mapping[str, Sequence[Use]], *, whole: bool
    ) -> dict[str, Measurement]:
        """Measurements by parameter, from ``gradients`` and ``uses`` by layer; of all processes in one exchange.

        It takes another one where layers have slots, and in rare cases two more: where the probed corner of a layer is
        dead.
        """
        if not (self._ranks.several or self._ranks.sharded):
            found = looked(
                [self._probes[layer].measure(own, uses[layer], whole=whole) for layer, own in gradients.items()]
            )
            return {name: one for own in found for name, one in own.items()}
        for layer in gradients if whole else ():
            self._probes[layer].turn()
        told = np.array([self._writer.recorded_bytes, self._writer.error is not None], dtype=np.float64)
        corners = {layer: self._probes[layer].usual(slot) for layer, slot in self._slots(uses).items()}

        def looked_at(corners: Mapping[str, Corner | None]) -> dict[str, dict[str, Measurement]]:
            looks = []
            for layer, corner in corners.items():
                probe, own = self._probes[layer], gradients[layer]
                looks.append(
                    probe.without_rows(own) if corner is None else probe.at(corner, own, uses[layer], whole=whole)
                )
            return dict(zip(corners, looked(looks), strict=True))

        everywhere, self._told = _summed(self._ranks, looked_at(corners), told)
        dead = [layer for layer, found in everywhere.items() if LayerProbe.is_dead(found)]
        if dead:  # look where this step's rows are largest, all of them
            own = [self._probes[layer].sizes(uses[layer], corners[layer].slot) for layer in dead]
            sizes = iter(self._ranks.sum([size for both in own for size in both]))
            moved = {
                layer: self._probes[layer].largest(corners[layer].slot, next(sizes), next(sizes)) for layer in dead
            }
            everywhere |= _summed(self._ranks, looked_at(moved), told)[0]
        return {name: one for found in everywhere.values() for name, one in found.items()}

    def _slots(self, uses: Mapping[str, Sequence[Use]]) -> dict[str, int]:
        """The slot of each layer that most rows fill in any one process."""
        own = {layer: self._probes[layer].busiest_slot(found) for layer, found in uses.items()}
        slotted = [layer for layer in uses if self._probes[layer].is_slotted]
        if slotted:
            told = np.zeros((self._ranks.size, len(slotted), 2))
            told[self._ranks.rank] = [own[layer] for layer in slotted]
            (everywhere,) = self._ranks.sum([told])
            first = everywhere[:, :, 1].argmax(0)
            own |= {layer: (int(everywhere[first[k], k, 0]), 0) for k, layer in enumerate(slotted)}
        return {layer: slot for layer, (slot, _) in own.items()}


def _summed(
    ranks: Ranks, found: Mapping[str, Mapping[str, Measurement]], told: Array
) -> tuple[dict[str, dict[str, Measurement]], Array]:
    """Measurements of every process as those of all."""
    arrays = [told]
    for one in (one for own in found.values() for one in own.values()):
        arrays += [np.array([one.dtype == dtype for dtype in DTYPES], dtype=np.float64)]
        for part in (one, one.whole):
            if part is not None:
                arrays += [part.gradient if ranks.counts else np.zeros_like(part.gradient), part.rebuilt, part.absolute]
    told, *rest = ranks.sum(arrays)
    sums = iter(rest)

    def total(one: Measurement) -> Measurement:
        dtype = DTYPES[int(np.flatnonzero(next(sums))[-1])]  # the coarsest of any process
        gradient, rebuilt, absolute = next(sums), next(sums), next(sums)
        parts = None
        if one.whole is not None:
            parts = Measurement(next(sums), next(sums), next(sums), dtype, None, one.rounding)
        return Measurement(gradient, rebuilt, absolute, dtype, parts, one.rounding)

    return {layer: {name: total(one) for name, one in own.items()} for layer, own in found.items()}, told
