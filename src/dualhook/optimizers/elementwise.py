"""Rules of optimisers that scale every entry of the gradient on its own: the Adam family and its relatives.

Written after the single-tensor forms in ``torch.optim``; foreach, fused and capturable forms compute the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from dualhook.optimizers.registry import register
from dualhook.optimizers.rule import Entry, Exactness, LinearStep, ReplayRule

__all__ = [
    "AdadeltaRule",
    "AdafactorRule",
    "AdagradRule",
    "AdamRule",
    "AdamaxRule",
    "LionRule",
    "NAdamRule",
    "RAdamRule",
    "RMSpropRule",
    "RpropRule",
]


class _Counted(ReplayRule):
    """An optimiser whose step depends on how many it has taken on the parameter."""

    def state_numbers(self, state: Mapping[str, object], hyper: Mapping[str, float]) -> dict[str, float]:
        return {"step": _number(state.get("step", 0.0))}


class _AdamLike(_Counted):
    """Running means of gradient and squared gradient."""

    buffer: ClassVar[str | None] = "exp_avg"
    preview_state: ClassVar[tuple[str, ...]] = ("exp_avg_sq",)

    def __init__(self, *, decoupled: bool = False) -> None:
        self.decoupled = decoupled

    def start(self, weight: Tensor, entry: Entry) -> dict[str, Tensor]:
        return {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}

    def linearize(self, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], entry: Entry) -> LinearStep:
        beta2 = entry["betas.1"]
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        return self.step_from(state, entry)

    def decay(self, entry: Entry) -> float:
        return 0.0 if self._decouples(entry) else entry["weight_decay"]

    def shrink(self, entry: Entry) -> float:
        """What decoupled weight decay leaves of the weight."""
        return 1 - entry["lr"] * entry["weight_decay"] if self._decouples(entry) else 1.0

    def _decouples(self, entry: Entry) -> bool:
        return self.decoupled or bool(entry["decoupled_weight_decay"])


class AdamRule(_AdamLike):
    """``torch.optim.Adam`` and ``AdamW``, amsgrad included (Kingma and Ba 2015; Loshchilov and Hutter 2019)."""

    name = "adam"
    preview_state: ClassVar[tuple[str, ...]] = ("exp_avg_sq", "max_exp_avg_sq")

    def start(self, weight: Tensor, entry: Entry) -> dict[str, Tensor]:
        largest = {"max_exp_avg_sq": torch.zeros_like(weight)} if entry["amsgrad"] else {}
        return super().start(weight, entry) | largest

    def linearize(self, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], entry: Entry) -> LinearStep:
        beta2 = entry["betas.1"]
        second = state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        if entry["amsgrad"]:
            torch.maximum(state["max_exp_avg_sq"], second, out=state["max_exp_avg_sq"])
        return self.step_from(state, entry)

    def step_from(self, state: Mapping[str, Tensor], entry: Entry) -> LinearStep:
        step = entry.state["step"] + 1
        beta1, beta2 = entry["betas.0"], entry["betas.1"]
        second = state["max_exp_avg_sq" if entry["amsgrad"] else "exp_avg_sq"]
        unbias = (1 - beta2**step) ** 0.5
        factor = second.sqrt().add_(entry["eps"] * unbias).reciprocal_()
        rate = entry["lr"] / (1 - beta1**step) * unbias  # numbers cost no pass over the entries
        return LinearStep(
            factor, rate * beta1, rate * (1 - beta1), keep=beta1, take=1 - beta1, shrink=self.shrink(entry)
        )


class NAdamRule(_AdamLike):
    """``torch.optim.NAdam`` (Dozat 2016): the gradient also reaches the weight past its running mean."""

    name = "nadam"

    def state_numbers(self, state: Mapping[str, object], hyper: Mapping[str, float]) -> dict[str, float]:
        numbers = super().state_numbers(state, hyper)
        product = state.get("mu_product")
        if not isinstance(product, Tensor):  # as torch will set it up
            precise = torch.get_default_dtype() == torch.float64
            product = torch.ones((), dtype=torch.float64 if precise else torch.float32)
        # after the step, in the precision that torch keeps it in
        return numbers | {"mu_product": float(product.detach() * _nadam_mu(hyper, numbers["step"] + 1))}

    def step_from(self, state: Mapping[str, Tensor], entry: Entry) -> LinearStep:
        step, product = entry.state["step"] + 1, entry.state["mu_product"]
        beta1, beta2 = entry["betas.0"], entry["betas.1"]
        factor = state["exp_avg_sq"].div(1 - beta2**step).sqrt_().add_(entry["eps"]).reciprocal_().mul_(entry["lr"])
        mu, following = _nadam_mu(entry.hyper, step), _nadam_mu(entry.hyper, step + 1)
        direct, through = (1 - mu) / (1 - product), following / (1 - product * following)
        return LinearStep(
            factor,
            from_buffer=through * beta1,
            from_gradient=direct + through * (1 - beta1),
            keep=beta1,
            take=1 - beta1,
            shrink=self.shrink(entry),
        )


class RAdamRule(_AdamLike):
    """``torch.optim.RAdam`` (Liu et al. 2020): momentum alone until the second moment is worth trusting."""

    name = "radam"

    def step_from(self, state: Mapping[str, Tensor], entry: Entry) -> LinearStep:
        step = entry.state["step"] + 1
        beta1, beta2 = entry["betas.0"], entry["betas.1"]
        rate, unbias = entry["lr"] / (1 - beta1**step), 1 - beta2**step
        longest = 2 / (1 - beta2) - 1
        length = longest - 2 * step * beta2**step / unbias
        factor: Tensor | float = 1.0
        if length > 5.0:
            rectified = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
            factor = state["exp_avg_sq"].sqrt().add_(entry["eps"]).reciprocal_()
            rate *= (rectified * unbias) ** 0.5
        return LinearStep(
            factor, rate * beta1, rate * (1 - beta1), keep=beta1, take=1 - beta1, shrink=self.shrink(entry)
        )


class AdamaxRule(_Counted):
    """``torch.optim.Adamax`` (Kingma and Ba 2015): the largest recent gradient in place of the second moment."""

    name = "adamax"
    buffer: ClassVar[str | None] = "exp_avg"
    preview_state: ClassVar[tuple[str, ...]] = ("exp_inf",)

    def start(self, weight: Tensor, entry: Entry) -> dict[str, Tensor]:
        return {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_inf")}

    def linearize(self, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], entry: Entry) -> LinearStep:
        largest = state["exp_inf"].mul_(entry["betas.1"])
        torch.maximum(largest, gradient.abs().add_(entry["eps"]), out=largest)
        return self.step_from(state, entry)

    def step_from(self, state: Mapping[str, Tensor], entry: Entry) -> LinearStep:
        step, beta1 = entry.state["step"] + 1, entry["betas.0"]
        factor = state["exp_inf"].reciprocal().mul_(entry["lr"] / (1 - beta1**step))
        return LinearStep(factor, beta1, 1 - beta1, keep=beta1, take=1 - beta1)


class RMSpropRule(ReplayRule):
    """``torch.optim.RMSprop``, centered or not, with momentum behind the preconditioner."""

    name = "rmsprop"
    buffer: ClassVar[str | None] = "momentum_buffer"
    preview_state: ClassVar[tuple[str, ...]] = ("square_avg", "grad_avg")

    def start(self, weight: Tensor, entry: Entry) -> dict[str, Tensor]:
        return {name: torch.zeros_like(weight) for name in ("square_avg", "grad_avg", "momentum_buffer")}

    def linearize(self, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], entry: Entry) -> LinearStep:
        alpha = entry["alpha"]
        state["square_avg"].mul_(alpha).addcmul_(gradient, gradient, value=1 - alpha)
        if entry["centered"]:
            state["grad_avg"].lerp_(gradient, 1 - alpha)
        return self.step_from(state, entry)

    def step_from(self, state: Mapping[str, Tensor], entry: Entry) -> LinearStep:
        momentum, root = entry["momentum"], state["square_avg"]
        if entry["centered"]:
            root = root.addcmul(state["grad_avg"], state["grad_avg"], value=-1).sqrt_()
        else:
            root = root.sqrt()
        inverse = root.add_(entry["eps"]).reciprocal_()
        if momentum > 0:  # W' = W - lr B' with B' = momentum B + inverse g
            return LinearStep(
                inverse,
                from_buffer=0.0,
                from_gradient=entry["lr"],
                keep=momentum,
                take=1.0,
                buffer_factor=inverse,
                plain_from_buffer=entry["lr"] * momentum,
            )
        return LinearStep(inverse, from_gradient=entry["lr"], keep=1.0)


class AdagradRule(_Counted):
    """``torch.optim.Adagrad`` (Duchi et al. 2011)."""

    name = "adagrad"
    preview_state: ClassVar[tuple[str, ...]] = ("sum",)

    def start(self, weight: Tensor, entry: Entry) -> dict[str, Tensor]:
        return {"sum": torch.full_like(weight, entry["initial_accumulator_value"])}

    def is_fresh(self, state: Mapping[str, object]) -> bool:
        return _number(state.get("step")) == 0  # torch sets the state up with the optimiser

    def linearize(self, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], entry: Entry) -> LinearStep:
        state["sum"].addcmul_(gradient, gradient)
        return self.step_from(state, entry)

    def step_from(self, state: Mapping[str, Tensor], entry: Entry) -> LinearStep:
        rate = entry["lr"] / (1 + entry.state["step"] * entry["lr_decay"])
        return LinearStep(state["sum"].sqrt().add_(entry["eps"]).reciprocal_().mul_(rate))


class AdadeltaRule(ReplayRule):
    """``torch.optim.Adadelta`` (Zeiler 2012)."""

    name = "adadelta"
    preview_state: ClassVar[tuple[str, ...]] = ("square_avg", "acc_delta")

    def start(self, weight: Tensor, entry: Entry) -> dict[str, Tensor]:
        return {name: torch.zeros_like(weight) for name in ("square_avg", "acc_delta")}

    def linearize(self, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], entry: Entry) -> LinearStep:
        rho = entry["rho"]
        state["square_avg"].mul_(rho).addcmul_(gradient, gradient, value=1 - rho)
        factor = self._factor(state, entry)
        delta = factor * gradient
        state["acc_delta"].mul_(rho).addcmul_(delta, delta, value=1 - rho)  # the factor has seen it from before
        return LinearStep(factor.mul_(entry["lr"]))

    def step_from(self, state: Mapping[str, Tensor], entry: Entry) -> LinearStep:
        return LinearStep(self._factor(state, entry).mul_(entry["lr"]))

    def _factor(self, state: Mapping[str, Tensor], entry: Entry) -> Tensor:
        eps = entry["eps"]
        return state["acc_delta"].add(eps).sqrt_().div_(state["square_avg"].add(eps).sqrt_())


class RpropRule(ReplayRule):
    """``torch.optim.Rprop`` (Riedmiller and Braun 1993): a step size per entry, the gradient's sign alone counts.

    The sign is the gradient over its absolute value, so that a step stays linear in the gradient. Where the gradient
    all but vanishes rounding decides the sign, torch's and the replay's not always alike.
    """

    name = "rprop"
    exactness: ClassVar[Exactness] = Exactness.ROUNDING

    def start(self, weight: Tensor, entry: Entry) -> dict[str, Tensor]:
        return {"prev": torch.zeros_like(weight), "step_size": torch.full_like(weight, entry["lr"])}

    def decay(self, entry: Entry) -> float:
        return 0.0

    def linearize(self, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], entry: Entry) -> LinearStep:
        agreement = gradient * state["prev"]
        turned = agreement < 0
        growth = torch.ones_like(gradient)
        growth[agreement > 0] = entry["etas.1"]
        growth[turned] = entry["etas.0"]
        size = state["step_size"].mul_(growth).clamp_(entry["step_sizes.0"], entry["step_sizes.1"])
        state["prev"].copy_(gradient).masked_fill_(turned, 0.0)
        factor, rest = _signs(size, state["prev"])
        return LinearStep(factor, rest=rest)


class LionRule(ReplayRule):
    """Lion as published (Chen et al. 2023): the sign of a short mean moves the weight, a long mean is kept.

    As for Rprop, rounding decides the sign of a mean that all but vanishes.
    """

    name = "lion"
    exactness: ClassVar[Exactness] = Exactness.ROUNDING
    buffer: ClassVar[str | None] = "exp_avg"
    reads_buffer: ClassVar[bool] = True

    def start(self, weight: Tensor, entry: Entry) -> dict[str, Tensor]:
        return {"exp_avg": torch.zeros_like(weight)}

    def decay(self, entry: Entry) -> float:
        return 0.0

    def refuses(self, hyper: Mapping[str, float]) -> str:
        for option, plain in (("caution", 0.0), ("cautious", 0.0), ("cautious_factor", 1.0), ("decoupled_wd", 0.0)):
            if hyper.get(option, plain) != plain:
                return f"{option}={hyper[option]:g}"
        return ""

    def linearize(self, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], entry: Entry) -> LinearStep:
        beta1, beta2 = entry["betas.0"], entry["betas.1"]
        mean = torch.add(gradient * (1 - beta1), state["exp_avg"], alpha=beta1)
        factor, rest = _signs(torch.full_like(mean, entry["lr"]), mean)
        return LinearStep(
            factor,
            from_buffer=beta1,
            from_gradient=1 - beta1,
            keep=beta2,
            take=1 - beta2,
            shrink=1 - entry["lr"] * entry["weight_decay"],
            rest=rest,
        )


class AdafactorRule(_Counted):
    """``torch.optim.Adafactor`` (Shazeer and Stern 2018): a second moment of row means times column means.

    Its step looks at the size of the whole weight and of the whole update: output units are not independent.
    """

    name = "adafactor"
    reads_weight: ClassVar[bool] = True
    separable: ClassVar[bool] = False

    def start(self, weight: Tensor, entry: Entry) -> dict[str, Tensor]:
        if weight.ndim == 1:
            return {"variance": torch.zeros_like(weight)}
        return {"row_var": torch.zeros_like(weight[:, :1]), "col_var": torch.zeros_like(weight[:1])}

    def decay(self, entry: Entry) -> float:
        return 0.0

    def linearize(self, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], entry: Entry) -> LinearStep:
        step = entry.state["step"] + 1
        smallest = entry["eps.0"] or torch.finfo(weight.dtype).eps
        intake = step ** entry["beta2_decay"]
        size = max(entry["eps.1"], float(weight.norm()) / weight.numel() ** 0.5)
        if weight.ndim == 1:
            estimate = state["variance"].lerp_(gradient.square(), intake).clone()
        else:
            squares = gradient.square()
            rows = state["row_var"].lerp_(squares.mean(1, keepdim=True), intake)
            columns = state["col_var"].lerp_(squares.mean(0, keepdim=True), intake)
            estimate = (rows @ columns).div_(rows.mean(0, keepdim=True).clamp_(min=smallest))
        factor = estimate.clamp_(min=smallest**2).rsqrt_()
        excess = max(1.0, float((factor * gradient).norm()) / (gradient.numel() ** 0.5 * entry["d"]))
        rate = size * min(entry["lr"], step**-0.5) / excess
        return LinearStep(factor.mul_(rate), shrink=1 - entry["lr"] * entry["weight_decay"])


def _nadam_mu(hyper: Mapping[str, float], step: float) -> float:
    return hyper["betas.0"] * (1.0 - 0.5 * 0.96 ** (step * hyper["momentum_decay"]))  # type: ignore[no-any-return]


def _signs(size: Tensor, values: Tensor) -> tuple[Tensor, Tensor | None]:
    """The factor ``size / |values|`` that turns values into their signs times size, and what it leaves out.

    Values that all but vanish would make it overflow: their steps are the rest.
    """
    absolute = values.abs()
    clear = absolute >= torch.finfo(values.dtype).tiny ** 0.75
    faint = ~clear & (absolute > 0)
    rest = torch.where(faint, values.sign() * size, 0.0) if bool(faint.any()) else None
    return torch.where(clear, size / absolute, 0.0), rest


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float, Tensor)) else 0.0


register("torch.optim.adam.Adam", AdamRule())
register("torch.optim.adamw.AdamW", AdamRule(decoupled=True))
register("torch.optim.nadam.NAdam", NAdamRule())
register("torch.optim.radam.RAdam", RAdamRule())
register("torch.optim.adamax.Adamax", AdamaxRule())
register("torch.optim.rmsprop.RMSprop", RMSpropRule())
register("torch.optim.adagrad.Adagrad", AdagradRule())
register("torch.optim.adadelta.Adadelta", AdadeltaRule())
register("torch.optim.rprop.Rprop", RpropRule())
for _module in ("torch.optim", "torch.optim._adafactor"):  # where torch says it is differs between versions
    register(f"{_module}.Adafactor", AdafactorRule())
register("lion_pytorch.lion_pytorch.Lion", LionRule())
