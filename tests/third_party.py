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
