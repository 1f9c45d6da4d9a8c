"""Real models of torchvision and transformers, tiny, from configs: every recorded linear map rebuilt.

Three momentum-SGD steps with clipping each, as people train them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
import transformers
from sweep.torchvision_families import small_alexnet
from torch import Tensor, nn

import dualhook

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}


def images(model: nn.Module) -> Tensor:
    labels = torch.randint(0, 5, (2,))
    return nn.functional.cross_entropy(model(torch.randn(2, 3, 64, 64)), labels)


def tokens(model: nn.Module) -> Tensor:
    ids = torch.randint(0, 50, (2, 7))
    return model(input_ids=ids, labels=ids).loss


def sentences(model: nn.Module) -> Tensor:
    return model(input_ids=torch.randint(0, 50, (2, 7)), labels=torch.randint(0, 3, (2,))).loss


def hf_images(model: nn.Module) -> Tensor:
    return model(pixel_values=torch.randn(2, 3, 16, 16), labels=torch.randint(0, 3, (2,))).loss


Case = tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor], dict[str, Any]]

CASES: dict[str, Case] = {
    # heads with an in-place activation right behind a Linear
    "alexnet": (
        small_alexnet,
        images,
        {"layers": ["classifier.4", "classifier.6"]},
    ),
    "mobilenet": (lambda: torchvision.models.mobilenet_v3_small(num_classes=5), images, {}),
    "resnet": (lambda: torchvision.models.resnet18(num_classes=5), images, {"layers": "head"}),
    "vit": (
        lambda: torchvision.models.VisionTransformer(64, 16, 2, 2, 16, 32, num_classes=5),
        images,
        {"layers": ["*.mlp.*", "heads.head"]},
    ),
    "llama": (lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY)), tokens, {}),
    "opt": (
        lambda: transformers.OPTForCausalLM(
            transformers.OPTConfig(
                vocab_size=50,
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                ffn_dim=32,
                word_embed_proj_dim=16,
                tie_word_embeddings=False,
            )
        ),
        tokens,
        {},
    ),
    "bert": (
        lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**TINY, num_labels=3)),
        sentences,
        {},
    ),
    "t5": (
        lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                vocab_size=50,
                d_model=16,
                d_kv=8,
                d_ff=32,
                num_layers=2,
                num_heads=2,
                tie_word_embeddings=False,
                decoder_start_token_id=0,
            )
        ),
        tokens,
        {},
    ),
    "hf_vit": (
        lambda: transformers.ViTForImageClassification(
            transformers.ViTConfig(
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=32,
                image_size=16,
                patch_size=8,
                num_labels=3,
            )
        ),
        hf_images,
        {},
    ),
}


def train(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    losses = []
    torch.manual_seed(2)
    for _ in range(3):
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        losses.append(float(value.detach()))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return losses


@pytest.mark.parametrize("name", CASES)
def test_every_recorded_layer_is_rebuilt_and_training_is_untouched(name):
    make, loss, options = CASES[name]
    torch.manual_seed(1)
    model = make()
    for parameter in model.parameters():  # torchvision starts some heads at zero, which would prove nothing
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    bare = copy.deepcopy(model)
    recorder = dualhook.instrument(model, verbose=False, **options)
    losses = train(model, loss)
    memory = recorder.close()
    assert losses == train(bare, loss)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), bare.parameters(), strict=True))
    expected = [spec.name for spec in recorder._first.selection.specs]
    assert sorted(use for layer in memory.layers for use in memory.uses(layer)) == sorted(expected)
    assert len(expected) >= 1
    report = memory.verify()
    assert report["exact"].all(), report
    assert report.max_error < 1e-5, report


def test_questions_to_a_language_model():
    """Inputs as a tokeniser gives them; a layer along the sequence answers with the sum over its positions."""
    make, loss, _ = CASES["llama"]
    model = make().double()
    recorder = dualhook.instrument(model, verbose=False)
    with recorder.batch(samples=[3, 4]):
        train(model, loss)
    memory = recorder.close()
    inputs = transformers.BatchEncoding({"input_ids": torch.randint(0, 50, (2, 5))})
    attention = memory.attend(model, inputs)
    assert (attention.explained["explained"] > 1 - 1e-9).all()
    top = attention.top(4, layers="lm_head")
    assert set(top["sample"]) <= {3, 4}
    assert top["position"].max() <= 6
    dual = memory.dual(model)
    assert torch.allclose(dual(**inputs).logits, model(**inputs).logits, atol=1e-10)
    # the direction is the gradient of the last token's logit: only that position of the head counts
    by_position = memory.attend(model, inputs, layers="lm_head", target=[1, 2]).sum_by("step")
    hidden = model.model(**inputs).last_hidden_state[:, -1].detach()
    made_of = memory._composition(memory._spec("lm_head"), memory.steps)
    change = hidden @ (model.lm_head.weight.detach() - made_of.origin_weight).T
    for query, target in enumerate((1, 2)):
        total = by_position.where(query=query)["contribution"].sum()
        assert total == pytest.approx(float(change[query, target]), abs=1e-10)


def test_a_head_tied_to_an_embedding_is_recorded_with_it():
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2))
    recorder = dualhook.instrument(model, layers="lm_head", verbose=False)
    train(model, lambda model: tokens(model))
    memory = recorder.close()
    assert memory.layers == ["lm_head"]
    assert memory.uses("lm_head") == ["transformer.wte", "lm_head"]
    assert memory.verify().max_error < 1e-6


def test_a_transformer_of_torch_is_recorded_whole():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    recorder = dualhook.instrument(layer, verbose=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(torch.randn(2, 3, 8)).square().mean().backward()
    optimizer.step()
    memory = recorder.close()
    assert memory.layers == ["self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2"]
    assert memory.verify().max_error < 1e-6
