"""Presets choose by structure: the expected layers are written out, model by model."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from torchvision.models import SwinTransformer, VisionTransformer, resnet18

import dualhook
from dualhook.capture import select_layers
from dualhook.errors import LayerError

SMALL = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=20, n_positions=16, n_embd=8, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))


def bert() -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL))


def t5() -> nn.Module:
    config = transformers.T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    return transformers.T5ForConditionalGeneration(config)


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(**SMALL, num_key_value_heads=1, num_local_experts=2)
    return transformers.MixtralForCausalLM(config)


def mamba() -> nn.Module:
    return transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=2))


def vit() -> nn.Module:
    return VisionTransformer(8, 4, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=16, num_classes=3)


def swin() -> nn.Module:
    return SwinTransformer([2, 2], embed_dim=8, depths=[1, 2], num_heads=[2, 2], window_size=[2, 2], num_classes=3)


def hf_swin() -> nn.Module:
    """Stages, which hold blocks, in a list of their own."""
    config = transformers.SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2
    )
    return transformers.SwinForImageClassification(config)


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(4, 4) for _ in range(3))


class MultiHeadAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList([Head(), Head()])
        self.projection = nn.Linear(8, 4)


class AttentionBlock(nn.Module):
    """A class whose own name says attention, with several experts of one class inside."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = MultiHeadAttention()
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)) for _ in range(3)])


def by_hand() -> nn.Module:
    return nn.Sequential(nn.Embedding(5, 4), nn.Sequential(AttentionBlock(), AttentionBlock()), nn.Linear(4, 5))


def unnamed() -> nn.Module:
    """Blocks that are lists themselves; the attention's class tells."""
    blocks = [nn.ModuleList([nn.MultiheadAttention(4, 2), nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))])]
    return nn.ModuleDict({"layers": nn.ModuleList(blocks), "out": nn.Linear(4, 2)})


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def each(*parts: str) -> list[str]:
    """Names from a prefix with ``#`` for both block numbers, and what follows it."""
    prefix, *rest = parts
    return [f"{prefix.replace('#', number)}.{one}" for number in "01" for one in rest]


QKVO = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
GATED = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
EXPERTS = ["mlp.gate", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
BERT_ATTENTION = [f"attention.{one}" for one in ("self.query", "self.key", "self.value", "output.dense")]
BERT_MLP = ["intermediate.dense", "output.dense"]
T5_SELF, T5_CROSS = ([f"{which}Attention.{one}" for one in "qkvo"] for which in ("Self", "EncDec"))
MIXER = [f"mixer.{one}" for one in ("in_proj", "x_proj", "dt_proj", "out_proj")]
VIT_ATTENTION, VIT_MLP = ["self_attention.in_proj", "self_attention.out_proj"], ["mlp.0", "mlp.3"]
SWIN_ATTENTION = [
    "attn.relative_position_bias_table",
    "attn.qkv",
    "attn.proj",
]  # the first forward pass drops the table
HF_SWIN = [f"attention.{one}_proj" for one in "qkvo"]
HF_SWIN_TABLE = "attention.relative_position_bias.relative_position_bias_table"
HAND_ATTENTION = [f"mix.heads.{n}.{one}" for n in "01" for one in ("key", "query", "value")] + ["mix.projection"]
HAND_MLP = [f"experts.{n}.{one}" for n in "012" for one in "01"]


def at(block: str, *parts: str) -> list[str]:
    return [f"{block}.{part}" for part in parts]


@pytest.mark.parametrize(
    ("make", "preset", "expected"),
    [
        (gpt2, "attention", each("transformer.h.#", "attn.c_attn", "attn.c_proj")),
        (gpt2, "mlp", each("transformer.h.#", "mlp.c_fc", "mlp.c_proj")),
        (
            gpt2,  # the head's weight is the embedding's
            "last_block",
            [
                "transformer.wte",
                *at("transformer.h.1", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
                "lm_head",
            ],
        ),
        (llama, "attention", each("model.layers.#", *QKVO)),
        (llama, "mlp", each("model.layers.#", *GATED)),
        (llama, "last_block", [*at("model.layers.1", *QKVO, *GATED), "lm_head"]),
        (bert, "attention", each("bert.encoder.layer.#", *BERT_ATTENTION)),
        (bert, "mlp", each("bert.encoder.layer.#", *BERT_MLP)),
        (bert, "last_block", [*at("bert.encoder.layer.1", *BERT_ATTENTION, *BERT_MLP), "classifier"]),
        (
            t5,
            "attention",
            at("encoder.block.0.layer.0", *T5_SELF)
            + at("decoder.block.0.layer.0", *T5_SELF)
            + at("decoder.block.0.layer.1", *T5_CROSS),
        ),
        (
            t5,
            "mlp",
            at("encoder.block.0.layer.1.DenseReluDense", "wi", "wo")
            + at("decoder.block.0.layer.2.DenseReluDense", "wi", "wo"),
        ),
        (
            t5,  # without the embedding of relative positions
            "last_block",
            [
                "shared",
                *at("decoder.block.0.layer.0", *T5_SELF),
                *at("decoder.block.0.layer.1", *T5_CROSS),
                *at("decoder.block.0.layer.2.DenseReluDense", "wi", "wo"),
                "lm_head",
            ],
        ),
        (mixtral, "attention", each("model.layers.#", *QKVO)),
        (mixtral, "mlp", each("model.layers.#", *EXPERTS)),
        (mixtral, "last_block", [*at("model.layers.1", *QKVO, *EXPERTS), "lm_head"]),
        (vit, "attention", each("encoder.layers.encoder_layer_#", *VIT_ATTENTION)),
        (vit, "mlp", each("encoder.layers.encoder_layer_#", *VIT_MLP)),
        (vit, "last_block", [*at("encoder.layers.encoder_layer_1", *VIT_ATTENTION, *VIT_MLP), "heads.head"]),
        (swin, "attention", at("features.1.0", *SWIN_ATTENTION) + each("features.3.#", *SWIN_ATTENTION)),
        (swin, "mlp", at("features.1.0", *VIT_MLP) + each("features.3.#", *VIT_MLP)),
        (swin, "last_block", [*at("features.3.1", *SWIN_ATTENTION, *VIT_MLP), "head"]),
        (hf_swin, "attention", each("swin.encoder.layers.#.blocks.0", *HF_SWIN, HF_SWIN_TABLE)),
        (hf_swin, "mlp", each("swin.encoder.layers.#.blocks.0", "mlp.fc1", "mlp.fc2")),
        (by_hand, "attention", each("1.#", *HAND_ATTENTION)),
        (by_hand, "mlp", each("1.#", *HAND_MLP)),
        (by_hand, "last_block", [*at("1.1", *HAND_ATTENTION, *HAND_MLP), "2"]),
        (unnamed, "attention", at("layers.0.0", "in_proj", "out_proj")),
        (unnamed, "mlp", at("layers.0.1", "0", "1")),
        (resnet18, "last_block", ["layer4.1.conv1", "layer4.1.conv2", "fc"]),
        (llama, ["head", "attention"], [*each("model.layers.#", *QKVO), "lm_head"]),
        (llama, ["mlp", "*.0.*.q_proj"], ["model.layers.0.self_attn.q_proj", *each("model.layers.#", *GATED)]),
        (llama, ["all"], [spec.name for spec in select_layers(llama(), "all").specs]),
    ],
)  # fmt: skip
def test_a_preset_chooses(make, preset, expected):
    assert [spec.name for spec in select_layers(make(), preset).specs] == expected


def test_blocks_without_attention_are_feed_forward():
    chosen = [spec.name for spec in select_layers(mamba(), "mlp").specs]
    assert [name for name in chosen if not name.endswith("A_log")] == each("backbone.layers.#", *MIXER)


@pytest.mark.parametrize(
    ("make", "preset", "words"),
    [
        (mlp, "mlp", "not apply to Sequential, which has no repeated blocks .*: expected one of 'all', 'head', or"),
        (mlp, ["head", "last_block"], "layers='last_block' does not apply to Sequential, which has no repeated blocks"),
        (resnet18, "attention", r"no attention in its blocks \(layer1.0, …\): expected .* 'head', 'last_block',"),
        (resnet18, "mlp", "no feed-forward part in its blocks"),
        (mamba, "attention", "expected one of 'all', 'head', 'last_block', 'mlp', or names or globs of layers"),
    ],
)  # fmt: skip
def test_a_preset_that_does_not_apply_names_those_that_do(make, preset, words):
    with pytest.raises(LayerError, match=words):
        select_layers(make(), preset)


def test_what_a_model_calls_so_itself_wins_over_a_preset():
    model = nn.ModuleDict({"head": nn.Linear(2, 2), "mlp": mlp(), "last": nn.Linear(3, 1)})
    assert [spec.name for spec in select_layers(model, "head").specs] == ["head"]
    assert [spec.name for spec in select_layers(model, "mlp").specs] == ["mlp.0", "mlp.2"]
    assert [spec.name for spec in select_layers(model["mlp"], "head").specs] == ["2"]


def test_a_table_in_the_attention_is_left_out_once_a_forward_pass_has_shown_what_it_is():
    model = swin()
    recorder = dualhook.instrument(model, layers="attention", verbose=False)
    model(torch.randn(2, 3, 8, 8)).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    memory = recorder.close()
    assert memory.layers == at("features.1.0", *SWIN_ATTENTION[1:]) + each("features.3.#", *SWIN_ATTENTION[1:])
    assert memory.verify()["exact"].all()
