"""What is left of a gradient, direction by direction, once training has gone on after it.

A small change of the weights at step ``t`` does not stay what it was: the later steps pull it back where the loss is
curved. In a direction of curvature ``λ`` that is what a weight decay of ``λ`` would do, so that the optimiser's own
step, with ``λ`` added to its decay, says what every gradient has become at the horizon: ``c_t(λ)``, with momentum and
schedules followed exactly. ``c_t(0)`` is the coefficient of the dual form.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dualhook.errors import RuleError
from dualhook.optimizers import LinearStep, ReplayedScalar
from dualhook.query.parts import ReplayShare, StepTaken

__all__ = ["decayed", "gains", "leaves_out_decay"]

LONGEST = 0.999  # momentum, of a step that is said to have gone as far as it will


def _numbers(taken: StepTaken) -> LinearStep:
    """The step with numbers in place of what its optimiser knows of single entries: as if its state were all ones.

    Raises:
        RuleError: the step is made of more than its state.
    """
    one = torch.ones((), dtype=torch.float64)
    if isinstance(taken.rule, ReplayedScalar):
        return taken.rule.linearize(one, one, {}, taken.entry)
    if not taken.rule.preview_state:
        raise RuleError(
            f"what a step of {taken.rule.name} takes back is not known: ask with method='cosine', which looks at the "
            "recorded gradients alone"
        )
    return taken.rule.step_from(dict.fromkeys(taken.rule.preview_state, one), taken.entry)


def decayed(
    share: ReplayShare, curvature: Tensor, scale: Tensor, stretches: Sequence[tuple[int, int]]
) -> Iterator[Tensor]:
    """``c_t(λ)`` for every ``curvature`` λ [l], the mean over each stretch of steps [l], newest stretch first.

    ``scale`` [t + 1] multiplies the curvature step by step; ``stretches`` are the steps between
    which each lies, oldest first.
    Curvature counts up to half of that at which the step would be unstable: training that has come to its end was not.
    """
    steps = dict(_steps(share))
    weight, buffer = torch.ones_like(curvature), torch.zeros_like(curvature)
    for begin, end in reversed(stretches):
        total = torch.zeros_like(curvature)
        for step in range(end, begin, -1):
            if (taken := steps.get(step)) is None:
                continue
            numbers, gradient = _numbers(taken), taken.rule.gradient_scale(taken.entry)
            factor = float(numbers.factor)
            # what multiplies the gradient that the optimiser works with
            took = buffer * (float(numbers.buffer_factor) * numbers.take) - weight * (factor * numbers.from_gradient)
            total -= took * gradient
            pull = (curvature * (float(scale[step]) * abs(gradient))).clamp(max=_steepest(numbers))
            held = buffer * numbers.keep - weight * (factor * numbers.from_buffer + numbers.plain_from_buffer)
            weight = weight * numbers.shrink + took * (pull + _decay(taken))
            buffer = torch.zeros_like(held) if taken.entry.fresh else held
        yield total / max(1, end - begin)


def gains(share: ReplayShare) -> Tensor:
    """By how much a gradient that stays the same moves the weights at each step [t + 1], float64, momentum included.

    In units of the optimiser's metric; 0 at steps that were not taken.

    Raises:
        RuleError: what the optimiser does is made of more than its state.
    """
    found = torch.zeros(share.horizon + 1, dtype=torch.float64)
    for step, taken in _steps(share):
        numbers = _numbers(taken)
        alone, through, carried = _ways(numbers)
        kept = min(numbers.keep, LONGEST) if numbers.take else 0.0
        found[step] += abs(taken.rule.gradient_scale(taken.entry)) * (alone + through * carried / (1 - kept))
    return found


def _steps(share: ReplayShare) -> Iterator[tuple[int, StepTaken]]:
    """The steps on a parameter by their number, oldest first.

    Raises:
        RuleError: the weights were also moved by what is no step.
    """
    for step, own in sorted(share.taken.items()):
        for taken in own:
            if not isinstance(taken, StepTaken):
                raise RuleError(f"{share.parameter!r} was trained under Lookahead: ask with method='cosine'")
            yield step, taken


def _steepest(numbers: LinearStep) -> float:
    """Half of the curvature at which weight and buffer would swing ever wider (the characteristic polynomial at -1)."""
    alone, through, carried = _ways(numbers)
    # det(M + 1) = (1 + shrink - alone λ)(1 + keep) + through (carried λ) = 0
    return (1 + numbers.shrink) * (1 + numbers.keep) / max(1e-300, 2 * (alone * (1 + numbers.keep) - through * carried))


def _ways(numbers: LinearStep) -> tuple[float, float, float]:
    """What of the gradient reaches the weight alone, what of the buffer does, and what of the gradient the buffer."""
    factor = float(numbers.factor)
    through = factor * numbers.from_buffer + numbers.plain_from_buffer
    return factor * numbers.from_gradient, through, float(numbers.buffer_factor) * numbers.take


def leaves_out_decay(share: ReplayShare) -> bool:
    """Whether weight decay joins the gradient of a step that scales every entry on its own: it is not followed."""
    return any(taken.rule.decay(taken.entry) != _decay(taken) for taken in share.steps)


def _decay(taken: StepTaken) -> float:
    """The weight decay that joins the gradient, where no entry is scaled on its own."""
    return taken.rule.decay(taken.entry) if isinstance(taken.rule, ReplayedScalar) else 0.0
