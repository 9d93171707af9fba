"""Splash attention, interpreted, compared with the reference; its smallest block is 128."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.ops.attention import attend, splash

B, T, HEADS = 2, 200, 2  # two blocks, of which the second is padded

SEGMENTS = jnp.asarray(
    [np.repeat([1, 2, 3, 0], [90, 60, 1, 49]), np.repeat([0, 1, 0], [30, 140, 30])]
)
SINKS = jnp.asarray([-1.0, 2.0])


def qkv(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((B, T, h, 8)), dtype) for h in (HEADS, 1, 1)]


def loss(function, q, k, v, sinks, **masks):
    out = function(q, k, v, scale=0.4, sinks=sinks, **masks)
    weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
    return (out.astype(jnp.float32) * weights).sum(), out


@pytest.mark.parametrize(
    ("segments", "window", "softcap", "sinks"),
    [(SEGMENTS, 50, None, None), (SEGMENTS, None, 3.0, SINKS), (None, 300, None, None)],
)
def test_results_and_gradients_match_the_reference(segments, window, softcap, sinks):
    masks = {"segment_ids": segments, "window": window, "softcap": softcap}
    splash_attend = functools.partial(splash.attend, interpret=True)
    places = (0, 1, 2) if sinks is None else (0, 1, 2, 3)
    got, want = (
        jax.grad(functools.partial(loss, f, **masks), places, has_aux=True)(*qkv(), sinks)
        for f in (splash_attend, functools.partial(attend, backend="reference"))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)


def test_gradients_of_sinks_keep_the_dtype_of_the_sinks():
    splash_attend = functools.partial(
        splash.attend, segment_ids=SEGMENTS, window=None, interpret=True
    )
    gradient, _ = jax.grad(functools.partial(loss, splash_attend), 3, has_aux=True)(
        *qkv(jnp.bfloat16), SINKS
    )
    assert gradient.dtype == SINKS.dtype
    other = functools.partial(attend, segment_ids=SEGMENTS, backend="reference")
    want, _ = jax.grad(functools.partial(loss, other), 3, has_aux=True)(*qkv(), SINKS)
    np.testing.assert_allclose(gradient, want, rtol=0.1)  # a sum of 400 terms of 2^-8 each
