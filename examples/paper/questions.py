"""What a run is asked: the paper's statistics over many test images, and some test images looked at one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from runs import Experiment, Trained
from tables import Rows
from tasks import Task
from torch import Tensor

import dualhook
from dualhook.statistics import DEFINITIONS, agreement, spread, votes

STRONGEST = 500  # patterns of every class that a picture shows
BLOCKS = 50  # of steps, in totals over training


@dataclass(frozen=True)
class Queries:
    """Test images [q, pixel] of a task with their class and the model's, by name."""

    task: str
    images: Tensor
    targets: list[str]
    outputs: list[str]

    @property
    def correct(self) -> np.ndarray:
        """Which are classified rightly [q]."""
        return np.array(self.targets) == np.array(self.outputs)


def asked_of(task: Task, model: torch.nn.Module, count: int) -> Queries:
    """The first ``count`` test images of a task; every task has the same ten outputs."""
    images = task.test_images[:count]
    with torch.no_grad():
        outputs = model(images).argmax(1).tolist()
    targets = task.test_labels[:count].tolist()
    return Queries(task.name, images, [task.classes[t] for t in targets], [task.classes[o] for o in outputs])


def statistics(run: Trained, experiment: Experiment, tasks: Sequence[Task]) -> dict[str, Rows]:
    """Every statistic of the paper, by layer and by the task of the test images."""
    found: dict[str, Rows] = {"accuracy": [], "power": [], "variance": [], "shares": [], "receipt": []}
    for number in experiment.tasks:
        queries = asked_of(tasks[number], run.model, experiment.queries)
        correct = queries.correct
        found["accuracy"].append({"task": queries.task, "queries": len(correct), "accuracy": float(correct.mean())})
        attention = run.memory.attend(run.model, queries.images)
        totals = attention.sum_by("class")
        found["power"] += power(queries, totals, tasks)
        variance = spread(totals, "class")
        own = [task.name for task in tasks for _ in task.classes]
        task_of = dict(zip((name for task in tasks for name in task.classes), own, strict=True))
        whose = np.array([task_of[name] for name in totals["class"].tolist()])
        for layer in attention.layers:
            of_layer = variance["layer"] == layer
            for kind, among in (("all", correct | True), ("correct", correct), ("wrong", ~correct)):
                mean = float(variance["abs_weight"][of_layer][among].mean()) if among.any() else None
                found["variance"].append(
                    {"task": queries.task, "layer": layer, "predictions": kind, "normalised_variance": mean}
                )
            for name in dict.fromkeys(own):
                row = {"task": queries.task, "layer": layer, "patterns_of": name}
                for by in ("abs_weight", "abs_contribution"):
                    here = totals["layer"] == layer
                    row[by] = float(totals[by][here & (whose == name)].sum() / totals[by][here].sum())
                found["shares"].append(row)
        found["receipt"] += [{"task": queries.task} | row for row in receipts(attention)]
    found["rebuilt"] = [{"layer": row["layer"], "error": row["error"]} for row in run.memory.verify()]
    return found


def receipts(attention: dualhook.Attention) -> Rows:
    """The receipt of every layer over all queries."""
    found = []
    for layer in attention.layers:
        own = attention.receipt.where(layer=layer)
        explained, cancellation = own["explained"], own["cancellation"]
        row = {"layer": layer, "explained_at_least": float(explained.min())}
        row |= {"cancellation_median": float(np.median(cancellation)), "cancellation_most": float(cancellation.max())}
        found.append(row)
    return found


def power(queries: Queries, totals: dualhook.Table, tasks: Sequence[Task]) -> Rows:
    """Predictive power by class, and where tasks share the outputs, by the output that a pattern's class has."""
    number = {name: n for task in tasks for n, name in enumerate(task.classes)}
    groups = {"class": (totals, queries.targets, queries.outputs)}
    if len(tasks) > 1:
        outputs = (summed(totals, number), *([number[n] for n in v] for v in (queries.targets, queries.outputs)))
        groups["output"] = outputs
    return [
        {"task": queries.task, "groups": name} | row
        for name, (table, targets, outputs) in groups.items()
        for row in agreement([votes(table, name, by) for by in DEFINITIONS], name, targets, outputs)
    ]


def summed(totals: dualhook.Table, number: dict[str, int]) -> dualhook.Table:
    """Totals by class as totals by the output that each class has."""
    sums: dict[tuple[int, str, int], np.ndarray] = {}
    for row in totals:
        key = (row["query"], row["layer"], number[row["class"]])
        sums[key] = sums.get(key, 0.0) + np.array([row[by] for by in DEFINITIONS])
    heads = {name: [key[n] for key in sums] for n, name in enumerate(("query", "layer", "output"))}
    return dualhook.Table(heads | {by: [own[n] for own in sums.values()] for n, by in enumerate(DEFINITIONS)})


def looked_at(run: Trained, experiment: Experiment, tasks: Sequence[Task]) -> tuple[dict[str, Rows], Tensor]:
    """Of each task two test images that are classified rightly and one that is not: tables, and the images."""
    chosen = [pick(asked_of(tasks[number], run.model, experiment.queries)) for number in experiment.tasks]
    images = torch.cat([queries.images for queries in chosen])
    queries = [
        {"task": own.task, "target": target, "output": output}
        for own in chosen
        for target, output in zip(own.targets, own.outputs, strict=True)
    ]
    attention = run.memory.attend(run.model, images)
    scores, totals = attention.queries["score"].tolist(), attention.sum_by("class")
    found = {
        "queries": [{"query": q} | row | {"logit": scores[q]} for q, row in enumerate(queries)],
        "top": [*attention.sum_by("sample", top=3, by="abs_weight")],
        "top_patterns": [*attention.top(3, by="abs_weight")],
        "strongest": [*attention.top_by("class", STRONGEST, by="abs_weight")],
        "strongest_contributions": [*attention.top_by("class", STRONGEST, by="abs_contribution")],
        "totals": [*totals],
        "signed": signed(attention, totals),
        "over_training": over_training(attention, experiment.steps),
    }
    return found, images


def pick(queries: Queries) -> Queries:
    """Two rightly classified ones of different classes and one wrong one, the first of each."""
    right = np.flatnonzero(queries.correct)
    other = [n for n in right if queries.targets[n] != queries.targets[right[0]]] if len(right) else []
    rows = [*right[:1], *other[:1], *np.flatnonzero(~queries.correct)[:1]]
    names = ([values[n] for n in rows] for values in (queries.targets, queries.outputs))
    return Queries(queries.task, queries.images[rows], *names)


def signed(attention: dualhook.Attention, totals: dualhook.Table) -> Rows:
    """What a layer's answer is the sum of: every class's patterns, and the parts that are not patterns.

    In the last layer the sum is the logit. Columns query, layer, part, contribution, explained, cancellation.
    """
    receipts = {(row["query"], row["layer"]): row for row in attention.receipt}
    rows = [(row["query"], row["layer"], row["class"], row["contribution"]) for row in totals]
    rows += [tuple(row.values()) for row in attention.parts if row["part"] != "patterns"]
    names = ("query", "layer", "part", "contribution")
    return [
        dict(zip(names, row, strict=True)) | {name: receipts[row[:2]][name] for name in ("explained", "cancellation")}
        for row in sorted(rows, key=lambda row: row[:2])
    ]


def over_training(attention: dualhook.Attention, steps: int) -> Rows:
    """Totals per class in blocks of steps: columns query, layer, class, until_step, abs_weight, contribution."""
    totals = attention.sum_by(("class", "step"))
    block = -(-steps // BLOCKS)
    sums: dict[tuple[int, str, str, int], list[float]] = {}
    names = ("query", "layer", "class", "step", "abs_weight", "contribution")
    for query, layer, name, step, weight, contribution in zip(*(totals[n].tolist() for n in names), strict=True):
        until = min(steps, -(-step // block) * block)
        own = sums.setdefault((query, layer, name, until), [0.0, 0.0])
        own[0] += weight
        own[1] += contribution
    return [dict(zip((*names[:3], "until_step", *names[4:]), (*key, *own), strict=True)) for key, own in sums.items()]
