"""Held-out loss, and replies compared with the data: what ``train`` and ``evaluate`` report."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jlora.decoding import generate


@runtime_checkable
class Prompt(Protocol):
    """A prompt's tokens and text, and the reply that the data has for it."""

    @property
    def prompt_ids(self) -> Sequence[int]:
        """The tokens up to where the reply begins."""
        ...

    @property
    def prompt(self) -> str:
        """Their text."""
        ...

    @property
    def reply(self) -> str:
        """The reply in the data."""
        ...


class HeldOut(NamedTuple):
    """Loss over all labelled held-out tokens, in nats a token."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """The exponential of the loss; infinite when that is too large for a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


class Sample(NamedTuple):
    """A prompt, the reply in the data, and the model's."""

    prompt: str
    expected: str
    reply: str

    @property
    def exact(self) -> bool:
        """Whether the two replies are the same, apart from white space around them."""
        return self.reply.strip() == self.expected.strip()


def held_out(
    eval_step: Callable[[Any, Any, Any], tuple[Any, Any]],
    trainable: Any,
    frozen: Any,
    batches: Iterable[Any],
) -> HeldOut:
    """The mean loss of all labelled tokens of ``batches``, each token counted once.

    ``eval_step(trainable, frozen, batch)`` gives the summed loss and the number of tokens. Sums are
    streamed, so that memory does not grow with the data.
    """
    total, count = 0.0, 0
    for batch in batches:
        loss, tokens = eval_step(trainable, frozen, batch)
        total, count = total + float(loss), count + int(tokens)
    return HeldOut(total / max(count, 1), count)


def replies(
    model: Any,
    params: Any,
    tokenizer: Any,
    rows: Sequence[Prompt],
    *,
    max_new_tokens: int,
    batch_size: int,
    eos_ids: Sequence[int],
) -> list[Sample]:
    """The model's greedy reply to each prompt, beside the data's."""
    tokens = generate(
        model,
        params,
        [row.prompt_ids for row in rows],
        max_new_tokens=max_new_tokens,
        eos_ids=eos_ids,
        batch_size=batch_size,
    )
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in tokens]
    return [Sample(r.prompt, r.reply, text) for r, text in zip(rows, texts, strict=True)]


def exact_match(samples: Sequence[Sample]) -> float:
    """The share of samples whose reply is exactly the data's."""
    return sum(s.exact for s in samples) / max(len(samples), 1)
