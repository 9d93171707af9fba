"""Attention against loops over heads, queries and keys in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.errors import ConfigError
from jlora.models.attention import attend, attend_cached

B, T, HEADS, KV, DIM = 2, 9, 4, 2, 8


def qkv(dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = (B, T, HEADS, DIM), (B, T, KV, DIM), (B, T, KV, DIM)
    return [jnp.asarray(rng.standard_normal(s), dtype) for s in shapes]


def oracle(q, k, v, scale, segments, window):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    for b, t, h in np.ndindex(q.shape[:3]):
        seen = [
            s
            for s in range(t + 1)
            if segments[b, s] == segments[b, t] and (window is None or t - s < window)
        ]
        key_head = h // (q.shape[2] // k.shape[2])
        scores = np.array([q[b, t, h] @ k[b, s, key_head] for s in seen]) * scale
        weights = np.exp(scores - scores.max())
        out[b, t, h] = weights @ v[b, seen, key_head] / weights.sum()
    return out


SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2, 2, 0], [0, 0, 1, 1, 1, 1, 1, 1, 1]])


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("segments", [None, SEGMENTS])
def test_attend_matches_loops(segments, window):
    q, k, v = qkv()
    ids = None if segments is None else jnp.asarray(segments)
    got = attend(q, k, v, scale=0.4, segment_ids=ids, window=window)
    want = oracle(q, k, v, 0.4, np.ones((B, T)) if segments is None else segments, window)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_window_and_scale_may_be_traced():
    q, k, v = qkv()
    traced = jax.jit(lambda w, s: attend(q, k, v, scale=s, window=w))(3, 0.4)
    np.testing.assert_allclose(traced, attend(q, k, v, scale=0.4, window=3), atol=1e-6)


def test_low_precision_sums_in_float32():
    q, k, v = qkv(jnp.bfloat16)
    got = attend(q, k, v, scale=0.4)
    assert got.dtype == jnp.bfloat16
    want = oracle(q, k, v, 0.4, np.ones((B, T)), None)
    np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=2e-2)


def test_cached_slots_see_what_precedes_them():
    q, k, v = qkv()
    slots = jnp.asarray([[4, 5, 6], [1, 2, 3]])
    rows = np.arange(B)[:, None]
    got = attend_cached(q[rows, slots], k, v, slots=slots, scale=0.4, window=4)
    want = oracle(q, k, v, 0.4, np.ones((B, T)), 4)[rows, slots]
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_gradients_are_finite_where_all_is_padding():
    q, k, v = qkv()
    segments = jnp.zeros((B, T), jnp.int32)
    grads = jax.grad(lambda *x: attend(*x, scale=0.4, segment_ids=segments).sum(), (0, 1, 2))(
        q, k, v
    )
    assert all(np.isfinite(g).all() for g in grads)


def test_dropped_tokens_have_finite_results():
    q, k, v = qkv()
    slots = jnp.full((B, T), T)  # beyond the cache: with a window of 1 they see no slot at all
    assert np.isfinite(attend_cached(q, k, v, slots=slots, scale=0.4, window=1)).all()


def test_unknown_backend_is_named():
    with pytest.raises(ConfigError, match=r"no attention 'referense'[\s\S]*'reference'"):
        attend(*qkv(), scale=1.0, backend="referense")
