"""The command line: ``dualhook demo``, ``info``, ``verify``, ``attend``, ``compact``."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from tqdm import tqdm

import dualhook
from dualhook.errors import DualHookError
from dualhook.given import build, fill, read_inputs, warn_of
from dualhook.memory import DualMemory
from dualhook.query.collectors import CRITERIA
from dualhook.store import SEGMENT_BYTES, Damage, Layout, Manifest, inspected, located
from dualhook.table import Table

__all__ = ["main"]

EPILOGS = {
    "demo": "example:\n  dualhook demo --out dualhook-demo",
    "info": "example:\n  dualhook info runs/fmnist",
    "verify": "examples:\n  dualhook verify runs/fmnist --tolerance 1e-6\n  dualhook verify runs/fmnist --deep",
    "compact": """\
Without --dtype and --min-share nothing is lost. Until it is done it takes the disk
space of both; interrupted at any moment, the memory is as it was.

examples:
  dualhook compact runs/fmnist
  dualhook compact runs/fmnist --dtype float16 --min-share 1e-5""",
    "attend": """\
The model's recorded layers get the weights that the memory holds after the last
step, everything else those of --weights. Modules in the current directory are
found.

examples:
  dualhook attend runs/fmnist --model train:build_model --inputs images.npy
  dualhook attend runs/fmnist --model train:build_model --inputs images.npy \\
      --by abs_weight --top 5 --layers fc1 fc2 --sum-by label --json""",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 (a check failed), 2 (it could not be done)."""
    try:
        options = _parser().parse_args(argv)
        status: int = options.run(options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader has seen enough (| head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (DualHookError, OSError) as error:
        print(f"dualhook: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dualhook: interrupted", file=sys.stderr)
        return 130


# ---- commands ------------------------------------------------------------------------------------------------


def _help(options: argparse.Namespace) -> int:
    options.parser.print_help(sys.stderr)
    return 2


def _demo(options: argparse.Namespace) -> int:
    from dualhook.demo import run_demo

    summary = run_demo(options.out, epochs=options.epochs, seed=options.seed)
    print(summary)
    return 0 if summary.adds_up else 1


def _info(options: argparse.Namespace) -> int:
    memory = dualhook.load(options.path)
    if not options.json:
        print(memory.info())
        return 0
    about = {
        "path": str(memory.path),
        "steps": memory.steps,
        "samples": len(memory.samples),
        "columns": memory.columns,
        "bytes": memory.nbytes,
        "layers": memory.info(),
    }
    _print_json(about)
    return 0


def _verify(options: argparse.Namespace) -> int:
    if options.deep and (damage := _damage(options.path)):
        if options.json:
            _print_json({"path": str(options.path), "passed": False, "damage": list(map(str, damage))})
        else:
            print("\n".join(map(str, damage)))
            print(f"FAILED: {len(damage)} damaged; dualhook.load(path, on_damage='skip') opens the rest")
        return 1
    memory = dualhook.load(options.path)
    with _progress(memory, "rebuilding the weights", memory.layers):
        report = memory.verify()
    passed = report.max_error < options.tolerance  # False for NaN
    if options.json:
        about = {"path": str(memory.path), "step": memory.steps, "tolerance": options.tolerance, "passed": passed}
        _print_json(about | {"max_error": report.max_error, "layers": report})
    else:
        print(report)
        print(f"{'passed: below' if passed else 'FAILED: not below'} the tolerance {options.tolerance:g}")
    return 0 if passed else 1


def _damage(path: str) -> Sequence[Damage]:
    """What is wrong with the files of a memory, every bit looked at."""
    layout = Layout(located(path))
    manifest = Manifest.read(layout)
    total = sum(file.stat().st_size for file in layout.root.glob("**/*.safetensors"))
    with tqdm(total=total, desc="reading", unit="B", unit_scale=True, leave=False, disable=None) as bar:
        found = inspected(layout, manifest, deep=True, on_file=bar.update)
    if found.without_checksums:
        print(
            f"dualhook: warning: {found.without_checksums} files hold no checksums: an earlier version wrote them",
            file=sys.stderr,
        )
    return found.damage


def _attend(options: argparse.Namespace) -> int:
    memory = dualhook.load(options.path)
    model = build(options.model)
    left = fill(model, memory, options.weights)
    inputs = read_inputs(options.inputs, model)
    try:
        attention = memory.attend(
            model, inputs, target=options.target, layers=options.layers, method=options.method, cache=options.cache
        )
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError) as error:
        raise DualHookError(f"{options.model} cannot be run on {options.inputs}: {error}") from error
    warn_of(left)
    with _progress(memory, "top patterns", attention.layers):
        answers = {"top": attention.top(options.top, by=options.by, largest=not options.smallest)}
    if options.sum_by:
        with _progress(memory, f"totals by {options.sum_by}", attention.layers):
            answers["totals"] = attention.sum_by(options.sum_by)
    answers["receipt"] = attention.receipt
    if options.json:
        _print_json({"path": str(memory.path), "step": memory.steps, "queries": len(attention)} | answers)
    else:
        print("\n\n".join(table.to_text() for table in answers.values()))
    return 0


def _compact(options: argparse.Namespace) -> int:
    path = Path(options.path)
    bytes_before, segments_before, _ = _size(path)
    with tqdm(total=bytes_before, desc="reading", unit="B", unit_scale=True, leave=False, disable=None) as bar:
        dualhook.compact(
            path,
            dtype=options.dtype and getattr(torch, options.dtype),
            min_share=options.min_share,
            segment_bytes=options.segment_bytes,
            on_bytes=bar.update,
        )
    size, segments, dropped = _size(path)
    if options.json:
        about = {"bytes_before": bytes_before, "segments_before": segments_before, "bytes": size, "segments": segments}
        _print_json({"path": str(options.path)} | about | {"dropped": dropped})
        return 0
    print(
        f"{segments_before:,} segments of {bytes_before / 1e6:,.1f} MB in all are now {segments:,} "
        f"of {size / 1e6:,.1f} MB"
    )
    if dropped:
        print("rows dropped, now and before: " + ", ".join(f"{count:,} of {layer}" for layer, count in dropped.items()))
    return 0


def _size(path: Path) -> tuple[int, int, dict[str, int]]:
    """Bytes and number of the segments of a memory, and the rows that compacting has dropped by layer."""
    manifest = Manifest.read(Layout(path))
    files = Layout(path, manifest.generation).segments()
    return sum(file.stat().st_size for file in files), len(files), dict(manifest.dropped)


@contextmanager
def _progress(memory: DualMemory, what: str, layers: Sequence[str]) -> Iterator[None]:
    """A progress bar over the patterns of one pass; on a terminal only. Replays have a bar of their own."""
    if any("replay" in cost for cost in memory.info()["cost"]):
        yield
        return
    total = sum(memory.patterns(layer) for layer in layers)
    with tqdm(total=total, desc=what, unit=" patterns", unit_scale=True, leave=False, disable=None) as bar:
        memory.on_progress(bar.update)
        try:
            yield
        finally:
            memory.on_progress(None)


# ---- output --------------------------------------------------------------------------------------------------


def _print_json(value: Any) -> None:
    print(json.dumps(_plain(value), allow_nan=False))


def _plain(value: Any) -> Any:
    """Tables as lists of row objects; NaN and infinity, which JSON does not have, as null."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, (Table, list)):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


# ---- arguments -----------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Reports a wrong argument like every other error: in one line."""

    def error(self, message: str) -> NoReturn:
        raise DualHookError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="dualhook",
        description="Which training patterns does a prediction attend to? Ask the memory of a recorded training run.",
        epilog="Start with: dualhook demo",
    )
    parser.add_argument("--version", action="version", version=f"dualhook {dualhook.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    parser.set_defaults(run=_help, parser=parser)

    _demo_arguments(_command(commands, _demo, "train a small network, record it, draw what two predictions attend to"))
    _command(commands, _info, "what a memory holds: layers, patterns, steps, columns", memory=True)
    verify = _command(commands, _verify, "rebuild the trained weights from the memory and compare", memory=True)
    verify.add_argument(
        "--tolerance",
        type=float,
        default=1e-5,
        metavar="X",
        help="exit with status 1 unless every layer's relative error is below it (default: %(default)g)",
    )
    verify.add_argument(
        "--deep", action="store_true", help="first compare every file with its checksums, and name those that differ"
    )
    _compact_arguments(_command(commands, _compact, "write a memory in fewer and smaller files", memory=True))
    _attend_arguments(_command(commands, _attend, "which training patterns a model's outputs attend to", memory=True))
    return parser


def _command(
    commands: argparse._SubParsersAction[_Parser],
    run: Callable[[argparse.Namespace], int],
    summary: str,
    *,
    memory: bool = False,
) -> _Parser:
    name = run.__name__.removeprefix("_")
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=EPILOGS[name],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    if memory:
        parser.add_argument("path", metavar="PATH", help="the path that was given to dualhook.instrument, or a URL")
        parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    return parser


def _demo_arguments(parser: _Parser) -> None:
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("dualhook-demo"),
        metavar="DIR",
        help="folder for memory and picture; an earlier demo in it is replaced (default: %(default)s)",
    )
    parser.add_argument(
        "--epochs",
        type=int,
        default=15,
        metavar="N",
        help="passes over 5,000 images, 80 MB of memory each (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and order (default: %(default)s)")


def _compact_arguments(parser: _Parser) -> None:
    parser.add_argument(
        "--dtype",
        choices=("float64", "float32", "bfloat16", "float16"),
        metavar="DTYPE",
        help="dtype of the rows, float16 with a scale per row (default: as they are); receipts tell what it loses",
    )
    parser.add_argument(
        "--min-share",
        type=float,
        default=0.0,
        metavar="X",
        help="drop rows whose norm is below this share of all in their step; receipts say what the rest explains, "
        "tables how many are gone (default: none)",
    )
    parser.add_argument(
        "--segment-bytes",
        type=int,
        default=SEGMENT_BYTES,
        metavar="N",
        help="what a segment may grow to (default: %(default)s)",
    )


def _attend_arguments(parser: _Parser) -> None:
    parser.add_argument(
        "--model", required=True, metavar="MODULE:CALLABLE", help="builds the model when called without arguments"
    )
    parser.add_argument(
        "--inputs",
        required=True,
        type=Path,
        metavar="FILE",
        help="what the model is asked: .npy (one array, queries first) or .safetensors (tensors by argument name)",
    )
    parser.add_argument(
        "--weights",
        type=Path,
        metavar="FILE.safetensors",
        help="parameters that the memory does not hold: embeddings, norms, layers that were not recorded",
    )
    parser.add_argument(
        "--target", type=int, metavar="N", help="the class whose logit counts (default: the predicted one)"
    )
    parser.add_argument("--top", type=int, default=10, metavar="K", help="patterns per query and layer (default: 10)")
    parser.add_argument(
        "--by",
        choices=CRITERIA,
        default="contribution",
        metavar="CRITERION",
        help=f"what ranks the patterns: {', '.join(CRITERIA)} (default: %(default)s)",
    )
    parser.add_argument("--smallest", action="store_true", help="the smallest by that instead of the largest")
    parser.add_argument("--layers", nargs="+", metavar="LAYER", help="ask these layers only (default: all)")
    parser.add_argument(
        "--method",
        choices=("exact", "preview"),
        default="exact",
        help="preview: without the replay that Adam and its like need; most of the same patterns, rough sums "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--cache", action="store_true", help="keep what a replay finds beside the memory, for the same question again"
    )
    parser.add_argument("--sum-by", metavar="COLUMN", help="add totals per value of a column, such as step or sample")
