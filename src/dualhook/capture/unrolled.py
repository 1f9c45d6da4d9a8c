"""The linear maps inside recurrent layers: ``nn.LSTM``, ``nn.GRU``, ``nn.RNN`` and their cells.

torch runs a whole layer as one fused operation that shows neither its gates nor their gradients. Here the same
recurrence is written out, one linear product after the other, so that each has an output in the autograd graph. Per
layer and direction ``k``, with the state ``h`` and the pre-activations of the gates as outputs:

    x W_ih_kᵀ + b_ih_k     over all time steps at once
    h W_hh_kᵀ + b_hh_k     one per time step
    h W_hr_kᵀ              one per time step, an LSTM's projection

Inside, every input is packed: rows in order of time, of each step the samples that are still running, longest first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from dualhook.host import on_host

__all__ = ["Hidden", "Input", "Product", "dropout_of", "flat", "rebuilt", "recurrent_weights", "unrolled"]

Input = Tensor | PackedSequence
Hidden = Tensor | tuple[Tensor, ...] | None
Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
State = tuple[Tensor, ...]  # (h,) or an LSTM's (h, c), each [b, ·]
Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Product:
    """One product of the recurrence: ``output`` [n, o] = ``key`` [n, i] Wᵀ + b, in the autograd graph.

    ``sample`` [n] counts within the call's batch, ``position`` [n] is the time step; both are on the CPU.
    """

    weight: str
    bias: str | None
    key: Tensor
    output: Tensor
    sample: Tensor
    position: Tensor


def recurrent_weights(module: nn.Module) -> dict[str, Tensor]:
    """The parameters of a recurrent layer or cell by their names, as its forward pass uses them now."""
    if isinstance(module, nn.RNNBase):
        return {name: getattr(module, name) for names in module._all_weights for name in names}
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    return {name: getattr(module, name) for name in names if getattr(module, name) is not None}


@on_host()
def unrolled(
    module: nn.Module,
    input: Input,
    hx: Hidden = None,
    *,
    weights: Mapping[str, Tensor] | None = None,
    linear: Linear | None = None,
    products: list[Product] | None = None,
    dropout: float | None = None,
) -> Any:
    """The forward pass of a recurrent layer or cell, written out; takes and returns what the module does.

    Args:
        module: a recurrent layer or cell.
        input: as for the module: [t, b, i], [b, t, i], [t, i] or packed; [b, i] or [i] for a cell.
        hx: the initial state, as for the module.
        weights: what to use in place of the module's own parameters, by name.
        linear: what to use in place of ``F.linear``, called with x [n, i], W [o, i] and b [o] or None.
        products: a list that gets every product, in the order they are made.
        dropout: the probability between layers; by default the module's own where it is in training mode.
    """
    weights = recurrent_weights(module) if weights is None else weights
    multiply = _Multiply(weights, F.linear if linear is None else linear, products)
    if isinstance(module, nn.RNNBase):
        return _layers(module, input, hx, multiply, dropout_of(module) if dropout is None else dropout)
    assert isinstance(module, nn.RNNCellBase)
    assert isinstance(input, Tensor)
    return _cell(module, input, hx, multiply)


def flat(result: Any) -> tuple[Tensor, ...]:
    """The tensors in what a recurrent module takes or returns: (output, h_n) or (output, h_n, c_n); packed as data."""
    if isinstance(result, PackedSequence):
        return (result.data,)
    if isinstance(result, Tensor):
        return (result,)
    return tuple(tensor for part in result for tensor in flat(part))


def rebuilt(result: Any, tensors: Iterable[Tensor]) -> Any:
    """``result`` with other tensors in place of those of ``flat(result)``."""
    left = iter(tensors)

    def build(part: Any) -> Any:
        if isinstance(part, PackedSequence):
            return part._replace(data=next(left))
        return next(left) if isinstance(part, Tensor) else tuple(build(inner) for inner in part)

    return build(result)


def dropout_of(module: nn.Module) -> float:
    """The probability with which the module's next call drops what passes between its layers."""
    if not (isinstance(module, nn.RNNBase) and module.training and module.num_layers > 1):
        return 0.0
    return float(module.dropout)


@dataclass(frozen=True)
class _Multiply:
    """Calls the linear map of a name, on rows of known sample and position, and notes the product."""

    weights: Mapping[str, Tensor]
    linear: Linear
    products: list[Product] | None

    def __call__(self, name: str, x: Tensor, sample: Tensor, position: Tensor) -> Tensor:
        weight, bias = f"weight_{name}", f"bias_{name}"
        output = self.linear(x, self.weights[weight], self.weights.get(bias))
        if self.products is not None:
            known = bias if bias in self.weights else None
            self.products.append(Product(weight, known, x, output, sample, position))
        return output


@dataclass(frozen=True)
class _Packing:
    """Which rows belong to which step: ``sizes`` [t] rows each; ``sample`` and ``position`` [n] of every row."""

    sizes: list[int]
    sample: Tensor
    position: Tensor

    @classmethod
    def of(cls, sizes: list[int], order: Tensor) -> _Packing:
        """Of steps that run the first ``sizes`` [t] samples of ``order`` [b]."""
        sample = torch.cat([order[:size] for size in sizes])
        return cls(sizes, sample, torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)))


def _layers(module: nn.RNNBase, input: Input, hx: Hidden, multiply: _Multiply, dropout: float) -> Any:
    """All layers and directions of a recurrent module."""
    x, packing, forth, back = _packed(module, input)
    states = _states(module, hx, x, packing.sizes[0], forth)
    directions = 2 if module.bidirectional else 1
    finals: list[State] = []
    for layer in range(module.num_layers):
        if layer and dropout:
            x = F.dropout(x, dropout)
        outputs = []
        for direction in range(directions):
            suffix = f"_l{layer}" + ("_reverse" if direction else "")
            y, state = _direction(module.mode, multiply, suffix, x, states[len(finals)], packing, bool(direction))
            outputs.append(y)
            finals.append(state)
        x = torch.cat(outputs, 1) if module.bidirectional else outputs[0]
    hidden = tuple(back(torch.stack(parts)) for parts in zip(*finals, strict=True))
    return _unpacked(module, input, x), hidden if module.mode == "LSTM" else hidden[0]


def _direction(
    mode: str, multiply: _Multiply, suffix: str, x: Tensor, state: State, packing: _Packing, reverse: bool
) -> tuple[Tensor, State]:
    """One layer in one direction: its outputs [n, h] and last state.

    The state keeps all samples: those past their end, or backwards not yet at it, wait in its last rows.
    """
    sizes = packing.sizes
    incoming = torch.split(multiply(f"ih{suffix}", x, packing.sample, packing.position), sizes)
    sample, position = torch.split(packing.sample, sizes), torch.split(packing.position, sizes)
    outputs: list[Tensor] = [x] * len(sizes)
    for t in reversed(range(len(sizes))) if reverse else range(len(sizes)):
        running, waiting = sizes[t], sizes[t] < sizes[0]
        now = tuple(part[:running] for part in state) if waiting else state

        def hidden(name: str, h: Tensor, t: int = t) -> Tensor:
            return multiply(f"{name}{suffix}", h, sample[t], position[t])

        after = _step(mode, incoming[t], now, hidden, f"weight_hr{suffix}" in multiply.weights)
        outputs[t] = after[0]
        pairs = zip(after, state, strict=True)
        state = tuple(torch.cat([new, old[running:].to(new.dtype)]) for new, old in pairs) if waiting else after
    return torch.cat(outputs), state


def _step(mode: str, x: Tensor, state: State, hidden: Callable[[str, Tensor], Tensor], projected: bool) -> State:
    """One time step from what the input contributes to the gates [b, g·h] and the state before."""
    h = state[0]
    recurrent = hidden("hh", h)
    if mode == "LSTM":
        i, f, g, o = (x + recurrent).chunk(4, 1)
        c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        return (hidden("hr", h) if projected else h), c
    if mode == "GRU":
        (xr, xz, xn), (hr, hz, hn) = x.chunk(3, 1), recurrent.chunk(3, 1)
        z = (xz + hz).sigmoid()
        n = (xn + (xr + hr).sigmoid() * hn).tanh()
        return (n + z * (h - n),)
    return ((x + recurrent).relu() if mode == "RNN_RELU" else (x + recurrent).tanh(),)


def _mode(cell: nn.RNNCellBase) -> str:
    if isinstance(cell, nn.RNNCell):
        return f"RNN_{cell.nonlinearity}".upper()
    return "LSTM" if isinstance(cell, nn.LSTMCell) else "GRU"


def _cell(module: nn.RNNCellBase, input: Tensor, hx: Hidden, multiply: _Multiply) -> Any:
    """A single cell: one step of one layer."""
    mode = _mode(module)
    x = input if input.dim() == 2 else input.unsqueeze(0)
    if hx is None:
        state: State = (x.new_zeros(len(x), module.hidden_size),) * (2 if mode == "LSTM" else 1)
    else:
        state = tuple(part if input.dim() == 2 else part.unsqueeze(0) for part in flat(hx))
    sample, position = torch.arange(len(x)), torch.zeros(len(x), dtype=torch.long)

    def hidden(name: str, h: Tensor) -> Tensor:
        return multiply(name, h, sample, position)

    after = _step(mode, hidden("ih", x), state, hidden, False)
    after = after if input.dim() == 2 else tuple(part.squeeze(0) for part in after)
    return after if mode == "LSTM" else after[0]


def _packed(module: nn.RNNBase, input: Input) -> tuple[Tensor, _Packing, Change, Change]:
    """The rows [n, i] of an input, their packing, and what brings a state [l, b, h] into its order and back."""
    if isinstance(input, PackedSequence):
        sizes = input.batch_sizes.tolist()
        there, back = input.sorted_indices, input.unsorted_indices
        if there is None or back is None:
            return input.data, _Packing.of(sizes, torch.arange(sizes[0])), _same, _same
        packing = _Packing.of(sizes, there.cpu())
        return input.data, packing, lambda s: s.index_select(1, there), lambda s: s.index_select(1, back)
    if input.dim() == 2:
        packing = _Packing.of([1] * len(input), torch.zeros(1, dtype=torch.long))
        return input, packing, lambda s: s.unsqueeze(1), lambda s: s.squeeze(1)
    x = input.transpose(0, 1) if module.batch_first else input
    steps, samples = x.shape[:2]
    return x.reshape(steps * samples, -1), _Packing.of([samples] * steps, torch.arange(samples)), _same, _same


def _unpacked(module: nn.RNNBase, input: Input, y: Tensor) -> Input:
    """Rows [n, h] in the layout of the input."""
    if isinstance(input, PackedSequence):
        return input._replace(data=y)
    if input.dim() == 2:
        return y
    if module.batch_first:
        return y.reshape(input.shape[1], input.shape[0], -1).transpose(0, 1)
    return y.reshape(*input.shape[:2], -1)


def _same(state: Tensor) -> Tensor:
    return state


def _states(module: nn.RNNBase, hx: Hidden, x: Tensor, samples: int, forth: Change) -> list[State]:
    """The initial state of every layer and direction, each part [b, ·]."""
    count = module.num_layers * (2 if module.bidirectional else 1)
    if hx is not None:
        return list(zip(*(forth(part).unbind(0) for part in flat(hx)), strict=True))
    widths = (module.proj_size or module.hidden_size, *((module.hidden_size,) if module.mode == "LSTM" else ()))
    return [tuple(x.new_zeros(samples, width) for width in widths)] * count
