"""Attention, compared with loops over heads, queries and keys in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.ops import attention
from jlora.ops.attention import attend_cached

attend = jax.jit(attention.attend, static_argnames=("window", "softcap", "backend"))

B, T, HEADS, KV, DIM = 2, 9, 4, 2, 8


def qkv(dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = (B, T, HEADS, DIM), (B, T, KV, DIM), (B, T, KV, DIM)
    return [jnp.asarray(rng.standard_normal(s), dtype) for s in shapes]


def oracle(q, k, v, scale, segments, window, softcap=None, sinks=None):
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
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        sink = 0 if sinks is None else np.exp(float(sinks[h]))
        out[b, t, h] = np.exp(scores) @ v[b, seen, key_head] / (np.exp(scores).sum() + sink)
    return out


SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2, 2, 0], [0, 0, 1, 1, 1, 1, 1, 1, 1]])


SINKS = jnp.asarray([-1.0, 0.0, 0.5, 2.0])
backends = pytest.mark.parametrize("backend", ["reference", "chunked"])


@backends
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("segments", [None, SEGMENTS])
def test_attend_matches_loops(segments, window, backend):
    q, k, v = qkv()
    ids = None if segments is None else jnp.asarray(segments)
    got = attend(q, k, v, scale=0.4, segment_ids=ids, window=window, backend=backend)
    want = oracle(q, k, v, 0.4, np.ones((B, T)) if segments is None else segments, window)
    np.testing.assert_allclose(got, want, atol=1e-6)


@backends
@pytest.mark.parametrize(("softcap", "sinks"), [(0.5, None), (None, SINKS), (0.5, SINKS)])
def test_softcap_and_sinks_match_loops(softcap, sinks, backend):
    q, k, v = qkv()
    more = {"softcap": softcap, "sinks": sinks}
    ids = jnp.asarray(SEGMENTS)
    got = attend(q, k, v, scale=0.4, segment_ids=ids, window=3, backend=backend, **more)
    want = oracle(q, k, v, 0.4, SEGMENTS, 3, **more)
    np.testing.assert_allclose(got, want, atol=1e-6)


@backends
def test_window_and_scale_may_be_traced(backend):
    q, k, v = qkv()

    @jax.jit
    def traced(window, scale):
        return attention.attend(q, k, v, scale=scale, window=window, backend=backend)

    np.testing.assert_allclose(traced(3, 0.4), oracle(q, k, v, 0.4, np.ones((B, T)), 3), atol=1e-6)


@backends
def test_low_precision_sums_in_float32(backend):
    q, k, v = qkv(jnp.bfloat16)
    got = attend(q, k, v, scale=0.4, backend=backend)
    assert got.dtype == jnp.bfloat16
    want = oracle(q, k, v, 0.4, np.ones((B, T)), None)
    np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=2e-2)


def test_cached_slots_see_what_precedes_them():
    q, k, v = qkv()
    slots = jnp.asarray([[4, 5, 6], [1, 2, 3]])
    rows = np.arange(B)[:, None]
    more = {"window": 4, "softcap": 0.5, "sinks": SINKS}
    got = attend_cached(q[rows, slots], k, v, slots=slots, scale=0.4, **more)
    want = oracle(q, k, v, 0.4, np.ones((B, T)), **more)[rows, slots]
    np.testing.assert_allclose(got, want, atol=1e-6)


@backends
def test_gradients_match_differences_of_the_oracle(backend):
    q, k, v = qkv()
    direction = np.random.default_rng(1).standard_normal(q.shape)
    more = {"scale": 0.4, "window": 3, "softcap": 0.5}
    ids = jnp.asarray(SEGMENTS)

    def loss(q, k, v, sinks):
        out = attend(q, k, v, segment_ids=ids, sinks=sinks, backend=backend, **more)
        return (out * jnp.asarray(direction, jnp.float32)).sum()

    got = jax.grad(loss, (0, 1, 2, 3))(q, k, v, SINKS)
    for place, gradient in enumerate(got):
        step = np.random.default_rng(2).standard_normal(gradient.shape) * 1e-3
        sides = []
        for sign in (1, -1):
            args = [np.asarray(x, np.float64) for x in (q, k, v, SINKS)]
            args[place] = args[place] + sign * step
            *moved, sinks = args
            sides.append((oracle(*moved, segments=SEGMENTS, sinks=sinks, **more) * direction).sum())
        # The error of the differences is of third order in a step of 1e-3.
        np.testing.assert_allclose((gradient * step).sum(), (sides[0] - sides[1]) / 2, rtol=1e-4)


@backends
def test_gradients_are_finite_where_all_is_padding(backend):
    q, k, v = qkv()
    segments = jnp.zeros((B, T), jnp.int32)

    def loss(*x):
        return attend(*x, scale=0.4, segment_ids=segments, backend=backend).sum()

    assert all(np.isfinite(g).all() for g in jax.grad(loss, (0, 1, 2))(q, k, v))


def test_dropped_tokens_have_finite_results():
    q, k, v = qkv()
    slots = jnp.full((B, T), T)  # beyond the cache: with a window of 1 they see no slot at all
    assert np.isfinite(attend_cached(q, k, v, slots=slots, scale=0.4, window=1)).all()
