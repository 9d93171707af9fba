"""Generated tokens, compared with full passes of the model; sampling, compared with NumPy."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from jlora.config import GenerateConfig
from jlora.inference.decoding import Sampling, generate, next_token

NEW = 6
PROMPTS = [[5, 9, 11], [32, 18, 20], list(range(3, 20)), [40, 41, 42, 43]]
SAMPLED = Sampling(do_sample=True, temperature=1.5)


@functools.cache
def last_logits(name, length):
    """A function: logits after the last of some tokens, by a full pass of the right-padded row."""
    model, params = tiny_models.build(name)

    def logits(ids):
        row = np.zeros((1, length), np.int32)
        row[0, : len(ids)] = ids
        return np.asarray(model(params, row))[0, len(ids) - 1]

    return logits


def greedy(name, prompt, new, length=32):
    """The oracle: repeatedly appends the most likely token."""
    ids = list(prompt)
    for _ in range(new):
        ids.append(int(last_logits(name, length)(ids).argmax()))
    return ids[len(prompt) :]


@functools.cache
def replied():
    return [greedy("llama", prompt, NEW) for prompt in PROMPTS]


def test_greedy_tokens_match_those_without_a_cache():
    model, params = tiny_models.build("llama")
    got = generate(model, params, PROMPTS, max_new_tokens=NEW, eos_ids=())
    assert got == replied()
    assert len({tuple(reply) for reply in got}) == len(got)


def test_any_end_of_sequence_token_ends_its_row_only():
    model, params = tiny_models.build("llama")
    ends = [replied()[1][2], replied()[2][0]]
    # Batches of three: the last one is padded.
    got = generate(model, params, PROMPTS, max_new_tokens=NEW, eos_ids=ends, batch_size=3)
    expected = []
    for reply in replied():
        stops = [i for i, token in enumerate(reply) if token in ends]
        expected.append(reply[: stops[0]] if stops else reply)
    assert got == expected and list(map(len, got)) == [1, 2, 0, NEW]


def test_no_prompts_give_no_replies():
    model, params = tiny_models.build("llama")
    assert generate(model, params, [], max_new_tokens=NEW, eos_ids=()) == []


def test_replies_end_at_the_position_limit():
    model, params = tiny_models.build("gpt2")  # it has 64 positions
    prompts = [list(range(3, 63)), list(range(70)), [5]]
    prompts[1] = [i % 61 for i in prompts[1]]
    got = generate(model, params, prompts, max_new_tokens=8, eos_ids=())
    assert got[0] == greedy("gpt2", prompts[0], 5, length=64)
    assert got[1] == []
    assert got[2] == greedy("gpt2", prompts[2], 8, length=64)


# Sampling


def probabilities(logits, temperature=1.0, top_k=0, top_p=1.0):
    """The distribution of the next token, by removing tokens one at a time."""
    logits = np.asarray(logits, np.float64) / temperature
    order = np.argsort(-logits)
    if top_k:
        order = order[:top_k]
    p = np.exp(logits[order] - logits.max())
    p /= p.sum()
    reached, count = 0.0, 0
    while reached < top_p and count < len(order):
        reached, count = reached + p[count], count + 1
    result = np.zeros(len(logits))
    result[order[:count]] = p[:count] / p[:count].sum()
    return result


@pytest.mark.parametrize(
    "setting",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 3},
        {"top_k": 100},
        {"top_p": 0.7},
        {"top_p": 1e-6},
        {"temperature": 1.5, "top_k": 6, "top_p": 0.8},
    ],
)
def test_draws_follow_the_distribution(setting):
    draws = 20_000
    logits = 2 * np.random.default_rng(0).standard_normal(10).astype(np.float32)
    p = probabilities(logits, **setting)
    sampling = Sampling(do_sample=True, **setting)
    keys = jax.random.split(jax.random.key(0), draws)
    rows = jnp.broadcast_to(logits, (draws, 10))
    tokens = jax.jit(next_token, static_argnums=2)(rows, keys, sampling)
    frequency = np.bincount(tokens, minlength=10) / draws
    assert not frequency[p == 0].any()
    np.testing.assert_array_less(np.abs(frequency - p), 5 * np.sqrt(p * (1 - p) / draws) + 1e-9)


def test_rows_are_sampled_by_their_own_logits():
    logits = jnp.log(jnp.eye(4) + 1e-30) - 100.0 * jnp.arange(4.0)[:, None]
    keys = jax.random.split(jax.random.key(0), 4)
    sampling = Sampling(do_sample=True, top_k=3, top_p=0.9)
    assert next_token(logits, keys, sampling).tolist() == [0, 1, 2, 3]


def sample(prompts, seed=0, batch_size=3):
    model, params = tiny_models.build("llama")
    return generate(
        model, params, prompts, max_new_tokens=NEW, eos_ids=(), sampling=SAMPLED, seed=seed,
        batch_size=batch_size,
    )  # fmt: skip


def test_a_seed_reproduces_a_reply_whatever_shares_the_batch():
    once = sample(PROMPTS)
    assert sample(PROMPTS) == once
    assert sample(PROMPTS, seed=1) != once
    others = [[9, 9], *PROMPTS[1:3], [8, 7, 6]]
    again = sample(others)
    assert again[1:3] == once[1:3]  # the second shares its batch with a different row
    assert sample(PROMPTS, batch_size=2) == once
    first, second = sample([PROMPTS[0]] * 2 + PROMPTS[2:])[:2]
    assert first != second  # the same prompt, sampled twice


class Coin:
    """A model for which all tokens are always equally likely."""

    config = SimpleNamespace(position_limit=None)

    def init_cache(self, batch, length):
        return jnp.int32(0)

    def decode(self, params, ids, positions, cache, last_only):
        return jnp.zeros((ids.shape[0], 16)), cache


def test_rows_and_steps_are_sampled_independently():
    drawn = generate(
        Coin(), None, [[1]] * 8, max_new_tokens=8, eos_ids=(), sampling=SAMPLED, batch_size=4
    )
    drawn = np.array(drawn)
    for table in (drawn, drawn.T):
        assert all(len(set(row)) > 2 for row in table.tolist())
        assert len({tuple(row) for row in table.tolist()}) == 8


def test_the_first_sampled_tokens_follow_the_model():
    prompt, times = PROMPTS[0], 300
    p = probabilities(last_logits("llama", 32)(prompt), temperature=1.5)
    tokens = [reply[0] for reply in sample([prompt] * times, batch_size=100)]
    found = np.bincount(tokens, minlength=len(p)) / times
    assert np.abs(found - p).sum() < 2 * np.sqrt(p * (1 - p) / times).sum()


def test_settings_name_the_sampling():
    config = GenerateConfig(do_sample=True, temperature=0.7, top_k=5, top_p=0.9, seed=3)
    assert Sampling.of(config) == Sampling(True, 0.7, 5, 0.9)
