"""The command line: it agrees with the Python surface, and what goes wrong is one line that names the remedy."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

import dualhook
from dualhook.cli import main

I, O, N = 6, 3, 24

MODELS = """
from torch import nn

class Net(nn.Module):
    def __init__(self, hidden=8):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, hidden), nn.Linear(hidden, 3)
    def forward(self, x, scale=1.0):
        return self.fc2(self.fc1(x * scale).relu())

class Normed(Net):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(6)
    def forward(self, x):
        return super().forward(self.norm(x))

class Tied(Net):
    def __init__(self):
        super().__init__()
        self.same = self.fc2

def wide(): return Net(hidden=9)
def leaves(): raise SystemExit(0)
def broken(): raise ValueError("the data is\\nnot there")
def empty(): return nn.Sequential(nn.Linear(2, 2))
text = "no model"
def no_model(): return text
"""


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(I, 8), nn.Linear(8, O)

    def forward(self, x):
        return self.fc2(self.fc1(x).relu())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A memory ``run``, inputs and models, as they lie beside a user's script."""
    folder = tmp_path_factory.mktemp("cli")
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(N, I, generator=generator), torch.arange(N) % O
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    recorder = dualhook.instrument(model, folder / "run", verbose=False)
    for _ in range(4):
        for rows in torch.arange(N).split(8):
            recorder.batch(samples=rows)
            optimizer.zero_grad()
            F.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
    recorder.close().add_column("label", [f"class {label}" for label in labels.tolist()])
    queries = torch.randn(2, I, generator=generator)
    np.save(folder / "queries.npy", queries.numpy())
    save_file({"x": queries, "scale": torch.ones(())}, folder / "queries.safetensors")
    save_file({"norm.weight": torch.full((I,), 2.0), "norm.bias": torch.zeros(I)}, folder / "norm.safetensors")
    (folder / "cli_models.py").write_text(MODELS, encoding="utf-8")
    return folder


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Runs a command in that folder; returns exit status, output, error output."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def call(*arguments):
        status = main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return call


def attend(*more, model="cli_models:Net", inputs="queries.npy"):
    return ("attend", "run", "--model", model, "--inputs", inputs, *more)


@pytest.fixture
def asked(folder):
    memory = dualhook.load(folder / "run")
    model = Net()
    model.load_state_dict(memory.state_dict())
    return memory.attend(model, torch.from_numpy(np.load(folder / "queries.npy")))


def same_rows(rows, table):
    """JSON rows against a table, floats compared as floats: JSON keeps all their digits."""
    assert [list(row) for row in rows] == [table.columns] * len(table)
    assert rows == list(table)


def test_info_json_agrees_with_the_memory(run, folder):
    status, out, _ = run("info", "run", "--json")
    memory, found = dualhook.load(folder / "run"), json.loads(out)
    assert status == 0
    assert (found["steps"], found["samples"], found["columns"]) == (memory.steps, N, memory.columns)
    assert found["bytes"] == sum(path.stat().st_size for path in (folder / "run" / "segments").iterdir())
    same_rows(found["layers"], memory.info())


def test_info_prints_the_table(run, folder):
    status, out, err = run("info", "run")
    assert (status, err) == (0, "")
    assert "fc1" in out
    assert "12 steps" in out


def test_verify_passes_and_agrees_with_the_memory(run, folder):
    status, out, _ = run("verify", "run", "--json")
    report, found = dualhook.load(folder / "run").verify(), json.loads(out)
    assert (status, found["passed"], found["tolerance"]) == (0, True, 1e-5)
    assert found["max_error"] == report.max_error
    same_rows(found["layers"], report)


@pytest.mark.parametrize("tolerance", ["1e-12", "0", "nan"])
def test_verify_fails_with_status_1_unless_the_error_is_below_the_tolerance(run, tolerance):
    status, out, _ = run("verify", "run", "--tolerance", tolerance)
    assert status == 1
    assert "FAILED" in out


def test_verify_fails_on_nan(run, folder, monkeypatch):
    report = dualhook.load(folder / "run").verify()
    spoilt = type(report)({"layer": report["layer"], "error": [math.nan, 0.0]})
    monkeypatch.setattr(dualhook.DualMemory, "verify", lambda self: spoilt)
    status, out, _ = run("verify", "run", "--json")
    assert status == 1
    found = json.loads(out, parse_constant=pytest.fail)  # NaN is not JSON
    assert (found["max_error"], found["layers"][0]["error"]) == (None, None)


@pytest.mark.parametrize("by", ["contribution", "abs_weight"])
@pytest.mark.parametrize("largest", [True, False])
def test_attend_json_agrees_with_the_memory(run, asked, by, largest):
    direction = () if largest else ("--smallest",)
    status, out, err = run(*attend("--top", 3, "--by", by, "--sum-by", "label", "--json", *direction))
    found = json.loads(out)
    assert (status, err) == (0, "")
    assert (found["step"], found["queries"]) == (12, 2)
    same_rows(found["top"], asked.top(3, by=by, largest=largest))
    same_rows(found["totals"], asked.sum_by("label"))
    same_rows(found["receipt"], asked.receipt)


def test_attend_takes_layers_and_target(run, folder):
    memory, model = dualhook.load(folder / "run"), Net()
    model.load_state_dict(memory.state_dict())
    inputs = torch.from_numpy(np.load(folder / "queries.npy"))
    _, out, _ = run(*attend("--layers", "fc2", "--target", 1, "--json"))
    same_rows(json.loads(out)["top"], memory.attend(model, inputs, target=1, layers="fc2").top(10))


def test_attend_previews_and_keeps_what_a_replay_finds(run, folder):
    model = Net()
    with dualhook.instrument(model, folder / "adam", verbose=False, overwrite=True) as recorder:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(12):
            optimizer.zero_grad()
            F.cross_entropy(model(torch.randn(4, I)), torch.randint(0, O, (4,))).backward()
            optimizer.step()
    memory = recorder.close()
    model.load_state_dict(memory.state_dict())
    inputs = torch.from_numpy(np.load(folder / "queries.npy"))
    ask = ("attend", "adam", "--model", "cli_models:Net", "--inputs", "queries.npy", "--json")
    for method in ("exact", "preview"):
        status, out, err = run(*ask, "--method", method)
        assert (status, err) == (0, "")
        same_rows(json.loads(out)["top"], memory.attend(model, inputs, method=method).top(10))
    assert not (folder / "adam" / "answers").exists()
    _, out, _ = run(*ask, "--cache")
    assert len(list((folder / "adam" / "answers").iterdir())) == 2
    assert run(*ask, "--cache")[1] == out


def influence(*more, model="cli_models:Net", inputs="queries.npy"):
    return ("influence", "run", "--model", model, "--inputs", inputs, *more)


@pytest.mark.parametrize("method", ["decayed", "cosine", "contribution"])
def test_influence_agrees_with_the_memory(run, folder, method):
    memory, model = dualhook.load(folder / "run"), Net()
    model.load_state_dict(memory.state_dict())
    inputs = torch.from_numpy(np.load(folder / "queries.npy"))
    asked = {"method": method, "of": "loss", "target": 1, "layers": "fc2"}
    expected = memory.influence(model, inputs, cache=False, **asked)
    words = ("--method", method, "--of", "loss", "--target", 1, "--layers", "fc2", "--top", 3, "--sum-by", "label")
    status, out, err = run(*influence(*words, "--no-cache", "--json"))
    found = json.loads(out)
    assert (status, err) == (0, "")
    assert not (folder / "run" / "answers").exists()
    same_rows(found["top"], expected.top(3))
    same_rows(found["bottom"], expected.bottom(3))
    same_rows(found["totals"], expected.sum_by("label"))
    assert (found["method"], found["of"], found["per"], found["queries"]) == (method, "loss", "sample", 2)
    assert found["meaning"] == expected.meaning
    _, out, _ = run(*influence(*words, "--no-cache"))
    assert out.count(expected.meaning) == 1
    assert out.endswith(f"{expected.meaning}\n")
    assert "most estimated influence on the loss" in out
    assert "least estimated influence on the loss" in out


def test_suspects_agree_with_the_memory(run, folder):
    expected = dualhook.load(folder / "run").suspects(5)
    status, out, err = run("suspects", "run", "-k", 5, "--json")
    assert (status, err) == (0, "")
    same_rows(json.loads(out)["suspects"], expected)
    assert run("suspects", "run", "-k", 5)[1] == f"{expected.to_text()}\n"


def test_attend_takes_named_tensors(run):
    _, plain, _ = run(*attend("--json"))
    _, named, _ = run(*attend("--json", inputs="queries.safetensors"))
    assert json.loads(plain) == json.loads(named)


def test_attend_prints_every_row_it_was_asked_for(run, asked):
    status, out, _ = run(*attend("--top", 30))
    assert status == 0
    assert "more rows" not in out
    rows = [line.split() for line in out.splitlines() if line.split()[1:2] in (["fc1"], ["fc2"])]
    assert len(rows) == 2 * 2 * 30 + 2 * 2  # top and receipt, of two queries in two layers


def test_other_parameters_come_from_the_weights_file(run, folder):
    status, out, err = run(*attend("--json", "--weights", "norm.safetensors", model="cli_models:Normed"))
    assert (status, err) == (0, "")
    memory, model = dualhook.load(folder / "run"), sys.modules["cli_models"].Normed()
    model.load_state_dict(memory.state_dict(), strict=False)
    nn.init.constant_(model.norm.weight, 2.0)
    same_rows(json.loads(out)["top"], memory.attend(model, torch.from_numpy(np.load("queries.npy"))).top(10))


def test_parameters_that_nothing_provides_are_named_in_one_line(run):
    status, _, err = run(*attend(model="cli_models:Normed"))
    assert status == 0
    assert err.count("\n") == 1
    assert "warning" in err
    assert "norm.weight, norm.bias" in err
    assert "fc1" not in err


def test_tied_weights_are_not_reported_as_missing(run):
    status, _, err = run(*attend(model="cli_models:Tied"))
    assert (status, err) == (0, "")


@pytest.mark.parametrize("name", ["fc2.weight", "same.weight"])
def test_the_memory_wins_over_the_weights_file_also_where_weights_are_tied(run, folder, name):
    save_file({name: torch.zeros(O, 8)}, folder / "zeros.safetensors")
    with_file = run(*attend("--json", "--weights", "zeros.safetensors", model="cli_models:Tied"))
    assert with_file == run(*attend("--json", model="cli_models:Tied"))


BAD = {
    ("info", "nowhere"): "dualhook.instrument",
    ("verify", "."): "dualhook.json",
    ("verify", "run", "--tolerance", "small"): "verify --help",
    ("frobnicate",): "'attend'",
    ("attend", "run"): "--model",
    attend(model="cli_models"): "MODULE:CALLABLE",
    attend(model="no_such_module:Net"): "no_such_module",
    attend(model="cli_models:Nothing"): "Nothing",
    attend(model="cli_models:text"): "not callable",
    attend(model="cli_models:no_model"): "torch.nn.Module",
    attend(model="cli_models:broken"): "the data is not there",
    attend(model="cli_models:leaves"): "SystemExit",
    attend(model="cli_models:wide"): "expected the model that was recorded",
    attend(model="cli_models:empty"): "expected the recorded model",
    attend(inputs="missing.npy"): "missing.npy",
    attend(inputs="cli_models.py"): ".safetensors",
    attend(inputs="text.npy"): "numpy.save",
    attend(inputs="objects.npy"): "numpy.save",
    attend(inputs="narrow.npy"): "expected 6",
    attend(inputs="text.safetensors"): "safetensors",
    attend("--weights", "missing.safetensors"): "missing.safetensors",
    attend("--top", "0"): "at least 1",
    attend("--by", "size"): "abs_contribution",
    attend("--layers", "fc7"): "did you mean",
    attend("--sum-by", "colour"): "add_column",
    attend("--target", "7"): "from 0 to 2",
    influence("--per", "token", "--method", "cosine"): "per='sample'",
    influence("--method", "exact"): "invalid choice",
    influence("--sum-by", "colour", "--method", "cosine"): "add_column",
    ("suspects", "run", "-k", "0"): "at least 1",
    ("demo", "--out", "."): "--out",
    ("demo", "--epochs", "0"): "at least 1",
}


@pytest.mark.parametrize(("arguments", "remedy"), BAD.items(), ids=lambda part: str(part)[:60])
def test_what_goes_wrong_is_one_line_with_the_remedy(run, folder, arguments, remedy):
    (folder / "text.npy").write_text("no array")
    (folder / "text.safetensors").write_text("no tensors")
    np.save(folder / "objects.npy", np.array([{}, {}], dtype=object))
    np.save(folder / "narrow.npy", np.zeros((2, 4), dtype=np.float32))
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("dualhook: error: ")
    assert err.count("\n") == 1
    assert remedy in err


OPTIONS = {
    "demo": ["--out", "--epochs", "--seed", "dualhook-demo"],
    "info": ["PATH", "--json"],
    "verify": ["PATH", "--json", "--tolerance", "1e-05"],
    "attend": ["PATH", "--model", "--inputs", "--weights", "--target", "--top", "--by", "--smallest", "--layers",
               "--sum-by", "--json", "abs_weight"],
    "influence": ["PATH", "--model", "--inputs", "--weights", "--target", "--of", "--method", "--per", "--top",
                  "--layers", "--sum-by", "--no-cache", "--json", "decayed"],
    "suspects": ["PATH", "-k", "--json"],
}  # fmt: skip


@pytest.mark.parametrize("command", OPTIONS)
def test_help_names_every_option_and_has_an_example(run, capsys, command):
    with pytest.raises(SystemExit) as stopped:
        run(command, "--help")
    out = capsys.readouterr().out
    assert stopped.value.code == 0
    assert all(option in out for option in OPTIONS[command])
    assert f"  dualhook {command}" in out.partition("example")[2]


def test_without_a_command_the_help_is_shown(run):
    status, out, err = run()
    assert (status, out) == (2, "")
    assert all(command in err for command in OPTIONS)


def test_version(run, capsys):
    with pytest.raises(SystemExit) as stopped:
        run("--version")
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"dualhook {dualhook.__version__}\n"


def test_the_package_alone_imports_neither_the_command_line_nor_the_demo():
    script = """
        import sys, dualhook
        heavy = {"dualhook.cli", "dualhook.demo", "dualhook.data", "matplotlib", "pandas"} & set(sys.modules)
        assert not heavy, heavy
        import dualhook.cli
        assert not {"dualhook.demo", "matplotlib", "pandas"} & set(sys.modules)
        import dualhook.demo
        assert "dualhook.demo" in sys.modules  # the test can fail
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)


def test_a_reader_that_has_seen_enough_is_no_error(folder):
    command = f"{sys.executable} -c 'import sys; from dualhook.cli import main; sys.exit(main())' attend run"
    command += " --model cli_models:Net --inputs queries.npy --top 200 | head -1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], cwd=folder, capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1


def test_compact_says_what_it_has_made_of_the_memory(folder, tmp_path, capsys):
    path = shutil.copytree(folder / "run", tmp_path / "run")
    assert main(["compact", str(path), "--segment-bytes", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["segments_before"], found["segments"], found["dropped"]) == (1, 12, {})
    assert found["bytes"] > found["bytes_before"] == dualhook.load(folder / "run").nbytes
    assert main(["compact", str(path), "--dtype", "float16", "--min-share", "0.05"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("12 segments of ")
    assert " are now 1 of 0.0 MB" in text
    assert re.search(r"rows dropped, now and before: \d+ of fc1", text)
    assert main(["verify", str(path)]) == 1
    assert main(["compact", str(path), "--dtype", "int8"]) == 0
    capsys.readouterr()
    assert main(["info", str(path)]) == 0
    assert "1 segments of rows in 8 bits" in capsys.readouterr().out
    assert main(["compact", str(path), "--min-share", "2"]) == 2
    assert "min_share=2.0: expected a share" in capsys.readouterr().err
