"""The picture of attended images: it shows what the tables say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from torch import nn
from torch.nn import functional as F

import dualhook
from dualhook.errors import DualHookError
from dualhook.report.images import NEGATIVE, POSITIVE, LabelledImages, draw_attended_images

SIDE, CLASSES, N = 4, ("round", "square", "long"), 18


@pytest.fixture(scope="module")
def run():
    """A memory of 18 images seen five times, its model, images and queries."""
    return record(tracked=True)


def record(*, tracked):
    torch.manual_seed(0)
    images, labels = torch.rand(N, SIDE * SIDE), torch.arange(N) % 3
    model = nn.Sequential(nn.Linear(SIDE * SIDE, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    recorder = dualhook.instrument(model, verbose=False)
    for _ in range(5):
        for rows in torch.arange(N).split(6):
            if tracked:
                recorder.batch(samples=rows)
            optimizer.zero_grad()
            F.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
    memory = recorder.close()
    if tracked:
        memory.add_column("label", labels)
    queries = torch.rand(2, SIDE * SIDE)
    return (
        memory,
        model,
        LabelledImages(images, labels, CLASSES),
        LabelledImages(queries, torch.tensor([0, 1]), CLASSES),
    )


def draw(run, **settings):
    memory, model, training, queries = run
    predicted = settings.pop("predicted", model(queries.images).argmax(1).tolist())
    training, queries = settings.pop("training", training), settings.pop("queries", queries)
    return draw_attended_images(memory.attend(model, queries.images), queries, predicted, training, **settings)


def pictures(figure):
    """The axes that hold images, the query's first in every block, then in reading order."""
    return [axes for axes in figure.axes if axes.images]


def bars(figure):
    return [axes for axes in figure.axes if axes.patches]


def texts(figure):
    return [text.get_text() for text in figure.texts]


def strongest(run, query, layer, k, by):
    """The first k different images, from the full ranking."""
    memory, model, _, queries = run
    everything = memory.attend(model, queries.images).top(5 * N, by=by).where(query=query, layer=layer)
    samples, rows = [], []
    for row in everything:
        if row["sample"] not in samples:
            samples.append(row["sample"])
            rows.append(row)
    return rows[:k]


@pytest.mark.parametrize("by", ["abs_contribution", "weight"])
@pytest.mark.parametrize("k", [1, 3])
def test_every_row_shows_the_strongest_different_images(run, k, by):
    figure = draw(run, k=k, by=by)
    shown = pictures(figure)
    assert len(shown) == 2 * (1 + 2 * k)
    place = iter(shown)
    for query in range(2):
        np.testing.assert_array_equal(next(place).images[0].get_array(), run[3].picture(query))
        for layer in ("0", "2"):
            for row in strongest(run, query, layer, k, by):
                axes = next(place)
                np.testing.assert_array_equal(axes.images[0].get_array(), run[2].picture(row["sample"]))
                frame = POSITIVE if row["contribution"] >= 0 else NEGATIVE
                assert axes.spines["left"].get_edgecolor()[:3] == pytest.approx(hexadecimal(frame))
                assert f"step {row['step']}" in texts(figure)


def hexadecimal(colour):
    return [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]


def test_more_images_than_there_are_shows_all_of_them(run):
    assert len(pictures(draw(run, k=N + 1))) == 2 * (1 + 2 * N)


def test_bars_are_the_totals_of_the_classes(run):
    memory, model, _, queries = run
    totals = memory.attend(model, queries.images).sum_by("label")
    panels = bars(draw(run))
    assert len(panels) == 2 * 2 * 2
    for number, (query, layer) in enumerate([(0, "0"), (0, "2"), (1, "0"), (1, "2")]):
        expected = totals.where(query=query, layer=layer)
        for axes, column in zip(panels[2 * number :], ("contribution", "abs_weight"), strict=False):
            np.testing.assert_allclose([bar.get_width() for bar in axes.patches], expected[column])
        assert [tick.get_text() for tick in panels[2 * number].get_yticklabels()] == list(CLASSES)


def test_units_ranking_and_receipt_are_named(run):
    memory, model, _, queries = run
    figure = draw(run)
    said = " ".join(texts(figure))
    assert "largest |contribution|" in said
    for row in memory.attend(model, queries.images).receipt:
        assert f"explained {row['explained']:.4%}" in said
    assert {axes.get_xlabel() for axes in bars(figure)} == {"", "contribution / logit", "Σ |attention weight|"}


def test_right_and_wrong_predictions_are_told_apart(run):
    said = texts(draw(run, predicted=[0, 2]))
    assert said.count("correct") == 1
    assert said.count("wrong") == 1
    assert "true class: square" in said
    assert "predicted: long" in said


@pytest.mark.parametrize("k", [1, 5])
def test_no_text_overlaps_another_or_leaves_the_sheet(run, k):
    figure = draw(run, k=k)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    labels = [
        label
        for axes in figure.axes
        for label in (*shown_ticks(axes.xaxis), *shown_ticks(axes.yaxis), axes.xaxis.label)
    ]
    boxes = [
        (text.get_text(), text.get_window_extent(renderer)) for text in (*figure.texts, *labels) if text.get_text()
    ]
    inside = figure.bbox
    for number, (text, box) in enumerate(boxes):
        assert inside.x0 <= box.x0, text
        assert box.x1 <= inside.x1, text
        assert inside.y0 <= box.y0, text
        assert box.y1 <= inside.y1, text
        for other_text, other in boxes[number + 1 :]:
            assert not box.padded(-1).overlaps(other.padded(-1)), (text, other_text)


def shown_ticks(axis):
    low, high = sorted(axis.get_view_interval())
    return [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]


def test_of_many_classes_the_strongest_are_shown(run):
    _, _, training, queries = run
    names = tuple(f"a rather long name of class {number}" for number in range(40))
    many = LabelledImages(training.images, training.labels, names)
    figure = draw(run, training=many, queries=LabelledImages(queries.images, queries.labels, names))
    assert [len(axes.patches) for axes in bars(figure)] == [3] * 8
    assert all(len(tick.get_text()) <= 18 for axes in bars(figure) for tick in axes.get_yticklabels())


@pytest.mark.parametrize(
    ("shape", "drawn"), [((16,), (4, 4)), ((4, 4), (4, 4)), ((1, 4, 4), (4, 4)), ((3, 2, 5), (2, 5, 3))]
)
def test_images_of_every_usual_shape_are_drawn(shape, drawn):
    image = torch.rand(1, *shape)
    picture = LabelledImages(image, torch.zeros(1), CLASSES).picture(0)
    assert picture.shape == drawn
    channel = picture[..., 0] if picture.ndim == 3 else picture
    np.testing.assert_array_equal(channel.ravel(), image[0].reshape(-1)[: channel.size])


def test_a_memory_without_samples_says_how_to_name_them():
    memory, model, training, queries = record(tracked=False)
    with pytest.raises(DualHookError, match="recorder.track"):
        draw_attended_images(memory.attend(model, queries.images), queries, [0, 0], training)


def test_a_number_of_predictions_that_does_not_fit_is_refused(run):
    with pytest.raises(DualHookError, match="expected one each for the 2 queries"):
        draw(run, predicted=[0])
