"""Questions about places of a sequence: tiny language models from configs, trained by a plain loop in float64."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

import dualhook
from dualhook.errors import LayerError

VOCABULARY, LENGTH = 23, 7


class Trained:
    """A causal model with everything of it recorded, and sequences it has not seen."""

    def __init__(self, model: torch.nn.Module, optimizer: str = "SGD", **options) -> None:
        torch.manual_seed(1)
        self.model = model.double()
        settings = {"lr": 0.1, "momentum": 0.9} if optimizer == "SGD" else {"lr": 0.01}
        optimizer = getattr(torch.optim, optimizer)(self.model.parameters(), **settings)
        ids = torch.randint(1, VOCABULARY, (6, LENGTH))
        with dualhook.instrument(self.model, verbose=False, **options) as recorder:
            for _ in range(3):
                for rows in torch.arange(6).split(3):
                    optimizer.zero_grad()
                    with recorder.batch(samples=rows):
                        self.model(input_ids=ids[rows], labels=ids[rows]).loss.backward()
                    optimizer.step()
        self.memory = recorder.close()
        self.tokens = torch.randint(1, VOCABULARY, (2, LENGTH))


@pytest.fixture(scope="module", params=["SGD", "AdamW"])
def gpt2(request) -> Trained:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=8, n_layer=2, n_head=2, n_positions=12, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return Trained(transformers.GPT2LMHeadModel(config), request.param, layers="all")


@pytest.fixture(scope="module")
def t5() -> Trained:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2, tie_word_embeddings=False,
        decoder_start_token_id=0,
    )  # fmt: skip
    return Trained(transformers.T5ForConditionalGeneration(config))


def answers(attention: dualhook.Attention, query: int) -> dict[str, np.ndarray]:
    """Everything that one query is told: scores of every pattern, receipt and parts, layer by layer."""
    found = {"queries": attention.queries.where(query=query)["score"]}
    for layer in attention.layers:
        every = attention.top(10**6, layers=layer).where(query=query)
        order = every["pattern"].argsort()
        for name in ("pattern", "weight", "contribution"):
            found[f"{layer} {name}"] = every[name][order]
        found[f"{layer} explained"] = attention.receipt.where(query=query, layer=layer)["explained"]
        found[f"{layer} parts"] = attention.parts.where(query=query, layer=layer)["contribution"]
    return found


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.allclose(one[k], other[k], rtol=1e-7, atol=1e-12) for k in one)


def test_queries_are_positions_of_sequences(gpt2):
    attention = gpt2.memory.attend(gpt2.model, input_ids=gpt2.tokens, positions=[-1, 2])
    logits = gpt2.model.eval()(gpt2.tokens).logits
    queries = attention.queries
    assert len(attention) == len(queries) == 4
    assert queries["sequence"].tolist() == [0, 0, 1, 1]
    assert queries["position"].tolist() == [LENGTH - 1, 2, LENGTH - 1, 2]
    chosen = logits[queries["sequence"], queries["position"]]
    assert queries["target"].tolist() == chosen.argmax(-1).tolist()
    assert np.allclose(queries["score"], chosen.max(-1).values.detach())
    assert np.allclose(queries["probability"], chosen.softmax(-1).max(-1).values.detach())
    asked = [3, 1, 4, 1]
    targets = gpt2.memory.attend(gpt2.model, input_ids=gpt2.tokens, positions=[-1, 2], target=asked).queries
    assert targets["target"].tolist() == asked
    assert np.allclose(targets["score"], chosen[range(4), asked].detach())


def test_several_positions_are_answered_like_each_alone(gpt2):
    disturbed = copy.deepcopy(gpt2.model)
    for parameter in disturbed.parameters():
        parameter.data += torch.randn_like(parameter)
    for model in (gpt2.model, disturbed):  # the receipt of the other is not 1, and has to be the same
        whole = gpt2.memory.attend(model, input_ids=gpt2.tokens, positions=[4, 0, -1])
        for k, position in enumerate((4, 0, LENGTH - 1)):
            for sequence in (0, 1):
                tokens = gpt2.tokens[sequence : sequence + 1]
                alone = gpt2.memory.attend(model, tokens, positions=position)
                assert same(answers(whole, 3 * sequence + k), answers(alone, 0))


class Packed(torch.nn.Module):
    """A head that sees all sequences one after the other, as one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = torch.nn.Embedding(VOCABULARY, 5), torch.nn.Linear(5, 3)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor | transformers.utils.ModelOutput:
        lengths = input_ids.ne(0).sum(1).tolist()
        one = self.head(self.embedding(input_ids[input_ids.ne(0)])[None])[0]
        logits = torch.stack([part.sum(0) for part in one.split(lengths)])
        if labels is None:
            return logits
        return transformers.utils.ModelOutput(loss=logits.logsumexp(1).mean())


def test_sequences_packed_into_one_are_answered_like_each_alone():
    trained = Trained(Packed())
    tokens = trained.tokens.clone()
    tokens[0, 4:] = 0
    whole = trained.memory.attend(trained.model, tokens)
    for query in (0, 1):
        alone = trained.memory.attend(trained.model, tokens[query : query + 1])
        assert same(answers(whole, query), answers(alone, 0))


def test_later_tokens_put_nothing_into_an_earlier_logit(gpt2):
    whole = gpt2.memory.attend(gpt2.model, gpt2.tokens[:1], positions=3)
    begun = gpt2.memory.attend(gpt2.model, gpt2.tokens[:1, :4])
    assert same(answers(whole, 0), answers(begun, 0))


def test_origin_and_patterns_of_the_head_add_up_to_the_logit(gpt2):
    attention = gpt2.memory.attend(gpt2.model, gpt2.tokens, positions=range(LENGTH))
    parts = attention.parts.where(layer="lm_head")
    totals = [parts.where(query=q)["contribution"].sum() for q in range(len(attention))]
    assert np.allclose(totals, attention.queries["score"], atol=1e-10)
    patterns = attention.sum_by("position", layers="lm_head")
    listed = [patterns.where(query=q)["contribution"].sum() for q in range(len(attention))]
    assert np.allclose(listed, parts.where(part="patterns")["contribution"], atol=1e-12)
    assert attention.explained["explained"].min() > 1 - 1e-9


def test_the_weight_of_a_head_is_that_of_the_place_asked(gpt2):
    attention = gpt2.memory.attend(gpt2.model, gpt2.tokens[:1], positions=[1, 4], layers="lm_head")
    hidden = gpt2.model.transformer(gpt2.tokens[:1]).last_hidden_state[0, [1, 4]].detach()
    keys = torch.cat([rows.key for rows in gpt2.memory._store.blocks("lm_head", last_step=10**6, block_rows=10**6)])
    for query, expected in enumerate((hidden @ keys.T).numpy()):
        every = attention.top(len(keys)).where(query=query)
        assert np.allclose(every["weight"], expected[every["pattern"]])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_no_token(gpt2, side):
    """Positions count real tokens, and a batch with padding is answered like each of its sequences alone."""
    length, pad = (LENGTH, 4), torch.zeros(3, dtype=torch.long)
    short = [gpt2.tokens[1, :4], pad] if side == "right" else [pad, gpt2.tokens[1, :4]]
    ids = torch.stack([gpt2.tokens[0], torch.cat(short)])
    mask = (ids > 0).long()
    places = (mask.cumsum(1) - 1).clamp(min=0)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": places}
    whole = gpt2.memory.attend(gpt2.model, **inputs)
    first = gpt2.memory.attend(gpt2.model, **inputs, positions=0)
    assert whole.queries["position"].tolist() == [n - 1 for n in length]
    for k in (0, 1):
        tokens = gpt2.tokens[k : k + 1, : length[k]]
        assert same(answers(whole, k), answers(gpt2.memory.attend(gpt2.model, tokens), 0))
        alone = gpt2.memory.attend(gpt2.model, tokens, positions=0)
        assert same(answers(first, k), answers(alone, 0))
    with pytest.raises(LayerError, match="position 4: sequence 1 has 4 tokens, expected -4 to 3"):
        gpt2.memory.attend(gpt2.model, **inputs, positions=[0, 4])


def test_permuting_a_batch_permutes_the_answers(gpt2):
    one = gpt2.memory.attend(gpt2.model, gpt2.tokens, positions=[2, 5])
    other = gpt2.memory.attend(gpt2.model, gpt2.tokens.flip(0), positions=[2, 5])
    assert all(same(answers(one, k), answers(other, (k + 2) % 4)) for k in range(4))


def test_an_encoder_decoder_is_asked_about_its_decoder(t5):
    source, written = t5.tokens, torch.cat([torch.zeros(2, 1, dtype=torch.long), t5.tokens[:, :3]], 1)
    mask = torch.ones_like(source)
    mask[1, 5:] = 0  # the encoder's padding says nothing of the decoder's tokens
    inputs = {"input_ids": source, "attention_mask": mask, "decoder_input_ids": written}
    attention = t5.memory.attend(t5.model, **inputs, positions=[-1, 1])
    logits = t5.model.eval()(**inputs).logits
    assert attention.queries["position"].tolist() == [3, 1, 3, 1]
    assert np.allclose(attention.queries["score"].reshape(2, 2), logits[:, [3, 1]].max(-1).values.detach())
    assert attention.explained["explained"].min() > 1 - 1e-9
    begun = t5.memory.attend(t5.model, **(inputs | {"decoder_input_ids": written[:, :2]}))
    assert all(same(answers(attention, 2 * k + 1), answers(begun, k)) for k in (0, 1))
    assert {"encoder.block.0.layer.0.SelfAttention.q", "lm_head"} <= set(attention.layers)


def test_the_model_is_left_as_it_was(gpt2):
    gpt2.model.train()
    gpt2.memory.attend(gpt2.model, gpt2.tokens, positions=[0, 1])
    assert all(module.training for module in gpt2.model.modules())
    assert not gpt2.model.lm_head._forward_hooks


def ids(length: int, value: int = 1) -> Tensor:
    return torch.full((1, length), value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"input_ids": ids(5), "positions": 5}, "position 5: sequence 0 has 5 tokens, expected -5 to 4"),
        ({"input_ids": ids(5), "positions": [0, -6]}, "position -6: sequence 0 has 5 tokens"),
        ({"input_ids": ids(5), "positions": 1.0}, "positions=1.0: expected one whole number or several"),
        ({"input_ids": ids(5), "positions": []}, r"positions=\[\]: expected one whole number or several"),
        ({"input_ids": ids(5), "positions": "last"}, "positions='last': expected one whole number"),
        ({"input_ids": ids(5), "attention_mask": ids(5, 0)}, "sequence 0 has 0 tokens that its attention_mask shows"),
        ({"input_ids": ids(13)}, "input_ids hold 13 tokens, the model's context is 12"),
        ({"inputs": ids(13)}, "input_ids hold 13 tokens, the model's context is 12"),
        (
            {"input_ids": ids(5, VOCABULARY)},
            "hold the token 23, the model's vocabulary ends at 22: expected the tokeni",
        ),
        ({"inputs": ids(5), "input_ids": ids(5)}, "attend got inputs and input_ids= as well"),
        ({"inputs": ids(5), "layer": "lm_head"}, "attend got inputs and layer= as well"),
        ({}, "expected the model's inputs: a tensor"),
        ({"layer": "lm_head"}, "expected the model's inputs: .* got layer="),
        ({"input_ids": ids(5), "target": [1, 2]}, "or one for each of the 1 queries"),
        ({"input_ids": ids(5), "target": VOCABULARY}, "expected one class from 0 to 22"),
        ({"input_ids": ids(5), "positions": 1, "target": lambda output: output.logits[:, 0, 0]}, "a function as targ"),
    ],
)
def test_questions_that_do_not_fit(gpt2, arguments, words):
    with pytest.raises(LayerError, match=words):
        gpt2.memory.attend(gpt2.model, **arguments)


def test_positions_need_a_sequence():
    model = torch.nn.Linear(3, 2)
    recorder = dualhook.instrument(model, verbose=False)
    model(torch.randn(4, 3)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    memory = recorder.close()
    assert memory.attend(model, torch.randn(2, 3), target=1).queries.columns == ["query", "target", "score"]
    with pytest.raises(LayerError, match=r"positions=-1: the model gives logits of shape \[2, 2\]"):
        memory.attend(model, torch.randn(2, 3), positions=-1)
