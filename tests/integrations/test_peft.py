"""PEFT's adapters, recorded while they train: LoRA's matrices are linear layers, what is no linear map says so."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import dualhook

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning:transformers")
VOCABULARY, LENGTH, STEPS = 40, 8, 4
TARGETS = {"gpt2": ["c_attn", "c_proj"], "llama": ["q_proj", "v_proj", "down_proj"]}


def base(name: str) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "max_position_embeddings": LENGTH}
    sizes |= {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    if name == "gpt2":
        return GPT2LMHeadModel(GPT2Config(**sizes))
    return LlamaForCausalLM(LlamaConfig(intermediate_size=24, **sizes))


def lora(name: str, **options) -> nn.Module:
    options = {"target_modules": TARGETS[name], "fan_in_fan_out": name == "gpt2", **options}
    return peft.get_peft_model(base(name), peft.LoraConfig(r=3, lora_dropout=0.1, task_type="CAUSAL_LM", **options))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1, momentum=0.9)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    tokens = torch.randint(0, VOCABULARY, (3, LENGTH))
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def plainly(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(STEPS):
        step(model, optimizer)


def train(make, *, record, make_optimizer=adamw, loop=plainly, layers=None):
    """The model after the loop, and its memory; the recorder is asked for its coverage on the way."""
    torch.manual_seed(1)
    model = make()
    optimizer = make_optimizer(model)
    recorder = dualhook.instrument(model, layers=layers, verbose=False) if record else None
    torch.manual_seed(2)
    loop(model, optimizer)
    if recorder is None:
        return model, None, None
    coverage = recorder.coverage
    return model, recorder.close(), dict(zip(coverage["parameter"], coverage["note"], strict=True))


def check(make, **options):
    """Training is untouched, and what is recorded is rebuilt; returns what is not recorded of what trains, and why."""
    bare, _, _ = train(make, record=False, **options)
    model, memory, notes = train(make, record=True, **options)
    assert all(torch.equal(a, b) for a, b in zip(bare.parameters(), model.parameters(), strict=True))
    parameters, rebuilt = dict(model.named_parameters()), memory.state_dict()
    assert all(parameters[name].requires_grad for name in rebuilt)  # nothing of the frozen base
    for name, value in rebuilt.items():
        assert (value - parameters[name]).norm() <= 1e-5 * parameters[name].norm(), name
    left = [name for name, parameter in parameters.items() if parameter.requires_grad and name not in rebuilt]
    return memory, {name: notes[name] for name in left}


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("make_optimizer", [adamw, sgd])
def test_lora_is_rebuilt_and_nothing_else_recorded(name, make_optimizer):
    memory, left = check(lambda: lora(name), make_optimizer=make_optimizer)
    assert left == {}
    targets = {n for n, _ in base(name).named_modules() if n.rpartition(".")[2] in TARGETS[name]}
    assert set(memory.layers) == {f"base_model.model.{n}.lora_{m}.default" for n in targets for m in "AB"}


VARIANTS = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "head": {"modules_to_save": ["lm_head"]},
    "every layer": {"target_modules": "all-linear"},
    "tokens": {"trainable_token_indices": [1, 2]},
}
LEFT_OUT = {"dora": ("magnitude", "no linear map"), "tokens": ("tokens_delta", "which no tap sees")}


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_are_recorded_or_left_out_with_the_reason(name, variant):
    _, left = check(lambda: lora(name, **VARIANTS[variant]))
    if variant not in LEFT_OUT:
        assert left == {}
    else:
        parameter, why = LEFT_OUT[variant]
        assert left
        assert all(parameter in name and why in note for name, note in left.items())


OTHERS = {
    "AdaLoraConfig": {"init_r": 3, "total_step": 10},
    "LoHaConfig": {"r": 2},
    "IA3Config": {"feedforward_modules": []},
    "VeraConfig": {"r": 4},
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_adapters_multiply_matrices_and_are_left_out(name):
    def make():
        config = getattr(peft, name)(target_modules=["q_proj"], task_type="CAUSAL_LM", **OTHERS[name])
        return peft.get_peft_model(base("llama"), config)

    _, left = check(make)
    assert left
    assert all("no tap sees" in note or "no linear map" in note for note in left.values())


@pytest.mark.parametrize("layers", [None, "all"])
def test_prompts_are_a_table_that_is_asked_for(layers):
    def make():
        config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
        return peft.get_peft_model(base("llama"), config)

    memory, left = check(make, layers=layers)
    assert list(memory.layers) == (["prompt_encoder.default.embedding"] if layers else [])
    assert all("when asked for" in note for note in left.values())


# ---- what is done to adapters while they train -------------------------------------------------------------------


def merging(model, optimizer):
    step(model, optimizer)
    model.merge_adapter()
    with torch.no_grad():
        model(input_ids=torch.randint(0, VOCABULARY, (2, LENGTH)))
    model.unmerge_adapter()
    step(model, optimizer)


def disabling(model, optimizer):
    for _ in range(2):
        with model.disable_adapter():  # what preference training compares with
            model(input_ids=torch.randint(0, VOCABULARY, (2, LENGTH)))
        step(model, optimizer)


def checkpointing(model, optimizer):
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    disabling(model, optimizer)  # its first forward pass is differentiable, and knows no adapter


def switching(model, optimizer):
    model.set_adapter("other")
    step(model, optimizer)
    model.set_adapter("default")
    step(model, optimizer)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("loop", [merging, disabling, checkpointing])
def test_merging_and_disabling_while_recording(name, loop):
    _, left = check(lambda: lora(name), loop=loop)
    assert left == {}


@pytest.mark.parametrize("name", TARGETS)
def test_two_adapters_in_turn(name):
    def make():
        model = lora(name)
        model.add_adapter("other", model.peft_config["default"])
        return model

    def both(model):
        return torch.optim.AdamW((p for n, p in model.named_parameters() if "lora_" in n), lr=1e-2)

    bare, _, _ = train(make, record=False, make_optimizer=both, loop=switching)
    model, memory, _ = train(make, record=True, make_optimizer=both, loop=switching)
    assert all(torch.equal(a, b) for a, b in zip(bare.parameters(), model.parameters(), strict=True))
    parameters = dict(model.named_parameters())
    for adapter in ("default", "other"):
        own = {name: value for name, value in memory.state_dict().items() if f".{adapter}." in name}
        assert own
        assert all((value - parameters[name]).norm() <= 1e-5 * parameters[name].norm() for name, value in own.items())


def test_an_answer_of_an_adapter_adds_up():
    model, memory, _ = train(lambda: lora("llama"), record=True)
    attention = memory.attend(model.eval(), {"input_ids": torch.randint(0, VOCABULARY, (2, LENGTH))})
    assert attention.explained["explained"].min() > 0.9999
