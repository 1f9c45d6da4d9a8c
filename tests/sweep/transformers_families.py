"""Tiny members of Hugging Face families, from their configs: two layers, a vocabulary of fifty."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from sweep.harness import Case
from torch import Tensor, nn

VOCABULARY, CLASSES, BATCH, LENGTH, PIXELS = 50, 3, 2, 7, 16
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TEXT = {**SIZES, "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {**TEXT, "num_key_value_heads": 1, "head_dim": 8}
IMAGE = {**SIZES, "image_size": PIXELS, "patch_size": 8, "num_labels": CLASSES}
SEQ2SEQ = {
    "vocab_size": VOCABULARY, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
T5 = {
    "vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2,
    "decoder_start_token_id": 0, "relative_attention_num_buckets": 8,
}  # fmt: skip


def words(length: int = LENGTH) -> Tensor:
    return torch.randint(3, VOCABULARY, (BATCH, length))


def classes() -> Tensor:
    return torch.randint(0, CLASSES, (BATCH,))


def next_word(model: nn.Module) -> Tensor:
    ids = words()
    return model(input_ids=ids, labels=ids).loss


def masked_word(model: nn.Module) -> Tensor:
    ids = words()
    return model(input_ids=ids, labels=torch.where(torch.rand(ids.shape) < 0.6, ids, -100)).loss


def sentence(model: nn.Module) -> Tensor:
    """A class for every sentence; the second one is padded."""
    ids, there = words(), torch.ones(BATCH, LENGTH, dtype=torch.int64)
    ids[1, -2:], there[1, -2:] = 0, 0
    return model(input_ids=ids, attention_mask=there, labels=classes()).loss


def every_word(model: nn.Module) -> Tensor:
    return model(input_ids=words(), labels=torch.randint(0, CLASSES, (BATCH, LENGTH))).loss


def translation(model: nn.Module) -> Tensor:
    return model(input_ids=words(), labels=words(LENGTH - 2)).loss


def speech(model: nn.Module) -> Tensor:
    return model(input_features=torch.randn(BATCH, 8, 16), labels=words()).loss


def picture(model: nn.Module) -> Tensor:
    return model(pixel_values=torch.randn(BATCH, 3, PIXELS, PIXELS), labels=classes()).loss


def captioned(model: nn.Module) -> Tensor:
    pixels = torch.randn(BATCH, 3, PIXELS, PIXELS)
    return model(input_ids=words(), pixel_values=pixels, return_loss=True).loss


def case(
    model: str, config: str, loss: Callable[[nn.Module], Tensor], uncovered: tuple[str, ...], **settings: Any
) -> Case:
    """A model class of transformers, built from its config class."""

    def build() -> nn.Module:
        return getattr(transformers, model)(getattr(transformers, config)(**settings))

    return Case(build, loss, uncovered)


def clip() -> Case:
    def build() -> nn.Module:
        vision = {**SIZES, "image_size": PIXELS, "patch_size": 8}
        text = {**TEXT, "max_position_embeddings": 16}
        return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))

    return Case(build, captioned, ("LayerNorm", "logit_scale", "*.class_embedding"))


NORM = ("LayerNorm",)

FAMILIES: dict[str, dict[str, Case]] = {
    "decoder": {
        "gpt2": case(
            "GPT2LMHeadModel", "GPT2Config", next_word, NORM, vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2,
            bos_token_id=1, eos_token_id=2,
        ),
        "llama": case("LlamaForCausalLM", "LlamaConfig", next_word, ("LlamaRMSNorm",), **TEXT),
        "mistral": case("MistralForCausalLM", "MistralConfig", next_word, ("MistralRMSNorm",), **GROUPED),
        "qwen3": case("Qwen3ForCausalLM", "Qwen3Config", next_word, ("Qwen3RMSNorm",), **GROUPED),
        "phi3": case("Phi3ForCausalLM", "Phi3Config", next_word, ("Phi3RMSNorm",), **TEXT),
        "gemma3": case("Gemma3ForCausalLM", "Gemma3TextConfig", next_word, ("Gemma3RMSNorm",), **GROUPED),
        "opt": case(
            "OPTForCausalLM", "OPTConfig", next_word, NORM, **{**TEXT, "ffn_dim": 32, "word_embed_proj_dim": 16}
        ),
        "bloom": case(
            "BloomForCausalLM", "BloomConfig", next_word, NORM, vocab_size=VOCABULARY, hidden_size=16, n_layer=2,
            n_head=2,
        ),
        "gpt_neox": case("GPTNeoXForCausalLM", "GPTNeoXConfig", next_word, NORM, **TEXT),
        "falcon": case("FalconForCausalLM", "FalconConfig", next_word, NORM, **TEXT),
    },
    "encoder": {
        "bert": case("BertForSequenceClassification", "BertConfig", sentence, NORM, **TEXT, num_labels=CLASSES),
        "bert_mlm": case("BertForMaskedLM", "BertConfig", masked_word, NORM, **TEXT),
        "roberta": case(
            "RobertaForSequenceClassification", "RobertaConfig", sentence, NORM, **TEXT, num_labels=CLASSES
        ),
        "distilbert": case(
            "DistilBertForSequenceClassification", "DistilBertConfig", sentence, NORM, vocab_size=VOCABULARY, dim=16,
            n_layers=2, n_heads=2, hidden_dim=32, num_labels=CLASSES,
        ),
        "electra": case(
            "ElectraForTokenClassification", "ElectraConfig", every_word, NORM, **TEXT, embedding_size=8,
            num_labels=CLASSES,
        ),
        "albert": case("AlbertForMaskedLM", "AlbertConfig", masked_word, NORM, **TEXT, embedding_size=8),
        "deberta_v2": case(
            "DebertaV2ForSequenceClassification", "DebertaV2Config", sentence, (*NORM, "*.rel_embeddings.*"), **TEXT,
            num_labels=CLASSES,
            relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=True, position_buckets=4,
        ),
    },
    "encoder_decoder": {
        "t5": case("T5ForConditionalGeneration", "T5Config", translation, ("T5LayerNorm",), **T5),
        "t5_v1_1": case(
            "T5ForConditionalGeneration", "T5Config", translation, ("T5LayerNorm",), **T5,
            feed_forward_proj="gated-gelu", tie_word_embeddings=False,
        ),
        "bart": case("BartForConditionalGeneration", "BartConfig", translation, NORM, **SEQ2SEQ),
        "marian": case("MarianMTModel", "MarianConfig", translation, NORM, **SEQ2SEQ),
        "pegasus": case("PegasusForConditionalGeneration", "PegasusConfig", translation, NORM, **SEQ2SEQ),
        "whisper": case(
            "WhisperForConditionalGeneration", "WhisperConfig", speech, (*NORM, "*.decoder.embed_positions.*"),
            **SEQ2SEQ, num_mel_bins=8,
            max_source_positions=8, max_target_positions=16,
        ),
    },
    "vision": {
        "vit": case("ViTForImageClassification", "ViTConfig", picture, (*NORM, "ViTEmbeddings"), **IMAGE),
        "deit": case("DeiTForImageClassification", "DeiTConfig", picture, (*NORM, "DeiTEmbeddings"), **IMAGE),
        "beit": case(
            "BeitForImageClassification", "BeitConfig", picture,
            (*NORM, "*.cls_token", "*.lambda_?", "*.relative_position_bias_table"), **IMAGE,
            use_relative_position_bias=True,
        ),
        "swin": case(
            "SwinForImageClassification", "SwinConfig", picture, (*NORM, "*.relative_position_bias_table"),
            image_size=PIXELS, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=4,
            num_labels=CLASSES,
        ),
        "convnext": case(
            "ConvNextForImageClassification", "ConvNextConfig", picture,
            ("*norm.*", "*downsampling_layer.0.*", "*.layer_scale_parameter"),
            hidden_sizes=[8, 16], num_stages=2, depths=[1, 1], patch_size=2, num_labels=CLASSES,
            layer_scale_init_value=0.1,
        ),
        "clip": clip(),
    },
    "mixture_of_experts": {
        "mixtral": case(
            "MixtralForCausalLM", "MixtralConfig", next_word, ("MixtralRMSNorm",), **GROUPED, num_local_experts=4
        ),
        "qwen3_moe": case(
            "Qwen3MoeForCausalLM", "Qwen3MoeConfig", next_word, ("Qwen3MoeRMSNorm",), **GROUPED, num_experts=4,
            num_experts_per_tok=2, moe_intermediate_size=16,
        ),
        "gpt_oss": case(
            "GptOssForCausalLM", "GptOssConfig", next_word, ("GptOssRMSNorm", "*.sinks"), **GROUPED,
            num_local_experts=4, num_experts_per_tok=2,
        ),
        "deepseek_v3": case(
            "DeepseekV3ForCausalLM", "DeepseekV3Config", next_word, ("DeepseekV3RMSNorm",), **TEXT,
            n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1, first_k_dense_replace=1,
            moe_intermediate_size=16, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8,
            v_head_dim=8, num_key_value_heads=2,
        ),
    },
    "state_space": {
        "mamba": case(
            "MambaForCausalLM", "MambaConfig", next_word, ("MambaRMSNorm", "*.A_log", "*.D", "*.dt_proj.*"),
            vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4, time_step_rank=2,
        ),
        "falcon_mamba": case(
            "FalconMambaForCausalLM", "FalconMambaConfig", next_word,
            ("FalconMambaRMSNorm", "*.A_log", "*.D", "*.dt_proj.*"),
            vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4, time_step_rank=2,
        ),
        "mamba2": case(
            "Mamba2ForCausalLM", "Mamba2Config", next_word,
            ("Mamba2RMSNorm", "*.norm.*", "*.A_log", "*.D", "*.dt_bias"),
            vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4, num_heads=4, head_dim=8,
            n_groups=2, chunk_size=4, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        ),
        "rwkv": case(
            "RwkvForCausalLM", "RwkvConfig", next_word, (*NORM, "*.time_*"), vocab_size=VOCABULARY, hidden_size=16,
            num_hidden_layers=2, attention_hidden_size=16, intermediate_size=32, context_length=16,
        ),
        "jamba": case(
            "JambaForCausalLM", "JambaConfig", next_word,
            ("JambaRMSNorm", "*.A_log", "*.D", "*.dt_proj.*"), **{**TEXT, "num_key_value_heads": 1},
            num_experts=4, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=4, mamba_dt_rank=2,
        ),
    },
}  # fmt: skip
