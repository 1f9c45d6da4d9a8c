"""Asks a user's model: any way of passing inputs, any usual form of output, the model left as it was found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dualhook.capture import Tapped, linear_maps, unwrapped
from dualhook.errors import LayerError
from dualhook.records import LayerSpec

__all__ = ["Target", "find_layers", "predicted_scores", "run_model"]

Target = int | Sequence[int] | Tensor | Callable[[Any], Tensor] | None


def find_layers(model: nn.Module, specs: Sequence[LayerSpec]) -> tuple[nn.Module, list[Tapped]]:
    """The user's model inside torch's wrappers, and in it the recorded layers with every module that shares them.

    Raises:
        LayerError: a layer is not there, or has another shape: this is not the recorded model.
    """
    if not isinstance(model, nn.Module):
        raise LayerError(f"model={type(model).__name__}: expected the recorded torch.nn.Module")
    inner = unwrapped(model)
    there = {tapped.spec.name: tapped for tapped in linear_maps(inner)}
    layers: list[Tapped] = []
    for spec in specs:
        found = there.get(spec.name)
        if found is None or found.spec.kind != spec.kind:
            raise LayerError(
                f"{type(inner).__name__} has no {spec.kind} layer {spec.name!r}: "
                f"expected the recorded model, with the layers {', '.join(other.name for other in specs)}"
            )
        if (found.spec.in_features, found.spec.out_features) != (spec.in_features, spec.out_features):
            raise LayerError(
                f"layer {spec.name!r} of {type(inner).__name__} maps {found.spec.in_features} to "
                f"{found.spec.out_features}, the recorded one {spec.in_features} to {spec.out_features}: expected the "
                "recorded model"
            )
        alike = [other for other in there.values() if other.weight is found.weight and other.spec.kind == spec.kind]
        shared = [other for other in alike if other is not found and not other.is_provisional]
        layers += [replace(other, spec=spec) for other in (found, *shared)]
    return inner, layers


def run_model(model: nn.Module, inputs: Any) -> Any:
    """Run the model in evaluation mode on a tensor, a tuple of arguments or a mapping of keyword arguments."""
    with _evaluating(model):
        if isinstance(inputs, Mapping):  # what tokenisers return is one
            return model(**inputs)
        return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def predicted_scores(output: Any, target: Target) -> Tensor:
    """One number per query [q]: the logit of ``target``, or of the predicted class where ``target`` is None.

    The logits are the output itself, its ``logits``, or the first tensor of a tuple; of a sequence's logits
    [q, position, class] the last position counts. A function is given the whole output and returns the numbers.

    Raises:
        LayerError: an output without logits, or a target that does not fit it.
    """
    if callable(target):
        scores = target(output)
        if not isinstance(scores, Tensor) or scores.dim() != 1:
            raise LayerError("target=: expected the function to return a tensor of one number per query")
        return scores
    logits = _logits(output)
    try:
        chosen = logits.argmax(-1) if target is None else torch.as_tensor(target, device=logits.device).long()
    except (TypeError, ValueError, RuntimeError) as error:
        raise LayerError(f"target={target!r}: expected a class number, one per query, or a function") from error
    if chosen.dim() == 0:
        chosen = chosen.expand(logits.shape[0])
    if not len(logits):
        raise LayerError("inputs hold no query")
    if chosen.shape != logits.shape[:1] or int(chosen.min()) < 0 or int(chosen.max()) >= logits.shape[1]:
        raise LayerError(
            f"target= of shape {list(chosen.shape)}: expected one class from 0 to {logits.shape[1] - 1}, "
            f"or one for each of the {logits.shape[0]} queries"
        )
    return logits.gather(1, chosen[:, None]).squeeze(1)


def _logits(output: Any) -> Tensor:
    if isinstance(output, Mapping):
        output = output.get("logits")
    output = getattr(output, "logits", output)
    if isinstance(output, (tuple, list)):
        output = next((part for part in output if isinstance(part, Tensor)), None)
    if not isinstance(output, Tensor) or output.dim() < 2:
        found = f"a tensor of shape {list(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise LayerError(
            f"the model gave {found}, expected logits [query, class]: pass target= a function that takes the model's "
            "output and returns one number per query"
        )
    logits: Tensor = output
    while logits.dim() > 2:
        logits = logits[:, -1]
    return logits


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True
