"""Memories behind URLs, in a local S3 server and in fsspec's own memory, against the same on disk."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import fsspec
import pytest
import torch
from runs import recorded_shortly

import dualhook
from dualhook.cli import main
from dualhook.errors import StoreError
from dualhook.store import Store
from dualhook.store.remote import RangedFile, RemotePath


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "memory"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dualhook.recorder.front.SEGMENT_BYTES", 1_500)
        model = recorded_shortly(path, partial(torch.optim.Adam, lr=0.01), 12)
    dualhook.load(path).add_column("label", torch.arange(20) % 3)
    assert len(list((path / "segments").iterdir())) > 3
    return model, path


@pytest.fixture(scope="module")
def server():
    """A local S3 server, as the environment tells clients where to find it."""
    why = "needs moto, flask and s3fs: pip takes minutes to find versions that go together"
    moto = pytest.importorskip("moto.server", reason=why)
    pytest.importorskip("s3fs", reason=why)
    running = moto.ThreadedMotoServer(port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        # werkzeug names its server beside moto's, and two names are an error to aiohttp in Python's development mode
        patch.setattr("werkzeug.serving.WSGIRequestHandler.send_response", BaseHTTPRequestHandler.send_response_only)
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield
    running.stop()


@pytest.fixture(params=["s3", "memory", "file"])
def url(request, recorded, tmp_path) -> str:
    """Where a copy of the memory lies."""
    root = {"s3": "s3://bucket/runs/one", "memory": "memory://runs/one", "file": f"file://{tmp_path}/one"}[
        request.param
    ]
    if request.param == "s3":
        request.getfixturevalue("server")
    files = fsspec.filesystem(request.param)
    if request.param == "s3" and not files.exists("bucket"):
        files.mkdir("bucket")
    if files.exists(root):
        files.rm(root, recursive=True)
    files.put(str(recorded[1]), root, recursive=True)
    files.invalidate_cache()
    return root


def same(one, other) -> None:
    assert one.columns == other.columns
    assert all(one[name].tolist() == other[name].tolist() for name in one.columns)


def test_every_question_is_answered_as_from_disk(recorded, url):
    model, path = recorded
    here, there = dualhook.load(path), dualhook.load(url)
    assert str(there.path) == url
    same(here.info(), there.info())
    same(here.verify(deep=True), there.verify(deep=True))
    assert here.columns == there.columns
    assert all(torch.equal(value, there.state_dict()[name]) for name, value in here.state_dict().items())
    x = torch.randn(3, 5)
    with ThreadPoolExecutor(2) as threads:
        one, other = here.attend(model, x), there.attend(model, x, executor=threads)
        for ask in (lambda a: a.top(4), lambda a: a.sum_by("label"), lambda a: a.receipt):
            same(ask(one), ask(other))


def test_a_question_reads_its_layer_and_no_more(recorded, url, monkeypatch):
    path, memory, read = recorded[1], dualhook.load(url), []
    ranges = RemotePath.ranges
    monkeypatch.setattr(RemotePath, "ranges", lambda self, places: read.extend(places) or ranges(self, places))
    monkeypatch.setattr("dualhook.store.remote.FIRST_BYTES", 8)  # headers are then read to their last byte, no further
    for piece in memory._store.pieces("2", last_step=12):
        list(piece.blocks(100))
    fetched = sum(end - begin for begin, end in read)
    whole = sum(file.stat().st_size for file in (path / "segments").iterdir())
    headers = sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in (path / "segments").iterdir())
    rows = 12 * 4 * (4 * (8 + 3) + 3 * 8)
    assert fetched == headers + rows < whole


def test_it_is_never_written_to(recorded, url):
    model, _ = recorded
    files, root = fsspec.core.url_to_fs(url)
    before = files.find(root)
    memory = dualhook.load(url)
    with pytest.raises(StoreError, match="read only"):
        memory.add_column("other", torch.arange(20))
    with pytest.raises(StoreError, match="read only"):
        memory.attend(model, torch.randn(1, 5), cache=True)
    memory.attend(model, torch.randn(1, 5)).top(2)
    files.invalidate_cache()
    assert files.find(root) == before


def test_the_command_line_takes_a_url(recorded, url, capsys):
    assert main(["info", url]) == 0
    assert "12 steps" in capsys.readouterr().out
    assert main(["verify", url, "--deep"]) == 0


def test_damage_is_found_behind_a_url(recorded, url):
    files, root = fsspec.core.url_to_fs(url)
    segment = sorted(name for name in files.find(root) if "/segments/" in name)[1]
    data = files.cat_file(segment)
    files.pipe_file(segment, data[:-1])
    with pytest.raises(StoreError, match="00000001.safetensors"):
        dualhook.load(url)
    files.pipe_file(segment, data[:-1] + bytes([data[-1] ^ 1]))
    assert len(dualhook.load(url).verify(deep=True).damage) == 1
    files.rm_file(segment)
    with pytest.raises(StoreError, match="00000001.safetensors is missing"):
        dualhook.load(url)


def test_a_segment_that_disappears_is_named(recorded, url):
    model, _ = recorded
    attention = dualhook.load(url).attend(model, torch.randn(1, 5), layers="2")
    files, root = fsspec.core.url_to_fs(url)
    files.rm_file(sorted(name for name in files.find(root) if "/segments/" in name)[2])
    files.invalidate_cache()
    with pytest.raises(StoreError, match=r"00000002.safetensors cannot be read: .*FileNotFoundError"):
        attention.top(2)


def test_a_bucket_that_is_not_there(server):
    with pytest.raises(StoreError, match="s3://nobody/run"):
        dualhook.load("s3://nobody/run")


def test_a_server_that_cannot_be_reached(monkeypatch):
    pytest.importorskip("s3fs", reason="a client of S3 is what cannot reach it").S3FileSystem.clear_instance_cache()
    monkeypatch.setattr("s3fs.core.S3FileSystem.retries", 1)  # it would ask again for a quarter of a minute
    keys = {"ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "x", "MAX_ATTEMPTS": "1"}
    for name, value in {"ENDPOINT_URL": "http://127.0.0.1:9", **keys}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    with pytest.raises(StoreError, match="s3://bucket/run.* cannot be read: .*127.0.0.1:9"):
        dualhook.load("s3://bucket/run")


def test_what_no_extra_knows(monkeypatch):
    with pytest.raises(StoreError, match="nosuch://x/run cannot be opened: .*nosuch"):
        dualhook.load("nosuch://x/run")
    monkeypatch.setitem(__import__("sys").modules, "fsspec", None)
    with pytest.raises(StoreError, match=r"pip install 'dualhook\[s3\]'"):
        dualhook.load("s3://bucket/run")


def test_headers_longer_than_the_first_bytes(recorded, monkeypatch):
    _, path = recorded
    file = next((path / "segments").iterdir())
    whole = RangedFile(RemotePath(f"file://{file}"))
    for first in (0, 1, 8, 9, 100):
        monkeypatch.setattr("dualhook.store.remote.FIRST_BYTES", max(8, first))
        assert RangedFile(RemotePath(f"file://{file}")).keys() == whole.keys()


def test_a_copy_on_disk_is_mapped(recorded, tmp_path):
    shutil.copytree(recorded[1], tmp_path / "copy")
    assert isinstance(Store(tmp_path / "copy").layout.root, Path)
