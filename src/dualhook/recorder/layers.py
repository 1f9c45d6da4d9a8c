"""The recorded layers: where their rows come in, which of them share a weight, and the parameters that are watched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from dualhook.capture import Intake, LayerProbe, Place, Selection, Sink, Use, Verdict, local, operation_of
from dualhook.recorder.watched import Watched, gradient_of
from dualhook.records import LayerSpec, Rows

__all__ = ["Layers"]


class Layers:
    """The layers of a selection. Of those that use one weight one is the primary: its parameters are watched for all.

    That is one without slots, where there is one.
    """

    def __init__(self, selection: Selection, sink: Sink) -> None:
        self._intakes: dict[str, list[Intake]] = {}
        self.watched: dict[str, Watched] = {}
        for tapped in selection.layers:
            self._intakes.setdefault(tapped.spec.name, []).append(Intake(tapped, sink))
        self._arrange()

    @property
    def names(self) -> list[str]:
        """Every layer."""
        return list(self._intakes)

    @property
    def intakes(self) -> Iterator[Intake]:
        """Every intake; layers whose weight several modules share alike have several."""
        return (intake for intakes in self._intakes.values() for intake in intakes)

    def intakes_of(self, spec: LayerSpec) -> Iterator[Intake]:
        """The intakes of all uses of a layer's weight."""
        return (intake for layer in self.uses(spec) for intake in self._intakes[layer])

    def spec(self, layer: str) -> LayerSpec:
        """A layer by its name."""
        return self._intakes[layer][0].spec

    def uses(self, spec: LayerSpec) -> list[str]:
        """The names of all layers that use a layer's weight."""
        return [own.name for own in self._by_weight[spec.weight]]

    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters whose uses the graph of the last forward pass shows."""
        found: dict[str, nn.Parameter] = {}
        for intake in self.intakes:
            if intake.tapped.by == "recurrent":  # one fused operation, which is seen as a whole
                continue
            for name, parameter in intake.parameters.items():
                added = name == intake.spec.bias and intake.spec.kind.endswith("experts")  # by itself, row by row
                if parameter.requires_grad and not added:
                    called_with = intake.called_with(name)
                    found[name] = parameter if called_with is None else called_with
        return found

    def verdict(self) -> Verdict:
        """What the calls so far show, where no graph was looked at: gradients of weights that no tap has heard of."""
        called = frozenset(name for name, own in self._intakes.items() if any(intake.was_called for intake in own))
        unseen: dict[str, str] = {}
        for spec in self.primary:
            if called.isdisjoint(self.uses(spec)):
                gradients = {name: gradient_of(self.watched[name]) for name in spec.parameters}
                if any(gradient is not None and bool(local(gradient).any()) for gradient in gradients.values()):
                    unseen |= dict.fromkeys(gradients, "used where no tap sees it, perhaps in compiled code")
        return Verdict(called, unseen)

    def narrow(self, selection: Selection) -> None:
        """Go on with what a smaller selection holds."""
        left = {tapped.spec.name: tapped.spec for tapped in selection.layers}
        for layer in [layer for layer in self._intakes if layer not in left]:
            for intake in self._intakes.pop(layer):
                intake.detach()
                intake.is_left_out = True
        for intake in self.intakes:
            intake.spec = left[intake.spec.name]
        self._arrange()

    def in_use(self, layer: str) -> dict[str, nn.Parameter]:
        """A layer's parameters by name, as the model has them now; of a bias only if it is watched."""
        watched = {name: self.watched[name].parameter for name in self.spec(layer).parameters if name in self.watched}
        return {name: parameter for name, parameter in watched.items() if parameter is not None}

    def seen_as(self, spec: LayerSpec, rows: Mapping[str, Rows]) -> list[Use]:
        """The rows of all uses of a weight, by layer, for one of them."""
        return [Use(spec, self.spec(layer), own) for layer, own in rows.items()]

    def probes(self) -> list[LayerProbe]:
        """One of each weight."""
        found = []
        for spec in self.primary:
            tapped = [intake.tapped for intake in self.intakes if intake.spec.weight == spec.weight]
            made_by = {operation_of(own.spec.kind, own.module) for own in tapped}
            found.append(LayerProbe(spec, self._by_weight[spec.weight], made_by))
        return found

    def _arrange(self) -> None:
        self._by_weight: dict[str, list[LayerSpec]] = {}
        for layer in self._intakes:
            spec = self.spec(layer)
            self._by_weight.setdefault(spec.weight, []).append(spec)
        uses = self._by_weight.values()
        self.primary = [next((spec for spec in own if spec.slots == 1), own[0]) for own in uses]
        before, self.watched = self.watched, {}
        for spec in self.primary:
            tapped = self._intakes[spec.name][0].tapped
            for name, attribute in zip(spec.parameters, tapped.attributes, strict=False):
                known = before.get(name)  # a step may be under way on it: its closure has made the first forward pass
                same = known is not None and known.spec == spec
                self.watched[name] = known if same and known else Watched(name, spec, Place(tapped.module, attribute))
