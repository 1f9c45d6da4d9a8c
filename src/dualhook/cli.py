"""The command line: ``dualhook demo``, ``info``, ``verify``, ``attend``, ``influence``, ``suspects``, …"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import dualhook
from dualhook.arguments import parser
from dualhook.errors import DualHookError
from dualhook.given import (
    build,
    fill,
    is_saved_model,
    read_inputs,
    read_names,
    read_numbers,
    read_passages,
    tokens_of,
    warn_of,
)
from dualhook.memory import DualMemory
from dualhook.store import Damage, Layout, Manifest, inspected, located
from dualhook.table import Table

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 (a check failed), 2 (it could not be done)."""
    try:
        options = parser(COMMANDS).parse_args(argv)
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
    memory, passages = dualhook.load(options.path), _passages(options)
    model, inputs, left = _asked(memory, options)
    with _running(options):
        attention = memory.attend(model, inputs, **_settings(options))
    warn_of(left)
    with _progress(memory, "top patterns", attention.layers):
        answers = {"top": attention.top(options.top, by=options.by, largest=not options.smallest)}
    if passages is not None:
        with _progress(memory, "passages", attention.layers):
            answers["passages"] = passages.top(attention, options.top, by=options.by, largest=not options.smallest)
    if options.sum_by:
        with _progress(memory, f"totals by {options.sum_by}", attention.layers):
            answers["totals"] = attention.sum_by(options.sum_by)
    answers["receipt"] = attention.receipt
    if options.json:
        _print_json({"path": str(memory.path), "step": memory.steps, "queries": len(attention)} | answers)
    else:
        print("\n\n".join(table.to_text() for table in answers.values()))
    return 0


def _influence(options: argparse.Namespace) -> int:
    memory, passages = dualhook.load(options.path), _passages(options)
    if passages is not None and options.per == "sample":
        raise DualHookError("--passages shows the text around tokens: expected --per token, which is then the default")
    per: Any = options.per or ("sample" if passages is None else "token")
    model, inputs, left = _asked(memory, options)
    settings = {name: getattr(options, name) for name in ("target", "layers", "of", "method")}
    with _progress(memory, f"influence, {options.method}", options.layers or memory.layers), _running(options):
        influence = memory.influence(model, inputs, per=per, cache=False if options.no_cache else None, **settings)
    warn_of(left)
    if passages is None:
        answers = {"top": influence.top(options.top), "bottom": influence.bottom(options.top)}
    else:
        ends = {"top": True, "bottom": False}
        answers = {name: passages.top(influence, options.top, largest=largest) for name, largest in ends.items()}
    if options.sum_by:
        answers["totals"] = influence.sum_by(options.sum_by)
    if options.json:
        about = {"path": str(memory.path), "step": memory.steps, "queries": len(influence)}
        said = {name: getattr(influence, name) for name in ("of", "per", "method", "meaning")}
        _print_json(about | said | answers)
    else:
        tables = "\n\n".join(table.to_text().removesuffix(f"\n{table.footer}") for table in answers.values())
        print(f"{tables}\n\n{influence.meaning}")
    return 0


def _suspects(options: argparse.Namespace) -> int:
    memory = dualhook.load(options.path)
    table = memory.suspects(options.top)
    if options.json:
        _print_json({"path": str(memory.path), "step": memory.steps, "note": table.footer, "suspects": table})
    else:
        print(table.to_text())
    return 0


def _report(options: argparse.Namespace) -> int:
    memory, passages = dualhook.load(options.path), _passages(options)
    images = None if options.images is None else read_numbers(options.images, "--images")
    labels = None if options.labels is None else read_numbers(options.labels, "--labels")
    classes = None if options.classes is None else read_names(options.classes)
    model, inputs, left = _asked(memory, options)
    with _progress(memory, "reading", options.layers or memory.layers), _running(options):
        written = memory.report(
            model,
            inputs,
            options.out,
            images=images,
            passages=passages,
            positions=_every_token(inputs) if options.text is not None else None,
            labels=labels,
            classes=classes,
            column=options.column,
            k=options.top,
            influence={None: "auto", "none": None}.get(options.influence, options.influence),
            **({} if options.title is None else {"title": options.title}),
            **_settings(options),
        )
    warn_of(left)
    size = written.stat().st_size
    if options.json:
        _print_json({"path": str(memory.path), "report": str(written), "bytes": size})
    else:
        print(f"{written}, {size / 1e6:.2f} MB: open it in a browser")
    return 0


def _asked(memory: DualMemory, options: argparse.Namespace) -> tuple[nn.Module, Any, Sequence[str]]:
    """The model, what it is asked, and what of it no file has filled."""
    model = build(options.model)
    left = fill(model, memory, options.weights)
    if is_saved_model(options.model):  # which has filled everything
        left = []
    if options.text is not None:
        return model, tokens_of(options.text, options.tokenizer, model), left
    return model, read_inputs(options.inputs, model), left


def _every_token(inputs: Any) -> range:
    ids = inputs if isinstance(inputs, torch.Tensor) else inputs["input_ids"]
    return range(ids.shape[1])


def _passages(options: argparse.Namespace) -> Any:
    if options.passages is not None:
        return read_passages(options.passages, options.tokenizer)
    if options.tokenizer is not None and options.text is None:
        raise DualHookError("--tokenizer is for a --text or --passages: expected one of them")
    return None


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in ("target", "layers", "method", "cache")}


@contextmanager
def _running(options: argparse.Namespace) -> Iterator[None]:
    """What the user's model raises is an error of the command."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError) as error:
        if isinstance(error, DualHookError):
            raise
        asked = options.inputs if options.text is None else f"the text {options.text!r}"
        raise DualHookError(f"{options.model} cannot be run on {asked}: {error}") from error


def _compact(options: argparse.Namespace) -> int:
    path = Path(options.path)
    bytes_before, segments_before, _ = _size(path)
    with tqdm(total=bytes_before, desc="reading", unit="B", unit_scale=True, leave=False, disable=None) as bar:
        dualhook.compact(
            path,
            dtype=options.dtype and getattr(torch, options.dtype),
            min_share=options.min_share,
            sparse=options.sparse,
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


COMMANDS = {
    "demo": _demo,
    "info": _info,
    "verify": _verify,
    "compact": _compact,
    "attend": _attend,
    "influence": _influence,
    "suspects": _suspects,
    "report": _report,
}
