"""A coverage-guided fuzzer for what a memory is read from, and for the command line.

Every input is bytes that take the place of one file of a small memory (or, for ``cli``, the arguments of a command).
The memory is then inspected, and now and then asked if it looks sound; nothing but :class:`dualhook.DualHookError` may
come out of it (of the command line also argparse's exits), no input may take longer than ``--timeout`` seconds, and
none may make the process hold more than ``--rss`` MB. What is wrong is written to ``crash-*`` by libFuzzer.

    pip install atheris
    python fuzz/fuzz_store.py manifest [--runs 100000] [--corpus fuzz/corpus] [--new DIR]

Targets: manifest; of a segment its safetensors header (``segment``), the JSON text in there (``header``) and its
numbers (``ledger``); origin; cli. ``python fuzz/make_corpus.py`` makes the corpus from a golden memory. What a run
works in stays in ``/dev/shm/dualhook-fuzz-*``: libFuzzer ends the process at once.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import re
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["dualhook.store", "dualhook.records", "dualhook.cli"]):
    import dualhook.store
    from dualhook.cli import main as command
    from dualhook.store import Layout, Manifest, inspected

import torch
from torch import nn

HERE = Path(__file__).parent
GOLDEN = HERE.parent / "tests" / "store" / "golden" / "v1"
SEGMENT = Path("segments/00000000.safetensors")
ORIGIN = Path("origin/00000000.safetensors")
MEMORY = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())


def network() -> nn.Sequential:
    """The model of the golden memory."""
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


def small_memory(path: Path) -> Path:
    """A copy of the golden memory with no more in it than has to be there."""
    for file in (Path("dualhook.json"), SEGMENT, ORIGIN):
        (path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(GOLDEN / file, path / file)
    return path


def words_of(corpus: Path) -> str:
    """The names and texts in a target's corpus, as libFuzzer's dictionary."""
    found = {word for file in corpus.iterdir() for word in re.findall(rb'"[\w./]+"|[\w-]+', file.read_bytes())}
    return "".join('"{}"\n'.format(word.decode().replace('"', r"\"")) for word in sorted(found) if len(word) < 32)


class Reading:
    """Opens a memory of which one file has just been written anew, as far as it lets itself be read.

    Headers of every input are looked at. Where they pass, so is every bit, and of what passes that as well every 16th
    is asked; what does not is opened without the damaged file every 16th time.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.layout = path, Layout(path)
        self.passed, self.damaged = itertools.count(), itertools.count()

    def __call__(self) -> None:
        manifest = Manifest.read(self.layout)
        if any(inspected(self.layout, manifest, deep=deep).damage for deep in (False, True)):
            if next(self.damaged) % 16 == 0:
                dualhook.load(self.path, on_damage="skip")
        elif next(self.passed) % 16 == 0:
            self.ask()

    def ask(self) -> None:
        memory, model = dualhook.load(self.path), network()
        for question in (
            memory.info,
            lambda: memory.verify(model),
            lambda: memory.weight(memory.layers[0] if memory.layers else ""),
            lambda: memory.attend(model, torch.ones(1, 4)).top(2),
        ):
            with contextlib.suppress(dualhook.DualHookError):
                question()


def in_place_of(path: Path, file: Path, wrap: Callable[[bytes], bytes]) -> Callable[[bytes], None]:
    """What is done with the bytes of one file of the memory at ``path``."""
    read, written = Reading(path), path / file

    def one(data: bytes) -> None:
        written.unlink()  # what is mapped of the last one stays as it was
        written.write_bytes(wrap(data))
        with contextlib.suppress(dualhook.DualHookError):
            read()

    return one


def with_header(original: bytes) -> Callable[[bytes], bytes]:
    """A safetensors file with another header: its length is right, so that what stands in it is looked at."""
    start = 8 + int.from_bytes(original[:8], "little")

    def wrap(data: bytes) -> bytes:
        return len(data).to_bytes(8, "little") + data + original[start:]

    return wrap


def with_inner_header(original: bytes) -> Callable[[bytes], bytes]:
    """The same where only the JSON text in the metadata is another, and the checksums are left out."""
    length = int.from_bytes(original[:8], "little")
    header = json.loads(original[8 : 8 + length])

    def wrap(data: bytes) -> bytes:
        header["__metadata__"]["dualhook"] = data.decode("utf-8", "replace")
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + original[8 + length :]

    return wrap


def with_ledger(original: bytes) -> Callable[[bytes], bytes]:
    """Other numbers in the tensors of a segment; short inputs are repeated, the header stays."""
    start = 8 + int.from_bytes(original[:8], "little")
    size = len(original) - start

    def wrap(data: bytes) -> bytes:
        return original[:start] + (data + original[start + len(data) :])[:size]

    return wrap


def arguments(path: Path) -> Callable[[bytes], None]:
    """A command line: words between zero bytes, ``MEMORY`` stands for the memory."""

    def one(data: bytes) -> None:
        words = [os.fsdecode(word).replace("MEMORY", str(path)) for word in data.split(b"\0")]
        if words[:1] == ["demo"] or any(word.startswith("/") and str(path) not in word for word in words):
            return  # would train; and nothing outside is to be touched
        sink = io.StringIO()
        with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink), contextlib.suppress(SystemExit):
            status = command(words)
            assert status in (0, 1, 2), status
        if words[:1] == ["compact"]:
            shutil.rmtree(path)
            small_memory(path)

    return one


def target(name: str, path: Path) -> Callable[[bytes], None]:
    """What is done with every input."""
    segment, origin = ((GOLDEN / file).read_bytes() for file in (SEGMENT, ORIGIN))
    return {
        "manifest": lambda: in_place_of(path, Path("dualhook.json"), bytes),
        "segment": lambda: in_place_of(path, SEGMENT, with_header(segment)),
        "header": lambda: in_place_of(path, SEGMENT, with_inner_header(segment)),
        "ledger": lambda: in_place_of(path, SEGMENT, with_ledger(segment)),
        "origin": lambda: in_place_of(path, ORIGIN, with_inner_header(origin)),
        "cli": lambda: arguments(path),
    }[name]()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=("manifest", "segment", "header", "ledger", "origin", "cli"))
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--timeout", type=int, default=10)
    parser.add_argument("--rss", type=int, default=3000, help="MB")
    parser.add_argument("--corpus", type=Path, default=HERE / "corpus")
    parser.add_argument("--new", type=Path, help="where inputs are kept that reach new code (default: nowhere)")
    parser.add_argument("--one", type=Path, help="run this input only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="dualhook-fuzz-", dir=MEMORY))
    new = options.new or folder / "new"
    new.mkdir(exist_ok=True, parents=True)
    path = small_memory(folder / "memory")
    one = target(options.target, path)
    if options.one:
        one(options.one.read_bytes())
        return
    os.chdir(folder)
    resource.setrlimit(resource.RLIMIT_AS, (2**36, 2**36))  # a petabyte is an error, not an excuse
    settings = [f"-runs={options.runs}", f"-timeout={options.timeout}", f"-rss_limit_mb={options.rss}", "-max_len=8192"]
    settings += [f"-artifact_prefix={folder.parent}/crash-{options.target}-", "-print_final_stats=1"]
    corpus, dictionary = (HERE / options.corpus / options.target).resolve(), folder / "words"
    if options.target != "ledger":  # that is numbers
        dictionary.write_text(words_of(corpus))
        settings += [f"-dict={dictionary}"]
    atheris.Setup([sys.argv[0], *settings, str(new), str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
