"""Whatever fails, training ends with the same weights, one warning says what, and what was committed stays valid."""

from __future__ import annotations

import errno
import os
import re
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pkgutil import resolve_name

import pytest
import torch
from faults import loop
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import dualhook
from dualhook.errors import StoreError

STEPS = range(1, 13)
FROM = 6  # the step in which things begin to fail


def trained(recorder=None, model=None, after_step: Callable[[int], None] = lambda step: None, **optimizer) -> loop.Net:
    """A model after all steps."""
    model = model or loop.network()
    settings = {"lr": 0.05, "momentum": 0.9} | optimizer
    loop.train(model, torch.optim.SGD(model.parameters(), **settings), recorder, STEPS, after_step)
    return model


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(*pair) for pair in zip(one.parameters(), other.parameters(), strict=True))


@contextmanager
def one_warning(match: str) -> Iterator[list[int]]:
    """Exactly one warning comes, and says the step up to which the memory is whole; that is added to the list."""
    found: list[int] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield found
    messages = [str(one.message) for one in caught]
    assert len(messages) == 1, messages
    message = messages[0]
    assert re.search(match, message), message
    said = re.search(r"whole up to step (\d+), from step (\d+) on it is missing; training goes on", message)
    whole, first = said.groups()
    assert int(first) == int(whole) + 1
    found.append(int(whole))


def check(memory: dualhook.DualMemory, whole: int) -> None:
    """The memory reaches as far as the warning says, and every step of it is rebuilt."""
    assert memory.steps == whole
    weights = [loop.network().state_dict()]
    model = loop.network()
    trained(model=model, after_step=lambda step: weights.append({n: v.clone() for n, v in model.state_dict().items()}))
    for step in range(whole + 1):
        for name, value in memory.state_dict(step).items():
            torch.testing.assert_close(value, weights[step][name], rtol=1e-9, atol=1e-12)


# ---- the disk ------------------------------------------------------------------------------------------------


def refusing(number: int, *, of: str, path: Path):
    """The function ``os.<of>`` from a moment on: it refuses what lies below a path."""
    original = getattr(os, of)

    def refuse(what, *args, **kwargs):
        name = os.readlink(f"/proc/self/fd/{what}") if isinstance(what, int) else os.fspath(what)
        reads = of == "open" and not args[0] & (os.O_WRONLY | os.O_RDWR)
        if name.startswith(str(path)) and not reads:
            raise OSError(number, os.strerror(number), name)
        return original(what, *args, **kwargs)

    return refuse


FAULTS = {
    "full": (errno.ENOSPC, "writev"),
    "read-only": (errno.EROFS, "open"),
    "failing fsync": (errno.EIO, "fsync"),
    "failing rename": (errno.EACCES, "replace"),
}


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="files are told by their handle")
@pytest.mark.parametrize("seen_in", ["writer", "flush", "close", "origin"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_disk_that_refuses(tmp_path, monkeypatch, fault, seen_in):
    number, name = FAULTS[fault]
    path = tmp_path / "run"
    model = loop.network()
    recorder = dualhook.instrument(model, path, verbose=False)
    if seen_in == "writer":
        recorder._writer.segment_bytes = 1

    def after_step(step: int) -> None:
        if step == FROM - 1:
            recorder.flush()
        begins = loop.LATE - 1 if seen_in == "origin" else STEPS[-1] if seen_in == "close" else FROM
        if step == begins:
            monkeypatch.setattr(os, name, refusing(number, of=name, path=path))
        if step > FROM and seen_in == "flush":
            recorder.flush()
        if seen_in == "writer":
            recorder._writer._sealed.join()

    with one_warning(re.escape(os.strerror(number))) as whole:
        trained(recorder, model, after_step)
        memory = recorder.close()
    assert same(model, trained())
    assert recorder.stopped
    assert isinstance(recorder.error, (OSError, StoreError))
    assert FROM - 1 <= whole[0] <= loop.LATE
    check(memory, whole[0])


def test_a_disk_that_is_full(tmp_path):
    """A real one, small: what is there afterwards is whole, and what was half written gives its room back."""
    if os.system(f"mount -t tmpfs -o size=300k none {tmp_path} 2>/dev/null"):
        pytest.skip("needs the right to mount")
    try:
        model = loop.network()
        recorder = dualhook.instrument(model, tmp_path / "run", max_bytes=10**9, verbose=False)
        recorder._writer.segment_bytes = 40_000
        with one_warning("No space left on device") as whole:
            for _ in range(16):
                trained(recorder, model)
                recorder._writer._sealed.join()
            memory = recorder.close()
        assert memory.steps == whole[0] > 0
        assert memory.state_dict(whole[0])
        assert [path.stat().st_size for path in tmp_path.rglob("*.partial")] == [0]
        expected = loop.network()
        for _ in range(16):
            trained(None, expected)
        assert same(model, expected)
    finally:
        os.system(f"umount {tmp_path}")


def test_a_directory_that_vanishes(tmp_path):
    model = loop.network()
    recorder = dualhook.instrument(model, tmp_path / "run", verbose=False)
    with one_warning("No such file or directory"):
        with recorder:  # leaving the block asks for no memory
            trained(recorder, model, lambda step: shutil.rmtree(tmp_path / "run") if step == FROM else None)
    assert same(model, trained())
    with pytest.raises(StoreError, match="holds no memory"):
        recorder.close()


def test_a_slow_disk_is_waited_for_and_the_waiting_reported(tmp_path, monkeypatch, capsys):
    model = loop.network()
    recorder = dualhook.instrument(model, tmp_path / "run")
    recorder._writer.segment_bytes = 1
    fsync = os.fsync

    def slow(handle: int) -> None:
        if threading.current_thread() is recorder._writer._thread:
            time.sleep(0.1)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", slow)
    began = time.perf_counter()
    trained(recorder, model)
    recorder.flush()
    assert 1 < recorder.waited <= time.perf_counter() - began
    assert " s waited for the disk" in repr(recorder)
    memory = recorder.close()
    assert "dualhook: training waited" in capsys.readouterr().err
    assert same(model, trained())
    check(memory, STEPS[-1])


# ---- our own hooks -------------------------------------------------------------------------------------------


class FaultError(Exception):
    """What is raised in the middle of the recorder."""


PLACES = {
    "forward hook": "dualhook.capture.taps.module_call",
    "gradient hook": "dualhook.capture.intake.Intake._arrive",
    "accumulation": "dualhook.capture.intake.as_rows",
    "rows": "dualhook.recorder.pending.Pending.take",
    "buffer": "dualhook.store.segment.LayerBuffer.append",
    "first step": "dualhook.recorder.first_pass.FirstPass.agree",
    "before a step": "dualhook.recorder.steps.StepBook.before",
    "probe": "dualhook.capture.probe.LayerProbe.measure",
    "self-check": "dualhook.recorder.steps.StepBook._predict",
    "after a step": "dualhook.recorder.steps.StepBook.after",
    "ledger": "dualhook.recorder.step.fit_scales",
    "backlog": "dualhook.recorder.backlog.Backlog.work",
    "glance": "dualhook.capture.probe.LayerProbe.glance",
    "later": "dualhook.capture.probe.LayerProbe.later",
    "commit": "dualhook.store.segment.SegmentBuilder.commit",
    "fingerprint": "dualhook.recorder.watched.Watched.remember",
    "snapshots": "dualhook.recorder.snapshots.Snapshots.stepped",
    "input sizes": "dualhook.capture.audit.RootHook.before",
    "latest": "dualhook.recorder.steps.StepBook.latest",
    "segment": "dualhook.store.segment.SegmentBuilder.contents",
}

CALLS = dict.fromkeys(("first step", "before a step", "self-check", "after a step", "ledger", "snapshots"), 10)
CALLS |= {"input sizes": 10, "latest": 1, "segment": 1, "probe": 8, "backlog": 3, "later": 5}
"""How many calls of those come at least that are rare."""


def failing(monkeypatch: pytest.MonkeyPatch, place: str, *, at_call: int) -> None:
    """Let what stands at a place raise, from a call on."""
    owner, _, name = place.rpartition(".")
    target = resolve_name(owner)
    original, calls = getattr(target, name), iter(range(10**9))

    def call(*args, **kwargs):
        if next(calls) >= at_call:
            raise FaultError(place)
        return original(*args, **kwargs)

    monkeypatch.setattr(target, name, call)


@pytest.mark.parametrize("at_call", [0, 1, 7, 20])
@pytest.mark.parametrize("place", PLACES)
def test_an_error_of_our_own_ends_the_recording_and_not_the_training(tmp_path, monkeypatch, place, at_call):
    model = loop.network()
    recorder = dualhook.instrument(model, tmp_path / "run", verbose=False)
    failing(monkeypatch, PLACES[place], at_call=min(at_call, CALLS.get(place, at_call)))
    flushed = []

    def after_step(step: int) -> None:
        if step in (3, 9):
            recorder.flush()
            if not recorder.stopped:
                flushed.append(step)

    with one_warning(r"recording stopped after step \d+: .*FaultError" if place != "segment" else place) as whole:
        trained(recorder, model, after_step)
        memory = recorder.close()
    assert recorder.stopped
    assert same(model, trained())
    assert whole[0] >= max(flushed, default=0)
    monkeypatch.undo()
    check(memory, whole[0])


def loaders() -> dict[str, Iterable]:
    data = [float(number) for number in range(24)]
    accelerate = pytest.importorskip("accelerate")
    return {
        "list": torch.tensor(data).split(4),
        "map": DataLoader(data, batch_size=4, shuffle=True),
        "stream": DataLoader(Stream(data), batch_size=None),
        "accelerate": accelerate.Accelerator(cpu=True).prepare(DataLoader(data, batch_size=4, shuffle=True)),
    }


class Stream(IterableDataset):
    """A data set that yields whole batches."""

    def __init__(self, data: list[float]) -> None:
        self.data = data

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(torch.tensor(self.data).split(4))


TRACKING = {
    "announce": "dualhook.recorder.front.sequence_number",
    "number": "dualhook.capture.loader._length",
    "rows": "dualhook.capture.loader._next_rows",
    "preparation": "dualhook.capture.loader._twin",
}


@pytest.mark.parametrize(
    ("kind", "place", "at_call"),
    [
        *((kind, "announce", at_call) for kind in ("list", "map", "stream", "accelerate") for at_call in (0, 2)),
        *((kind, "number", at_call) for kind in ("list", "stream") for at_call in (0, 2)),
        *((kind, "rows", at_call) for kind in ("map", "accelerate") for at_call in (0, 2)),
        *((kind, "preparation", 0) for kind in ("map", "stream", "accelerate")),
    ],
)
def test_an_error_in_tracking_ends_the_recording_and_not_the_loop(tmp_path, monkeypatch, kind, place, at_call):
    def batches(track=lambda loader: loader) -> list[torch.Tensor]:
        torch.manual_seed(0)
        return list(track(loaders()[kind]))

    expected = batches()
    recorder = dualhook.instrument(loop.network(), tmp_path / "run", verbose=False)
    failing(monkeypatch, TRACKING[place], at_call=at_call)
    with one_warning("recording stopped after step 0: .*FaultError"):
        found = batches(recorder.track)
    assert len(found) == len(expected) == 6
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert recorder.stopped
    monkeypatch.undo()
    recorder = dualhook.instrument(loop.network(), tmp_path / "other", on_error="raise", verbose=False)
    failing(monkeypatch, TRACKING[place], at_call=at_call)
    with pytest.raises(FaultError):
        batches(recorder.track)


def test_samples_that_accelerate_does_not_ask_for_end_the_recording_and_not_the_loop(tmp_path, monkeypatch):
    recorder = dualhook.instrument(loop.network(), tmp_path / "run", verbose=False)
    monkeypatch.setattr("dualhook.capture.loader._Noting.__iter__", lambda self: iter(self.loader))
    with one_warning("recording stopped after step 0: .*IndexError"):
        assert len(list(recorder.track(loaders()["accelerate"]))) == 6


def test_what_the_loader_raises_is_not_ours(tmp_path):
    def broken() -> Iterator[torch.Tensor]:
        yield torch.zeros(1)
        raise FaultError

    with dualhook.instrument(loop.network(), tmp_path, verbose=False) as recorder:
        with pytest.raises(FaultError):
            list(recorder.track(broken()))
        assert not recorder.stopped


@pytest.mark.parametrize(("place", "at_call"), [("before a step", 9), ("before a step", 10), ("after a step", 9)])
def test_of_two_optimisers_on_one_backward_pass_the_memory_has_both_steps_or_none(
    tmp_path, monkeypatch, place, at_call
):
    def train(recorder, model) -> list[dict[str, torch.Tensor]]:
        optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in (model.one, model.head)]
        weights = [{name: value.clone() for name, value in model.state_dict().items()}]
        for step in STEPS:
            torch.manual_seed(step)
            model.zero_grad()
            model(torch.randn(4, 6, dtype=torch.float64)).square().sum().backward()
            for optimizer in optimizers:
                optimizer.step()
            weights.append({name: value.clone() for name, value in model.state_dict().items()})
        return weights

    expected = train(None, loop.network())
    recorder = dualhook.instrument(model := loop.network(), tmp_path, verbose=False)
    failing(monkeypatch, PLACES[place], at_call=at_call)
    with one_warning("FaultError") as whole:
        train(recorder, model)
        memory = recorder.close()
    monkeypatch.undo()
    assert whole[0] == memory.steps == (5 if at_call == 10 else 4)
    for step in range(whole[0] + 1):
        for name, value in memory.state_dict(step).items():
            torch.testing.assert_close(value, expected[step][name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("place", ["forward hook", "rows", "probe", "ledger"])
def test_an_error_of_our_own_stops_training_where_that_was_asked_for(tmp_path, monkeypatch, place):
    model = loop.network()
    recorder = dualhook.instrument(model, tmp_path / "run", on_error="raise", verbose=False)
    failing(monkeypatch, PLACES[place], at_call=3 if place == "ledger" else 9)
    with pytest.raises(FaultError):
        trained(recorder, model)
    assert recorder.stopped
    monkeypatch.undo()
    memory = recorder.close()
    check(memory, memory.steps)


def test_a_disk_that_refuses_stops_training_where_that_was_asked_for(tmp_path, monkeypatch):
    model = loop.network()
    recorder = dualhook.instrument(model, tmp_path / "run", on_error="raise", verbose=False)
    monkeypatch.setattr(os, "writev", refusing(errno.ENOSPC, of="writev", path=tmp_path))
    with pytest.raises((StoreError, OSError), match="No space left"):
        trained(recorder, model, lambda step: recorder.flush())


def test_compiled_and_recurrent_layers_are_guarded_too(tmp_path, monkeypatch):
    for make in (lambda: nn.LSTM(3, 4), lambda: nn.MultiheadAttention(4, 2)):
        models = [make(), make()]
        models[1].load_state_dict(models[0].state_dict())
        recorder = dualhook.instrument(models[0], layers="all", verbose=False)
        with monkeypatch.context() as patch, one_warning("FaultError"):
            failing(patch, "dualhook.capture.intake.Intake.on_late_call", at_call=5)
            for model in models:
                torch.manual_seed(0)
                optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
                for _ in range(4):
                    x = torch.randn(5, 2, 3 if isinstance(model, nn.LSTM) else 4)
                    out = model(x) if isinstance(model, nn.LSTM) else model(x, x, x)
                    optimizer.zero_grad()
                    out[0].square().sum().backward()
                    optimizer.step()
            recorder.close()
        assert same(*models)


def test_settings_are_checked():
    with pytest.raises(dualhook.DualHookError, match="on_error='ignore': expected 'warn' or 'raise'"):
        dualhook.instrument(nn.Linear(2, 2), on_error="ignore")
