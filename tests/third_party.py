"""Optimisers that torch does not have, written for the tests from their papers."""

from __future__ import annotations

import torch


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023, algorithm 2."""

    def __init__(self, params, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            short, long = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p)
                sign = (short * state["exp_avg"] + (1 - short) * p.grad).sign()
                p.sub_(group["lr"] * (sign + group["weight_decay"] * p))
                state["exp_avg"].mul_(long).add_(p.grad, alpha=1 - long)


class Lookahead(torch.optim.Optimizer):
    """Zhang et al. 2019 around another optimiser: torch's hooks fire for both, one step inside the other."""

    def __init__(self, optimizer, k=5, alpha=0.5):
        self.optimizer, self.k, self.alpha, self.steps = optimizer, k, alpha, 0
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = {}, {}
        self._patch_step_function()
        self.slow = {p: p.detach().clone() for group in self.param_groups for p in group["params"]}

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure=None):
        loss = self.optimizer.step(closure)
        self.steps += 1
        if self.steps % self.k == 0:
            for p, slow in self.slow.items():
                if p.grad is not None:
                    slow.lerp_(p, self.alpha)
                    p.copy_(slow)
        return loss


class PlainLookahead:
    """The same as no optimiser of torch's: it synchronises after the first step, and frozen parameters as well."""

    def __init__(self, optimizer, k=5, alpha=0.5):
        self.optimizer, self.k, self.alpha, self.counter, self.slow = optimizer, k, alpha, 0, {}
        self.param_groups = optimizer.param_groups
        self.zero_grad = optimizer.zero_grad

    @torch.no_grad()
    def step(self, closure=None):
        loss = self.optimizer.step(closure)
        if self.counter % self.k == 0:
            for p in (p for group in self.param_groups for p in group["params"]):
                slow = self.slow.setdefault(p, p.clone())
                p.mul_(self.alpha).add_(slow, alpha=1 - self.alpha)
                slow.copy_(p)
        self.counter += 1
        return loss
