"""Tiny language models in the real Trainer, as people set it up."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, default_data_collator

import dualhook

VOCABULARY, LENGTH, ROWS = 32, 6, 22
WIDE = 600  # words of a vocabulary whose output gradients are not written
SMALL = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def gpt2(words: int = VOCABULARY, blocks: int = 2) -> nn.Module:
    sizes = {"n_positions": 16, "n_embd": 16, "n_layer": blocks, "n_head": 2}
    config = transformers.GPT2Config(**sizes, **(SMALL | {"vocab_size": words}))
    return transformers.GPT2LMHeadModel(config)


def llama(words: int = VOCABULARY) -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=1, **(SMALL | {"vocab_size": words}))
    return transformers.LlamaForCausalLM(config)


def t5() -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, **SMALL))


MODELS = {"gpt2": gpt2, "llama": llama, "t5": t5}


class Sentences(Dataset[dict[str, Any]]):
    """Random sentences of different lengths: no two are alike."""

    def __init__(self, padded: bool = True, rows: int = ROWS) -> None:
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(3, VOCABULARY, (rows, LENGTH), generator=generator)
        self.lengths = torch.randint(3, LENGTH + 1, (rows,), generator=generator) if padded else None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids, mask, labels = self.ids[index].clone(), torch.ones(LENGTH, dtype=torch.int64), self.ids[index].clone()
        if self.lengths is not None:
            ids[self.lengths[index] :], mask[self.lengths[index] :] = 0, 0
            labels[self.lengths[index] :] = -100
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, "length": int(mask.sum())}


@dataclass(frozen=True)
class Way:
    """One way of training, as people set it up."""

    model: Callable[[], nn.Module] = gpt2
    settings: dict[str, Any] = field(default_factory=dict)
    optimizer: Callable[..., torch.optim.Optimizer] | None = None  # None: the Trainer's own, AdamW
    tolerance: float = 1e-5
    padded: bool = True


SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
WAYS = {
    "gpt2": Way(),
    "gpt2-sgd": Way(optimizer=SGD),
    "llama": Way(llama),
    "llama-sgd": Way(llama, optimizer=SGD),
    "t5": Way(t5),
    "t5-sgd": Way(t5, optimizer=SGD),
    "accumulated": Way(settings={"gradient_accumulation_steps": 3}),
    "accumulated-workers": Way(
        settings={"gradient_accumulation_steps": 2, "dataloader_num_workers": 2, "dataloader_prefetch_factor": 3}
    ),
    "persistent-workers": Way(settings={"dataloader_num_workers": 1, "dataloader_persistent_workers": True}),
    "drop-last": Way(settings={"dataloader_drop_last": True, "gradient_accumulation_steps": 2}),
    "evaluated": Way(settings={"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 4}),
    "checkpointing": Way(llama, settings={"gradient_checkpointing": True}),
    "reentrant": Way(
        llama,
        settings={"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ),
    "by-length": Way(settings={"train_sampling_strategy": "group_by_length"}),
    "smoothed": Way(settings={"label_smoothing_factor": 0.1}),
    "dispatched": Way(settings={"accelerator_config": {"dispatch_batches": True}}),
    "bf16": Way(llama, settings={"bf16": True}, optimizer=SGD, tolerance=3e-2),
    "fused": Way(llama, settings={"optim": "adamw_torch_fused", "weight_decay": 0.1}),
    "tokenizer": Way(),
    "end-to-end": Way(llama, padded=False),
    "wide-head": Way(partial(gpt2, WIDE), settings={"gradient_accumulation_steps": 3}),
    "wide-head-bf16": Way(
        partial(llama, WIDE),
        settings={"bf16": True, "gradient_accumulation_steps": 3},
        optimizer=SGD,
        tolerance=3e-2,
    ),
}


def arguments(folder: Path, way: Way, **settings: Any) -> TrainingArguments:
    usual = {
        "num_train_epochs": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "warmup_steps": 2,
        "lr_scheduler_type": "linear", "max_grad_norm": 0.5, "logging_steps": 2, "save_strategy": "no", "seed": 3,
        "use_cpu": os.environ.get("DUALHOOK_DEVICE") != "cuda", "report_to": [], "disable_tqdm": True,
    }  # fmt: skip
    return TrainingArguments(str(folder), **(usual | way.settings | settings))


def encoded(items: list[dict[str, Any]]) -> transformers.BatchEncoding:
    """What a tokeniser's own padding returns."""
    return transformers.BatchEncoding(default_data_collator(items))


def laid_end_to_end(items: list[dict[str, Any]]) -> dict[str, Any]:
    """The sequences as one."""
    parts = {name: [item[name] for item in items] for name in ("input_ids", "labels")}
    positions = [torch.arange(len(ids)) for ids in parts["input_ids"]]
    return {name: torch.cat(own)[None] for name, own in {**parts, "position_ids": positions}.items()}


COLLATORS = {"tokenizer": encoded, "end-to-end": laid_end_to_end}


def trainer_of(folder: Path, way: Way, callbacks: list[Any], dataset: Any = None, **settings: Any) -> Trainer:
    torch.manual_seed(0)
    model = way.model()
    optimizer = None if way.optimizer is None else way.optimizer(model.parameters())
    dataset = Sentences(way.padded) if dataset is None else dataset
    return Trainer(
        model, arguments(folder, way, **settings), train_dataset=dataset, eval_dataset=Sentences(rows=5),
        data_collator=next((c for n, c in COLLATORS.items() if way is WAYS[n]), default_data_collator),
        callbacks=callbacks, optimizers=(optimizer, None),
    )  # fmt: skip


def embeddings(memory: dualhook.DualMemory) -> list[str]:
    return [use for layer in memory.layers for use in memory.uses(layer)]


def raw_rows(memory: dualhook.DualMemory, layer: str) -> list[dict[str, torch.Tensor]]:
    """What is stored of an embedding: token id, dataset row and position of every token."""
    spec = memory._spec(layer)
    found = (segment.stored(spec) for segment in memory._store.segments)
    return [dict(stored.tensors) for stored in found if stored is not None]
