"""Odd training loops, drawn at random: whatever a loop does, the memory is exact or says that it is not."""

from __future__ import annotations

import copy
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import dualhook

WIDTH, CLASSES = 5, 3
EVENTS = ("step", "step", "step", "step", "freeze", "unfreeze", "drop", "look", "twice", "partial", "flush", "empty")


class TwoHeads(nn.Module):
    """A shared layer, one without a bias, and two heads of which a batch uses one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [
                nn.Linear(WIDTH, WIDTH),
                nn.Linear(WIDTH, WIDTH, bias=False),
                nn.Linear(WIDTH, CLASSES),
                nn.Linear(WIDTH, CLASSES),
            ]
        )

    def forward(self, x: torch.Tensor, head: int) -> torch.Tensor:
        hidden = self.layers[1](self.layers[0](x).relu_()).tanh()
        return self.layers[2 + head](hidden)


def optimizers(model: TwoHeads, split: str, settings: list[dict[str, Any]]) -> list[torch.optim.Optimizer]:
    parameters = list(model.parameters())
    parts = {
        "one": [parameters],
        "halves": [[*model.layers[0].parameters(), *model.layers[1].parameters()],
                   [*model.layers[2].parameters(), *model.layers[3].parameters()]],
        "kinds": [[p for p in parameters if p.dim() == 2], [p for p in parameters if p.dim() == 1]],
    }[split]  # fmt: skip
    made: list[torch.optim.Optimizer] = []
    for part, chosen in zip(parts, settings, strict=False):
        make = torch.optim.ASGD if "t0" in chosen else torch.optim.SGD
        made.append(make(part, **chosen))
    return made


SETTINGS = st.sampled_from(
    [
        {"lr": 0.05},
        {"lr": 0.05, "momentum": 0.9},
        {"lr": 0.02, "momentum": 0.9, "nesterov": True, "weight_decay": 0.05},
        {"lr": 0.05, "momentum": 0.5, "dampening": 0.3},
        {"lr": 0.05, "t0": 2, "weight_decay": 0.1},
    ]
)


@given(
    events=st.lists(st.sampled_from(EVENTS), min_size=1, max_size=30),
    split=st.sampled_from(["one", "halves", "kinds"]),
    settings=st.lists(SETTINGS, min_size=2, max_size=2),
    max_bytes=st.sampled_from([None, None, 3_000, 12_000]),
    to_none=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_any_loop_is_exact(events, split, settings, max_bytes, to_none, seed):
    torch.manual_seed(seed)
    model = TwoHeads().double()
    recorder = dualhook.instrument(model, max_bytes=max_bytes, verbose=False)
    steppers = optimizers(model, split, settings)
    weights = {0: copy.deepcopy(model.state_dict())}

    def loss(size: int = 4) -> torch.Tensor:
        return model(torch.randn(size, WIDTH, dtype=torch.float64), int(torch.randint(0, 2, ()))).square().sum()

    for event in events:
        layer = model.layers[int(torch.randint(0, 4, ()))]
        if event in ("freeze", "unfreeze"):
            for parameter in layer.parameters():
                parameter.requires_grad_(event == "unfreeze")
                parameter.grad = None
        for stepper in steppers:
            stepper.zero_grad(set_to_none=to_none)
        if any(parameter.requires_grad for parameter in model.parameters()):
            value = loss(0 if event == "empty" else 4)
            if not value.requires_grad:  # what trains is the other head
                continue
            if event == "look":
                training = [parameter for parameter in model.parameters() if parameter.requires_grad]
                torch.autograd.grad(value, training, allow_unused=True, retain_graph=True)
            value.backward(retain_graph=event == "twice")
            if event == "twice":
                value.backward()
            if event == "drop":
                for stepper in steppers:
                    stepper.zero_grad(set_to_none=to_none)
                value = loss()
                if value.requires_grad:
                    value.backward()
        if event == "partial":
            nn.utils.clip_grad_norm_(layer.parameters(), 0.05)
        for stepper in steppers:
            stepper.step()
        if event == "flush":
            recorder.flush()
        weights[recorder.steps] = copy.deepcopy(model.state_dict())
    memory = recorder.close()
    if not memory.layers:
        return
    report = memory.verify(model)
    assert report["exact"].all(), report
    assert report.max_error < 1e-10
    for step in {memory._store.first_step, memory.steps}:
        if step in weights:
            rebuilt = memory.state_dict(step=step)
            assert all(torch.allclose(value, weights[step][name], atol=1e-10) for name, value in rebuilt.items())
