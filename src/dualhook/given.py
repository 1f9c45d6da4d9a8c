"""What the command line is given to ask with: the user's model, weights and inputs."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dualhook.errors import DualHookError, LayerError
from dualhook.memory import DualMemory

__all__ = [
    "build",
    "fill",
    "is_saved_model",
    "read_inputs",
    "read_names",
    "read_numbers",
    "read_passages",
    "tokens_of",
    "warn_of",
]


def build(spec: str) -> nn.Module:
    """Call what ``module:callable`` names, or load the language model that lies in a folder."""
    if is_saved_model(spec):
        return _pretrained("AutoModelForCausalLM", spec, "--model").eval()  # type: ignore[no-any-return]
    module_name, _, attribute = spec.partition(":")
    if not module_name or not attribute:
        raise DualHookError(
            f"--model {spec}: expected MODULE:CALLABLE, such as train:build_model, or a folder that save_pretrained "
            "has written"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
        for name in attribute.split("."):
            found = getattr(found, name)
        model = found()
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise DualHookError(f"--model {spec}: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise DualHookError(f"--model {spec}: expected it to return a torch.nn.Module, got {type(model).__name__}")
    return model


def is_saved_model(model: str) -> bool:
    """Whether a model is given as the folder that its ``save_pretrained`` has written, with all its weights."""
    return (Path(model) / "config.json").is_file()


def fill(model: nn.Module, memory: DualMemory, weights: Path | None) -> list[str]:
    """Load the memory's weights over those of a file; returns what is left as the callable made it."""
    there = model.state_dict(keep_vars=True)
    filled: set[int] = set()  # by identity, and file by file: tied weights have two names
    for values in ({} if weights is None else _read_safetensors(weights), memory.state_dict()):
        for name, value in values.items():
            if name in there and there[name].shape != value.shape:
                raise LayerError(
                    f"{name!r} of the model has shape {list(there[name].shape)}, the weights {list(value.shape)}: "
                    f"expected the model that was recorded at {memory.path}"
                )
        model.load_state_dict(values, strict=False)
        filled |= {id(there[name]) for name in values if name in there}
    return [name for name, value in there.items() if id(value) not in filled]


def warn_of(left: Sequence[str]) -> None:
    """Say on standard error what no file has filled."""
    if left:
        listed = ", ".join(left[:8]) + (f", … ({len(left)} in all)" if len(left) > 8 else "")
        print(
            f"dualhook: warning: neither the memory nor --weights holds {listed}: left as the model was built",
            file=sys.stderr,
        )


def read_inputs(path: Path, model: nn.Module) -> Tensor | dict[str, Tensor]:
    """Inputs from a file, floating-point ones in the model's dtype."""
    if path.suffix == ".npy":
        return _fitting(read_numbers(path, "--inputs"), model)
    if path.suffix == ".safetensors":
        return {name: _fitting(value, model) for name, value in _read_safetensors(path).items()}
    raise DualHookError(
        f"--inputs {path}: expected a .npy file (one array), or .safetensors (named tensors as keyword arguments)"
    )


def tokens_of(prompt: str, tokenizer: str | None, model: nn.Module) -> Tensor | dict[str, Tensor]:
    """A prompt as the model takes it: by argument names, or the ids [1, token] alone."""
    encoded = _tokenizer(tokenizer, "--text")(prompt, return_tensors="pt")
    taken = inspect.signature(model.forward).parameters
    # token types are left out: models that were trained without them may add an embedding for each
    found = {name: encoded[name] for name in ("input_ids", "attention_mask") if name in encoded}
    if all(own.kind in (own.VAR_POSITIONAL, own.VAR_KEYWORD) for own in taken.values()):
        return found
    found = {name: value for name, value in found.items() if name in taken}
    return found if "input_ids" in found else encoded["input_ids"]


def read_passages(path: Path, tokenizer: str | None) -> Any:
    """The training text that patterns come from, to be shown: ``Passages`` of the integration of transformers."""
    loaded = _tokenizer(tokenizer, "--passages")
    try:
        import datasets

        from dualhook.integrations.transformers import Passages
    except ImportError as error:
        raise DualHookError(f"--passages needs datasets and transformers: {error}") from error
    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # of whatever lies there
        raise DualHookError(
            f"--passages {path}: expected a folder that Dataset.save_to_disk has written ({_first_line(error)})"
        ) from error
    if isinstance(found, dict):
        listed = ", ".join(str(path / split) for split in found)
        raise DualHookError(f"--passages {path} holds several splits: expected one of {listed}")
    return Passages(found, loaded)


def _tokenizer(given: str | None, needed_by: str) -> Any:
    if given is None:
        raise DualHookError(f"{needed_by} needs --tokenizer: the folder of the one that the model was trained with")
    return _pretrained("AutoTokenizer", given, "--tokenizer")


def _pretrained(kind: str, given: str, option: str) -> Any:
    """What a class of transformers loads from a folder or name."""
    try:
        import transformers
    except ImportError as error:
        raise DualHookError(f'{option} {given} needs transformers: pip install "dualhook[transformers]"') from error
    try:
        return getattr(transformers, kind).from_pretrained(given)
    except Exception as error:  # configurations, weights and quantisers of all sorts
        raise DualHookError(f"{option} {given} cannot be loaded: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def read_numbers(path: Path, option: str) -> Tensor:
    """An array out of a file that numpy.save has written."""
    try:
        return torch.from_numpy(np.load(path, allow_pickle=False))
    except (ValueError, TypeError, EOFError) as error:
        raise DualHookError(f"{option} {path} holds no array of numbers: write it with numpy.save") from error


def read_names(given: Sequence[str]) -> list[str]:
    """Names as they are given, or the lines of the one file that is."""
    if len(given) == 1 and Path(given[0]).is_file():
        return Path(given[0]).read_text(encoding="utf-8").splitlines()
    return list(given)


def _fitting(value: Tensor, model: nn.Module) -> Tensor:
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return value.to(dtype) if value.is_floating_point() else value


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return dict(load_file(path))
    except SafetensorError as error:
        raise DualHookError(f"{path} is no safetensors file: {error}") from error
