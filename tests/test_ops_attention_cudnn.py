"""The calls to cuDNN, computed by JAX instead and compared with the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.ops.attention import attend, cudnn

B, T = 2, 9


def qkv():
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((B, T, h, 8)), jnp.float32) for h in (4, 2, 2)]


def sevens(q, k, v):
    return q * 0 + 7


def cudnn_attend(q, k, v, ids=None, window=None, scale=0.4):
    return cudnn.attend(q, k, v, ids, window, scale, sevens, packed=True, implementation="xla")


@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_causality_and_windows_match_the_reference(window):
    q, k, v = qkv()
    want = attend(q, k, v, scale=0.4, window=window, backend="reference")
    np.testing.assert_allclose(cudnn_attend(q, k, v, window=window), want, atol=1e-6)


def test_scale_may_be_traced():
    q, k, v = qkv()
    want = attend(q, k, v, scale=0.4, backend="reference")
    np.testing.assert_allclose(jax.jit(cudnn_attend)(q, k, v, scale=0.4), want, atol=1e-6)


def test_rows_of_one_document_are_computed_and_others_fall_back():
    q, k, v = qkv()
    alone = jnp.asarray([[1] * 9, [4] * 5 + [0] * 4])
    many = alone.at[0, 6:].set(256)
    got = cudnn_attend(q, k, v, alone, 3)
    want = attend(q, k, v, scale=0.4, segment_ids=alone, window=3, backend="reference")
    np.testing.assert_allclose(got[alone > 0], want[alone > 0], atol=1e-6)
    assert np.isfinite(got).all()
    assert (cudnn_attend(q, k, v, many, 3) == 7).all()


def test_what_counts_as_one_document():
    rows = {
        (5, 5, 5, 5): True,
        (1, 1, 0, 0): True,
        (0, 0, 0, 0): True,
        (0, 1, 1, 1): False,  # padding at the front would be attended to
        (1, 1, 2, 2): False,
        (1, 0, 1, 0): False,
        (1, 1, 2, 0): False,
    }
    got = cudnn.one_document(jnp.asarray(list(rows)))
    assert got.tolist() == list(rows.values())


def test_no_cudnn_is_found_where_jax_has_none():
    if jax.default_backend() == "cpu":
        assert cudnn.capability() is None
    assert cudnn.available() == any("cuda" in name for name in _plugins())


def _plugins():
    from importlib.metadata import entry_points

    return [entry.name for entry in entry_points(group="jax_plugins")]
