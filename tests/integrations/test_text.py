"""Training text read from a memory: a tiny GPT-2 from config, on a byte-level BPE that is trained on the spot."""

from __future__ import annotations

import copy
import json
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
import transformers
from dualhook.integrations.transformers import Passages, explain
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import TensorDataset

import dualhook

VERSES = [
    "In the beginning God created the heaven and the earth.",
    "And God said, Let there be light: and there was light.",
    "And the LORD said unto Moses,\nSpeak unto the children of Israel.",
    "And God said, Let there be light: and there was light.",  # a duplicate of row 1
    "Élie → 日本 → the é of 日.",
    "And the earth was without form, and void; and the LORD said unto Noah.",
]
BOOKS = ["Genesis", "Genesis", "Exodus", "Genesis", "none", "Genesis"]
CONTEXT = 80


def byte_level(texts: list[str], size: int) -> transformers.PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<pad>"]
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=special[0], pad_token=special[1])


class Trained:
    """Two epochs over the verses with two samples a batch, everything but the position table recorded."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        self.tokenizer = byte_level(VERSES, 76)
        self.rows = [
            {"input_ids": self.tokenizer(v)["input_ids"], "book": b} for v, b in zip(VERSES, BOOKS, strict=True)
        ]
        config = transformers.GPT2Config(
            vocab_size=len(self.tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=CONTEXT, bos_token_id=0,
            eos_token_id=0, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
        )  # fmt: skip
        self.model = transformers.GPT2LMHeadModel(config).double()
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        with dualhook.instrument(self.model, layers=["transformer.h.*", "lm_head"], verbose=False) as recorder:
            for _ in range(2):
                for samples in torch.arange(len(VERSES)).split(2):
                    optimizer.zero_grad()
                    batch = self.tokenizer.pad(
                        [{"input_ids": self.rows[s]["input_ids"]} for s in samples.tolist()], return_tensors="pt"
                    )
                    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
                    with recorder.batch(samples=samples):
                        self.model(**batch, labels=labels).loss.backward()
                    optimizer.step()
        self.memory = recorder.close()
        self.passages = Passages(self.rows, self.tokenizer)
        inputs = self.tokenizer("And God said", return_tensors="pt", return_token_type_ids=False)
        self.attention = self.memory.attend(self.model, **inputs, positions=[-1, 1], layers=self.layers)

    layers = ("transformer.h.1.mlp.c_proj", "transformer.h.0.attn.c_attn")


@pytest.fixture(scope="module")
def trained() -> Trained:
    return Trained()


# ---- passages ----------------------------------------------------------------------------------------------------


def test_the_marked_token_is_the_one_of_the_row(trained):
    """Wherever tokens are whole characters: marked text, and the passage without its marks, decode to the row."""
    tokenizer = trained.tokenizer
    for sample in (0, 1, 2, 5):
        for position, token in enumerate(trained.rows[sample]["input_ids"]):
            alone = tokenizer.decode([token])
            assert trained.passages.token(sample, position) == alone
            passage = trained.passages.around(sample, position)
            marked = passage[passage.index("«") + 1 : passage.index("»")]
            assert marked == (alone.strip() or alone).replace("\n", "⏎")
            first, last = max(0, position - 12), position + 13
            around = tokenizer.decode(trained.rows[sample]["input_ids"][first:last]).replace("\n", "⏎").strip()
            assert passage.replace("«", "").replace("»", "").strip("…") == around
            assert passage.startswith("…") == (first > 0)
            assert passage.endswith("…") == (last < len(trained.rows[sample]["input_ids"]))


def test_characters_split_over_tokens_stay_whole(trained):
    ids = trained.rows[4]["input_ids"]
    split = [k for k, token in enumerate(ids) if "\N{REPLACEMENT CHARACTER}" in trained.tokenizer.decode([token])]
    assert len(split) > 6  # the vocabulary is too small for these characters
    for width in (0, 1, 2, 5, 12):
        passages = Passages(trained.rows, trained.tokenizer, width=width)
        for position in range(len(ids)):
            passage = passages.around(4, position)
            assert "\N{REPLACEMENT CHARACTER}" not in passage
            assert passage.replace("«", "").replace("»", "").strip("…").strip() in VERSES[4]
    assert {trained.passages.token(4, k).strip() for k in split} <= set("É→日本é")


def test_a_broken_character_in_the_row_itself_is_shown_as_one(trained):
    ids = trained.tokenizer("日")["input_ids"]
    passages = Passages([{"input_ids": ids[:-1]}], trained.tokenizer)
    assert "\N{REPLACEMENT CHARACTER}" in passages.around(0, 0)


def test_padding_is_not_shown(trained):
    ids = [*trained.rows[0]["input_ids"], *[trained.tokenizer.pad_token_id] * 5]
    passages = Passages([{"input_ids": ids}], trained.tokenizer)
    last = len(trained.rows[0]["input_ids"]) - 1
    assert passages.around(0, last) == trained.passages.around(0, last)
    assert "<pad>" in passages.around(0, last + 2)


def test_a_tokenizer_that_drops_the_first_space_keeps_the_others():
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Metaspace()
    bpe.decoder = decoders.Metaspace()
    bpe.train_from_iterator(VERSES, trainers.BpeTrainer(vocab_size=90, show_progress=False))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe)
    ids = tokenizer(VERSES[0])["input_ids"]
    passages = Passages([ids], tokenizer, width=100)
    for position in range(len(ids)):
        assert passages.around(0, position).replace("«", "").replace("»", "") == VERSES[0]


def test_forms_of_data_sets(trained):
    tensors = [torch.tensor(row["input_ids"]) for row in trained.rows]
    padded = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=trained.tokenizer.pad_token_id)
    forms = [
        datasets.Dataset.from_list(trained.rows),
        datasets.Dataset.from_list(trained.rows).with_format("torch"),
        TensorDataset(padded, padded),
        tensors,
        [row["input_ids"] for row in trained.rows],
        [(row["input_ids"], 3) for row in trained.rows],
    ]
    expected = trained.passages.around(2, 9)
    assert [Passages(form, trained.tokenizer).around(2, 9) for form in forms] == [expected] * len(forms)


# ---- what a prediction attends to --------------------------------------------------------------------------------


def by_hand(trained: Trained, query: int) -> tuple[Counter, Counter, Counter]:
    """Contributions, patterns and places by the text around the token, from the list of all patterns."""
    every = trained.attention.top(10**6).where(query=query)
    total, count, places = Counter(), Counter(), {}
    for row in every:
        ids = trained.rows[row["sample"]]["input_ids"]
        if row["position"] >= len(ids):
            continue
        at = row["position"]
        padded = [None] * 12 + ids + [None] * 12
        key = tuple(padded[at : at + 25])
        total[key] += row["contribution"]
        count[key] += 1
        places.setdefault(key, set()).add((row["sample"], at))
    return total, count, Counter({key: len(found) for key, found in places.items()})


@pytest.mark.parametrize("largest", [True, False])
def test_repeats_and_duplicates_are_summed(trained, largest):
    table = trained.passages.top(trained.attention, k=12, largest=largest)
    assert len(table) == 24
    for query in (0, 1):
        total, count, places = by_hand(trained, query)
        best = sorted(total, key=total.__getitem__, reverse=largest)[:12]
        found = table.where(query=query)
        assert found["rank"].tolist() == list(range(1, 13))
        assert np.allclose(found["contribution"], [total[key] for key in best])
        assert found["repeats"].tolist() == [count[key] for key in best]
        assert found["places"].tolist() == [places[key] for key in best]
        for row, key in zip(found, best, strict=True):
            assert trained.rows[row["sample"]]["input_ids"][row["position"]] == key[12]
            assert row["passage"] == trained.passages.around(row["sample"], row["position"])
            assert row["token"] == trained.tokenizer.decode([key[12]])
    assert {2} <= set(table["places"])  # rows 1 and 3 are the same verse
    assert not set(table.where(places=2)["sample"]) - {1, 3}


def test_all_passages_add_up_to_what_training_put_into_the_logit(trained):
    attention = trained.memory.attend(
        trained.model, input_ids=trained.tokenizer("And God", return_tensors="pt")["input_ids"], layers="lm_head"
    )
    every = trained.passages.top(attention, k=10**6)
    parts = {row["part"]: row["contribution"] for row in attention.parts}
    assert every["contribution"].sum() == pytest.approx(parts["patterns"], abs=1e-10)
    assert parts["origin"] + parts["patterns"] == pytest.approx(attention.queries["score"][0], abs=1e-10)
    assert every["repeats"].sum() == trained.memory.patterns("lm_head")
    assert attention.explained["explained"][0] > 1 - 1e-9


def test_documents_total_their_rows(trained):
    by_row = trained.attention.sum_by("sample")
    expected = {
        (query, book): sum(r["contribution"] for r in by_row if r["query"] == query and BOOKS[r["sample"]] == book)
        for query in (0, 1)
        for book in set(BOOKS)
    }
    trained.passages.add_documents(trained.memory, "book")
    column = trained.attention.sum_by("book")
    packed = [{"input_ids": r["input_ids"], "book": [r["book"]] * CONTEXT} for r in trained.rows]
    tables = [
        trained.passages.documents(trained.attention, "book"),
        Passages(packed, trained.tokenizer).documents(trained.attention, "book"),
    ]
    for (query, book), total in expected.items():
        assert column.where(query=query, book=book)["contribution"].sum() == pytest.approx(total)
        for table in tables:
            assert table.where(query=query, book=book)["contribution"].tolist() == pytest.approx([total])


# ---- what would have changed a prediction ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def influence(trained) -> dualhook.Influence:
    inputs = trained.tokenizer("And God said", return_tensors="pt", return_token_type_ids=False)
    asked = {"positions": [-1, 1], "layers": trained.layers, "of": "logit"}
    return trained.memory.influence(trained.model, **inputs, **asked, method="contribution", per="token")


@pytest.mark.parametrize("largest", [True, False])
def test_passages_of_an_influence_are_those_of_the_same_scores(trained, influence, largest):
    """Contributions, whose passages are known by hand, told as an influence."""
    found = trained.passages.top(influence, k=12, largest=largest)
    expected = trained.passages.top(trained.attention, k=12, largest=largest)
    assert found.columns == ["query", "rank", "sample", "position", "token", "passage", "influence", "places"]
    for name in ("query", "sample", "position", "token", "passage", "places"):
        assert found[name].tolist() == expected[name].tolist()
    assert np.allclose(found["influence"], expected["contribution"])
    assert "exact contributions" in found.footer


def test_documents_of_an_influence_total_their_tokens(trained, influence):
    packed = [{"input_ids": r["input_ids"], "book": [r["book"]] * CONTEXT} for r in trained.rows]
    expected = trained.passages.documents(trained.attention, "book")
    for passages in (trained.passages, Passages(packed, trained.tokenizer)):
        found = passages.documents(influence, "book")
        assert found.columns == ["query", "book", "influence"]
        assert np.allclose(found["influence"], expected["contribution"])
    layer = trained.layers[0]
    one = trained.passages.documents(influence, "book", layers=layer)
    alone = trained.passages.documents(trained.attention, "book", layers=layer)
    assert np.allclose(one["influence"], alone["contribution"])


# ---- generated text ----------------------------------------------------------------------------------------------


def test_every_generated_token_is_explained(trained):
    trained.model.train()
    found = explain(
        trained.model, trained.tokenizer, trained.memory, "And God", max_new_tokens=5, k=2, passages=trained.passages
    )
    assert all(module.training for module in trained.model.modules())
    ids = trained.tokenizer("And God", return_tensors="pt")["input_ids"]
    begun = ids.shape[1]
    for row in found.tokens:
        logits = trained.model.eval()(ids).logits[0, -1].detach()
        assert row["position"] == ids.shape[1] - 1
        assert row["id"] == int(logits.argmax())
        assert row["logit"] == pytest.approx(float(logits.max()))
        assert row["probability"] == pytest.approx(float(logits.softmax(-1).max()))
        assert row["explained"] > 1 - 1e-9
        alone = trained.passages.top(trained.memory.attend(trained.model, input_ids=ids), 2)
        one = found.passages.where(query=row["query"])
        assert one["passage"].tolist() == alone["passage"].tolist()
        assert np.allclose(one["contribution"], alone["contribution"])
        ids = torch.cat([ids, torch.tensor([[row["id"]]])], 1)
    assert len(found) == 5
    assert found.text == trained.tokenizer.decode(ids[0, begun:]).strip()
    assert "".join(found.tokens["token"]) == trained.tokenizer.decode(ids[0, begun:])
    printed = str(found)
    assert printed.startswith("And God ▸")
    assert all(passage in printed for passage in found.passages["passage"])


def test_without_a_data_set_patterns_are_listed(trained):
    found = explain(trained.model, trained.tokenizer, trained.memory, "And", max_new_tokens=2, k=1, layers="lm_head")
    assert found.passages["layer"].tolist() == ["lm_head"] * 2
    assert "lm_head: sample" in str(found)


def test_an_encoder_decoder_is_explained(trained):
    config = transformers.T5Config(
        vocab_size=len(trained.tokenizer), d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2,
        decoder_start_token_id=1, pad_token_id=1, eos_token_id=0,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config).double()
    recorder = dualhook.instrument(model, layers=["*.wo", "lm_head"], verbose=False)
    ids = torch.tensor([trained.rows[0]["input_ids"][:9]])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with recorder.batch(samples=[0]):
        model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    memory = recorder.close()
    found = explain(model, trained.tokenizer, memory, "In the", max_new_tokens=4)
    assert found.tokens["position"].tolist() == list(range(len(found)))
    assert found.tokens["explained"].min() > 1 - 1e-9
    prompt = trained.tokenizer("In the", return_tensors="pt")["input_ids"]
    written = model.eval().generate(prompt, max_new_tokens=4, do_sample=False)
    assert found.tokens["id"].tolist() == written[0, 1:].tolist()


# ---- what does not fit -------------------------------------------------------------------------------------------


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield {"input_ids": [1]}


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda t: Passages(Endless(), t.tokenizer), "Endless has no length"),
        (lambda t: Passages(t.rows, t.tokenizer, column="ids"), "no column 'ids': its rows have input_ids, book"),
        (lambda t: Passages(t.rows, t.tokenizer, column="book"), "row 0 of the data set holds .* expected token ids"),
        (lambda t: Passages(VERSES, t.tokenizer), "expected token ids"),
        (lambda t: t.passages.around(6, 0), "sample 6: the data set has rows 0 to 5"),
        (lambda t: t.passages.around(-1, 0), "sample -1: the data set has rows 0 to 5"),
        (lambda t: t.passages.around(0, 500), "position 500: row 0 of the data set has .* tokens: expected the rows"),
        (lambda t: Passages([[3, 99]], t.tokenizer).around(0, 0), "holds token 99, the tokenizer has 76"),
        (lambda t: Passages(t.rows[:2], t.tokenizer).top(t.attention), "sample 2: the data set has rows 0 to 1"),
        (
            lambda t: Passages([r["input_ids"][:4] for r in t.rows], t.tokenizer).top(t.attention),
            "row 0 of the data set has 4 tokens",
        ),
        (lambda t: t.passages.top(t.attention, 0), "k=0: expected at least 1"),
        (lambda t: t.passages.top(t.attention, by="size"), "by='size': expected one of weight"),
        (lambda t: t.passages.top(t.attention, layers="head"), "layer 'head' was not asked"),
        (lambda t: t.passages.documents(t.attention, "author"), "no column 'author'"),
        (
            lambda t: t.passages.top(t.memory.influence(t.model, torch.tensor([[2, 3]]), method="cosine")),
            "whole samples: expected memory.influence",
        ),
        (lambda t: t.passages.documents(t.attention, "short"), "no column 'short'"),
        (lambda t: t.passages.add_documents(t.memory, "input_ids"), "no single value per row"),
        (lambda t: explain(t.model, t.tokenizer, t.memory, ""), "the prompt has no tokens"),
        (
            lambda t: explain(t.model, t.tokenizer, t.memory, "And", max_new_tokens=CONTEXT),
            f"80 new ones would go beyond the model's context of {CONTEXT}",
        ),
        (
            lambda t: explain(t.model, byte_level(VERSES, 200), t.memory, VERSES[1]),
            "expected the tokenizer that the model was trained with",
        ),
        (
            lambda t: explain(t.model, t.tokenizer, t.memory, "And", num_return_sequences=2, num_beams=2),
            "to write one sequence",
        ),
    ],
)
def test_what_does_not_fit_is_said(trained, ask, words):
    with pytest.raises(dualhook.DualHookError, match=words):
        ask(trained)


def test_a_run_without_samples_says_so(trained):
    model = copy.deepcopy(trained.model)
    recorder = dualhook.instrument(model, layers="lm_head", verbose=False)
    ids = torch.tensor([trained.rows[0]["input_ids"]])
    model(input_ids=ids, labels=ids).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    attention = recorder.close().attend(model, ids)
    with pytest.raises(dualhook.DualHookError, match="no pattern knows its sample"):
        trained.passages.top(attention)


# ---- reports -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["And God said, Let", "Élie → 日本", ""])
def test_pieces_make_the_text(trained, text):
    ids = trained.tokenizer(text)["input_ids"]
    pieces = trained.passages.pieces(ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text


def test_a_report_asks_every_token_of_a_prompt(trained, tmp_path):
    inputs = dict(trained.tokenizer("And God said", return_tensors="pt", return_token_type_ids=False))
    trained.memory.add_column("document", BOOKS)
    path = trained.memory.report(
        trained.model, inputs, tmp_path / "report.html", passages=trained.passages, layers=trained.layers, k=3
    )
    page = path.read_text("utf-8")
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert "".join(data["sequences"][0]) == "And God said"
    assert [query["position"] for query in data["queries"]] == list(range(len(data["sequences"][0])))
    alone = trained.memory.attend(trained.model, inputs, layers=trained.layers)  # the last token
    best = alone.top(1).where(layer=trained.layers[0])
    listed = data["top"][-1][data["layers"].index(trained.layers[0])]["single"]
    sample, position = listed["entries"][listed["lists"]["contribution"][0]][:2]
    assert [sample, position] == [best["sample"][0], best["position"][0]]
    assert data["passages"][f"{sample}:{position}"] == trained.passages.around(sample, position)
    assert data["totals"][0]["groups"] == sorted(set(BOOKS))
