"""The rows of recurrent layers: what the gates' gradients were, from a call's inputs and its outputs' gradients.

torch runs a whole layer as one fused operation. Its linear maps are seen by running the same recurrence once more,
written out (``unrolled``), in the backward pass: nothing of it is kept from the forward pass but the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dualhook.capture.precision import is_reduced
from dualhook.capture.unrolled import Hidden, Input, Product, dropout_of, flat, rebuilt, recurrent_weights, unrolled
from dualhook.errors import LayerError

__all__ = ["Ambient", "GateRows", "NotRecomputableError", "fingerprint", "gate_rows", "on_output_grads"]

CHECKED = 256
"""How many entries of each output tell whether a recomputation is the forward pass that was."""


class NotRecomputableError(LayerError):
    """The written-out recurrence does not give what the module gave: its rows would be wrong."""


@dataclass(frozen=True)
class GateRows:
    """The rows of one weight in one call: dL/dW = ``output_grad``ᵀ ``key``, dL/db the sum of ``output_grad``.

    ``key`` [n, i], ``output_grad`` [n, o], ``sample`` [n] and ``position`` [n] as in ``Product``.
    """

    weight: str
    bias: str | None
    key: Tensor
    output_grad: Tensor
    sample: Tensor
    position: Tensor


@dataclass(frozen=True)
class Ambient:
    """What a forward pass draws on beside its arguments, noted right before it.

    ``rng`` is the generator's state where the call draws dropout, ``autocast`` the dtype where that is on.
    """

    rng: Tensor | None = None
    autocast: torch.dtype | None = None

    @classmethod
    def now(cls, module: nn.Module, device: torch.device) -> Ambient:
        """As it is for a call of ``module`` on ``device`` that comes next."""
        kind = device.type
        has_autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        autocast = torch.get_autocast_dtype(kind) if has_autocast else None
        if not dropout_of(module):
            return cls(None, autocast)
        return cls(torch.cuda.get_rng_state(device) if kind == "cuda" else torch.get_rng_state(), autocast)


OnGrads = Callable[[tuple["Tensor | None", ...]], None]


def on_output_grads(outputs: Any, callback: OnGrads) -> Any:
    """Stand-ins for the outputs of one call, whose gradients reach ``callback`` together, once per backward pass.

    ``callback`` gets them in the order of ``flat``, None where an output got none, before any parameter behind the
    call gets its gradient. Values, gradients and storage stay what they are.

    One node of the graph in front of all outputs, since only a node is called exactly once, as soon as the last of
    its gradients is there. A hook on each output knows nothing of the others; a multi-gradient hook in mode "all"
    waits for outputs that nobody uses; torch's fused operation is one node on some devices and many on others; and
    the end of the backward pass is too late, the parameters have accumulated by then.
    """
    tensors = flat(outputs)
    count = len(tensors)  # the callback keeps no output alive
    tracked = [number for number, tensor in enumerate(tensors) if tensor.requires_grad]
    if not tracked:
        return outputs

    def on_grads(gradients: tuple[Tensor | None, ...]) -> None:
        arrived = dict(zip(tracked, gradients, strict=True))
        callback(tuple(arrived.get(number) for number in range(count)))

    made = _Together.apply(on_grads, *(tensors[number] for number in tracked))
    stand_ins = dict(zip(tracked, made, strict=True))
    return rebuilt(outputs, (stand_ins.get(number, tensor) for number, tensor in enumerate(tensors)))


class _Together(torch.autograd.Function):
    """The identity, as one node. Detached tensors share storage and version, and may be changed in place."""

    @staticmethod
    def forward(ctx: Any, on_grads: OnGrads, *outputs: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.on_grads = on_grads
        return tuple(output.detach() for output in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.on_grads(gradients)
        return None, *gradients


def gate_rows(
    module: nn.Module,
    input: Input,
    hx: Hidden,
    output_grads: Sequence[Tensor | None],
    weights: Mapping[str, Tensor] | None = None,
    *,
    ambient: Ambient | None = None,
    expected: Sequence[Tensor] | None = None,
) -> list[GateRows]:
    """The rows of every weight in one call, recomputed from its inputs and the gradients at its outputs.

    Leaves the random state, every ``grad`` and the caller's graph alone; may run inside a backward pass.

    Args:
        module: a recurrent layer or cell.
        input: the call's input.
        hx: the call's initial state.
        output_grads: the gradients of the outputs in the order of ``flat``, None where there is none.
        weights: the parameters as the call used them, by name.
        ambient: what was noted before the call.
        expected: the ``fingerprint`` of what the module returned.

    Raises:
        NotRecomputableError: the recomputed outputs are not those of the call.
    """
    weights = recurrent_weights(module) if weights is None else weights
    ambient = Ambient() if ambient is None else ambient
    # drawn or not is what the call did, whatever mode the module is in by now
    dropout = float(module.dropout) if isinstance(module, nn.RNNBase) and ambient.rng is not None else 0.0
    products: list[Product] = []
    with torch.enable_grad(), _surroundings(ambient, flat(input)[0].device):
        result = unrolled(
            module,
            _detached(input),
            _detached(hx),
            weights={name: weight.detach() for name, weight in weights.items()},
            linear=_observable,
            products=products,
            dropout=dropout,
        )
    made = flat(result)
    if expected is not None:
        _check(expected, fingerprint(made), ambient)
    arrived = [(y, dy.to(y.dtype)) for y, dy in zip(made, output_grads, strict=True) if dy is not None]
    gradients: Sequence[Tensor | None] = [None] * len(products)
    if arrived:
        with torch.enable_grad():
            gradients = torch.autograd.grad(
                [y for y, _ in arrived],
                [product.output for product in products],
                [dy for _, dy in arrived],
                allow_unused=True,
            )
    return _by_weight(products, gradients)


def fingerprint(outputs: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Some entries of each output, copied, since the outputs themselves may be changed in place."""
    return tuple(
        y.detach().reshape(-1)[:: max(1, y.numel() // CHECKED)].clone(memory_format=torch.contiguous_format)
        for y in outputs
    )


def _surroundings(ambient: Ambient, device: torch.device) -> ExitStack:
    """A block in which the call's random numbers and autocast come again; the generator is put back after it."""
    block = ExitStack()
    kind = device.type
    if torch.amp.is_autocast_available(kind):
        block.enter_context(torch.autocast(kind, ambient.autocast, enabled=ambient.autocast is not None))
    if ambient.rng is not None:
        block.enter_context(torch.random.fork_rng([device] if kind == "cuda" else []))
        torch.cuda.set_rng_state(ambient.rng, device) if kind == "cuda" else torch.set_rng_state(ambient.rng)
    return block


def _observable(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` whose output is in the graph; what comes before the first product is of no interest there."""
    output = F.linear(x, weight, bias)
    return output if output.requires_grad else output.requires_grad_()


def _detached(values: Any) -> Any:
    return None if values is None else rebuilt(values, (tensor.detach() for tensor in flat(values)))


def _check(expected: Sequence[Tensor], found: Sequence[Tensor], ambient: Ambient) -> None:
    """Compare two fingerprints: rounding grows along a sequence, a wrong dropout mask is of another order."""
    real, ours = (torch.cat([part.double() for part in parts]) for parts in (expected, found))
    finite = real.isfinite()
    difference, size = (ours - real)[finite].norm(), real[finite].norm()
    dtypes = {part.dtype for part in expected} | ({ambient.autocast} if ambient.autocast is not None else set())
    coarsest = max(torch.finfo(dtype).eps for dtype in dtypes)
    if torch.float32 in dtypes and is_reduced("rnn", real.device):
        coarsest = max(coarsest, 2.0**-10)  # of TF32
    if not bool(difference <= coarsest**0.5 * size):
        cause = (
            "weights or inputs were changed since" if ambient.rng is None else "its dropout masks cannot be drawn again"
        )
        remedy = "change them after the backward pass" if ambient.rng is None else "train it with dropout=0"
        raise NotRecomputableError(
            f"the recurrence written out differs from the module's output by {float(difference / size):.1e} of it, "
            f"expected at most {coarsest**0.5:.1e}: {cause}; {remedy}, or leave the layer out"
        )


def _by_weight(products: list[Product], gradients: Sequence[Tensor | None]) -> list[GateRows]:
    """The products of every weight put together, in order of its first one."""
    found: dict[str, list[tuple[Product, Tensor]]] = {}
    for product, gradient in zip(products, gradients, strict=True):
        grad = torch.zeros_like(product.output) if gradient is None else gradient
        found.setdefault(product.weight, []).append((product, grad.detach()))
    return [
        GateRows(
            weight,
            parts[0][0].bias,
            torch.cat([product.key.detach() for product, _ in parts]),
            torch.cat([gradient for _, gradient in parts]),
            torch.cat([product.sample for product, _ in parts]),
            torch.cat([product.position for product, _ in parts]),
        )
        for weight, parts in found.items()
    ]
