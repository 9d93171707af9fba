"""Generating tokens with a KV cache: greedy or sampled, many rows at once. Pure.

The model is an argument, any object with

- ``init_cache(batch, length)``: an empty cache;
- ``decode(params, ids, positions, cache, last_only)``: float32 logits (B, V) and the new cache;
- ``config.position_limit``: the number of positions, or None if there is no limit.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jlora.config import GenerateConfig
from jlora.distributed.mesh import COMPILER_OPTIONS


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is chosen, with the names and meanings of transformers' GenerationConfig."""

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    @classmethod
    def of(cls, config: GenerateConfig) -> Sampling:
        """As the ``generate`` section says."""
        return cls(**{f.name: getattr(config, f.name) for f in dataclasses.fields(cls)})


def generate(
    model: Any,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    sampling: Sampling = Sampling(),
    seed: int = 0,
    batch_size: int = 32,
) -> list[list[int]]:
    """The reply to each prompt, up to and without the first end-of-sequence token.

    A reply also ends where the model has no more positions; it is empty after a prompt that is
    longer than the model's positions.

    All batches have one shape, so that only one program is compiled: prompts are padded to the
    longest (rounded up to a multiple of 16), and the last batch is filled up. A reply depends on
    its prompt only; if sampled, also on ``seed`` and the prompt's index.

    Args:
      model: see the module's docstring.
      params: its parameters, with an adapter attached or not.
      prompts: token ids of each prompt, at least one.
      max_new_tokens: the maximum length of a reply.
      eos_ids: the tokens that end a reply.
      sampling: how a token is chosen.
      seed: of the sampling.
      batch_size: rows that are generated together.
    """
    if not prompts:
        return []
    width = -(-max(map(len, prompts)) // 16) * 16
    rows = min(batch_size, len(prompts))
    run = _compiled(model, rows, width, max_new_tokens, tuple(eos_ids), sampling)
    replies: list[list[int]] = []
    for start in range(0, len(prompts), rows):
        batch = prompts[start : start + rows]
        ids = np.zeros((rows, width), np.int32)
        positions = np.full((rows, width), -1, np.int32)
        # Filled up with copies, which end when the first prompt's reply does; rows of padding need
        # not end before max_new_tokens.
        for row, prompt in enumerate([*batch, *[batch[0]] * (rows - len(batch))]):
            ids[row, : len(prompt)] = prompt
            positions[row, : len(prompt)] = np.arange(len(prompt))
        indices = np.arange(start, start + rows, dtype=np.int32)
        tokens = np.asarray(run(params, ids, positions, jax.random.key(seed), indices))
        replies += [_cut_at_eos(row, eos_ids) for row in tokens[: len(batch)].tolist()]
    if (limit := model.config.position_limit) is None:
        return replies
    # The last token needs no position: nothing is computed from it.
    room = [max(0, limit - len(prompt) + 1) for prompt in prompts]
    return [reply[:most] for reply, most in zip(replies, room, strict=True)]


def next_token(
    logits: Float[Array, "batch vocab"], keys: Array, sampling: Sampling
) -> Int[Array, " batch"]:
    """The most likely token of each row, or one drawn after temperature, top-k and top-p."""
    if not sampling.do_sample:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_k:
        k = min(sampling.top_k, logits.shape[-1])
        least = jax.lax.top_k(logits, k)[0][:, -1:]
        # Values equal to the k-th stay, as in transformers.
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        mass = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1)
        # A token is kept if the more likely ones have not reached top_p; the first always is.
        before = mass - jax.nn.softmax(ordered, axis=-1)
        least = jnp.min(jnp.where(before < sampling.top_p, ordered, jnp.inf), -1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


# jax.jit remembers programs by function, and the function in here is a new one in each call.
@functools.lru_cache(maxsize=8)
def _compiled(
    model: Any, rows: int, width: int, new: int, eos_ids: tuple[int, ...], sampling: Sampling
):
    """The jitted ``(params, ids, positions, key, prompt indices) -> (rows, new)`` tokens."""
    # No token is -1: without an end-of-sequence token no row is done early.
    eos = jnp.asarray(eos_ids or (-1,), jnp.int32)

    def pick(logits, key, indices, step):
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(key, i), step))(indices)
        return next_token(logits, keys, sampling)

    def run(params, ids, positions, key, indices):
        cache = model.init_cache(rows, width + new)
        logits, cache = model.decode(params, ids, positions, cache, last_only=True)
        first = pick(logits, key, indices, 0)
        tokens = jnp.full((rows, new), eos[0], jnp.int32).at[:, 0].set(first)

        def unfinished(carry):
            step, done, *_ = carry
            return (step < new) & ~jnp.all(done)

        def decode_one(carry):
            step, done, last, cache, tokens = carry
            # On a CPU, more than half of this for one row is XLA's copy of the bfloat16 weights in
            # float32. Barriers, sums instead of products, other layouts and more rows were no
            # faster.
            logits, cache = model.decode(params, last[:, None], None, cache, last_only=True)
            token = jnp.where(done, eos[0], pick(logits, key, indices, step))
            tokens = tokens.at[:, step].set(token)
            return step + 1, jnp.isin(token, eos), token, cache, tokens

        start = (jnp.int32(1), jnp.isin(first, eos), first, cache, tokens)
        return jax.lax.while_loop(unfinished, decode_one, start)[-1]

    # Without these options XLA for CPU converts all weights to float32 before the loop over tokens:
    # 1 or 4 rows take a quarter less time with them.
    return jax.jit(run, compiler_options=COMPILER_OPTIONS.get(jax.default_backend()))


def _cut_at_eos(tokens: list[int], eos_ids: Sequence[int]) -> list[int]:
    ends = [i for i, token in enumerate(tokens) if token in eos_ids]
    return tokens[: ends[0]] if ends else tokens
