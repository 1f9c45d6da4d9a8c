"""Keys that several layers have read lie in a segment once, and come back bit for bit, row by row."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from store.test_lanes import writers
from store.test_store import bits, entry, written
from torch import Tensor

import dualhook
from dualhook.errors import StoreError
from dualhook.records import LayerSpec, Rows
from dualhook.store import Manifest, Store, Writer
from dualhook.store.lanes import Segment
from dualhook.store.layout import open_tensors, read_header, tensor_names, write_tensors
from dualhook.store.sharing import shared_keys

LAYERS = tuple(LayerSpec(name, 8, 2, f"{name}.weight", None) for name in ("query", "key", "value", "other"))
SPECIAL = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -1.5, 2.0], dtype=torch.float64)


def rows(key: Tensor, keep: Tensor, seed: int) -> Rows:
    """Those rows of an input [n, i] whose output gradient is not zero."""
    number = torch.arange(len(key))
    output_grad = torch.randn(len(key), 2, generator=torch.Generator().manual_seed(seed)).to(key.dtype)
    unknown = torch.full_like(number, -1)
    return Rows(key, output_grad, torch.zeros_like(number), unknown, number % 2).where(keep)


def headers(root: Path) -> list[dict]:
    paths = sorted((root / "segments").glob("*.safetensors"))
    return [read_header(path, open_tensors(path))["rows"] for path in paths]


def holders(root: Path) -> dict[str, str]:
    """Which layer holds another one's keys, where one segment says so."""
    return {name: own["key_of"] for found in headers(root) for name, own in found.items() if "key_of" in own}


@given(
    masks=st.lists(st.tuples(*[st.lists(st.booleans(), min_size=6, max_size=6)] * 3), min_size=1, max_size=5),
    seals=st.sets(st.integers(1, 5)),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    alike=st.booleans(),
    sparse=st.booleans(),
)
def test_shared_keys_come_back_bit_for_bit_whichever_rows_a_layer_has(
    tmp_path_factory, masks, seals, dtype, alike, sparse
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dualhook.store.sparse.WORTH", 100.0)
        patch.setattr("dualhook.store.sparse.AT_ONCE", 16)
        shared_rows_come_back(tmp_path_factory.mktemp("run") / "memory", masks, seals, dtype, alike, sparse)


def shared_rows_come_back(path: Path, masks, seals: set[int], dtype: torch.dtype, alike: bool, sparse: bool) -> None:
    writer = written(path, LAYERS, sparse=sparse)
    truth: dict[str, list[Rows]] = {spec.name: [] for spec in LAYERS}
    for step, kept in enumerate(masks, start=1):
        generator = torch.Generator().manual_seed(step)
        key = SPECIAL[torch.randint(0, len(SPECIAL), (6, 8), generator=generator)].to(dtype)
        other = key.clone()
        if not alike:
            other[:, 7] += 1  # nearly the same input
        for spec, keep in zip(LAYERS, (*kept, [True] * 6), strict=True):
            part = rows(other if spec.name == "other" else key, torch.tensor(keep), step)
            writer.builder.append(spec.name, part)
            writer.builder.commit(spec.name, step)
            truth[spec.name].append(replace(part, step=torch.full_like(part.step, step)))
        writer.builder.add(step, [entry(step)])
        if step in seals:
            writer.seal()
    writer.close()
    store = Store(writer.layout.root)
    for spec in LAYERS:
        expected = truth[spec.name][0].joined(*truth[spec.name][1:])
        stored = [one for segment in store.segments if (one := segment.stored(spec)) is not None]
        found = [one.rows(0, len(one.step)) for one in stored]
        assert sum(map(len, found)) == len(expected)
        if not found:
            continue
        together = found[0].joined(*found[1:])
        for name in ("key", "output_grad"):
            assert torch.equal(bits(getattr(together, name)), bits(getattr(expected, name)))
        for name in ("step", "position"):
            assert torch.equal(getattr(together, name), getattr(expected, name))


def stored_by(writer: Writer, parts: dict[str, Rows]) -> Segment:
    for name, part in parts.items():
        writer.builder.append(name, part)
        writer.builder.commit(name, 1)
    writer.builder.add(1, [entry(1)])
    writer.close()
    return Store(writer.layout.root).segments[0]


def test_the_layer_with_most_rows_holds_the_keys_of_the_others(tmp_path):
    key, every = torch.randn(6, 8), torch.ones(6, dtype=torch.bool)
    some = every.clone()
    some[::3] = False
    parts = {"query": rows(key, some, 1), "key": rows(key.clone(), every, 2), "value": rows(key, every, 3)}
    parts["other"] = rows(torch.randn(6, 8), every, 4)
    segment = stored_by(written(tmp_path / "run", LAYERS), parts)
    assert holders(tmp_path / "run") == {"query": "key", "value": "key"}
    names = set(tensor_names(open_tensors(segment.path)))
    assert {f"rows/{name}/key" for name in parts} & names == {"rows/key/key", "rows/other/key"}
    assert {name for name in names if name.endswith("key_row")} == {"rows/query/key_row"}  # value has all, in order
    assert open_tensors(segment.path).get_tensor("rows/query/key_row").tolist() == [1, 2, 4, 5]


def test_keys_that_differ_in_one_bit_are_not_shared():
    def tensors(key: Tensor, index: int = 0) -> dict[str, Tensor]:
        number = torch.arange(len(key))
        return {"key": key, "step": number, "sample": number, "position": number + index}

    key = torch.zeros(5, 64)
    for at in range(64):
        other = key.clone()
        other[3, at] = -0.0
        assert shared_keys({"a": tensors(key), "b": tensors(other)}) == {}
        assert (
            shared_keys({"a": tensors(key), "b": {name: values[:4] for name, values in tensors(other).items()}}) == {}
        )
    assert shared_keys({"a": tensors(key), "b": tensors(key.clone())})["b"].holder == "a"
    assert shared_keys({"a": tensors(key), "b": tensors(key.double())}) == {}
    assert shared_keys({"a": tensors(key), "b": tensors(key.clone())}, apart=["b"]) == {}
    assert (
        shared_keys({"a": tensors(key[:, :3].contiguous()), "b": tensors(key[:, :3].contiguous())}) == {}
    )  # too small


def test_the_version_rises_before_the_first_segment_that_shares_and_in_no_other_memory(tmp_path, monkeypatch):
    key, every = torch.randn(6, 8), torch.ones(6, dtype=torch.bool)
    writer = written(tmp_path / "run", LAYERS)
    seen = []

    def noted(path: Path, *rest) -> None:
        seen.append(json.loads(writer.layout.manifest.read_text())["version"])
        write_tensors(path, *rest)

    monkeypatch.setattr("dualhook.store.writer.write_tensors", noted)
    for step, layers in enumerate((["key"], ["key", "other"], ["key", "value"], ["key"]), start=1):
        for name in layers:
            writer.builder.append(name, rows(key + (name == "other"), every, step))
            writer.builder.commit(name, step)
        writer.builder.add(step, [entry(step)])
        writer.flush()
    writer.close()
    assert seen == [1, 1, 3, 3]
    assert Manifest.read(writer.layout) == replace(Manifest(LAYERS, {"dualhook": "test"}), needs=3)
    assert not list((tmp_path / "run").glob("*.partial"))


def test_bytes_that_are_shared_are_not_counted_as_recorded(tmp_path):
    key, every = torch.randn(6, 8), torch.ones(6, dtype=torch.bool)
    writer = written(tmp_path / "run", LAYERS)
    for name in ("query", "key", "value"):
        writer.builder.append(name, rows(key, every if name == "key" else every & (key[:, 0] < 9), 1))
        writer.builder.commit(name, 1)
    writer.builder.add(1, [entry(1)])
    whole = writer.recorded_bytes
    writer.flush()
    assert writer.recorded_bytes == whole - 2 * 6 * 8 * 4
    writer.close()


def test_each_process_shares_its_own_keys(tmp_path):
    both = writers(tmp_path / "run")
    manifest = Manifest.read(both[0].layout)
    replace(manifest, layers=LAYERS).write(both[0].layout)
    key, every = torch.randn(4, 8), torch.ones(4, dtype=torch.bool)
    for writer in both:
        for name in ("key", "value"):
            writer.builder.append(name, rows(key + writer.rank, every, writer.rank))
            writer.builder.commit(name, 1)
        writer.builder.add(1, [] if writer.rank else [entry(1)])
        writer.close()
    assert [found["value"]["key_of"] for found in headers(tmp_path / "run")] == ["key", "key"]
    told = json.loads((tmp_path / "run" / "dualhook.json").read_text())
    assert (told["version"], told["ranks"]) == (3, 2)
    blocks = list(Store(tmp_path / "run").blocks("value", last_step=1, block_rows=9))
    assert torch.equal(torch.cat([block.key for block in blocks]), torch.cat([key, key + 1]))


def test_a_reader_of_version_2_refuses_shared_keys(tmp_path, monkeypatch):
    key, every = torch.randn(6, 8), torch.ones(6, dtype=torch.bool)
    stored_by(written(tmp_path / "run", LAYERS), {name: rows(key, every, 1) for name in ("key", "value")})
    assert json.loads((tmp_path / "run" / "dualhook.json").read_text())["version"] == 3
    monkeypatch.setattr("dualhook.store.layout.FORMAT_VERSION", 2)
    with pytest.raises(StoreError, match="format version 3, this dualhook reads up to 2: install a newer"):
        Store(tmp_path / "run")


LLAMA = transformers.LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
)
PREFIX = "model.layers.{}."


def llama(path: Path, way: str) -> tuple[dualhook.DualMemory, list[Tensor]]:
    """Six steps of two micro-batches, one of which is zeroed away in every other step."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(LLAMA)
    if way == "checkpointing":
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    dtype = torch.bfloat16 if way == "dtype" else None
    budget = 60_000 if way == "folding" else None
    recorder = dualhook.instrument(model, path, verbose=False, dtype=dtype, max_bytes=budget)
    for step in range(6):
        optimizer.zero_grad()
        for part in range(2):
            tokens = torch.randint(0, 32, (3, 7))
            labels = tokens.masked_fill(torch.arange(7) > 4, -100)
            recorder.batch(samples=range(6 * step + 3 * part, 6 * step + 3 * part + 3))
            with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
                loss = model(input_ids=tokens, labels=labels).loss
            loss.backward()
            if step % 2 and not part:
                optimizer.zero_grad()
        optimizer.step()
        if step % 2:
            recorder.flush()
    return recorder.close(), [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("way", ["plain", "checkpointing", "dtype", "autocast"])
def test_a_llama_is_recorded_as_without_sharing_in_fewer_bytes(tmp_path, monkeypatch, way):
    memory, weights = llama(tmp_path / "shared", way)
    monkeypatch.setattr("dualhook.store.segment.shared_keys", lambda layers, apart: {})
    alone, same = llama(tmp_path / "alone", way)
    assert all(torch.equal(one, other) for one, other in zip(weights, same, strict=True))
    for found in headers(tmp_path / "shared"):
        sharing = {name: own["key_of"] for name, own in found.items() if "key_of" in own}
        attention, feed_forward = ({f"{PREFIX.format(n)}{which}" for n in range(2)} for which in ("self_attn", "mlp"))
        names = {name: name.rpartition(".")[0] for name in sharing}
        assert {name.rpartition(".")[2] for name in sharing} <= {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
        assert sorted(names.values()) == sorted([*attention, *attention, *feed_forward])  # two of three, one of two
        assert all(holder.rpartition(".")[0] == names[name] for name, holder in sharing.items())
    assert json.loads((tmp_path / "alone" / "dualhook.json").read_text())["version"] == 1
    for layer in alone.layers:
        one, other = (next(m._store.blocks(layer, last_step=6, block_rows=10**6)) for m in (memory, alone))
        for name in ("key", "output_grad", "step", "sample", "position"):
            assert torch.equal(getattr(one, name), getattr(other, name)), (layer, name)
    assert memory._store.nbytes < alone._store.nbytes
    assert memory.verify().max_error == alone.verify().max_error


def test_folding_goes_through_shared_keys(tmp_path):
    memory, _ = llama(tmp_path / "run", "folding")
    assert 0 < memory._store.first_step < 6
    assert holders(tmp_path / "run")
    assert memory.verify()["exact"].all()
    assert memory.verify().max_error < 1e-5
