"""The paper's look at language models: what the next token attends to in training, in an LSTM and a GPT-2.

    python examples/paper/language.py                       # small: minutes on two cores
    python examples/paper/language.py --full --seeds 3      # LSTM: 1,024 units, clipping at 1.0, batches of 64
    python examples/paper/language.py --text FILE           # a text of your own, one passage a line

Models, text and training loops are those of examples/language_model.py. The last passages of the text are kept out of
training; each gives one query, the token that comes next somewhere in it. Tables (CSV and Markdown, mean ± deviation
over seeds) and pictures go to one folder; a seed that is done is not run again.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dualhook.integrations.transformers import Passages

import dualhook
from dualhook.statistics import DEFINITIONS, agreement, votes

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where the loops are

from figures import MaxNLocator, plt, save
from language_model import (
    PROMPTS,
    SIZES,
    Rows,
    Size,
    logging,
    read_passages,
    rows_of_passages,
    rows_of_windows,
    train_gpt2,
    train_lstm,
    train_tokenizer,
)
from questions import receipts
from seeds import averaged, is_done, many, mark_done
from tables import write_csv

MODELS = ("lstm", "gpt2")
TITLES = {
    "accuracy": "Next tokens of passages kept out of training",
    "power": "Predictive power: how often the token with the largest total is the true next one, and the model's",
    "receipt": "Receipts",
    "rebuilt": "Relative error of the weights rebuilt from the memory",
}
KEYS = {
    "accuracy": ("queries",),
    "power": ("layer", "by", "predictions"),
    "receipt": ("layer",),
    "rebuilt": ("layer",),
}
STRONGEST = 500  # patterns of a picture
TOKENS = 8  # bars of a picture


@dataclass(frozen=True)
class Text:
    """What is trained on, a row per sequence; beginnings of other passages and their next tokens; prompts to show."""

    tokenizer: Any
    rows: Rows
    prompts: list[list[int]]
    targets: list[int]
    shown: list[str]


def main() -> None:
    options = arguments()
    logging.set_verbosity_error()
    for name in options.models:
        size = SIZES[f"{name} full" if options.full else name]
        size = replace(size, passages=options.passages or size.passages, epochs=options.epochs or size.epochs)
        text = prepared(name, options.text, size, options.queries)
        for seed in range(options.seeds):
            run_seed(name, text, size, seed, options)
        summarise(name, size, options.out / name, options.seeds)
    paths = [options.out / name / "tables.md" for name in MODELS]
    found = [path.read_text("utf-8") for path in paths if path.is_file()]
    (options.out / "TABLES.md").write_text("\n".join(found), "utf-8")
    print(f"tables and pictures: {options.out}, the tables together in {options.out / 'TABLES.md'}")


def prepared(name: str, path: Path | None, size: Size, queries: int) -> Text:
    """The first passages to train on but for the last ``queries`` of them, which give the queries."""
    _, passages = read_passages(path, size.passages)
    count = min(queries, len(passages) // 5)
    tokenizer = train_tokenizer(passages[:-count], size.vocabulary)
    tokens = [tokenizer(passage + tokenizer.eos_token)["input_ids"] for passage in passages]
    rows = (rows_of_passages if name == "gpt2" else rows_of_windows)(tokens[:-count], size)
    drawn = torch.Generator().manual_seed(0)
    prompts, targets = [], []
    for passage in tokens[-count:]:
        end = int(torch.randint(1, min(len(passage), size.context), (), generator=drawn))
        prompts.append(passage[:end])
        targets.append(passage[end])
    shown = list(PROMPTS) if path is None else [tokenizer.decode(prompt) for prompt in prompts[:3]]
    return Text(tokenizer, rows, prompts, targets, shown)


def run_seed(name: str, text: Text, size: Size, seed: int, options: argparse.Namespace) -> None:
    """Train, ask, write and draw, unless this was done before.

    Raises:
        SystemExit: the folder is of a run with other settings.
    """
    folder = options.out / name / f"seed-{seed}"
    settings = asdict(size) | {"queries": len(text.prompts), "text": str(options.text)}
    if is_done(folder, settings, f"{name}, seed {seed}"):
        return
    torch.manual_seed(seed)
    if name == "gpt2":
        model, memory = train_gpt2(text.rows, text.tokenizer, size, folder / "run", None)
    else:
        model, memory = train_lstm(text.rows, len(text.tokenizer), size, folder / "run", None, carry_state=False)
    memory.verbose = False
    model.eval()
    tables = statistics(model, memory, text) | looked_at(model, memory, text, folder)
    for table, rows in tables.items():
        write_csv(folder / f"{table}.csv", rows)
    if not options.keep:
        shutil.rmtree(folder / "run")
    mark_done(folder, settings)
    print(f"{name}, seed {seed}: done", flush=True)


# ---- questions -------------------------------------------------------------------------------------------------------


def statistics(model: torch.nn.Module, memory: dualhook.DualMemory, text: Text) -> dict[str, list[dict[str, Any]]]:
    """The paper's statistics with the next token of every training pattern for its class."""
    padded = text.tokenizer.pad({"input_ids": text.prompts}, padding_side="right", return_tensors="pt")
    attention = memory.attend(model, **padded, positions=-1)
    outputs = attention.queries["target"]
    totals = by_next_token(attention, text.rows)
    power = agreement([votes(totals, "token", by) for by in DEFINITIONS], "token", text.targets, outputs)
    return {
        "accuracy": [{"queries": len(outputs), "accuracy": float((outputs == np.array(text.targets)).mean())}],
        "power": [*power],
        "receipt": receipts(attention),
        "rebuilt": [{"layer": row["layer"], "error": row["error"]} for row in memory.verify()],
    }


def by_next_token(attention: dualhook.Attention, rows: Rows) -> dualhook.Table:
    """Totals per token that a training pattern was to predict; patterns at the end of a sequence have none."""
    totals = attention.sum_by(("sample", "position"))
    token = next_tokens(rows)[totals["sample"], totals["position"]]
    layers, layer = np.unique(totals["layer"].astype(str), return_inverse=True)
    groups, place = np.unique(np.stack([totals["query"], layer, token])[:, token >= 0], axis=1, return_inverse=True)
    sums = {d: np.bincount(place.ravel(), totals[d][token >= 0]) for d in DEFINITIONS}
    return dualhook.Table({"query": groups[0], "layer": layers[groups[1]], "token": groups[2]} | sums)


def next_tokens(rows: Rows) -> np.ndarray:
    """The token after each [row, position]; -1: none."""
    following = [row["labels"] if "labels" in row else row["input_ids"][1:] for row in rows]
    found = np.full((len(rows), max(len(row["input_ids"]) for row in rows)), -1)
    for line, tokens in zip(found, following, strict=True):
        line[: len(tokens)] = tokens
    return found


def looked_at(
    model: torch.nn.Module, memory: dualhook.DualMemory, text: Text, folder: Path
) -> dict[str, list[dict[str, Any]]]:
    """Some prompts one by one: what they are continued with, from which passages, and pictures of it."""
    tokenizer = text.tokenizer
    attention = memory.attend(model, **tokenizer(text.shown, padding=True, return_tensors="pt"), positions=-1)
    passages = Passages(text.rows, tokenizer, width=8)
    totals, strongest = by_next_token(attention, text.rows), attention.top(STRONGEST, by="abs_weight")
    queries = [
        {"query": q["query"], "prompt": prompt, "next": spelt(tokenizer, q["target"]), "logit": q["score"],
         "probability": q["probability"]}
        for q, prompt in zip(attention.queries, text.shown, strict=True)
    ]  # fmt: skip
    for query, asked in zip(queries, attention.queries, strict=True):
        draw(query, asked["target"], attention.layers, totals, strongest, text, folder)
    return {
        "queries": queries,
        "supporting": [*passages.top(attention, 5)],
        "opposing": [*passages.top(attention, 5, largest=False)],
        "parts": [*attention.parts],
        "receipts": [*attention.receipt],
    }


def spelt(tokenizer: Any, token: int) -> str:
    return tokenizer.decode([token]).replace("\n", "⏎").replace(" ", "␣")


# ---- pictures --------------------------------------------------------------------------------------------------------


def draw(
    query: dict[str, Any], target: int, layers: Sequence[str], totals: dualhook.Table, strongest: dualhook.Table,
    text: Text, folder: Path,
) -> None:  # fmt: skip
    """The strongest patterns by their step, and the totals of the tokens that lead, a line per layer."""
    following = next_tokens(text.rows)
    figure, axes = plt.subplots(
        len(layers), 3, figsize=(13, 3.6 * len(layers) + 0.6), squeeze=False, layout="constrained",
        gridspec_kw={"width_ratios": [2, 1, 1]},
    )  # fmt: skip
    for (scatter, *bars), layer in zip(axes, layers, strict=True):
        own = strongest.where(query=query["query"], layer=layer)
        same = following[own["sample"], own["position"]] == target
        kinds = ((~same, "#a9bcd6", "another token came next"), (same, "#c8553d", "the same token"))
        for among, colour, label in kinds:
            steps, weights = own["step"][among], np.abs(own["weight"][among])
            scatter.scatter(steps, weights, s=9, color=colour, linewidths=0, label=label)
        scatter.set(xlabel="training step", ylabel="|key · query|", title=f"{layer}: the {len(own)} strongest patterns")
        scatter.xaxis.set_major_locator(MaxNLocator(integer=True))
        scatter.legend(fontsize=8, loc="upper left")
        by_token = totals.where(query=query["query"], layer=layer)
        drawn = (("abs_weight", "Σ|key · query|"), ("contribution", "contribution / logit"))
        for ax, (by, label) in zip(bars, drawn, strict=True):
            order = np.argsort(-np.abs(by_token[by]))[:TOKENS]
            tokens = by_token["token"][order]
            colours = ["#1f3b63" if token == target else "#a9bcd6" for token in tokens]
            ax.barh(range(len(order)), by_token[by][order], color=colours)
            ax.set_yticks(range(len(order)), [spelt(text.tokenizer, token) for token in tokens], fontsize=8)
            ax.invert_yaxis()
            ax.axvline(0, color="#444444", linewidth=0.8)
            ax.set(xlabel=label, title="totals by next token")
    figure.suptitle(f"{query['prompt']} ▸{query['next']}   ({query['probability']:.0%})", fontsize=11)
    save(figure, folder / f"prompt-{query['query']}.png")


def summarise(name: str, size: Size, folder: Path, seeds: int) -> None:
    """Mean and deviation over the seeds, each table as CSV, all as Markdown."""
    what = f"{size.passages} passages, width {size.width}, {size.epochs} epochs"
    heading = f"## {name}\n\n{what}, batches of {size.batch} x {size.context} tokens; {many(seeds)}\n\n"
    (folder / "tables.md").write_text(heading + averaged(folder, seeds, TITLES, KEYS)[1], "utf-8")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="larger models on the whole text")
    parser.add_argument("--seeds", type=int, default=2, metavar="N")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, metavar="NAME", help="lstm, gpt2")
    parser.add_argument("--text", type=Path, metavar="FILE", help="a text of your own, one passage a line")
    parser.add_argument("--passages", type=int, metavar="N", help="take the first ones only")
    parser.add_argument("--epochs", type=int, metavar="N")
    parser.add_argument("--queries", type=int, default=50, metavar="N", help="passages kept for queries (50)")
    parser.add_argument("--out", type=Path, default=Path("runs/paper-language"), metavar="DIR")
    parser.add_argument("--keep", action="store_true", help="keep the memories")
    return parser.parse_args()


if __name__ == "__main__":
    main()
