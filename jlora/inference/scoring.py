"""The figures that ``train`` and ``evaluate`` report of held-out rows.

Loss and perplexity, accuracy and F1 of classifiers, and exact match of generated replies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from jlora.inference.decoding import generate


@runtime_checkable
class Prompt(Protocol):
    """A held-out row to generate a reply for: a prompt, and the reply in the data."""

    @property
    def prompt_ids(self) -> Sequence[int]:
        """The prompt's tokens, up to where the reply begins."""
        ...

    @property
    def prompt(self) -> str:
        """The prompt's text."""
        ...

    @property
    def reply(self) -> str:
        """The reply in the data."""
        ...


class HeldOut(NamedTuple):
    """Loss over all labelled held-out tokens, in nats a token."""

    loss: float
    tokens: int
    accuracy: float | None = None
    """The share of rows that a classifier labels correctly; None for a language model."""
    f1: float | None = None
    """See ``f1_score``."""

    @property
    def perplexity(self) -> float:
        """The exponential of the loss; infinite when that is too large for a float."""
        # math.exp raises OverflowError from 710 on.
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def figures(self) -> dict[str, float]:
        """Names and values for a line of metrics.jsonl."""
        if self.accuracy is None or self.f1 is None:
            return {"eval_loss": self.loss, "eval_perplexity": self.perplexity}
        return {"eval_loss": self.loss, "eval_accuracy": self.accuracy, "eval_f1": self.f1}


class Sample(NamedTuple):
    """A prompt, the reply in the data, and the model's reply."""

    prompt: str
    expected: str
    reply: str

    @property
    def exact(self) -> bool:
        """Whether the two replies are equal, apart from white space around them."""
        return self.reply.strip() == self.expected.strip()


def held_out(
    eval_step: Callable[[Any, Any, Any], tuple[Any, Any, Any]],
    trainable: Any,
    frozen: Any,
    batches: Iterable[Any],
) -> HeldOut:
    """The mean loss over all labelled tokens of ``batches``, and a classifier's accuracy and F1.

    ``eval_step(trainable, frozen, batch)`` returns the summed loss, the number of labelled tokens
    and, for a classifier, the counts that ``f1_score`` takes, else None. Only sums are kept, so
    that memory does not grow with the data.
    """
    total, count, classes = 0.0, 0, None
    for batch in batches:
        loss, tokens, counts = eval_step(trainable, frozen, batch)
        total, count = total + float(loss), count + int(tokens)
        if counts is not None:
            # The devices count in int32, which the sum over all batches may exceed.
            new = np.asarray(counts, np.int64)
            classes = new if classes is None else classes + new
    loss = total / max(count, 1)
    if classes is None:
        return HeldOut(loss, count)
    return HeldOut(loss, count, float(classes[0].sum() / max(count, 1)), f1_score(classes))


def mean_loss(results: Sequence[HeldOut]) -> float:
    """The loss over all labelled tokens of several results."""
    return sum(r.loss * r.tokens for r in results) / max(sum(r.tokens for r in results), 1)


def figures(results: Sequence[HeldOut], adapters: Sequence[str]) -> dict[str, float]:
    """Names and values for a line of metrics.jsonl, from the results of all adapters.

    In a multi-adapter run (``adapters`` are the names) they are ``eval_loss/NAME`` and so on,
    besides the ``eval_loss`` over all tokens; adapters without held-out rows are left out.
    """
    if not adapters:
        return results[0].figures
    line = {"eval_loss": mean_loss(results)}
    for adapter, result in zip(adapters, results, strict=True):
        line |= {f"{k}/{adapter}": v for k, v in result.figures.items() if result.tokens}
    return line


def f1_score(counts: Int[np.ndarray, "3 classes"]) -> float:
    """F1, the harmonic mean of precision and recall, as scikit-learn's function of this name.

    For two classes it is that of class 1 (``average="binary"``), for more the mean over the classes
    that occur as a label or a prediction (``average="macro"``).

    Args:
      counts: for each class its correct predictions, all its predictions, and its labels.
    """
    correct, predicted, labelled = counts
    occurrences = predicted + labelled
    f1 = 2 * correct / np.maximum(occurrences, 1)
    return float(f1[1] if len(f1) == 2 else f1[occurrences > 0].mean())


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
    """The model's greedy reply to each prompt, with the data's."""
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
    """The share of samples whose reply equals the data's."""
    return sum(s.exact for s in samples) / max(len(samples), 1)
