"""Asks a user's model: any way of passing inputs, any usual form of output, the model left as it was found."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualhook.capture import Tapped, linear_maps, unwrapped
from dualhook.errors import LayerError
from dualhook.host import on_default_device
from dualhook.records import LayerSpec

__all__ = ["Measure", "Positions", "Predicted", "Target", "find_layers", "model_inputs", "predicted", "run_model"]

Target = int | Sequence[int] | Tensor | Callable[[Any], Tensor] | None
Positions = int | Sequence[int] | Tensor | None
Measure = Literal["logit", "margin", "loss"]


@dataclass(frozen=True)
class Predicted:
    """The numbers that a question is about: ``scores`` [sequence, position], and how their queries are told apart.

    ``columns`` describe the queries, position by position of one sequence after the other.
    """

    scores: Tensor
    columns: Mapping[str, Tensor]

    @property
    def along_sequences(self) -> bool:
        """Whether scores belong to places of a sequence rather than to whole inputs."""
        return "position" in self.columns


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


def model_inputs(inputs: Any, named: Mapping[str, Any]) -> Any:
    """What the model is run on: ``inputs``, or keyword arguments of the model in their place.

    Raises:
        LayerError: both, neither, or keywords without a tensor.
    """
    if inputs is not None and not named:
        return inputs
    if inputs is None and any(isinstance(value, Tensor) for value in named.values()):
        return named
    given = ", ".join(f"{name}=" for name in named)
    if inputs is not None:
        raise LayerError(f"attend got inputs and {given} as well: expected the model's inputs one way or the other")
    raise LayerError(
        "expected the model's inputs: a tensor, a tuple, a mapping, or keyword tensors such as **tokenizer(prompt, "
        f'return_tensors="pt"){f"; got {given}" if named else ""}'
    )


def run_model(model: nn.Module, inputs: Any) -> Any:
    """Run the model in evaluation mode on a tensor, a tuple of arguments or a mapping of keyword arguments.

    Raises:
        LayerError: tokens that the model's configuration has no place for.
    """
    config = getattr(model, "config", None)
    named = inputs if isinstance(inputs, Mapping) else {"input_ids": inputs}
    for name in ("input_ids", "decoder_input_ids"):
        if config is not None and isinstance(ids := named.get(name), Tensor) and not ids.is_floating_point():
            _check_tokens(name, ids, config)
    with _evaluating(model), on_default_device():
        if isinstance(inputs, Mapping):  # what tokenisers return is one
            return model(**inputs)
        return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def _check_tokens(name: str, ids: Tensor, config: Any) -> None:
    """A sequence fits the context and the vocabulary that a model of transformers states."""
    context, vocabulary = getattr(config, "max_position_embeddings", None), getattr(config, "vocab_size", None)
    if isinstance(context, int) and ids.dim() == 2 and ids.shape[1] > context > 0:
        raise LayerError(
            f"{name} hold {ids.shape[1]} tokens, the model's context is {context} "
            "(config.max_position_embeddings): shorten the prompt"
        )
    if isinstance(vocabulary, int) and ids.numel() and int(ids.max()) >= vocabulary > 0:
        raise LayerError(
            f"{name} hold the token {int(ids.max())}, the model's vocabulary ends at {vocabulary - 1}: expected the "
            "tokenizer that the model was trained with"
        )


def predicted(
    output: Any, target: Target, positions: Positions, model: nn.Module, inputs: Any, of: Measure = "logit"
) -> Predicted:
    """The logits of ``target``, or of the predicted classes where ``target`` is None; or what ``of`` names instead.

    The logits are the output itself, its ``logits``, or the first tensor of a tuple; of a sequence's logits
    [sequence, position, class] those of ``positions``. A function is given the whole output and returns the numbers.

    Raises:
        LayerError: an output without logits, or a target or positions that do not fit it.
    """
    if callable(target):
        if positions is not None:
            raise LayerError("positions= beside a function as target=: let the function choose the positions")
        with on_default_device():
            scores = target(output)
        if not isinstance(scores, Tensor) or scores.dim() != 1:
            raise LayerError("target=: expected the function to return a tensor of one number per query")
        return Predicted(scores[:, None], {"score": scores})
    logits, columns = _logits(output), dict[str, Tensor]()
    if not len(logits):
        raise LayerError("inputs hold no query")
    if logits.dim() == 3:
        number, place = _places(logits, positions, _shown(model, inputs))
        logits = logits.take_along_dim(place.to(logits.device)[..., None], 1)
        columns = {"sequence": torch.arange(len(number))[:, None].expand_as(number), "position": number}
    elif positions is not None:
        raise LayerError(
            f"positions={positions!r}: the model gives logits of shape {list(logits.shape)}, expected ones along a "
            "sequence [sequence, position, class]"
        )
    else:
        while logits.dim() > 2:
            logits = logits[:, -1]
        logits = logits[:, None]
    chosen = _chosen(logits, target)
    scores = _measured(logits, chosen, of)
    columns |= {"target": chosen, "score": scores}
    if "position" in columns:
        columns["probability"] = _measured(logits, chosen, "loss").neg().exp()
    return Predicted(scores, columns)


def _measured(logits: Tensor, chosen: Tensor, of: Measure) -> Tensor:
    """What is asked about the chosen classes [sequence, position].

    Their logits; by how much these are above those of all others together (log-sum-exp); or the cross-entropy.
    """
    own = logits.gather(2, chosen[..., None]).squeeze(2)
    if of == "loss":
        return logits.logsumexp(2) - own
    if of == "logit" or logits.shape[2] == 1:
        return own
    return own - logits.scatter(2, chosen[..., None], -math.inf).logsumexp(2)


def _chosen(logits: Tensor, target: Any) -> Tensor:
    """The classes asked about [sequence, position]."""
    try:
        chosen = logits.argmax(-1) if target is None else torch.as_tensor(target, device=logits.device).long()
    except (TypeError, ValueError, RuntimeError) as error:
        raise LayerError(f"target={target!r}: expected a class number, one per query, or a function") from error
    queries, classes = logits.shape[:2], logits.shape[2]
    if chosen.dim() == 0:
        chosen = chosen.expand(queries)
    fits = chosen.shape == queries or (chosen.dim() == 1 and len(chosen) == queries.numel())
    if not fits or int(chosen.min()) < 0 or int(chosen.max()) >= classes:
        raise LayerError(
            f"target= of shape {list(chosen.shape)}: expected one class from 0 to {classes - 1}, "
            f"or one for each of the {queries.numel()} queries"
        )
    return chosen.reshape(queries)


def _places(logits: Tensor, positions: Positions, shown: Tensor | None) -> tuple[Tensor, Tensor]:
    """The positions asked about [sequence, position]: numbers among the real tokens, and places in the logits."""
    length = logits.shape[1]
    real = torch.ones(logits.shape[:2], dtype=torch.bool)
    if shown is not None and shown.dim() == 2 and len(shown) == len(logits):
        # a cache makes masks longer than the logits, a learned prefix shorter
        real = F.pad(shown.cpu().long(), (length - shown.shape[1], 0), value=1) != 0
    try:
        wanted = torch.as_tensor(
            -1 if positions is None else list(positions) if isinstance(positions, range) else positions
        )
    except (TypeError, ValueError, RuntimeError) as error:
        raise LayerError(f"positions={positions!r}: expected one whole number or several") from error
    if wanted.dtype not in (torch.int64, torch.int32) or wanted.dim() > 1 or not wanted.numel():
        raise LayerError(f"positions={positions!r}: expected one whole number or several")
    wanted = wanted.cpu().long().reshape(1, -1)
    tokens = real.sum(1, keepdim=True)
    number = torch.where(wanted < 0, wanted + tokens, wanted)
    outside = ((number < 0) | (number >= tokens)).nonzero()
    if len(outside):
        sequence, which = outside[0].tolist()
        count = int(tokens[sequence])
        raise LayerError(
            f"position {int(wanted[0, which])}: sequence {sequence} has {count} tokens"
            + (f", expected {-count} to {count - 1}" if count else " that its attention_mask shows")
        )
    return number, real.logical_not().long().argsort(dim=1, stable=True).gather(1, number)


def _shown(model: nn.Module, inputs: Any) -> Tensor | None:
    """Which tokens of the sequences that the logits belong to are real [sequence, position], as far as inputs say."""
    decodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    mask = (
        inputs.get("decoder_attention_mask" if decodes else "attention_mask") if isinstance(inputs, Mapping) else None
    )
    return mask if isinstance(mask, Tensor) else None


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
    return output


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True
