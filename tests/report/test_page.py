"""The report: its figures are those of the tables, its texts are texts, and it works in a browser."""

from __future__ import annotations

import base64
import json
import re
import shutil

import fsspec
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dualhook
from dualhook.cli import main
from dualhook.errors import DualHookError
from dualhook.report.pictures import Pictures, as_array

SIDE, N, EPOCHS = 4, 18, 5
CLASSES = ("round", "<script>alert('square')</script>", "long")
DEFINITIONS = ("contribution", "abs_contribution", "weight", "abs_weight")


def network():
    return nn.Sequential(nn.Linear(SIDE * SIDE, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.fixture(scope="module")
def run():
    """A memory of 18 images seen five times, its model, the images and three queries."""
    torch.manual_seed(0)
    images, labels, model = torch.rand(N, SIDE * SIDE), torch.arange(N) % 3, network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    recorder = dualhook.instrument(model, verbose=False)
    for _ in range(EPOCHS):
        for rows in torch.randperm(N).split(6):
            with recorder.batch(samples=rows):
                optimizer.zero_grad()
                F.cross_entropy(model(images[rows]), labels[rows]).backward()
                optimizer.step()
    memory = recorder.close()
    memory.add_column("label", labels)
    memory.add_column("task", ["first" if label < 2 else "second" for label in labels.tolist()])
    return memory, model, images, torch.rand(3, SIDE * SIDE)


def written(run, path, **settings):
    memory, model, images, queries = run
    options = {"images": images, "labels": [0, 1, 2], "classes": CLASSES} | settings
    return memory.report(model, queries, path / "report.html", **options)


def data_of(page):
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text("utf-8"), re.DOTALL)
    return json.loads(found[1])


@pytest.fixture(scope="module")
def page(run, tmp_path_factory):
    return written(run, tmp_path_factory.mktemp("report"), k=4)


@pytest.fixture(scope="module")
def data(page):
    return data_of(page)


@pytest.fixture(scope="module")
def attention(run):
    return run[0].attend(run[1], run[3])


def close(found, true):
    return found == pytest.approx(true, rel=5.1e-6)  # six significant digits


@pytest.mark.parametrize("by", DEFINITIONS)
def test_listed_patterns_are_the_strongest_of_each_image(data, attention, by):
    everything = attention.top(N * EPOCHS, by=by)
    for q in range(3):
        for n, layer in enumerate(data["layers"]):
            first = {}
            for row in everything.where(query=q, layer=layer):
                first.setdefault(row["sample"], row)
            expected = list(first.values())[:4]
            found = data["top"][q][n]["single"]
            entries = [found["entries"][at] for at in found["lists"][by]]
            assert [e[:2] for e in entries] == [[r["sample"], r["position"]] for r in expected]
            for entry, row in zip(entries, expected, strict=True):  # repeats of an image weigh the same in layer 0
                repeats = everything.where(query=q, layer=layer, sample=row["sample"])
                assert entry[2] in [
                    r["step"] for r in repeats if close(r[by.removeprefix("abs_")], row[by.removeprefix("abs_")])
                ]
            assert close([e[3] for e in entries], [r["weight"] for r in expected])
            assert close([e[4] for e in entries], [r["contribution"] for r in expected])


@pytest.mark.parametrize(
    ("by", "largest"), [*((by, True) for by in DEFINITIONS), ("weight", False), ("contribution", False)]
)
def test_sums_over_repeats_are_those_of_sum_by(data, attention, by, largest):
    name = by if largest else f"{by}_low"
    expected = attention.sum_by("sample", top=4, by=by, largest=largest)
    for q in range(3):
        for n, layer in enumerate(data["layers"]):
            found = data["top"][q][n]["summed"]
            entries = [found["entries"][at] for at in found["lists"][name]]
            own = expected.where(query=q, layer=layer)
            assert [e[0] for e in entries] == own["sample"].tolist()
            assert close([e[3] for e in entries], own["weight"].tolist())
            assert close([e[4] for e in entries], own["contribution"].tolist())


def test_totals_votes_and_receipts_are_those_of_the_tables(data, attention):
    assert [totals["column"] for totals in data["totals"]] == ["label", "task"]
    for totals, labels in zip(data["totals"], ([0, 1, 2], ["first", "second"]), strict=True):
        table = attention.sum_by(totals["column"])
        for q in range(3):
            for n, layer in enumerate(data["layers"]):
                for g, label in enumerate(labels):
                    row = next(iter(table.where(query=q, layer=layer, **{totals["column"]: label})))
                    assert close(totals["values"][q][n][g], [row[by] for by in DEFINITIONS])
    for by in DEFINITIONS:
        votes = attention.vote("label", by=by)
        for q in range(3):
            for n, layer in enumerate(data["layers"]):
                assert data["votes"][by][q][n] == votes.where(query=q, layer=layer)["label"][0]
    for row in attention.receipt:
        found = data["receipt"][row["query"]][data["layers"].index(row["layer"])]
        assert close(found, [row["explained"], row["cancellation"]])


def test_totals_by_step_keep_the_whole(data, attention):
    table = attention.sum_by("step")
    for q in range(3):
        for n, layer in enumerate(data["layers"]):
            own = table.where(query=q, layer=layer)
            assert np.sum(data["steps"]["values"][q][n], 0) == pytest.approx(
                [own[by].sum() for by in DEFINITIONS], rel=1e-4
            )


def test_queries_say_what_the_model_gives(data, attention, run):
    output = run[1](run[3]).argmax(1).tolist()
    assert [query["output"] for query in data["queries"]] == [CLASSES[n] for n in output]
    assert [query["truth"] for query in data["queries"]] == list(CLASSES)
    assert close([query["score"] for query in data["queries"]], attention.queries["score"].tolist())


@pytest.mark.parametrize("method", ["cosine", "decayed"])
def test_the_estimate_is_that_of_the_memory(run, tmp_path, method):
    memory, model, _, queries = run
    found = data_of(written(run, tmp_path, k=4, influence=method))
    expected = memory.influence(model, queries, method=method)
    assert (found["influence"]["about"], found["influence"]["missing"]) == ("margin", "")
    assert found["influence"]["meaning"] == expected.meaning
    assert expected.meaning.startswith(f"{method}: ")
    for q in range(3):
        for name, table, way in (("raised", expected.top(4), 1), ("lowered", expected.bottom(4), -1)):
            own = [row for row in table.where(query=q) if way * row["influence"] > 0]
            listed = found["influence"][name][q]
            assert [entry[0] for entry in listed] == [row["sample"] for row in own]
            assert close([entry[2] for entry in listed], [row["influence"] for row in own])
            assert {str(entry[0]) for entry in listed} <= found["samples"].keys()


def test_by_default_it_is_the_instant_one(run, data, tmp_path):
    assert data["influence"]["meaning"].startswith("cosine: ")
    assert data_of(written(run, tmp_path, influence=None))["influence"] is None


def test_where_there_is_no_estimate_the_page_says_why(tmp_path):
    model, x = nn.Linear(4, 3), torch.randn(6, 4)
    recorder = dualhook.instrument(model, verbose=False)
    F.cross_entropy(model(x), torch.arange(6) % 3).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    memory = recorder.close()
    found = data_of(memory.report(model, x[:1], tmp_path / "page.html"))["influence"]
    assert "knows no samples" in found["missing"]
    assert (found["raised"], found["lowered"]) == ([[]], [[]])
    with pytest.raises(DualHookError, match="knows no samples"):
        memory.report(model, x[:1], tmp_path / "page.html", influence="cosine")


def test_images_are_there_once_and_to_the_pixel(data, run):
    from io import BytesIO

    from PIL import Image

    assert len(data["pictures"]) == len(set(data["pictures"]))
    for sample, shown in data["samples"].items():
        kind, _, code = data["pictures"][shown["picture"]].partition(",")
        assert kind == "data:image/png;base64"
        found = np.asarray(Image.open(BytesIO(base64.b64decode(code))))
        assert (found == (255 * run[2][int(sample)].double()).round().reshape(SIDE, SIDE).numpy()).all()
        assert shown["group"] == CLASSES[int(sample) % 3]


def test_nothing_is_asked_of_a_network_and_texts_cannot_leave_the_data(page):
    text = page.read_text("utf-8")
    assert not re.search(r'(src|href)=(?!"data:)', text.split("<script")[0])
    assert not re.search(r"\b(fetch|XMLHttpRequest|import)\(|https?://(?!www\.w3\.org/2000/svg)", text)
    assert "<script>alert" not in text


@pytest.mark.parametrize(
    ("image", "shape"),
    [
        (torch.rand(3, 8, 6), (8, 6, 3)),
        (torch.rand(1, 8, 6), (8, 6)),
        (torch.rand(16), (4, 4)),
        (np.zeros((8, 6, 3), dtype=np.uint8), (8, 6, 3)),
        ((torch.rand(1, 5, 5), 3), (5, 5)),
        ({"pixel_values": torch.randn(3, 5, 5)}, (5, 5, 3)),
    ],
)
def test_any_usual_form_of_an_image(image, shape):
    array = as_array(image)
    assert (array.dtype, array.shape) == (np.uint8, shape)


def test_large_images_become_small_ones():
    pictures = Pictures()
    assert pictures.number(torch.rand(3, 300, 200)) == 0
    assert pictures.uris[0].startswith("data:image/jpeg")
    assert len(pictures.uris[0]) < 6000


def test_what_does_not_fit_is_said(run, tmp_path):
    with pytest.raises(DualHookError, match="no column 'colour'"):
        written(run, tmp_path, column="colour")
    with pytest.raises(DualHookError, match="labels of shape"):
        written(run, tmp_path, labels=[0])
    with pytest.raises(DualHookError, match="an image of shape"):
        as_array(torch.rand(2, 5, 7))
    assert not list(tmp_path.iterdir())


def test_without_images_samples_are_named_by_their_rows(run, tmp_path):
    found = data_of(written(run, tmp_path, images=None, labels=None, classes=None))
    assert (found["kind"], found["pictures"]) == ("rows", [])
    assert found["samples"]["0"] == {"picture": None, "group": "0"}


def test_the_command_writes_the_same(run, tmp_path, monkeypatch, capsys):
    memory, _, images, queries = run
    memory_path = shutil.copytree(memory.path, tmp_path / "run")
    (tmp_path / "report_models.py").write_text(
        "from torch import nn\ndef build(): return nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))\n"
    )
    monkeypatch.chdir(tmp_path)
    np.save("queries.npy", queries.numpy())
    np.save("images.npy", images.numpy())
    np.save("labels.npy", np.arange(3))
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    arguments = "--model report_models:build --inputs queries.npy --images images.npy --labels labels.npy --top 4"
    assert main(["report", str(memory_path), *arguments.split(), "--classes", "classes.txt", "-o", "page.html"]) == 0
    assert "page.html" in capsys.readouterr().out
    rebuilt = network()
    rebuilt.load_state_dict(memory.state_dict())  # as the command fills it
    expected = data_of(written((memory, rebuilt, images, queries), tmp_path, k=4))
    found = data_of(tmp_path / "page.html")
    assert found["facts"].pop("memory") == f"{tmp_path.name}/run"
    expected["facts"].pop("memory")
    assert found == expected


def test_a_memory_behind_a_url_has_a_page_too(run, tmp_path):
    memory, model, images, queries = run
    fsspec.filesystem("memory").put(str(memory.path), "memory://pages/run", recursive=True)
    remote = dualhook.load("memory://pages/run")
    assert data_of(written((remote, model, images, queries), tmp_path))["facts"]["memory"] == "pages/run"


class Text:
    """A training text of which every passage tries to be markup."""

    def around(self, sample, position):
        return f"…</script><script>window.broken = 1</script> «token {sample}:{position}» <b>after</b>"

    def pieces(self, ids):
        return [f"<i>{number}</i> " for number in ids]


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(7, 5), nn.Linear(5, 7)

    def forward(self, input_ids):
        return self.head(self.table(input_ids))


@pytest.fixture(scope="module")
def text_page(tmp_path_factory):
    torch.manual_seed(0)
    model, ids = Reader(), torch.randint(0, 7, (6, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    recorder = dualhook.instrument(model, verbose=False)
    for rows in torch.arange(6).split(2):
        with recorder.batch(samples=rows):
            optimizer.zero_grad()
            F.cross_entropy(model(ids[rows])[:, :-1].flatten(0, 1), ids[rows][:, 1:].flatten()).backward()
            optimizer.step()
    memory = recorder.close()
    memory.add_column("document", ["one", "one", "two", "two", "three", "three"])
    path = tmp_path_factory.mktemp("text") / "report.html"
    return memory.report(model, {"input_ids": ids[:1, :4]}, path, passages=Text(), k=3), memory, model, ids


def test_every_token_of_a_prompt_is_asked_about(text_page):
    page, memory, model, ids = text_page
    found = data_of(page)
    assert found["sequences"] == [[f"<i>{number}</i> " for number in ids[0, :4].tolist()]]
    assert [query["position"] for query in found["queries"]] == [0, 1, 2, 3]
    table = memory.attend(model, {"input_ids": ids[:1, :4]}, positions=range(4)).top(3)
    for q in range(4):
        entries = found["top"][q][0]["single"]
        named = [entries["entries"][at][:2] for at in entries["lists"]["contribution"]]
        own = table.where(query=q)
        assert named == [list(pair) for pair in zip(own["sample"].tolist(), own["position"].tolist(), strict=True)]
        assert all(found["passages"][f"{sample}:{position}"] for sample, position in named)
    assert found["totals"][0]["column"] == "document"
    influence = memory.influence(
        model, {"input_ids": ids[:1, :4]}, positions=range(4), method="cosine", per="token", layers="head"
    ).top(3)
    for q in range(4):
        own = [row for row in influence.where(query=q) if row["influence"] > 0]
        assert [entry[:2] for entry in found["influence"]["raised"][q]] == [[r["sample"], r["position"]] for r in own]
        assert all(
            f"{sample}:{position}" in found["passages"] for sample, position, _ in found["influence"]["raised"][q]
        )


# ---- in a browser --------------------------------------------------------------------------------------------------

FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--window-size=1200,900"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no chromium with its driver on this machine")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    try:
        found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    except Exception as error:
        pytest.skip(f"chromium does not start: {str(error).splitlines()[0]}")
    yield found
    found.quit()


def opened(browser, page):
    browser.get(page.as_uri())
    assert browser.get_log("browser") == []
    return lambda script: browser.execute_script(f"return {script}")


def choose(browser, name, value):
    browser.execute_script(
        "const s = document.querySelector(`select[name=${arguments[0]}]`); s.value = arguments[1];"
        "s.dispatchEvent(new Event('change'))",
        name,
        value,
    )
    assert browser.get_log("browser") == []


def test_the_page_opens_and_queries_and_filters_work(browser, page, data):
    ask = opened(browser, page)
    assert ask("document.querySelectorAll('.layer').length") == 2
    assert ask("document.querySelectorAll('#queries button').length") == 3
    assert ask("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
    assert ask("[...document.querySelectorAll('#detail img')].every((image) => image.alt)")
    browser.find_elements("css selector", "#queries button")[2].click()
    assert ask("document.querySelector('#queries [aria-pressed=true]').dataset.query") == "2"
    assert data["queries"][2]["output"] in ask("document.querySelector('#detail h2').textContent")
    choose(browser, "layer", "1")
    assert ask("[...document.querySelectorAll('.layer h3')].map((h) => h.textContent)") == ["layer 2"]
    for by in DEFINITIONS:
        choose(browser, "by", by)
        own = data["top"][2][1]["single"]
        rows = [f"row {own['entries'][at][0]}" for at in own["lists"][by]]
        assert (
            ask("[...document.querySelectorAll('.layer figcaption small:last-child')].map((s) => s.textContent)")
            == rows
        )
    choose(browser, "by", "contribution")
    choose(browser, "sign", "negative")
    assert ask("document.querySelectorAll('.layer figure.lowered').length") > 0
    assert ask("document.querySelectorAll('.layer figure.raised').length") == 0
    shown = 0
    choose(browser, "by", "abs_contribution")  # which lists any sign
    for q in range(3):
        browser.find_elements("css selector", "#queries button")[q].click()
        own = data["top"][q][1]["single"]
        negative = [own["entries"][at][4] < 0 for at in own["lists"]["abs_contribution"]]
        assert ask("document.querySelectorAll('.layer figure').length") == sum(negative)
        shown += sum(negative)
    assert shown < 3 * 4
    choose(browser, "by", "contribution")
    choose(browser, "count", "summed")
    assert "all steps" in ask("document.querySelector('figure').textContent")
    assert ask("dispatchEvent(new Event('beforeprint'))")
    assert ask("document.querySelectorAll('.query').length") == 3


def test_the_estimate_stands_apart_from_the_sums(browser, page, data):
    ask = opened(browser, page)
    assert ask("document.querySelectorAll('.estimate').length") == 1
    assert ask("document.querySelectorAll('.layer .estimate, .estimate .layer').length") == 0
    text = "document.querySelector('.estimate').innerText"
    assert f"Method {data['influence']['meaning']}." in ask(text)
    before = ask(text)
    choose(browser, "layer", "1")
    choose(browser, "by", "weight")
    assert ask(text) == before
    browser.find_elements("css selector", "#queries button")[1].click()
    for way in ("raised", "lowered"):
        rows = [f"row {entry[0]}" for entry in data["influence"][way][1]]
        shown = f"[...document.querySelectorAll('.estimate figure.{way} small')].map((s) => s.textContent)"
        assert ask(shown) == rows


@pytest.mark.parametrize("width", [360, 390, 700, 1000, 1200, 1600])
def test_thumbnails_fill_their_lines(browser, run, tmp_path, width):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    )
    ask = opened(browser, written(run, tmp_path, k=8))
    lines = """[...document.querySelectorAll('.thumbs')].map((list) => {
        const tops = [...list.children].map((item) => item.offsetTop);
        return [...new Set(tops)].map((top) => tops.filter((other) => other === top).length);
    })"""
    for line in ask(lines):
        assert line[0] - line[-1] < len(line), line
    assert ask("document.documentElement.scrollWidth") <= width
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_texts_are_shown_as_texts(browser, page, text_page):
    ask = opened(browser, page)
    assert "<script>alert('square')</script>" in ask("document.body.innerText")
    ask = opened(browser, text_page[0])
    browser.find_elements("css selector", ".token")[1].click()
    assert ask("window.broken") is None
    assert "<script>window.broken = 1</script>" in ask("document.querySelector('.passages li').innerText")
    assert ask("document.querySelector('.passages mark').textContent").startswith("token ")
    assert ask("document.querySelectorAll('.passages b, .prompt i').length") == 0
    assert browser.get_log("browser") == []


def test_it_fits_a_phone(browser, page):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    )
    ask = opened(browser, page)
    assert ask("document.documentElement.scrollWidth") <= 360
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
