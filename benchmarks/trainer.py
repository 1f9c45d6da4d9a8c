"""What the callback costs in a Hugging Face Trainer: the ratio of recorded to bare steps, and the bytes per token.

A GPT-2-style model (4 blocks, 256 wide, 8 × 128 tokens a step, AdamW) is trained in turns: without the callback, with
the head recorded, and with all layers. The first steps do not count: buffers grow, more is checked than later, and the
optimiser's state is kept more often. That the last rows are on disk does. A layer's rows grow with its width and its
arithmetic with the square of it: 256 is narrow, 768 is GPT-2 small's; `--width 768 --blocks 12 --words 50257` is it.

    python benchmarks/trainer.py [--rounds 3] [--warm 24] [--steps 40] [--width 256] [--blocks 4] [--words 2000]
        [--batch 8] [--length 128] [--threads N] [--only "head" "all layers"]
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from dualhook.integrations.transformers import DualMemoryCallback
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments
from turns import in_turns, spread

WAYS = {
    "head": {"layers": "lm_head"},
    "head, whole": {"layers": "lm_head", "head_grads": "dense"},
    "head, bfloat16": {"layers": "lm_head", "dtype": torch.bfloat16},
    "attention and MLP": {"layers": "transformer.h"},
    "all layers": {"layers": "all"},
    "all layers, bfloat16": {"layers": "all", "dtype": torch.bfloat16},
}


@dataclass(frozen=True)
class Size:
    """How large the model is, and a step."""

    width: int = 256
    blocks: int = 4
    words: int = 2000
    batch: int = 8
    length: int = 128

    def model(self) -> GPT2LMHeadModel:
        """The model, untrained."""
        heads = self.width // 64
        shape = {"n_positions": self.length, "n_embd": self.width, "n_layer": self.blocks, "n_head": heads}
        return GPT2LMHeadModel(GPT2Config(vocab_size=self.words, **shape))

    def tokens(self, rows: int) -> torch.Tensor:
        """Random ones [rows, length]."""
        return torch.randint(0, self.words, (rows, self.length))


class Text(Dataset[dict[str, torch.Tensor]]):
    """Rows of tokens."""

    def __init__(self, ids: torch.Tensor) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


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
    folder: Path, warm: int, steps: int, size: Size, settings: dict | None, found: dict[str, float], name: str
) -> float:
    """Seconds of ``steps`` of a training, behind its first ones; ``found`` gets the bytes that a token takes."""
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(0)
    model = size.model()
    recording = []
    if settings is not None:
        recording = [DualMemoryCallback(folder / "memory", verbose=False, **settings)]
    clock = Clock(recording, warm)
    options = TrainingArguments(
        str(folder), max_steps=warm + steps, per_device_train_batch_size=size.batch,
        use_cpu=not torch.cuda.is_available(), report_to=[], disable_tqdm=True, save_strategy="no",
        logging_strategy="no",
    )  # fmt: skip
    text = Text(size.tokens(size.batch * (warm + steps)))
    trainer = Trainer(model, options, train_dataset=text, callbacks=[*recording, clock])
    trainer.log = lambda *args, **kwargs: None  # its last line
    trainer.train()
    for callback in recording:
        found[name] = callback.memory.nbytes / text.ids.numel()
    return clock.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm", type=int, default=24, help="first steps, which do not count")
    parser.add_argument("--steps", type=int, default=40, help="those that do")
    sizes = parser.add_argument_group("sizes")
    sizes.add_argument("--width", type=int, default=256, help="a multiple of 64")
    for name, what in (
        ("blocks", "of the model"),
        ("words", "of its vocabulary"),
        ("batch", "rows"),
        ("length", "of one"),
    ):
        sizes.add_argument(f"--{name}", type=int, default=getattr(Size, name), help=what)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help=", ".join(WAYS))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore", FutureWarning)
    size = Size(options.width, options.blocks, options.words, options.batch, options.length)
    bytes_of: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        run, shape = Path(folder) / "run", (options.warm, options.steps, size)
        ways: dict[str, Callable[[], float]] = {"bare": partial(block, run, *shape, None, bytes_of, "")}
        ways |= {name: partial(block, run, *shape, WAYS[name], bytes_of, name) for name in options.only}
        seconds = in_turns(ways, options.rounds, warm=False)  # each has its own first steps
    base = seconds["bare"]
    each = 1000 / options.steps
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{options.threads} threads"
    print(f"{device}, torch {torch.__version__}; {options.rounds} rounds of {options.steps} steps after {options.warm}")
    print(f"{size.blocks} blocks, {size.width} wide, {size.words} words, {size.batch} × {size.length} tokens a step")
    print(f"{'recorded':24} {'ms/step':>9} {'kB/token':>9}   ratio to bare: median (lowest to highest)")
    for name, own in seconds.items():
        taken = f"{bytes_of[name] / 1000:9.2f}" if name in bytes_of else f"{'':9}"
        print(f"{name:24} {statistics.median(own) * each:9.1f} {taken}   {spread(own, base)}")


if __name__ == "__main__":
    main()
