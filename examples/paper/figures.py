"""The pictures of a run, in kind the paper's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from runs import Experiment, Trained
from tables import Rows
from torch import Tensor

LAYERS = ("fc1", "fc2", "fc3")


def draw_run(folder: Path, experiment: Experiment, run: Trained, tables: dict[str, Rows], images: Tensor) -> None:
    """All pictures of the test images that were looked at."""
    save(attended(run, tables, images), folder / "attended.png")
    save(class_totals(run, tables), folder / "class-totals.png")
    for number in range(len(images)):
        save(scores_over_training(experiment, run, tables, number), folder / f"scores-{number}.png")
    save(totals_over_training(experiment, run, tables), folder / "totals-over-training.png")


def attended(run: Trained, tables: dict[str, Rows], images: Tensor) -> Figure:
    """Each test image beside the three training images of the largest total |key · query| in every layer."""
    queries = tables["queries"]
    columns = 1 + 3 * len(LAYERS)
    widths = [1.25, *[1] * (columns - 1)]
    figure, axes = plt.subplots(
        len(queries), columns, figsize=(1.25 * columns, 1.75 * len(queries) + 0.7), squeeze=False,
        gridspec_kw={"width_ratios": widths}, layout="constrained",
    )  # fmt: skip
    for row, query in zip(axes, queries, strict=True):
        show(row[0], images[query["query"]], titled(query), bold=True)
        for n, layer in enumerate(LAYERS):
            own = of(tables["top"], query=query["query"], layer=layer)
            for ax, top in zip(row[1 + 3 * n : 4 + 3 * n], own, strict=True):
                whole = sum(total["abs_weight"] for total in of(tables["totals"], query=query["query"], layer=layer))
                times = top["abs_weight"] / whole * len(run.memory.samples)
                show(ax, run.images[top["sample"]], f"{run.class_of[top['sample']]}\n{times:.1f} ×")
    for n, layer in enumerate(LAYERS):
        axes[0][2 + 3 * n].annotate(
            layer, (0.5, 1.55), xycoords="axes fraction", ha="center", fontsize=11, fontweight="bold"
        )
    figure.suptitle(
        "test images, and the training images with the largest Σ|key · query| (how many times the average image's)\n",
        fontsize=11,
    )
    return figure


def class_totals(run: Trained, tables: dict[str, Rows]) -> Figure:
    """Totals of every class: |key · query| as shares of their sum, signed contributions in logits."""
    queries = tables["queries"]
    names = run.classes
    figure, axes = plt.subplots(
        len(queries), 2 * len(LAYERS), figsize=(2.4 * 2 * len(LAYERS), (0.9 + 0.17 * len(names)) * len(queries) + 0.5),
        squeeze=False, sharey=True, layout="constrained",
    )  # fmt: skip
    for row, query in zip(axes, queries, strict=True):
        for n, (ax, by) in enumerate(zip(row, ("abs_weight", "contribution") * len(LAYERS), strict=True)):
            layer = LAYERS[n // 2]
            own = {total["class"]: total[by] for total in of(tables["totals"], query=query["query"], layer=layer)}
            values = np.array([own.get(name, 0.0) for name in names])
            values = values / values.sum() if by == "abs_weight" else values
            ax.barh(range(len(names)), values, color=[bar_colour(name, query) for name in names])
            ax.axvline(0, color="#444444", linewidth=0.8)
            ax.set_yticks(range(len(names)), names, fontsize=7)
            ax.tick_params(axis="x", labelsize=7)
            ax.xaxis.set_major_locator(MaxNLocator(4))
            ax.set_ylim(len(names) - 0.4, -0.6)
            if query is queries[0]:
                what = "share of Σ|key · query|" if by == "abs_weight" else "contribution / logit"
                ax.set_title(f"{layer}\n{what}", fontsize=9)
        row[0].set_ylabel(titled(query), fontsize=9)
    figure.suptitle("totals per class (dark: the class that the model says; red: the true class, if it is another)",
                    fontsize=10)  # fmt: skip
    return figure


def scores_over_training(experiment: Experiment, run: Trained, tables: dict[str, Rows], number: int) -> Figure:
    """The strongest patterns of every class by the step they come from: |key · query| above, contribution below."""
    query = tables["queries"][number]
    figure, axes = plt.subplots(2, len(LAYERS), figsize=(13, 7), sharex=True, layout="constrained")
    drawn = (
        ("strongest", "weight", "|key · query|"),
        ("strongest_contributions", "contribution", "contribution / logit"),
    )
    for row, (table, column, label) in zip(axes, drawn, strict=True):
        for ax, layer in zip(row, LAYERS, strict=True):
            own = of(tables[table], query=number, layer=layer)
            for n, name in enumerate(run.classes):
                points = of(own, **{"class": name})
                values = [abs(p[column]) if column == "weight" else p[column] for p in points]
                ax.scatter([p["step"] for p in points], values, s=5, color=colour(n, len(run.classes)), label=name,
                           linewidths=0, alpha=0.8)  # fmt: skip
            mark_switch(ax, experiment)
            ax.set_title(layer, fontsize=10)
            ax.set_xlim(0, experiment.steps)
            if column == "contribution":
                ax.axhline(0, color="#444444", linewidth=0.6)
                ax.set_xlabel("training step")
        row[0].set_ylabel(label)
    legend(figure, axes[0][0])
    figure.suptitle(f"the strongest patterns of every class for {titled(query).replace(chr(10), ' ')}", fontsize=11)
    return figure


def totals_over_training(experiment: Experiment, run: Trained, tables: dict[str, Rows]) -> Figure:
    """The classes' totals of |key · query| in every block of steps, on top of each other."""
    queries = tables["queries"]
    figure, axes = plt.subplots(
        len(queries), len(LAYERS), figsize=(13, 2.2 * len(queries) + 0.6), sharex=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for row, query in zip(axes, queries, strict=True):
        for ax, layer in zip(row, LAYERS, strict=True):
            own = of(tables["over_training"], query=query["query"], layer=layer)
            ends = sorted({total["until_step"] for total in own})
            heights = np.zeros((len(run.classes), len(ends)))
            for total in own:
                heights[run.classes.index(total["class"]), ends.index(total["until_step"])] = total["abs_weight"]
            colours = [colour(n, len(run.classes)) for n in range(len(run.classes))]
            ax.stackplot(ends, heights, colors=colours, labels=run.classes, linewidth=0)
            mark_switch(ax, experiment)
            ax.set_xlim(ends[0], experiment.steps)
            ax.set_ylim(0)
            ax.ticklabel_format(axis="y", scilimits=(0, 3))
            if query is queries[0]:
                ax.set_title(layer, fontsize=10)
            if query is queries[-1]:
                ax.set_xlabel("training step")
        row[0].set_ylabel(titled(query), fontsize=9)
    legend(figure, axes[0][0])
    figure.suptitle("Σ|key · query| per class, by the steps that the patterns come from", fontsize=11)
    return figure


def predictive_power(rows: Rows, title: str) -> Figure:
    """How often the vote of the classes is the model's output, by layer and definition; whiskers: over seeds."""
    lines = list(dict.fromkeys((row["task"], row["groups"]) for row in rows))
    kinds, definitions = ("correct", "wrong"), list(dict.fromkeys(row["by"] for row in rows))
    figure, axes = plt.subplots(
        len(lines), 2, figsize=(10, 2.9 * len(lines) + 0.6), sharey=True, squeeze=False, layout="constrained"
    )
    for line, (task, groups) in zip(axes, lines, strict=True):
        for ax, kind in zip(line, kinds, strict=True):
            for n, by in enumerate(definitions):
                own = [of(rows, task=task, groups=groups, layer=layer, by=by, predictions=kind)[0] for layer in LAYERS]
                at = np.arange(len(LAYERS)) + 0.2 * (n - (len(definitions) - 1) / 2)
                ax.bar(
                    at, [row["equals_output"] or 0 for row in own], 0.18, label=by, color=plt.get_cmap("tab10")(n),
                    yerr=[row["equals_output_deviation"] or 0 for row in own], error_kw={"linewidth": 1},
                )  # fmt: skip
            ax.axhline(0.1, color="#888888", linewidth=0.8, linestyle=":")
            ax.set_xticks(range(len(LAYERS)), LAYERS)
            ax.set_ylim(0, 1.02)
            ax.set_title(f"{task}, {kind} predictions; votes by {groups}", fontsize=10)
        line[0].set_ylabel("vote = model's output")
    legend(figure, axes[0][0])
    figure.suptitle(f"{title}: how often the group with the largest total is what the model says", fontsize=11)
    return figure


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def show(ax: Axes, image: Tensor, title: str, *, bold: bool = False) -> None:
    """One image [pixel], grey of 28 x 28 or CIFAR-10's."""
    pixels = image.numpy()
    side = 28 if pixels.size == 28**2 else 32
    ax.imshow(pixels.reshape(side, side, -1).squeeze(), cmap="gray_r", interpolation="nearest", vmin=0, vmax=1)
    ax.set_title(title, fontsize=8, fontweight="bold" if bold else "normal")
    ax.set_xticks([])
    ax.set_yticks([])


def titled(query: dict[str, object]) -> str:
    target, output = query["target"], query["output"]
    return f"{target}\n(correct)" if target == output else f"{target}\n(said: {output})"


def of(rows: Sequence[dict[str, object]], **values: object) -> Rows:
    """The rows that have these values."""
    return [row for row in rows if all(row[name] == value for name, value in values.items())]


def colour(number: int, count: int) -> tuple[float, ...]:
    """Of ten classes tab10; of twenty the light shades of the same for the second ten."""
    return plt.get_cmap("tab10")(number) if count <= 10 else plt.get_cmap("tab20")(2 * (number % 10) + number // 10)


def bar_colour(name: str, query: dict[str, object]) -> str:
    return "#1f3b63" if name == query["output"] else "#c8553d" if name == query["target"] else "#a9bcd6"


def mark_switch(ax: Axes, experiment: Experiment) -> None:
    if experiment.is_continual:
        ax.axvline(experiment.switch, color="black", linewidth=1, linestyle="--")


def legend(figure: Figure, ax: Axes) -> None:
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8, markerscale=3, frameon=False)
