"""The ledger's tensor form: entries of consecutive steps to tensors and back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from dualhook.records import FactorVectors, History, LedgerEntry, Mark

__all__ = ["LEDGER", "entries", "fit_vectors", "pack", "unpack"]


LEDGER = ("ledger/entry", "ledger/measured", "ledger/hyper")
NAMES = ("parameters", "optimizers", "hyper", "state")  # what a header lists and the tensors number
FIT = ("step", "row", "column")


def pack(entries: Sequence[LedgerEntry]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a ledger; hyper-parameters are kept once per step, optimiser and parameter group."""
    parameters = _numbered(entry.parameter for entry in entries)
    optimizers = _numbered(entry.optimizer for entry in entries)
    hyper_names = list(_numbered(name for entry in entries for name in entry.hyper))
    state_names = list(_numbered(name for entry in entries for name in entry.state))
    groups: dict[int, int] = {}  # entries of one parameter group share one mapping
    hyper: list[list[float]] = []
    whole: list[list[int]] = []
    for entry in entries:
        if id(entry.hyper) not in groups:
            groups[id(entry.hyper)] = len(hyper)
            hyper.append([entry.hyper.get(name, math.nan) for name in hyper_names])
        names = parameters[entry.parameter], optimizers[entry.optimizer]
        whole.append([entry.step, *names, groups[id(entry.hyper)], int(entry.mark)])
    real = [
        [entry.scale, entry.residual, *(entry.state.get(name, math.nan) for name in state_names)] for entry in entries
    ]
    tensors = {
        "ledger/entry": torch.tensor(whole, dtype=torch.int64).reshape(len(whole), 5),
        "ledger/measured": torch.tensor(real, dtype=torch.float64).reshape(len(real), 2 + len(state_names)),
        "ledger/hyper": torch.tensor(hyper, dtype=torch.float64).reshape(len(hyper), len(hyper_names)),
    }
    header = {
        "parameters": list(parameters),
        "optimizers": list(optimizers),
        "hyper": hyper_names,
        "state": state_names,
    }
    return tensors | _pack_vectors(entries), header


def entries(file: Any, header: Mapping[str, Any]) -> list[LedgerEntry]:
    """The ledger of an open segment, as :func:`pack` was given it."""
    whole, measured = (file.get_tensor(f"ledger/{part}").tolist() for part in ("entry", "measured"))
    groups = [
        {name: value for name, value in zip(header["hyper"], row, strict=True) if not math.isnan(value)}
        for row in file.get_tensor("ledger/hyper").tolist()
    ]
    vectors = {
        (step, parameter): own for parameter in header["parameters"] for step, own in fit_vectors(file, parameter)
    }
    return [
        LedgerEntry(
            step=step,
            parameter=header["parameters"][parameter],
            optimizer=header["optimizers"][optimizer],
            hyper=groups[group],
            state={n: value for n, value in zip(header["state"], state, strict=True) if not math.isnan(value)},
            scale=scale,
            residual=residual,
            mark=Mark(mark),
            vectors=vectors.get((step, header["parameters"][parameter])),
        )
        for (step, parameter, optimizer, group, mark), (scale, residual, *state) in zip(whole, measured, strict=True)
    ]


def fit_vectors(file: Any, parameter: str) -> list[tuple[int, FactorVectors]]:
    """The vectors of a parameter's fitted steps in an open segment, oldest first."""
    prefix = f"fit/{parameter}/"
    if f"{prefix}step" not in set(file.keys()):
        return []
    step, row, column = (file.get_tensor(prefix + part) for part in FIT)
    return [(number, FactorVectors(row[k], column[k])) for k, number in enumerate(step.tolist())]


def _pack_vectors(entries: Sequence[LedgerEntry]) -> dict[str, Tensor]:
    """``fit/<parameter>/…``: step [k], row [k, o] and column [k, i] of the fitted steps that have vectors."""
    tensors: dict[str, Tensor] = {}
    for parameter in _numbered(entry.parameter for entry in entries if entry.vectors is not None):
        own = [(e.step, e.vectors) for e in entries if e.parameter == parameter and e.vectors is not None]
        steps = torch.tensor([step for step, _ in own], dtype=torch.int64)
        vectors = torch.stack([v.row for _, v in own]), torch.stack([v.column for _, v in own])
        tensors |= {f"fit/{parameter}/{part}": values for part, values in zip(FIT, (steps, *vectors), strict=True)}
    return tensors


def unpack(parts: Iterable[tuple[Mapping[str, Tensor], Mapping[str, Any]]]) -> dict[str, History]:
    """The history of every parameter, from the ledgers of consecutive segments."""
    pieces: dict[str, list[History]] = {}
    for tensors, header in _merged(parts):
        entry, measured = tensors["ledger/entry"], tensors["ledger/measured"]
        hyper = tensors["ledger/hyper"][entry[:, 3]]
        for number, parameter in enumerate(header["parameters"]):
            own = entry[:, 1] == number
            pieces.setdefault(parameter, []).append(
                History(
                    parameter,
                    entry[own, 0],
                    tuple(header["optimizers"][index] for index in entry[own, 2].tolist()),
                    {name: hyper[own, column] for column, name in enumerate(header["hyper"])},
                    {name: measured[own, 2 + column] for column, name in enumerate(header["state"])},
                    measured[own, 0],
                    measured[own, 1],
                    entry[own, 4],
                )
            )
    return {parameter: _joined(parameter, histories) for parameter, histories in pieces.items()}


def _merged(
    parts: Iterable[tuple[Mapping[str, Tensor], Mapping[str, Any]]],
) -> Iterator[tuple[Mapping[str, Tensor], Mapping[str, Any]]]:
    """The ledgers of consecutive segments that know the same names as one: there may be very many."""
    for _, group in groupby(parts, key=lambda part: [part[1][name] for name in NAMES]):
        alike = list(group)
        sizes = torch.tensor([0, *(len(tensors["ledger/hyper"]) for tensors, _ in alike)]).cumsum(0).tolist()
        entry = torch.cat([tensors["ledger/entry"] for tensors, _ in alike])
        counts = torch.tensor([len(tensors["ledger/entry"]) for tensors, _ in alike])
        entry[:, 3] += torch.tensor(sizes[:-1]).repeat_interleave(counts)  # rows of ledger/hyper
        whole = {
            name: torch.cat([tensors[name] for tensors, _ in alike]) for name in ("ledger/measured", "ledger/hyper")
        }
        yield {"ledger/entry": entry, **whole}, alike[0][1]


def _joined(parameter: str, histories: Sequence[History]) -> History:
    def named(which: str) -> dict[str, Tensor]:
        names = _numbered(name for history in histories for name in getattr(history, which))
        return {
            name: torch.cat(
                [
                    getattr(history, which).get(name, torch.full((len(history),), math.nan, dtype=torch.float64))
                    for history in histories
                ]
            )
            for name in names
        }

    return History(
        parameter,
        torch.cat([history.step for history in histories]),
        tuple(name for history in histories for name in history.optimizer),
        named("hyper"),
        named("state"),
        torch.cat([history.scale for history in histories]),
        torch.cat([history.residual for history in histories]),
        torch.cat([history.mark for history in histories]),
    )


def _numbered(names: Iterable[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(dict.fromkeys(names))}
