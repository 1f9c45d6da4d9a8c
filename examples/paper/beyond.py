"""What the paper does not ask: forgetting seen through the memory, and bookkeeping beside a real retraining."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from questions import asked_of
from runs import Experiment, Trained, retrain
from tables import Rows
from tasks import Task
from torch import Tensor, nn

KEYS = {
    "forgetting": ("step", "task"),
    "overwriting": ("part",),
    "bookkeeping": ("left_out",),
}
LOST = 100  # test images that were lost, whose overwriting is asked about
SHARE = 0.05  # of the training set, in a group of samples drawn by chance


def beyond(run: Trained, experiment: Experiment, tasks: Sequence[Task], seed: int) -> dict[str, Rows]:
    """The tables that the experiment is for."""
    if experiment.is_continual:
        return {"forgetting": forgetting(run, experiment, tasks), "overwriting": overwriting(run, experiment, tasks)}
    if experiment.name == "single":
        return {"bookkeeping": bookkeeping(run, experiment, tasks, seed)}
    return {}


def at_step(run: Trained, step: int) -> nn.Module:
    """The model as it was after a step: its weights are rebuilt from the memory, no checkpoint is needed."""
    model = copy.deepcopy(run.model)
    model.load_state_dict(run.memory.state_dict(step=step))
    return model


def forgetting(run: Trained, experiment: Experiment, tasks: Sequence[Task]) -> Rows:
    """Accuracy on every task along the way: at the switch, and soon and long after it."""
    switch, last = experiment.switch, experiment.steps
    steps = sorted({0, switch // 3, switch, *(switch + (last - switch) * part // 100 for part in (3, 10, 30)), last})
    rows = []
    for step in steps:
        model = at_step(run, step)
        for task in tasks:
            accuracy = float(asked_of(task, model, experiment.queries).correct.mean())
            rows.append({"step": step, "task": task.name, "accuracy": accuracy})
    return rows


def overwriting(run: Trained, experiment: Experiment, tasks: Sequence[Task]) -> Rows:
    """What the last layer's preference of the wrong class is made of, where the first task was lost.

    Of the test images of the first task that were classified rightly at the switch and are not at the end: the mean
    contribution of every class's patterns, and of what is no pattern, to the logit that wins less the true one. The
    parts sum to ``whole``. ``strongest_image_is_of_it``: the share of them whose largest total of a single training
    image is of this class.
    """
    first = tasks[0]
    before = asked_of(first, at_step(run, experiment.switch), experiment.queries)
    after = asked_of(first, run.model, experiment.queries)
    lost = np.flatnonzero(before.correct & ~after.correct)[:LOST]
    if not len(lost):
        return []
    images = first.test_images[lost]
    with torch.no_grad():
        winner = run.model(images).argmax(1)[:, None]
    true = first.test_labels[lost][:, None]

    def preference(logits: Tensor) -> Tensor:
        return (logits.gather(1, winner) - logits.gather(1, true)).squeeze(1)

    attention = run.memory.attend(run.model, images, target=preference, layers="fc3")
    totals, parts = attention.sum_by("class"), attention.parts
    single = attention.sum_by("sample", top=1)
    best = [run.class_of[sample] for sample in single["sample"].tolist()]
    rows = []
    for name in run.classes:
        own = totals["contribution"][totals["class"] == name]
        led = sum(leader == name for leader in best) / len(lost)
        rows.append({"part": name, "contribution": float(own.sum() / len(lost)), "strongest_image_is_of_it": led})
    for part in dict.fromkeys(parts["part"].tolist()):
        if part != "patterns":
            own = parts["contribution"][parts["part"] == part]
            rows.append({"part": part, "contribution": float(own.mean()), "strongest_image_is_of_it": None})
    whole = float(attention.queries["score"].mean())
    return [*rows, {"part": "whole", "contribution": whole, "strongest_image_is_of_it": None}]


def bookkeeping(run: Trained, experiment: Experiment, tasks: Sequence[Task], seed: int) -> Rows:
    """The margins of test images without some samples: their values taken away, beside a training without them.

    Margins are of the true class: its logit above the log-sum-exp of the others. Sizes are means of absolute changes
    over the test images; ``signs_agree`` is the share of images whose margin moves the same way. The last row leaves
    nothing out: how far a retraining is from the run itself.
    """
    task = tasks[0]
    images, labels = task.test_images[: experiment.queries], task.test_labels[: experiment.queries]
    before = margins(run.model, images, labels)
    rows = []
    for name, samples in groups(task, experiment.groups, seed):
        there = torch.isin(samples, torch.from_numpy(run.memory.samples))
        model = copy.deepcopy(run.model)
        model.load_state_dict(run.memory.without(samples[there].tolist()))
        taken = margins(model, images, labels) - before
        real = margins(retrain(experiment, tasks, seed, samples), images, labels) - before
        rows.append(
            {
                "left_out": name,
                "samples": int(there.sum()),
                "size_values_taken": float(taken.abs().mean()),
                "size_retrained": float(real.abs().mean()),
                "ratio": float(taken.abs().mean() / real.abs().mean()),
                "signs_agree": float((taken.sign() == real.sign()).double().mean()),
            }
        )
    nobody = margins(retrain(experiment, tasks, seed, torch.tensor([], dtype=torch.int64)), images, labels) - before
    rows.append(
        dict.fromkeys(rows[0]) | {"left_out": "nothing", "samples": 0, "size_retrained": float(nobody.abs().mean())}
    )
    return rows


def groups(task: Task, count: int, seed: int) -> Iterator[tuple[str, Tensor]]:
    """``count`` whole classes, and as many parts of the training set drawn by chance."""
    for number in range(count):
        yield task.classes[number], (task.train_labels == number).nonzero().flatten()
    generator = torch.Generator().manual_seed(seed)
    for number in range(count):
        order = torch.randperm(len(task.train_labels), generator=generator)
        yield f"{SHARE:.0%} by chance, {number + 1}", order[: int(SHARE * len(order))]


def margins(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Of the true class [q]: its logit above the log-sum-exp of the others."""
    with torch.no_grad():
        logits = model(images)
    own = torch.nn.functional.one_hot(labels, logits.shape[1]).bool()
    return logits[own] - logits.masked_fill(own, -torch.inf).logsumexp(1)
