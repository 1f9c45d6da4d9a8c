"""Makes the fuzzer's corpus from the golden memory: ``python fuzz/make_corpus.py``."""

from __future__ import annotations

import json
from pathlib import Path

HERE = Path(__file__).parent
GOLDEN = HERE.parent / "tests" / "store" / "golden" / "v1"
COMMANDS = (
    "info MEMORY",
    "info MEMORY --json",
    "verify MEMORY --tolerance 1e-6 --deep",
    "compact MEMORY --dtype float16 --min-share 1e-5 --segment-bytes 100",
    "attend MEMORY --model json:loads --inputs images.npy --top 3 --by weight --smallest --sum-by label --json",
    "attend MEMORY --model collections:OrderedDict --inputs x.safetensors --layers 0 2 --target 1 --method preview",
    "--version",
    "verify --help",
)


def parts(file: Path) -> tuple[bytes, bytes, bytes]:
    """A safetensors file's header, the JSON text in its metadata, and its tensors."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length]
    return header, json.loads(header)["__metadata__"]["dualhook"].encode(), data[8 + length :]


def main() -> None:
    segments, origins = (sorted((GOLDEN / folder).iterdir()) for folder in ("segments", "origin"))
    manifest = (GOLDEN / "dualhook.json").read_bytes()
    plain = {key: value for key, value in json.loads(manifest).items() if key != "checksum"}
    ranked = plain | {"version": 2, "ranks": 2}
    compacted = plain | {"version": 5, "generation": 1, "dropped": {"0": 3}}
    corpus = {
        "manifest": [manifest, *(json.dumps(one).encode() for one in (plain, ranked, compacted))],
        "segment": [parts(file)[0] for file in segments],
        "header": [parts(file)[1] for file in segments],
        "ledger": [parts(file)[2] for file in segments],
        "origin": [parts(file)[1] for file in origins],
        "cli": [command.replace(" ", "\0").encode() for command in COMMANDS],
    }
    for target, inputs in corpus.items():
        folder = HERE / "corpus" / target
        folder.mkdir(parents=True, exist_ok=True)
        for number, data in enumerate(inputs):
            (folder / f"{number:02d}").write_bytes(data)


if __name__ == "__main__":
    main()
