"""What the callback costs in a Hugging Face Trainer: the ratio of recorded to bare steps, and the bytes per token.

A GPT-2-style model (4 layers, 256 wide, 8 × 128 tokens a step, AdamW) is trained in turns: without the callback, with
the head recorded, and with all layers. The first steps do not count: buffers grow, more is checked than later, and the
optimiser's state is kept more often. That the last rows are on disk does. A layer's rows grow with its width and its
arithmetic with the square of it: 256 is narrow, 768 is GPT-2 small's.

    python benchmarks/trainer.py [--rounds 3] [--warm 24] [--steps 40] [--width 256] [--threads N]
        [--only "head" "all layers"]
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from dualhook.integrations.transformers import DualMemoryCallback
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments
from turns import in_turns, spread

LENGTH, BATCH, WORDS = 128, 8, 2000
WAYS = {
    "head": {"layers": "lm_head"},
    "head, whole": {"layers": "lm_head", "head_grads": "dense"},
    "head, bfloat16": {"layers": "lm_head", "dtype": torch.bfloat16},
    "attention and MLP": {"layers": "transformer.h"},
    "all layers": {"layers": "all"},
    "all layers, bfloat16": {"layers": "all", "dtype": torch.bfloat16},
}


class Text(Dataset[dict[str, torch.Tensor]]):
    """Random tokens."""

    def __init__(self, rows: int) -> None:
        self.ids = torch.randint(0, WORDS, (rows, LENGTH))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def model_of(width: int) -> GPT2LMHeadModel:
    """The model, four layers deep."""
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=WORDS, n_positions=LENGTH, n_embd=width, n_layer=4, n_head=width // 64)
    )


class Clock(TrainerCallback):
    """Seconds from the end of the first steps to the end of the last one, and until everything is on disk."""

    def __init__(self, recording: list[DualMemoryCallback], warm: int) -> None:
        self.recording = recording
        self.warm = warm
        self.begin = self.seconds = 0.0

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.warm:
            self.begin = time.perf_counter()
        if state.global_step == args.max_steps:
            for callback in self.recording:
                callback.recorder.flush()
            self.seconds = time.perf_counter() - self.begin


def block(
    folder: Path, warm: int, steps: int, width: int, settings: dict | None, sizes: dict[str, float], name: str
) -> float:
    """Seconds of ``steps`` of a training, behind its first ones."""
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(0)
    model = model_of(width)
    recording = []
    if settings is not None:
        recording = [DualMemoryCallback(folder / "memory", verbose=False, **settings)]
    clock = Clock(recording, warm)
    options = TrainingArguments(
        str(folder), max_steps=warm + steps, per_device_train_batch_size=BATCH, use_cpu=not torch.cuda.is_available(),
        report_to=[], disable_tqdm=True, save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    trainer = Trainer(model, options, train_dataset=Text(BATCH * (warm + steps)), callbacks=[*recording, clock])
    trainer.log = lambda *args, **kwargs: None  # its last line
    trainer.train()
    for callback in recording:
        sizes[name] = callback.memory.nbytes / ((warm + steps) * BATCH * LENGTH)
    return clock.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm", type=int, default=24, help="first steps, which do not count")
    parser.add_argument("--steps", type=int, default=40, help="those that do")
    parser.add_argument("--width", type=int, default=256, help="a multiple of 64")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help=", ".join(WAYS))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore", FutureWarning)
    sizes: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        run, shape = Path(folder) / "run", (options.warm, options.steps, options.width)
        ways: dict[str, Callable[[], float]] = {"bare": partial(block, run, *shape, None, sizes, "")}
        ways |= {name: partial(block, run, *shape, WAYS[name], sizes, name) for name in options.only}
        seconds = in_turns(ways, options.rounds)
    base = seconds["bare"]
    each = 1000 / options.steps
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{options.threads} threads"
    turns = f"{options.width} wide, {options.rounds} rounds of {options.steps} steps after {options.warm}"
    print(f"{device}, torch {torch.__version__}; {turns}, {BATCH} × {LENGTH} tokens each")
    print(f"{'recorded':24} {'ms/step':>9} {'kB/token':>9}   ratio to bare: median (lowest to highest)")
    for name, own in seconds.items():
        size = f"{sizes[name] / 1000:9.2f}" if name in sizes else f"{'':9}"
        print(f"{name:24} {statistics.median(own) * each:9.1f} {size}   {spread(own, base)}")


if __name__ == "__main__":
    main()
