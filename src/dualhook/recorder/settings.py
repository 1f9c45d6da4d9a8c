"""Settings: what a user may choose, and what an optimiser says of itself before a step."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dualhook.errors import RuleError
from dualhook.optimizers import Rule
from dualhook.recorder.staging import Bring, in_one_go, is_elsewhere

__all__ = [
    "HeadGrads",
    "OnError",
    "OnFull",
    "RowDtype",
    "loss_scale_of",
    "numbers_of",
    "pool_bytes",
    "refuse",
    "state_numbers",
]

OnFull = Literal["fold", "stop", "error"]
OnError = Literal["warn", "raise"]
HeadGrads = Literal["computed", "dense"] | int
POOL_SHARE = 4  # part of a budget within which steps are to be held, or of the machine's memory
RowDtype = torch.dtype | Mapping[str, torch.dtype | None]


def pool_bytes(budget: int, on_full: OnFull, processes: int) -> int:
    """What each process's keys may take that later epochs are to find.

    No more than a part of the machine's memory: they are looked for in another order than they lie in, and training
    would have to wait if they were on the disk alone. Nor than a part of a budget that old steps fold away for.
    """
    most = budget // POOL_SHARE if on_full == "fold" else budget
    memory = _memory_bytes()
    return most if memory is None else min(most, memory // POOL_SHARE // processes)


def refuse(optimizer: Optimizer, parameters: Iterable[nn.Parameter | None]) -> None:
    """Turn away an optimiser that would step on recorded parameters in a way that cannot be recorded.

    Raises:
        RuleError: LBFGS or ZeroRedundancyOptimizer on one of ``parameters``.
    """
    redundant = type(optimizer).__name__ == "ZeroRedundancyOptimizer"
    if not (redundant or isinstance(optimizer, torch.optim.LBFGS)):
        return
    own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(id(parameter) in own for parameter in parameters):
        return
    if redundant:
        raise RuleError(
            "ZeroRedundancyOptimizer steps on other parameters in every process: its steps cannot be recorded; shard "
            "the model with torch.distributed.fsdp.fully_shard, or train with the plain optimiser"
        )
    raise RuleError(
        "torch.optim.LBFGS runs several backward passes within one step and mixes their gradients: its steps cannot be "
        "recorded; leave its layers out with layers=, train them with another optimiser, or close() the recorder"
    )


def loss_scale_of(optimizer: Optimizer) -> float | None:
    """What a fused step divides the gradients by, as torch's GradScaler has told it; None: it will skip the step."""
    scale, infinite = (getattr(optimizer, name, None) for name in ("grad_scale", "found_inf"))
    if isinstance(infinite, Tensor) and bool(infinite):
        return None
    return float(scale) if isinstance(scale, Tensor) else 1.0


def numbers_of(group: Mapping[str, Any], rule: Rule) -> dict[str, float]:
    """The hyper-parameters of a group that are numbers; pairs like ``betas`` as ``betas.0`` and ``betas.1``."""
    found = rule.hyper_numbers(group)
    for name, value in group.items():
        if name == "params":
            continue
        if isinstance(value, (tuple, list)):
            found |= {f"{name}.{k}": float(v) for k, v in enumerate(value) if isinstance(v, (int, float, Tensor))}
        elif isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1):
            found[name] = float(value)
    return found


def state_numbers(
    rule: Rule,
    states: Mapping[str, tuple[Mapping[str, Any], Mapping[str, float]]],
    bring: Bring,
) -> dict[str, Callable[[], dict[str, float]]]:
    """What to call for the numbers that a rule notes before a step, from states and settings by parameter.

    Those of states elsewhere (fused and capturable steps count there) ``bring`` copies to the host: to be called when
    they have come.
    """
    found: dict[str, Callable[[], dict[str, float]]] = {}
    late: dict[str, list[str]] = {}
    for name, (state, hyper) in states.items():
        counts = [key for key, value in state.items() if isinstance(value, Tensor) and value.numel() == 1]
        if any(is_elsewhere(state[key]) for key in counts):
            late[name] = counts
        else:
            found[name] = partial(dict, rule.state_numbers(state, hyper))
    numbers = [states[name][0][key].detach() for name, counts in late.items() for key in counts]
    there = iter(in_one_go([one.reshape(1).clone() if one.is_cpu else one.reshape(1) for one in numbers], bring))
    for name, counts in late.items():
        state, hyper = states[name]
        found[name] = partial(rule.state_numbers, {**state, **{key: next(there) for key in counts}}, hyper)
    return found


def _memory_bytes() -> int | None:
    """What the machine has; None where it does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return None
