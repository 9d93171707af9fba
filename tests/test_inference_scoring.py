"""Held-out loss and comparison of replies."""

import math
from typing import NamedTuple
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest

from jlora.inference import scoring
from jlora.inference.scoring import HeldOut, Sample, exact_match, f1_score, held_out, replies


def test_the_loss_is_the_mean_over_tokens_not_over_batches():
    sums = [(12.0, 3), (1.0, 7), (0.0, 0)]

    def step(trainable, frozen, batch):
        assert (trainable, frozen) == ("adapter", "base")
        total, count = sums[batch]
        return jnp.float32(total), jnp.int32(count), None

    result = held_out(step, "adapter", "base", iter(range(3)))
    assert result == HeldOut(1.3, 10)
    assert result.figures == {"eval_loss": 1.3, "eval_perplexity": result.perplexity}
    np.testing.assert_allclose(result.perplexity, np.exp(1.3), rtol=1e-12)


def test_perplexity_of_a_huge_loss_is_infinite():
    assert HeldOut(1e4, 1).perplexity == math.inf
    assert held_out(lambda *_: None, None, None, []) == HeldOut(0.0, 0)


def precision_and_recall(labels, predictions, c):
    """Precision and recall by definition, from single predictions."""
    right = sum(a == b == c for a, b in zip(labels, predictions, strict=True))
    return right / max(predictions.count(c), 1), right / max(labels.count(c), 1)


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_accuracy_and_f1_follow_from_single_predictions(classes):
    """F1 is of class 1 if there are two, else the mean over classes that occur; 4 does not."""
    rng = np.random.default_rng(classes)
    labels, predictions = (rng.integers(0, min(classes, 4), 40).tolist() for _ in range(2))
    f1 = {}
    for c in range(classes):
        precision, recall = precision_and_recall(labels, predictions, c)
        f1[c] = 2 * precision * recall / max(precision + recall, 1e-9)
    occurring = set(labels) | set(predictions)
    want = f1[1] if classes == 2 else np.mean([f1[c] for c in occurring])

    def step(trainable, frozen, batch):
        counts = np.zeros((3, classes), np.int32)
        for label, predicted in batch:
            counts[0, label] += label == predicted
            counts[1, predicted] += 1
            counts[2, label] += 1
        return jnp.float32(0.5 * len(batch)), jnp.int32(len(batch)), jnp.asarray(counts)

    pairs = list(zip(labels, predictions, strict=True))
    result = held_out(step, None, None, [pairs[:11], pairs[11:]])
    accuracy = np.mean(np.array(labels) == np.array(predictions))
    np.testing.assert_allclose(list(result.figures.values()), [0.5, accuracy, want], rtol=1e-6)
    assert list(result.figures) == ["eval_loss", "eval_accuracy", "eval_f1"]


def test_f1_without_a_right_prediction_is_zero():
    counts = np.array([[0, 0], [3, 0], [0, 3]])  # class 1 is never predicted
    assert f1_score(counts) == 0.0
    assert f1_score(counts[:, ::-1]) == 0.0


def test_exact_match_ignores_white_space_around_replies():
    replies = [("a b", " a b\n"), ("a b", "a  b"), ("A", "a"), ("x", "x")]
    samples = [Sample("p", expected, reply) for expected, reply in replies]
    assert [s.exact for s in samples] == [True, False, False, True]
    assert exact_match(samples) == 0.5
    assert exact_match([]) == 0.0


class Row(NamedTuple):
    prompt_ids: tuple[int, ...]
    prompt: str
    reply: str


def test_samples_pair_replies_with_references():
    rows = [Row((1, 2), "p", "r"), Row((3,), "q", "s")]
    generated = mock.Mock(return_value=[[7, 8], [9]])
    tokenizer = mock.Mock()
    tokenizer.decode = lambda ids, skip_special_tokens: f"{ids} {skip_special_tokens}"
    with mock.patch.object(scoring, "generate", generated):
        found = replies(
            "model", "params", tokenizer, rows, max_new_tokens=5, batch_size=2, eos_ids=(0,)
        )
    assert found == [Sample("p", "r", "[7, 8] True"), Sample("q", "s", "[9] True")]
    given = {"max_new_tokens": 5, "eos_ids": (0,), "batch_size": 2}
    generated.assert_called_once_with("model", "params", [(1, 2), (3,)], **given)
