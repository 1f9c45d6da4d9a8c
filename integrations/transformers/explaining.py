"""What a language model writes, token by token with the training passages that it attends to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dualhook.integrations.transformers.text import Passages, texts_of
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dualhook import Attention, DualHookError, DualMemory, Table

__all__ = ["Explanation", "explain"]


class Explanation:
    """A continuation and what each of its tokens attends to; prints as text.

    ``tokens`` has columns query, position (of the token before it), id, token, logit, probability and explained (the
    least share that any layer's patterns explain); ``passages`` is the table of :meth:`Passages.top`, without a data
    set that of ``attention.top``. Further questions go to ``attention``, whose queries are the tokens.
    """

    def __init__(self, prompt: str, text: str, tokens: Table, passages: Table, attention: Attention) -> None:
        self.prompt = prompt
        self.text = text
        self.tokens = tokens
        self.passages = passages
        self.attention = attention

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        lines = [f"{self.prompt} ▸ {self.text}"]
        for token in self.tokens:
            lines.append(
                f"\n«{token['token']}»  logit {token['logit']:.4g}, probability {token['probability']:.3g}, "
                f"explained {token['explained']:.6f}"
            )
            for row in self.passages.where(query=token["query"]):
                if "passage" in row:
                    times = f", {row['places']} places" if row["places"] > 1 else ""
                    where = f"sample {row['sample']}, position {row['position']}, {row['repeats']} patterns{times}"
                    lines.append(f"  {row['rank']:>2}  {row['contribution']:+.4g}  {row['passage']}  ({where})")
                else:
                    where = f"sample {row['sample']}, position {row['position']}, step {row['step']}"
                    lines.append(f"  {row['rank']:>2}  {row['contribution']:+.4g}  {row['layer']}: {where}")
        return "\n".join(lines)


def explain(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    memory: DualMemory,
    prompt: str,
    *,
    max_new_tokens: int = 8,
    layers: str | Iterable[str] | None = None,
    k: int = 5,
    passages: Passages | None = None,
    **generate: Any,
) -> Explanation:
    """Continue a prompt, greedily unless ``generate`` (what ``model.generate`` takes) says otherwise, and explain it.

    The finished text is read once more, all tokens together, with one backward pass for each. ``layers`` are those to
    ask, ``k`` how many passages to list per token. An encoder-decoder is asked about what its decoder writes.

    Raises:
        DualHookError: a prompt without tokens, beyond the model's context or from another tokenizer, or a continuation
            of no tokens or of several sequences.
    """
    layers = layers if layers is None or isinstance(layers, str) else list(layers)
    read = tokenizer(prompt, return_tensors="pt")
    read = {name: read[name].to(model.device) for name in ("input_ids", "attention_mask") if name in read}
    ids, decodes = read["input_ids"], bool(model.config.is_encoder_decoder)
    _check(ids, model, tokenizer, 0 if decodes else max_new_tokens)
    settings = {"do_sample": False, "pad_token_id": _padding(tokenizer), "return_dict_in_generate": False}
    generation: Any = model  # its mixin is not typed
    training = [module for module in model.modules() if module.training]
    try:
        model.train(False)
        written = generation.generate(**read, max_new_tokens=max_new_tokens, **(settings | generate))
    finally:
        for module in training:
            module.training = True
    begun = 1 if decodes else ids.shape[1]
    if not isinstance(written, Tensor) or len(written) != 1 or written.shape[1] <= begun:
        raise DualHookError("expected model.generate to write one sequence with at least one new token")
    new = written[0, begun:]
    inputs = read | {"decoder_input_ids": written[:, :-1]} if decodes else {"input_ids": written[:, :-1]}
    places = range(begun - 1, written.shape[1] - 1)
    attention = memory.attend(model, inputs, positions=places, target=new, layers=layers)
    table = attention.top(k) if passages is None else passages.top(attention, k)
    queries, receipt = attention.queries, attention.receipt
    texts = texts_of(tokenizer, ids[0, :0] if decodes else ids[0], new)
    columns: dict[str, Any] = {
        "query": queries["query"],
        "position": queries["position"],
        "id": queries["target"],
        "token": texts,
        "logit": queries["score"],
        "probability": queries["probability"],
        "explained": [float(receipt.where(query=query)["explained"].min()) for query in range(len(attention))],
    }
    tokens = Table(columns, title=f"tokens after {prompt!r}", bars=(("token",), "probability"))
    return Explanation(prompt, "".join(texts).strip(), tokens, table, attention)


def _check(ids: Tensor, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, more: int) -> None:
    """The prompt and ``more`` tokens are something that the model can read."""
    vocabulary, context = model.config.vocab_size, getattr(model.config, "max_position_embeddings", None)
    if not ids.numel():
        raise DualHookError("the prompt has no tokens: expected some text to continue")
    if int(ids.max()) >= vocabulary:
        raise DualHookError(
            f"the tokenizer ({len(tokenizer)} tokens) makes token {int(ids.max())} of the prompt, the model's "
            f"vocabulary ends at {vocabulary - 1}: expected the tokenizer that the model was trained with"
        )
    if isinstance(context, int) and ids.shape[1] + more > context:
        raise DualHookError(
            f"the prompt has {ids.shape[1]} tokens, and {more} new ones would go beyond the model's context of "
            f"{context}: shorten the prompt or lower max_new_tokens"
        )


def _padding(tokenizer: PreTrainedTokenizerBase) -> Any:
    """What generate asks for, though one sequence needs no padding."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
