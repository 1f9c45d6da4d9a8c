"""A picture of what image predictions attend to: the training images themselves, and the totals of their classes."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from torch import Tensor

from dualhook.errors import DualHookError
from dualhook.table import Table

__all__ = ["LabelledImages", "draw_attended_images"]

POSITIVE, NEGATIVE, MUTED, TEXT = "#2f6db5", "#c8553d", "#b9bec6", "#333333"
SMALL, NORMAL, LARGE = 7.5, 9.0, 11.0  # points
RANKED_BY = {
    "weight": "largest attention weight",
    "abs_weight": "largest |attention weight|",
    "contribution": "largest contribution",
    "abs_contribution": "largest |contribution|",
}

EXPLANATION = (
    "Shown are the {k} images per layer with the {ranked} in any one step, strongest first. A contribution is what "
    "training on the image put into the logit asked about (the predicted class's): blue raised it, red lowered it. "
    "Explained: share of the layer's trained output that all patterns add up to. Cancellation: sum of |contributions| "
    "over |their sum|."
)

# the sheet, in inches from its upper left corner
MARGIN, TITLE, LINE, HEAD, ROW, BLOCK_GAP = 0.3, 0.42, 0.19, 0.3, 1.66, 0.35
QUERY, LAYER_AT, LAYER, THUMB, PITCH = 1.5, 2.05, 1.2, 0.86, 1.12
CLASS_NAMES, TOTAL, WEIGHTS, PANEL_GAP, PANEL = 0.75, 2.1, 1.15, 0.25, 1.16
CLASSES = 12  # at most this many bars


class Answers(Protocol):
    """What the picture asks of a :class:`dualhook.Attention`."""

    @property
    def layers(self) -> list[str]: ...
    @property
    def receipt(self) -> Table: ...
    def __len__(self) -> int: ...
    def top(self, k: int, *, by: Any) -> Table: ...
    def sum_by(self, column: str) -> Table: ...


@dataclass(frozen=True)
class LabelledImages:
    """Images [n, h·w], [n, h, w] or [n, c, h, w] with their class numbers [n] and the names of the classes."""

    images: Tensor
    labels: Tensor
    classes: Sequence[str]

    def picture(self, index: int) -> np.ndarray:
        """One image as matplotlib draws it: [h, w], or [h, w, c] in colour. A flat one is taken to be square."""
        image = self.images[index].detach().cpu().numpy()
        if image.ndim == 1:
            side = round(image.size**0.5)
            image = image.reshape(side, side)
        if image.ndim == 3:
            image = image[0] if len(image) == 1 else np.moveaxis(image, 0, -1)
        return image

    def name(self, index: int) -> str:
        """The class of one image."""
        return self.classes[int(self.labels[index])]


def draw_attended_images(
    attention: Answers,
    queries: LabelledImages,
    predicted: Sequence[int],
    training: LabelledImages,
    *,
    k: int = 5,
    by: str = "abs_contribution",
    column: str = "label",
    title: str = "Which training images does the prediction attend to?",
) -> Figure:
    """Draw, for every query and layer, the training images that matter most and the totals per class.

    An image is seen once per epoch; it is shown once, by its strongest pattern. Contributions are in logits of the
    class the attention was asked about (``target=``, default the predicted class).

    Args:
        attention: of ``memory.attend(model, images)``.
        queries: the images that were asked about, with their true classes.
        predicted: the class number the model gives each of them [q].
        training: the training images by dataset row.
        k: images per query and layer.
        by: what ranks them, as in :meth:`dualhook.Attention.top`.
        column: the memory's column that holds the class numbers.
        title: the heading.

    Returns:
        A Figure that belongs to no window; ``figure.savefig(path)`` writes it.

    Raises:
        DualHookError: the memory does not know its samples or has no such column, or numbers that do not fit.
    """
    if not len(predicted) == len(queries.images) == len(attention):
        raise DualHookError(
            f"{len(queries.images)} query images and {len(predicted)} predicted classes: expected one each for the "
            f"{len(attention)} queries of the attention"
        )
    strongest = _strongest_by_image(attention, k, by)
    totals, receipt = attention.sum_by(column), attention.receipt
    width = LAYER_AT + LAYER + k * PITCH + CLASS_NAMES + TOTAL + PANEL_GAP + WEIGHTS + MARGIN
    lines = textwrap.wrap(EXPLANATION.format(k=k, ranked=RANKED_BY[by]), round(14.5 * (width - 2 * MARGIN)))
    start, block = MARGIN + TITLE + LINE * len(lines), HEAD + ROW * len(attention.layers) + BLOCK_GAP
    sheet = _Sheet(width, start + block * len(attention))
    sheet.text(MARGIN, MARGIN + 0.08, title, size=LARGE + 3, weight="bold")
    for number, line in enumerate(lines):
        sheet.text(MARGIN, MARGIN + TITLE - 0.04 + LINE * number, line)
    for query, guess in enumerate(predicted):
        top = start + block * query
        _draw_query(sheet, top, queries, query, int(guess))
        _draw_headings(sheet, top, k)
        for row, layer in enumerate(attention.layers):
            y, place = top + HEAD + ROW * row, {"query": query, "layer": layer}
            _draw_receipt(sheet, y, layer, next(iter(receipt.where(**place))))
            for rank, pattern in enumerate(strongest[query, layer]):
                _draw_pattern(sheet, LAYER_AT + LAYER + rank * PITCH, y, pattern, training)
            at = LAYER_AT + LAYER + k * PITCH + CLASS_NAMES
            panels = _draw_totals(sheet, at, y, totals.where(**place), column, training.classes, int(guess))
        for axes, label in zip(panels, ("contribution / logit", "Σ |attention weight|"), strict=True):
            axes.set_xlabel(label, size=SMALL, labelpad=3, color=TEXT)
    return sheet.figure


class _Sheet:
    """A figure on which things are placed in inches from the upper left corner."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width, height), dpi=100, facecolor="white")

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        return self.figure.add_axes(
            (x / self.width, 1 - (y + height) / self.height, width / self.width, height / self.height)
        )

    def text(self, x: float, y: float, text: str, *, size: float = NORMAL, **style: Any) -> None:
        style = {"va": "center", "color": TEXT} | style
        self.figure.text(x / self.width, 1 - y / self.height, text, size=size, **style)

    def image(self, x: float, y: float, side: float, picture: np.ndarray, frame: str, line: float) -> None:
        axes = self.axes(x, y, side, side)
        axes.imshow(picture, cmap="gray_r", interpolation="nearest")
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set(color=frame, linewidth=line)


def _strongest_by_image(attention: Answers, k: int, by: str) -> dict[tuple[int, str], list[dict[str, Any]]]:
    """The rows of ``attention.top`` for the first ``k`` different images of every query and layer."""
    asked, found = 16 * k, 0
    while True:
        table = attention.top(asked, by=by)
        if (table["sample"] < 0).any():
            raise DualHookError(
                "the memory does not know which images its patterns come from: record with recorder.track(loader)"
            )
        best: dict[tuple[int, str], dict[int, dict[str, Any]]] = {}
        for row in table:
            best.setdefault((row["query"], row["layer"]), {}).setdefault(row["sample"], row)
        if len(table) == found or all(len(images) >= k for images in best.values()):
            return {place: list(images.values())[:k] for place, images in best.items()}
        asked, found = 4 * asked, len(table)  # few images fill many places: look further down, until there is no more


def _draw_query(sheet: _Sheet, top: float, queries: LabelledImages, query: int, predicted: int) -> None:
    right = predicted == int(queries.labels[query])
    sheet.image(MARGIN, top + HEAD + 0.18, QUERY, queries.picture(query), TEXT, 1.0)
    y = top + HEAD + QUERY + 0.4
    sheet.text(MARGIN, top + 0.14, f"test image {query + 1}", size=LARGE, weight="bold")
    sheet.text(MARGIN, y, f"true class: {queries.name(query)}")
    sheet.text(
        MARGIN, y + 0.2, f"predicted: {queries.classes[predicted]}", weight="bold", color=TEXT if right else NEGATIVE
    )
    sheet.text(MARGIN, y + 0.4, "correct" if right else "wrong", color=TEXT if right else NEGATIVE)


def _draw_headings(sheet: _Sheet, top: float, k: int) -> None:
    y, x = top + 0.14, LAYER_AT + LAYER
    sheet.text(LAYER_AT, y, "layer", weight="bold")
    sheet.text(x, y, "most attended images", weight="bold")
    x += k * PITCH + CLASS_NAMES
    sheet.text(x, y, "totals per class of training image", weight="bold")


def _draw_receipt(sheet: _Sheet, y: float, layer: str, receipt: dict[str, Any]) -> None:
    sheet.text(LAYER_AT, y + 0.26, _short(layer), size=LARGE if len(layer) <= 10 else SMALL, weight="bold")
    sheet.text(LAYER_AT, y + 0.50, f"explained {receipt['explained']:.4%}", size=SMALL)
    sheet.text(LAYER_AT, y + 0.66, f"cancellation {_number(receipt['cancellation'])}", size=SMALL)


def _draw_pattern(sheet: _Sheet, x: float, y: float, pattern: dict[str, Any], training: LabelledImages) -> None:
    colour = _sign_colour(pattern["contribution"])
    middle = x + THUMB / 2
    sheet.text(middle, y + 0.08, _short(training.name(pattern["sample"])), size=SMALL, ha="center")
    sheet.image(x, y + 0.18, THUMB, training.picture(pattern["sample"]), colour, 2.0)
    lines = (f"step {pattern['step']}", f"weight {_number(pattern['weight'])}")
    for number, line in enumerate(lines):
        sheet.text(middle, y + 0.18 + THUMB + 0.11 + 0.14 * number, line, size=SMALL, ha="center")
    contribution = f"contrib. {_number(pattern['contribution'], sign=True)}"
    sheet.text(middle, y + 0.18 + THUMB + 0.39, contribution, size=SMALL, ha="center", color=colour, weight="bold")


def _draw_totals(
    sheet: _Sheet, x: float, y: float, totals: Table, column: str, classes: Sequence[str], predicted: int
) -> tuple[Axes, Axes]:
    """Signed contribution and absolute attention weight per class, side by side over the same classes."""
    of_class = {row[column]: row for row in totals if row[column] in range(len(classes))}
    strongest = sorted(of_class, key=lambda number: -abs(of_class[number]["contribution"]))
    shown = range(len(classes)) if len(classes) <= CLASSES else sorted(strongest[:CLASSES])
    contribution, weight = (
        [of_class[number][name] if number in of_class else 0.0 for number in shown]
        for name in ("contribution", "abs_weight")
    )
    left = sheet.axes(x, y + 0.1, TOTAL, PANEL)
    left.barh(range(len(shown)), contribution, height=0.7, color=[_sign_colour(value) for value in contribution])
    left.axvline(0, color=TEXT, linewidth=0.8)
    left.margins(x=0.06)
    right = sheet.axes(x + TOTAL + PANEL_GAP, y + 0.1, WEIGHTS, PANEL)
    right.barh(range(len(shown)), weight, height=0.35, color=MUTED)
    right.locator_params(axis="x", nbins=3)
    right.xaxis.set_major_formatter(EngFormatter(sep=""))
    names = [_short(classes[number]) for number in shown]
    for axes, ticks in ((left, names), (right, [""] * len(names))):
        axes.set_yticks(range(len(names)), ticks, size=SMALL - 0.5)
        axes.invert_yaxis()
        axes.tick_params(length=0, axis="y", pad=2)
        axes.tick_params(length=2, axis="x", labelsize=SMALL - 0.5, pad=1)
        axes.spines[["top", "right", "left"]].set_visible(False)
    for number, tick in zip(shown, left.get_yticklabels(), strict=True):
        tick.set_fontweight("bold" if number == predicted else "normal")
    return left, right


def _sign_colour(value: float) -> str:
    return POSITIVE if value >= 0 else NEGATIVE


def _number(value: float, *, sign: bool = False) -> str:
    """Three significant digits, thousands in full, with a typographic minus."""
    digits = ",.0f" if abs(value) >= 1000 else ".3g"
    return f"{value:{'+' if sign else ''}{digits}}".replace("-", "−")


def _short(name: str, length: int = 18) -> str:
    return name if len(name) <= length else f"{name[: length // 2]}…{name[-length // 2 + 1 :]}"
