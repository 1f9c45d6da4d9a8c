"""The command line and language models: a prompt in place of a file of inputs, training text in place of numbers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import datasets
import pytest
import torch
import transformers
from dualhook.integrations.transformers import Passages
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import dualhook
from dualhook.cli import main
from dualhook.given import tokens_of

TEXTS = ["In the beginning God created the heaven and the earth.", "And God said, Let there be light.",
         "And God saw the light, that it was good.", "And God called the light Day."]  # fmt: skip
PROMPT = "And God said"

MODELS = """
from transformers import GPT2Config, GPT2LMHeadModel

def build():
    size = dict(vocab_size=280, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    return GPT2LMHeadModel(GPT2Config(**size, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).eval()
"""


def built():
    """The model of that module."""
    found: dict = {}
    exec(MODELS, found)
    return found["build"]()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A memory ``run`` with its tokenizer, its tokenised texts, and the weights that it does not hold."""
    folder = tmp_path_factory.mktemp("cli-text")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe)
    tokenizer.save_pretrained(folder / "tokenizer")
    tokens = datasets.Dataset.from_dict({"input_ids": [tokenizer(text)["input_ids"] for text in TEXTS]})
    tokens.save_to_disk(folder / "tokens")
    datasets.DatasetDict({"train": tokens, "test": tokens}).save_to_disk(folder / "splits")
    (folder / "text_models.py").write_text(MODELS, encoding="utf-8")
    torch.manual_seed(0)
    model = built()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = dualhook.instrument(model, folder / "run", layers=["mlp", "head"], verbose=False)
    for _ in range(3):
        for row, ids in enumerate(tokens["input_ids"]):
            ids = torch.tensor([ids])
            with recorder.batch(samples=torch.tensor([row])):
                model(ids, labels=ids).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    recorder.close()
    kept = {name: value.detach().clone() for name, value in model.state_dict().items()}
    save_file(kept, folder / "weights.safetensors")
    model.save_pretrained(folder / "model")
    return folder


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Runs a command about the prompt in that folder; returns exit status, output, error output."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def call(command, *more, model="text_models:build"):
        asked = ("--weights", "weights.safetensors", "--text", PROMPT)
        status = main([command, "run", "--model", model, *asked, *more])
        return status, *capsys.readouterr()

    return call


TOKENIZER = ("--tokenizer", "tokenizer")
PASSAGES = (*TOKENIZER, "--passages", "tokens")


@pytest.fixture
def asked(folder):
    """The memory, the model, what the tokenizer makes of the prompt, and the passages."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    model = built()
    memory = dualhook.load(folder / "run")
    for values in (load_file(folder / "weights.safetensors"), memory.state_dict()):
        model.load_state_dict(values, strict=False)
    passages = Passages(datasets.load_from_disk(folder / "tokens"), tokenizer)
    return memory, model, tokenizer(PROMPT, return_tensors="pt"), passages


def same_rows(rows, table):
    assert rows == list(table)
    assert rows


def test_a_prompt_attends_to_passages(run, asked):
    memory, model, inputs, passages = asked
    status, out, err = run("attend", *PASSAGES, "--top", "3", "--by", "abs_weight", "--json")
    expected = passages.top(memory.attend(model, **inputs), 3, by="abs_weight")
    assert (status, err) == (0, "")
    same_rows(json.loads(out)["passages"], expected)
    _, out, _ = run("attend", *PASSAGES, "--top", "3")
    assert "«" in out


def test_a_model_that_takes_ids_alone_gets_them(asked, folder):
    _, model, inputs, _ = asked
    assert torch.equal(tokens_of(PROMPT, str(folder / "tokenizer"), torch.nn.Embedding(280, 2)), inputs["input_ids"])

    class Wrapped(torch.nn.Module):
        def forward(self, *given, **named):
            return model(*given, **named)

    settings = folder / "tokenizer" / "tokenizer_config.json"
    before = settings.read_text("utf-8")
    names = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
    settings.write_text(json.dumps(json.loads(before) | names), "utf-8")
    try:
        for one in (model, Wrapped()):  # GPT-2 would add an embedding for each token's type
            assert tokens_of(PROMPT, str(folder / "tokenizer"), one).keys() == {"input_ids", "attention_mask"}
    finally:
        settings.write_text(before, "utf-8")


def test_a_folder_is_a_model_too(run, capsys):
    asked = ("--model", "model", "--text", PROMPT, *PASSAGES, "--json")  # without --weights: they are in the folder
    expected = run("attend", *PASSAGES, "--json")[1]
    assert main(["attend", "run", *asked]) == 0
    out, err = capsys.readouterr()
    assert out == expected
    assert "warning" not in err  # transformers draws a bar
    (broken := Path("broken")).mkdir()
    (broken / "config.json").write_text("{}")
    status, _, err = run("attend", *PASSAGES, model="broken")
    assert (status, err.count("\n")) == (2, 1)
    assert "--model broken cannot be loaded" in err


@pytest.mark.parametrize("method", ["cosine", "contribution"])
def test_influence_of_passages(run, asked, method):
    memory, model, inputs, passages = asked
    status, out, err = run("influence", *PASSAGES, "--method", method, "--top", "2", "--json")
    influence = memory.influence(model, **inputs, per="token", method=method)
    assert (status, err) == (0, "")
    same_rows(json.loads(out)["top"], passages.top(influence, 2))
    same_rows(json.loads(out)["bottom"], passages.top(influence, 2, largest=False))


def test_without_passages_every_token_is_asked_too(run, asked, folder):
    assert run("report", *TOKENIZER, "-o", "rows.html")[0] == 0
    assert (folder / "rows.html").read_text("utf-8").count('"name":"query ') == asked[2]["input_ids"].shape[1]


def test_a_page_of_text(run, asked, folder):
    _, model, inputs, passages = asked
    status, out, err = run("report", *PASSAGES, "-o", "text.html")
    assert (status, err) == (0, "")
    assert out.startswith("text.html, ")
    dualhook.load("run").report(model, **inputs, passages=passages, path="python.html")
    assert (folder / "text.html").read_text("utf-8") == (folder / "python.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("attend",), "--text needs --tokenizer"),
        (("attend", "--passages", "tokens"), "--passages needs --tokenizer"),
        (("attend", "--tokenizer", "tokens"), "--tokenizer tokens cannot be loaded"),
        (("attend", *TOKENIZER, "--passages", "nowhere"), "expected a folder that Dataset.save_to_disk has written"),
        (("attend", *TOKENIZER, "--passages", "splits"), "expected one of splits/train, splits/test"),
        (("attend", *TOKENIZER, "--passages", "model"), "expected a folder that Dataset.save_to_disk has written"),
        (("influence", *PASSAGES, "--per", "sample"), "expected --per token"),
        (("attend", "--inputs", "x.npy", *TOKENIZER), "not allowed with argument"),
    ],
)
def test_what_is_missing_is_named(run, words, says):
    status, out, err = run(*words)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert says in err
