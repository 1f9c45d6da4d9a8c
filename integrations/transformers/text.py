"""The training text that a prediction attends to.

.. code-block:: python

    passages = Passages(dataset, tokenizer)  # the tokenised data set that the model was trained on
    inputs = tokenizer("And God said", return_tensors="pt")
    attention = memory.attend(model, **inputs)
    print(passages.top(attention))  # …and God «said», Let there be light…
    print(passages.top(memory.influence(model, **inputs, per="token")))

A pattern's sample is the row of the data set, its position the token that the layer has read: the gradient there is
that of the tokens after it. Rows have to be as the model has read them, padding on the right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dualhook import Attention, DualHookError, DualMemory, Influence, Table

__all__ = ["Passages", "texts_of"]

Criterion = Literal["weight", "abs_weight", "contribution", "abs_contribution"]
TOTALS = ("weight", "abs_weight", "contribution", "abs_contribution")

CHARACTER = 4  # tokens that one character can be split over: the bytes it has in UTF-8
NOTHING = -1  # where a passage goes beyond its row


class Passages:
    """The passages of a tokenised data set, by the dataset row and position of a pattern.

    Args:
        dataset: anything with a length and rows by index: mappings with the token ids in ``column`` (a
            ``datasets.Dataset``, a list of dicts), tuples that begin with them, or the ids themselves.
        tokenizer: the tokenizer that made it.
        column: where mappings have their token ids; of an encoder-decoder's decoder, the labels.
        width: how many tokens to show on either side.

    Raises:
        DualHookError: a data set without length, without the column, or with rows of something else.
    """

    def __init__(
        self, dataset: Any, tokenizer: PreTrainedTokenizerBase, *, column: str = "input_ids", width: int = 12
    ) -> None:
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise DualHookError(
                f"{type(dataset).__name__} has no length and rows by index: expected a map-style data set"
            )
        if width < 0:
            raise DualHookError(f"width={width}: expected 0 or more tokens")
        self.width = width
        self.column = column
        self._dataset = dataset
        self._tokenizer = tokenizer
        self._tokens = len(tokenizer)
        if len(dataset):
            self._ids(0)

    def __len__(self) -> int:
        return len(self._dataset)

    def around(self, sample: int, position: int) -> str:
        """The text around a token with the token marked: ``…the LORD «said» unto Moses…``, line ends as ⏎.

        A character that is split over several tokens is marked whole.

        Raises:
            DualHookError: no such row or position, or tokens that the tokenizer does not know.
        """
        ids = self._ids(sample, position)
        while len(ids) > position + 1 and ids[-1] == self._tokenizer.pad_token_id:
            ids = ids[:-1]
        (first, last), (before, token, after) = self._cut(ids, sample, position)
        core = token.strip() or token
        lead, _, trail = token.partition(core)
        text = f"{before}{lead}«{core}»{trail}{after}".replace("\n", "⏎").strip()
        return f"{'…' if first else ''}{text}{'…' if last < len(ids) else ''}"

    def token(self, sample: int, position: int) -> str:
        """The token itself as text, spaces included.

        Raises:
            DualHookError: as :meth:`around`.
        """
        return self._cut(self._ids(sample, position), sample, position)[1][1]

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """What each of these tokens adds to the text; of a character's tokens, the last one adds it.

        Raises:
            DualHookError: a token that the tokenizer does not know.
        """
        tokens = torch.as_tensor(ids, dtype=torch.int64)
        return texts_of(self._tokenizer, tokens[:0], tokens) if len(tokens) else []

    def top(
        self,
        answer: Attention | Influence,
        k: int = 10,
        *,
        by: Criterion | None = None,
        largest: bool = True,
        layers: str | Iterable[str] | None = None,
    ) -> Table:
        """The ``k`` passages that each query attends to most (``largest=False``: least) by a criterion.

        All patterns of a token (layer by layer, epoch by epoch) count together, and so do passages of the same
        tokens in several places of the data set: the largest of those is named. Columns query, rank, sample, position,
        token, passage, weight, contribution, repeats (patterns summed) and places (where the passage stands). Exact:
        takes some 50 bytes for every query, layer and token that was trained on.

        Of an influence ``per="token"``: the passages that have raised (``largest=False``: lowered) it most, with the
        column influence in place of weight, contribution and repeats. ``by`` is then left out; default of an attention
        is ``"contribution"``.

        Raises:
            DualHookError: an unknown criterion or layer, patterns without a sample, ones of another data set, or an
                influence of whole samples.
        """
        tokens = self._tokens_of(answer, layers)
        criterion = tokens.criterion(by)
        if not isinstance(k, int) or k < 1:
            raise DualHookError(f"k={k!r}: expected at least 1")
        sample, position, rows = tokens.sample, tokens.position, list[tuple[Any, ...]]()
        windows = np.concatenate(list(self._windows(sample, position)))
        _, passage = np.unique(windows, return_inverse=True)
        places = np.bincount(passage)
        for query in range(len(answer)):
            rank = tokens.values(query, criterion) * (1 if largest else -1)
            total = np.bincount(passage, rank)
            order = np.lexsort((-rank, -total[passage]))  # the largest passage first, in it the largest place
            best = order[np.sort(np.unique(passage[order], return_index=True)[1])][:k]
            numbers = [np.bincount(passage, tokens.values(query, name)) for name in tokens.shown]
            for number, at in enumerate(best.tolist()):
                row, column, kind = int(sample[at]), int(position[at]), passage[at]
                texts = self.token(row, column), self.around(row, column)
                told = (float(values[kind]) for values in numbers)
                rows.append((query, number + 1, row, column, *texts, *told, int(places[kind])))
        names = ("query", "rank", "sample", "position", "token", "passage", *tokens.shown, "places")
        columns: dict[str, Any] = {name: [row[n] for row in rows] for n, name in enumerate(names)}
        if "patterns" in columns:
            counted = {"repeats": np.asarray(columns.pop("patterns"), dtype=np.int64)}
            columns |= counted | {"places": columns.pop("places")}
        return Table(
            columns,
            title=f"the {k} passages with the {'largest' if largest else 'smallest'} {criterion}, per query",
            footer=tokens.footer,
            bars=(("passage",), criterion.removeprefix("abs_")),
        )

    def documents(
        self,
        answer: Attention | Influence,
        column: str = "document",
        *,
        layers: str | Iterable[str] | None = None,
    ) -> Table:
        """Totals per document, by a column of the data set: one value per row, or one per token in packed rows.

        Columns query, the column, weight, abs_weight, contribution, abs_contribution, patterns; of an influence
        ``per="token"`` query, the column, influence.

        Raises:
            DualHookError: no such column, one that does not fit the tokens, patterns of another data set, or an
                influence of whole samples (which itself has ``sum_by``).
        """
        tokens = self._tokens_of(answer, layers)
        named: list[Any] = []
        for row, places in _by_row(tokens.sample, tokens.position):
            values = self._column(row, column)
            if isinstance(values, (str, int, float)):
                named += [values] * len(places)
            elif len(values) <= int(places.max()):
                raise DualHookError(
                    f"column {column!r} has {len(values)} values in row {row}, which was trained on up to position "
                    f"{int(places.max())}: expected one value for the row, or one per token"
                )
            else:
                named += [values[at] for at in places.tolist()]
        labels, group = np.unique(np.asarray(named), return_inverse=True)
        queries, size = range(len(answer)), len(labels)
        totals = {
            name: np.concatenate([np.bincount(group, tokens.values(q, name), minlength=size) for q in queries])
            for name in tokens.names
        }
        if "patterns" in totals:
            totals["patterns"] = totals["patterns"].astype(np.int64)
        head = {"query": np.repeat(np.arange(len(answer)), size), column: np.tile(labels, len(answer))}
        bars = ((column,), tokens.criterion(None))
        return Table(head | totals, title=f"totals by {column}", footer=tokens.footer, bars=bars)

    def add_documents(self, memory: DualMemory, column: str = "document") -> None:
        """Give the memory the data set's own column, one value per row, for ``attention.sum_by(column)``.

        Raises:
            DualHookError: no such column, values per token (:meth:`documents` takes them), or a data set of fewer rows
                than the memory has samples.
        """
        values = [self._column(row, column) for row in range(len(self))]
        if any(not isinstance(value, (str, int, float)) for value in values):
            raise DualHookError(
                f"column {column!r} has no single value per row: passages.documents(attention, {column!r}) sums values "
                "per token"
            )
        memory.add_column(column, values)

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _ids(self, sample: int, position: int | None = None) -> Any:
        """The token ids [token] of a row that has this position."""
        if not 0 <= sample < len(self):
            raise DualHookError(
                f"sample {sample}: the data set has rows 0 to {len(self) - 1}: expected the one that was trained on"
            )
        row = self._dataset[int(sample)]
        if isinstance(row, Mapping):
            row = self._column(sample, self.column, row)
        elif isinstance(row, (tuple, list)) and len(row) and not isinstance(row[0], (int, np.integer)):
            row = row[0]
        ids = row.numpy() if isinstance(row, Tensor) else np.asarray(row)
        if ids.ndim != 1 or (len(ids) and ids.dtype.kind not in "iu"):
            raise DualHookError(
                f"row {sample} of the data set holds {ids.dtype} of shape {list(ids.shape)}: expected token ids [token]"
            )
        if position is not None and not 0 <= position < len(ids):
            raise DualHookError(
                f"position {position}: row {sample} of the data set has {len(ids)} tokens: expected the rows as they "
                "were trained on, after packing and truncation, padded on the right"
            )
        return ids

    def _column(self, sample: int, column: str, row: Any = None) -> Any:
        row = self._dataset[int(sample)] if row is None else row
        if not isinstance(row, Mapping) or column not in row:
            there = ", ".join(map(str, row)) if isinstance(row, Mapping) else "no columns"
            raise DualHookError(f"the data set has no column {column!r}: its rows have {there}")
        return row[column]

    def _cut(self, ids: Any, sample: int, position: int) -> tuple[tuple[int, int], tuple[str, str, str]]:
        """First and last token of a passage, and its text before, in and after the token."""
        first, last = max(0, position - self.width), min(len(ids), position + self.width + 1)
        start, stop = max(0, first - CHARACTER), min(len(ids), last + CHARACTER)
        whole = self._decoded(ids[start:stop], sample)

        def edge(place: int, way: int) -> int:
            """The next place that no character is split at: where the text up to it goes on to be the whole."""
            for moved in range(CHARACTER):
                at = place + moved * way
                if not start < at < stop or whole.startswith(self._decoded(ids[start:at], sample)):
                    return min(max(at, start), stop)
            return place

        edges = edge(first, -1), edge(position, -1), edge(position + 1, 1), edge(last, 1)
        cut = [len(self._decoded(ids[start:at], sample)) for at in edges]
        before, token, after = (whole[a:b] for a, b in pairwise(cut))
        return (edges[0], edges[3]), (before, token, after)

    def _decoded(self, ids: Any, sample: int) -> str:
        known = ids[ids >= 0]  # labels leave out tokens with negative ids
        if len(known) and int(known.max()) >= self._tokens:
            raise DualHookError(
                f"row {sample} of the data set holds token {int(known.max())}, the tokenizer has {self._tokens}: "
                "expected the tokenizer that the data set was made with"
            )
        return str(
            self._tokenizer.decode(known.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )

    def _tokens_of(self, answer: Attention | Influence, layers: str | Iterable[str] | None) -> _Tokens:
        """The tokens that an answer tells of."""
        if isinstance(answer, Influence):
            return _tokens_of_influence(answer, layers)
        table = answer.sum_by(("sample", "position"), layers=layers)
        known = table["sample"] >= 0
        if not known.any():
            raise DualHookError(
                "no pattern knows its sample: expected a run recorded with recorder.track(loader) or "
                "recorder.batch(samples=...)"
            )
        sums = {name: table[name][known] for name in table.columns}
        length = int(sums["position"].max()) + 1
        token, place = np.unique(sums["sample"] * length + sums["position"], return_inverse=True)

        def values(query: int, name: str) -> Any:
            own = sums["query"] == query
            return np.bincount(place[own], sums[name][own], minlength=len(token))

        shown = ("weight", "contribution", "patterns")
        return _Tokens(token // length, token % length, values, (*TOTALS, "patterns"), shown)

    def _windows(self, sample: Any, position: Any) -> Iterator[Any]:
        """A number for the tokens around each position; the same for the same tokens. Positions stand row by row."""
        factors = np.random.default_rng(0).integers(1, 2**62, 2 * self.width + 1) * 2 + 1
        for row, places in _by_row(sample, position):
            ids = self._ids(row, int(places.max())).astype(np.int64)
            padded = np.pad(ids, self.width, constant_values=NOTHING)
            yield (sliding_window_view(padded, len(factors))[places] * factors).sum(1)


@dataclass(frozen=True)
class _Tokens:
    """The tokens of an answer, row by row: ``sample`` and ``position`` [u], and ``values(query, name)`` [u] of each.

    ``names`` are those of all values, ``shown`` of those that passages are listed with.
    """

    sample: Any
    position: Any
    values: Callable[[int, str], Any]
    names: tuple[str, ...]
    shown: tuple[str, ...]
    footer: str = ""

    def criterion(self, by: str | None) -> str:
        """What ranks passages: ``by``, or the default where it is None.

        Raises:
            DualHookError: something else than totals of the answer.
        """
        there = [name for name in self.names if name != "patterns"]
        if by is not None and by not in there:
            raise DualHookError(f"by={by!r}: expected one of {', '.join(there)}")
        return by or ("contribution" if "contribution" in there else there[0])


def _tokens_of_influence(influence: Influence, layers: str | Iterable[str] | None) -> _Tokens:
    """The tokens of an influence, through some of its layers or all of them."""
    if influence.positions is None:
        raise DualHookError("this influence is one of whole samples: expected memory.influence(..., per='token')")
    names = influence.layers if layers is None else [layers] if isinstance(layers, str) else list(layers)
    scores = torch.stack([influence.of_layer(name) for name in names]).sum(0)

    def values(query: int, name: str) -> Any:
        return scores[query].numpy()

    told = ("influence",)
    return _Tokens(influence.samples, influence.positions, values, told, told, influence.meaning)


def _by_row(sample: Any, position: Any) -> Iterator[tuple[int, Any]]:
    """The positions [place] of every row; rows are ascending."""
    rows, firsts = np.unique(sample, return_index=True)
    return zip(rows.tolist(), np.split(position, firsts[1:]), strict=True)


def texts_of(tokenizer: PreTrainedTokenizerBase, before: Tensor, new: Tensor) -> list[str]:
    """What each new token adds to the text; of a character's tokens, the last one adds it."""
    if int(new.max()) >= len(tokenizer):
        raise DualHookError(
            f"the model has written token {int(new.max())}, the tokenizer has {len(tokenizer)}: expected the tokenizer "
            "that the model was trained with"
        )

    def decoded(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    ids = before.tolist()
    done, texts = decoded(ids), list[str]()
    for token in new.tolist():
        ids.append(token)
        text = decoded(ids)
        waits = text.endswith("\N{REPLACEMENT CHARACTER}") and len(texts) + 1 < len(new)
        texts.append("" if waits else text[len(done) :])
        done = done if waits else text
    return texts
