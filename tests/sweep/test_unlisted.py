"""Models that nobody listed: recorded whole, or the table says truthfully what is not.

The rule that picks them: of every task below all models that the installed transformers registers for it and the sweep
does not name, in an order shuffled by the release, so that a new release draws others; the first few that the settings
of ``TINY`` shrink to a size for tests, and that train without the recorder. HYPOTHESIS_PROFILE=search takes all.
"""

from __future__ import annotations

import copy
import functools
import itertools
import os
import random
from collections.abc import Callable, Iterator, Mapping

import pytest
import torch
import transformers
from sweep.harness import Case, are_same, assert_truthful, built, train
from sweep.transformers_families import CLASSES, FAMILIES, PIXELS, masked_word, next_word, picture, translation
from torch import Tensor, nn
from transformers.models.auto import modeling_auto as registry

import dualhook

SEARCH = os.environ.get("HYPOTHESIS_PROFILE") == "search"
LARGEST, STEPS = 100_000, 2

TASKS: dict[str, tuple[Mapping[str, str | tuple[str, ...]], Callable[[nn.Module], Tensor], int]] = {
    "next_word": (registry.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, next_word, 12),
    "masked_word": (registry.MODEL_FOR_MASKED_LM_MAPPING_NAMES, masked_word, 4),
    "translation": (registry.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, translation, 4),
    "picture": (registry.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, picture, 4),
}

TINY = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size", "word_embed_proj_dim"), 16),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "decoder_ffn_dim", "encoder_ffn_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("num_key_value_heads", "encoder_attention_heads", "num_experts_per_tok", "moe_top_k"), 2),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "max_window_layers"), 16),
    **dict.fromkeys(("head_dim", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"), 8),
    "v_head_dim": 8, "vocab_size": 50, "vocab_size_per_layer_input": 50, "max_position_embeddings": 32,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 0, "image_size": PIXELS, "patch_size": 8, "num_labels": CLASSES,
    "embed_dim": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "state_size": 4, "mamba_d_state": 4,
    "mamba_n_heads": 4, "mamba_d_head": 8,
}  # fmt: skip


@functools.cache
def swept() -> set[str]:
    """The model classes that the sweep names."""
    return {type(case.build()).__name__ for members in FAMILIES.values() for case in members.values()}


def unlisted(task: str) -> Iterator[str]:
    """Model classes in the order in which they are drawn."""
    entries = TASKS[task][0].values()  # a name, or a tuple of them
    names = {name for entry in entries for name in ((entry,) if isinstance(entry, str) else entry)}
    order = sorted(names - swept())
    random.Random(transformers.__version__).shuffle(order)
    return iter(order)


def shrunk(name: str, loss: Callable[[nn.Module], Tensor]) -> nn.Module | None:
    """The model with every setting of ``TINY`` that its config knows; None if that is no small model that trains."""
    try:
        kind = getattr(transformers, name)
        known = kind.config_class()
        config = kind.config_class(**{key: value for key, value in TINY.items() if hasattr(known, key)})
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in kind(config).parameters())
        if size > LARGEST:
            return None
        case = Case(lambda: kind(config), loss)
        train(built(case), loss, steps=1)
    except Exception:  # whatever a config that was shrunk blindly runs into, before anything is recorded
        return None
    return built(case)


@functools.cache
def drawn(task: str) -> list[tuple[str, nn.Module]]:
    """The first models of the order that can be had."""
    _, loss, count = TASKS[task]
    found = ((name, model) for name in unlisted(task) if (model := shrunk(name, loss)) is not None)
    return list(itertools.islice(found, None if SEARCH else count))


def places() -> list[tuple[str, int]]:
    """Numbers stand for models, which are drawn when the first one is tested."""
    counts = {task: len(drawn(task)) if SEARCH else count for task, (_, _, count) in TASKS.items()}
    return [(task, place) for task, count in counts.items() for place in range(count)]


@pytest.mark.parametrize(("task", "place"), places())
def test_what_the_table_calls_recorded_is_rebuilt_and_the_rest_has_a_reason(task, place):
    loss = TASKS[task][1]
    name, model = drawn(task)[place]
    print(name)  # pytest shows it where the test fails
    bare = copy.deepcopy(model)
    recorder = dualhook.instrument(model, layers="all", verbose=False)
    run = train(model, loss, STEPS)
    coverage, memory = recorder.coverage, recorder.close()
    assert are_same(model, run, bare, train(bare, loss, STEPS))
    listed = {row["parameter"] for row in coverage if not row["note"].startswith("frozen")}
    assert listed == {name for name, p in model.named_parameters() if p.requires_grad}
    assert_truthful(model, run, coverage, memory)
