"""Held-out loss and comparison of replies."""

import math
from typing import NamedTuple
from unittest import mock

import jax.numpy as jnp
import numpy as np

from jlora import evaluation
from jlora.evaluation import HeldOut, Sample, exact_match, held_out, replies


def test_the_loss_is_the_mean_over_tokens_not_over_batches():
    sums = [(12.0, 3), (1.0, 7), (0.0, 0)]

    def step(trainable, frozen, batch):
        assert (trainable, frozen) == ("adapter", "base")
        total, count = sums[batch]
        return jnp.float32(total), jnp.int32(count)

    result = held_out(step, "adapter", "base", iter(range(3)))
    assert result == HeldOut(1.3, 10)
    np.testing.assert_allclose(result.perplexity, np.exp(1.3), rtol=1e-12)


def test_perplexity_of_a_huge_loss_is_infinite():
    assert HeldOut(1e4, 1).perplexity == math.inf
    assert held_out(lambda *_: None, None, None, []) == HeldOut(0.0, 0)


def test_exact_match_leaves_out_white_space_around_replies():
    replies = [("a b", " a b\n"), ("a b", "a  b"), ("A", "a"), ("x", "x")]
    samples = [Sample("p", expected, reply) for expected, reply in replies]
    assert [s.exact for s in samples] == [True, False, False, True]
    assert exact_match(samples) == 0.5
    assert exact_match([]) == 0.0


class Row(NamedTuple):
    prompt_ids: tuple[int, ...]
    prompt: str
    reply: str


def test_replies_stand_beside_the_data():
    rows = [Row((1, 2), "p", "r"), Row((3,), "q", "s")]
    generated = mock.Mock(return_value=[[7, 8], [9]])
    tokenizer = mock.Mock()
    tokenizer.decode = lambda ids, skip_special_tokens: f"{ids} {skip_special_tokens}"
    with mock.patch.object(evaluation, "generate", generated):
        found = replies(
            "model", "params", tokenizer, rows, max_new_tokens=5, batch_size=2, eos_ids=(0,)
        )
    assert found == [Sample("p", "r", "[7, 8] True"), Sample("q", "s", "[9] True")]
    given = {"max_new_tokens": 5, "eos_ids": (0,), "batch_size": 2}
    generated.assert_called_once_with("model", "params", [(1, 2), (3,)], **given)
