"""Record the training of a small language model, then read which training passages its next words come from.

    python examples/language_model.py                              # a GPT-2 in the Trainer, 75 MB of patterns
    python examples/language_model.py --model lstm                 # an LSTM in a plain loop, 200 MB
    python examples/language_model.py --model lstm --carry-state   # its state goes on from window to window
    python examples/language_model.py --text FILE --prompt "Once upon"    # a text of your own, one passage a line
    python examples/language_model.py --full                       # larger and on all of the text, some gigabytes
    python examples/language_model.py --out runs/lm                # kept, with what `dualhook report` asks it with

By default it takes less than a minute and trains on the first verses of the King James text that ships with dualhook.
What dualhook needs is marked with ``# (1)`` to ``# (3)``; the rest is ordinary training.
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
from datasets import Dataset
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

PROMPTS = ("And God said, Let", "And all the days of", "In the beginning God created the")

Rows = list[dict[str, list[int]]]  # token ids, and of every token the number of its passage


@dataclass(frozen=True)
class Size:
    """How much to train: sequences of ``context`` tokens, ``batch`` of them a step, at learning rate ``rate``."""

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
    "gpt2 full": Size(passages=3637, vocabulary=2048, depth=4, width=256, context=128, batch=16, epochs=4, rate=1e-3),
    "lstm": Size(passages=300, vocabulary=1024, depth=1, width=256, context=64, batch=4, epochs=4, rate=2.0),
    "lstm full": Size(passages=3637, vocabulary=2048, depth=1, width=1024, context=32, batch=64, epochs=4, rate=2.0),
}


def main() -> None:
    options = arguments()
    logging.set_verbosity_error()
    torch.manual_seed(0)
    size = SIZES[f"{options.model} full" if options.full else options.model]
    size = replace(size, passages=options.passages or size.passages, epochs=options.epochs or size.epochs)
    references, passages = read_passages(options.text, size.passages)
    tokenizer = train_tokenizer(passages, size.vocabulary)
    tokens = [tokenizer(passage + tokenizer.eos_token)["input_ids"] for passage in passages]
    print(f"text: {len(passages):,} passages, {sum(map(len, tokens)):,} tokens, a vocabulary of {len(tokenizer):,}")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        out = options.out or Path(temporary)
        if options.model == "gpt2":
            rows = rows_of_passages(tokens, size)
            model, memory = train_gpt2(rows, tokenizer, size, out, options.layers)
        else:
            rows = rows_of_windows(tokens, size)
            model, memory = train_lstm(rows, len(tokenizer), size, out, options.layers, options.carry_state)
        patterns = sum(memory.patterns(layer) for layer in memory.layers)
        place = memory.path if options.out else "a temporary folder (--out DIR keeps it)"
        print(
            f"recorded: {patterns:,} patterns of {', '.join(memory.layers)}, {memory.nbytes / 1e6:.0f} MB in {place}\n"
        )
        print(memory.verify(), end="\n\n")

        prompts = options.prompt or (PROMPTS if options.text is None else [" ".join(passages[0].split()[:3])])
        show(model, memory, tokenizer, rows, references, prompts)
        if options.model == "gpt2":
            written = explain(
                model, tokenizer, memory, prompts[0], max_new_tokens=4, k=2, passages=Passages(rows, tokenizer, width=8)
            )
            print("", "The same of every token that the model writes:", written, sep="\n")
            if options.out:
                keep(model, tokenizer, rows, out)


def keep(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, rows: Rows, out: Path) -> None:
    """What the command line asks with: the model with its tokenizer, and the tokens that it was trained on."""
    model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    Dataset.from_list(rows).save_to_disk(out / "tokens")
    print(
        f"\nFrom a shell: dualhook report {out / 'memory'} --model {out / 'model'} --tokenizer {out / 'model'} "
        f'--text "And God said" --passages {out / "tokens"} -o report.html'
    )


# ---- text ------------------------------------------------------------------------------------------------------------


def read_passages(path: Path | None, count: int) -> tuple[Sequence[str], Sequence[str]]:
    """Where the first passages of a text stand in it, and the passages."""
    if path is None:
        text = load_king_james_subset()
        return text.references[:count], text.verses[:count]
    lines = [(f"line {number}", line.strip()) for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)]
    found = [(reference, line) for reference, line in lines if line][:count]
    if not found:
        raise SystemExit(f"{path} has no text: expected one passage a line")
    return [reference for reference, _ in found], [line for _, line in found]


def train_tokenizer(passages: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE; passages end with a line end."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<pad>", "\n"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bpe.train_from_iterator(passages, trainer)
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="\n", model_input_names=names)


def rows_of_passages(tokens: list[list[int]], size: Size) -> Rows:
    """A passage a row; what goes beyond the context is cut off."""
    cut = [passage[: size.context] for passage in tokens]
    return [{"input_ids": passage, "passage": [number] * len(passage)} for number, passage in enumerate(cut)]


def rows_of_windows(tokens: list[list[int]], size: Size) -> Rows:
    """The running text in windows of the same length, each with the tokens that come next."""
    stream = [(token, number) for number, passage in enumerate(tokens) for token in passage]
    ids, numbers = zip(*stream, strict=True)
    windows = (len(stream) - 1) // (size.batch * size.context) * size.batch  # as many for each sequence of a batch
    if not windows:
        raise SystemExit(
            f"the text has {len(stream)} tokens: expected more than {size.batch * size.context}, {size.batch} windows "
            f"of {size.context}"
        )
    cuts = [slice(first, first + size.context) for first in range(0, windows * size.context, size.context)]
    return [
        {"input_ids": list(ids[cut]), "labels": list(ids[cut.start + 1 : cut.stop + 1]), "passage": list(numbers[cut])}
        for cut in cuts
    ]


# ---- a GPT-2 in the Trainer ------------------------------------------------------------------------------------------


def train_gpt2(
    rows: Rows, tokenizer: PreTrainedTokenizerFast, size: Size, out: Path, layers: list[str] | None
) -> tuple[nn.Module, dualhook.DualMemory]:
    """Train under AdamW, the Trainer's default; questions run it again over the recorded rows."""
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=size.context, n_embd=size.width, n_layer=size.depth, n_head=4,
        bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        initializer_range=0.8 * size.width**-0.5,  # a model as narrow as this learns slowly from GPT-2's own 0.02
        tie_word_embeddings=False,  # the head's weight is made of its own patterns then, not of the embedding's too
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    settings = TrainingArguments(
        str(out / "trainer"), num_train_epochs=size.epochs, per_device_train_batch_size=size.batch,
        learning_rate=size.rate, logging_strategy="epoch", save_strategy="no", report_to="none", disable_tqdm=True,
        warmup_steps=50,  # else AdamW's first steps would be its largest, and the first verses lead all lists
        dataloader_pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
    layers = layers or [f"transformer.h.{size.depth - 1}.mlp.c_proj"]  # the head's rows are wide as the vocabulary
    callback = DualMemoryCallback(out / "memory", layers=layers, overwrite=True)  # (1) that is all
    trainer = Trainer(
        model, settings, train_dataset=rows, data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        callbacks=[callback, Report()],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)  # Report prints instead
    trainer.train()
    return model.cpu(), callback.memory


class Report(TrainerCallback):
    """Prints a line per epoch; what dualhook has recorded by then stands in the Trainer's logs."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Print what the Trainer logs at the end of an epoch."""
        if logs and "loss" in logs:
            report(state.epoch, logs["loss"], logs["dualhook_rows"], logs["dualhook_bytes"])


def report(epoch: float, loss: float, patterns: int, nbytes: int) -> None:
    print(f"epoch {epoch:.0f}: loss {loss:.3f}, {patterns:,} patterns, {nbytes / 1e6:.0f} MB", flush=True)


# ---- an LSTM in a plain loop -----------------------------------------------------------------------------------------


class LSTM(nn.Module):
    """The language model of Irie et al. 2022: one LSTM layer between embedding and head."""

    def __init__(self, vocabulary: int, width: int, depth: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 64)
        self.lstm = nn.LSTM(64, width, depth, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, input_ids: Tensor, attention_mask: Any = None, state: Any = None) -> tuple[Tensor, Any]:
        """Logits [b, position, token] and the state after them; padding is on the right, where it changes nothing."""
        hidden, state = self.lstm(self.embedding(input_ids), state)
        return self.head(hidden), state


def train_lstm(
    rows: Rows, vocabulary: int, size: Size, out: Path, layers: list[str] | None, carry_state: bool
) -> tuple[nn.Module, dualhook.DualMemory]:
    """Train under SGD with truncated backpropagation: every sequence of a batch reads its own part of the text."""
    shape = (size.batch, -1, size.context)  # sequence, window, position
    inputs = torch.tensor([row["input_ids"] for row in rows]).view(shape)
    targets = torch.tensor([row["labels"] for row in rows]).view(shape)
    numbers = torch.arange(len(rows)).view(size.batch, -1)
    model = LSTM(vocabulary, size.width, size.depth)
    optimizer = torch.optim.SGD(model.parameters(), lr=size.rate, momentum=0.9)

    recorder = dualhook.instrument(model, out / "memory", layers=layers or "head", overwrite=True)  # (1) one line
    for epoch in range(size.epochs):
        losses, state = [], None
        for window in range(inputs.shape[1]):
            recorder.batch(samples=numbers[:, window])  # (2) so that every pattern knows its row
            logits, after = model(inputs[:, window], state=state)
            loss = F.cross_entropy(logits.flatten(0, 1), targets[:, window].flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            state = tuple(part.detach() for part in after) if carry_state else None
        report(epoch + 1, sum(losses) / len(losses), recorder.rows, recorder.nbytes)
    return model, recorder.close()  # (3)


# ---- questions -------------------------------------------------------------------------------------------------------


def show(
    model: nn.Module,
    memory: dualhook.DualMemory,
    tokenizer: PreTrainedTokenizerFast,
    rows: Rows,
    references: Sequence[str],
    prompts: Sequence[str],
) -> None:
    """Print what the model expects after each prompt, and which passages put most into that, for it or against it."""
    attention = memory.attend(model, **tokenizer(list(prompts), padding=True, return_tensors="pt"), positions=-1)
    passages = Passages(rows, tokenizer, width=8)
    supporting, opposing = passages.top(attention, 5), passages.top(attention, 2, largest=False)
    print("The next token, and what training passages put into its logit (the token «read» by the layer is marked):\n")
    for query, prompt in zip(attention.queries, prompts, strict=True):
        token = tokenizer.decode([query["target"]]).replace("\n", "⏎")
        print(f"{prompt} ▸{token}    probability {query['probability']:.0%}, logit {query['score']:.2f}")
        found = [*supporting.where(query=query["query"]), *reversed([*opposing.where(query=query["query"])])]
        for row in found:
            reference = references[rows[row["sample"]]["passage"][row["position"]]]
            where = f"{reference}, {row['repeats']} patterns" + (f", {row['places']} places" * (row["places"] > 1))
            print(f"  {row['contribution']:+7.3f}  {row['passage']}  ({where})")
        print()
    receipt = attention.receipt
    explained, cancellation = receipt["explained"], receipt["cancellation"]
    print(
        f"receipt: explained at least {explained.min():.6f}, "
        f"cancellation {cancellation.min():.3g} to {cancellation.max():.3g}"
    )
    assert explained.min() > 0.999


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("gpt2", "lstm"), default="gpt2")
    parser.add_argument("--carry-state", action="store_true", help="the LSTM's state goes on from window to window")
    parser.add_argument("--full", action="store_true", help="a larger model on the whole text")
    parser.add_argument("--text", type=Path, metavar="FILE", help="a text of your own, one passage a line")
    parser.add_argument("--passages", type=int, metavar="N", help="train on the first ones only")
    parser.add_argument("--epochs", type=int, metavar="N")
    parser.add_argument(
        "--layers", nargs="+", metavar="NAME", help="what to record (the last layer before the head, the LSTM's head)"
    )
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="what to continue; may be given again")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to record (a folder that goes with the run)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
