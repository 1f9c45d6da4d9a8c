"""Record the training of a small language model, then read which training passages its next words come from.

    python examples/language_model.py                              # a GPT-2 in the Trainer, 250 MB, seconds
    python examples/language_model.py --model lstm                 # an LSTM in a plain loop, 200 MB, seconds
    python examples/language_model.py --model lstm --carry-state   # its state goes on from window to window
    python examples/language_model.py --text FILE --prompt "Once upon a"    # your own text, one passage a line
    python examples/language_model.py --full                       # larger, gigabytes

The text that ships with dualhook is part of the King James Version. What dualhook needs is marked with ``# (1)`` to
``# (3)``; the rest is an ordinary training script.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from dualhook.integrations.transformers import DualMemoryCallback, Passages, explain
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    DataCollatorForLanguageModeling,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    logging,
)

import dualhook
from dualhook.data import load_king_james_subset

PROMPTS = ("And God said,", "And all the days of", "In the beginning God created the")


@dataclass(frozen=True)
class Size:
    """How much to train: ``context`` tokens at a time, ``batch`` of them beside each other, at learning rate ``rate``."""

    passages: int
    vocabulary: int
    depth: int
    width: int
    context: int
    batch: int
    epochs: int
    rate: float


SIZES = {
    "gpt2": Size(passages=300, vocabulary=1024, depth=2, width=64, context=64, batch=4, epochs=6, rate=5e-3),
    "gpt2 full": Size(passages=3637, vocabulary=2048, depth=4, width=256, context=128, batch=16, epochs=5, rate=1e-3),
    "lstm": Size(passages=300, vocabulary=1024, depth=1, width=256, context=64, batch=4, epochs=4, rate=2.0),
    "lstm full": Size(passages=3637, vocabulary=2048, depth=1, width=1024, context=64, batch=64, epochs=5, rate=2.0),
}


def main() -> None:
    options = arguments()
    logging.set_verbosity_error()
    torch.manual_seed(0)
    size = SIZES[f"{options.model} full" if options.full else options.model]
    size = replace(size, **{n: v for n in ("passages", "epochs") if (v := getattr(options, n)) is not None})
    references, passages = read_passages(options.text, size.passages)
    tokenizer = train_tokenizer(passages, size.vocabulary)
    tokens = [tokenizer(passage + tokenizer.eos_token)["input_ids"] for passage in passages]
    print(f"{len(passages):,} passages, {sum(map(len, tokens)):,} tokens, {len(tokenizer):,} of them different")
    with tempfile.TemporaryDirectory() as temporary:
        out = options.out or Path(temporary)
        if options.model == "gpt2":
            rows, model, memory = train_gpt2(tokens, tokenizer, size, out, options.layers)
        else:
            rows, model, memory = train_lstm(tokens, tokenizer, size, out, options.layers, options.carry_state)
        print(f"\nrecorded: {memory.patterns(memory.layers[0]):,} patterns, {memory.nbytes / 1e6:.0f} MB in {out}")
        print(memory.verify(), end="\n\n")
        prompts = options.prompt or (PROMPTS if options.text is None else [" ".join(passages[0].split()[:3])])
        show(model, memory, tokenizer, rows, references, prompts)
        if options.model == "gpt2":
            print(
                explain(model, tokenizer, memory, prompts[0], max_new_tokens=4, k=2, passages=Passages(rows, tokenizer))
            )


# ---- text ------------------------------------------------------------------------------------------------------------


def read_passages(path: Path | None, count: int) -> tuple[Sequence[str], Sequence[str]]:
    """The first passages of a text, and where they stand in it."""
    if path is None:
        text = load_king_james_subset()
        return text.references[:count], text.verses[:count]
    lines = [(f"line {number}", line.strip()) for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)]
    references, passages = zip(*[(where, line) for where, line in lines if line][:count], strict=True)
    return references, passages


def train_tokenizer(passages: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokeniser."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<pad>", "\n"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(passages, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", eos_token="\n", model_input_names=["input_ids", "attention_mask"]
    )


# ---- GPT-2, a passage a row ------------------------------------------------------------------------------------------


def train_gpt2(
    tokens: list[list[int]], tokenizer: PreTrainedTokenizerFast, size: Size, out: Path, layers: list[str]
) -> tuple[list[dict[str, list[int]]], nn.Module, dualhook.DualMemory]:
    rows = [
        {"input_ids": passage[: size.context], "passage": [number] * len(passage)}
        for number, passage in enumerate(tokens)
    ]
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=size.context, n_embd=size.width, n_layer=size.depth, n_head=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        tie_word_embeddings=False,  # what the head is made of are then its own patterns, none of the embedding's
        bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    callback = DualMemoryCallback(out / "memory", layers=layers, overwrite=True)  # (1) all that is needed
    settings = TrainingArguments(
        str(out / "trainer"), num_train_epochs=size.epochs, per_device_train_batch_size=size.batch,
        learning_rate=size.rate, logging_strategy="epoch", save_strategy="no", report_to="none", disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = Trainer(model, settings, train_dataset=rows, data_collator=collator, callbacks=[callback, Report()])
    trainer.remove_callback(PrinterCallback)  # Report prints instead
    trainer.train()
    return rows, model.cpu(), callback.memory


class Report(TrainerCallback):
    """Prints a line per epoch; what dualhook has recorded by then stands in the Trainer's logs."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            report(state.epoch, logs["loss"], logs["dualhook_rows"], logs["dualhook_bytes"])


def report(epoch: float, loss: float, patterns: int, nbytes: int) -> None:
    print(f"epoch {epoch:.0f}: loss {loss:.3f}, {patterns:,} patterns, {nbytes / 1e6:.0f} MB", flush=True)


# ---- LSTM, a window of the running text a row ------------------------------------------------------------------------


class LSTM(nn.Module):
    """The language model of Irie et al. 2022: one LSTM layer between embedding and head."""

    def __init__(self, vocabulary: int, width: int, depth: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 64)
        self.lstm = nn.LSTM(64, width, depth, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, input_ids: Tensor, attention_mask: Any = None, state: Any = None) -> tuple[Tensor, Any]:
        """Logits [b, position, token] and the state after them; padding is on the right and changes nothing before."""
        hidden, state = self.lstm(self.embedding(input_ids), state)
        return self.head(hidden), state


def train_lstm(
    tokens: list[list[int]],
    tokenizer: PreTrainedTokenizerFast,
    size: Size,
    out: Path,
    layers: list[str],
    carry_state: bool,
) -> tuple[list[dict[str, list[int]]], nn.Module, dualhook.DualMemory]:
    stream = torch.tensor([token for passage in tokens for token in passage])
    passage = torch.tensor([number for number, passage in enumerate(tokens) for _ in passage])
    windows = (len(stream) - 1) // (size.batch * size.context)
    length = size.batch * windows * size.context
    # the text in `batch` streams of windows [stream, window, token]; a window's number is its place in the text
    inputs, targets, passage = (
        part.view(size.batch, windows, size.context)
        for part in (stream[:length], stream[1 : length + 1], passage[:length])
    )
    numbers = torch.arange(size.batch * windows).view(size.batch, windows)
    model = LSTM(len(tokenizer), size.width, size.depth)
    optimizer = torch.optim.SGD(model.parameters(), lr=size.rate, momentum=0.9)

    recorder = dualhook.instrument(model, out / "memory", layers=layers, overwrite=True)  # (1) the one line
    for epoch in range(size.epochs):
        state, total = None, 0.0
        for window in range(windows):
            recorder.batch(samples=numbers[:, window])  # (2) so that every pattern knows its window
            logits, after = model(inputs[:, window], state=state)
            loss = F.cross_entropy(logits.flatten(0, 1), targets[:, window].flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            state = tuple(part.detach() for part in after) if carry_state else None
            total += loss.item()
        report(epoch + 1, total / windows, recorder.rows, recorder.nbytes)
    memory = recorder.close()  # (3)
    rows = [
        {"input_ids": ids.tolist(), "passage": own.tolist()}
        for ids, own in zip(inputs.flatten(0, 1), passage.flatten(0, 1), strict=True)
    ]
    return rows, model, memory


# ---- questions -------------------------------------------------------------------------------------------------------


def show(
    model: nn.Module,
    memory: dualhook.DualMemory,
    tokenizer: PreTrainedTokenizerFast,
    rows: list[dict[str, list[int]]],
    references: Sequence[str],
    prompts: Sequence[str],
) -> None:
    """Print what comes after each prompt, and the passages for and against it."""
    asked = tokenizer(list(prompts), padding=True, return_tensors="pt")
    attention = memory.attend(model, **asked, positions=-1)
    passages = Passages(rows, tokenizer)
    supporting, opposing = passages.top(attention, 5), passages.top(attention, 2, largest=False)
    for query, prompt in zip(attention.queries, prompts, strict=True):
        word, number = tokenizer.decode([query["target"]]), query["query"]
        print(f"{prompt} ▸{word}   (probability {query['probability']:.0%}, logit {query['score']:.2f})")
        for title, found in (("for it", supporting), ("against it", opposing)):
            print(f"  {title}")
            for row in found.where(query=number):
                where = references[rows[row["sample"]]["passage"][row["position"]]]
                times = f"{row['repeats']} patterns" + (f" in {row['places']} places" if row["places"] > 1 else "")
                print(f"  {row['contribution']:+8.3f}  {where}: {row['passage']}  ({times})")
        print()
    print(attention.receipt, end="\n\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("gpt2", "lstm"), default="gpt2")
    parser.add_argument("--carry-state", action="store_true", help="the LSTM's state goes on from window to window")
    parser.add_argument("--text", type=Path, metavar="FILE", help="a text of your own, one passage a line")
    parser.add_argument("--passages", type=int, metavar="N", help="how many of its first passages to train on")
    parser.add_argument("--epochs", type=int, metavar="N")
    parser.add_argument("--layers", nargs="+", default=["*head"], metavar="NAME", help="layers to record (the head)")
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="what to continue; may be given several times"
    )
    parser.add_argument("--full", action="store_true", help="a larger model on the whole text")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to record (a folder that goes with the run)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
