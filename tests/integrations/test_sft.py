"""trl's SFTTrainer with the callback: rows of packed sequences, and adapters."""

from __future__ import annotations

import pytest
import torch
import transformers
from datasets import Dataset
from dualhook.integrations.transformers import DualMemoryCallback, Passages
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from trainers import raw_rows

trl = pytest.importorskip("trl")

TEXTS = [f"sentence number {k} says {'abc'[k % 3] * (1 + k % 5)} again and again" for k in range(20)]


@pytest.fixture(scope="module")
def tokenizer():
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special, letters = ["<pad>", "<eos>"], pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=280, special_tokens=special, initial_alphabet=letters)
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")


def trained(tmp_path, tokenizer, packing, **settings):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(tokenizer), **sizes, **ids))
    callback = DualMemoryCallback(tmp_path / "memory", layers="all", verbose=False)
    options = trl.SFTConfig(
        str(tmp_path / "out"), max_steps=4, per_device_train_batch_size=3, use_cpu=True, bf16=False, report_to=[],
        packing=packing, max_length=32, save_strategy="no", disable_tqdm=True, learning_rate=1e-2,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model, options, train_dataset=Dataset.from_dict({"text": TEXTS}), processing_class=tokenizer,
        callbacks=[callback], **settings,
    )  # fmt: skip
    trainer.train()
    return trainer, callback.memory


@pytest.mark.parametrize("packing", [False, True])
def test_every_token_knows_its_row_and_place(tmp_path, tokenizer, packing):
    trainer, memory = trained(tmp_path, tokenizer, packing)
    assert memory.verify(trainer.model)["exact"].all()
    ids, count = trainer.train_dataset["input_ids"], 0
    for rows in raw_rows(memory, "model.embed_tokens"):
        for token, sample, position in zip(
            rows["slot"].tolist(), rows["sample"].tolist(), rows["position"].tolist(), strict=True
        ):
            assert ids[sample][position] == token
            count += 1
    assert count > 100
    passages = Passages(trainer.train_dataset, tokenizer)
    assert f"«{tokenizer.decode([ids[sample][position]]).strip()}»" in passages.around(sample, position)


def test_adapters(tmp_path, tokenizer):
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer, memory = trained(tmp_path, tokenizer, True, peft_config=adapter)
    assert all("lora_" in layer for layer in memory.layers)
    assert len(memory.layers) == 8
    assert memory.verify(trainer.model)["exact"].all()
