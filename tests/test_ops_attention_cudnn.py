"""The calls to cuDNN, computed by JAX instead and compared with the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.ops.attention import attend, cudnn
from jlora.ops.attention.case import most_documents

B, T = 2, 9


def qkv():
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((B, T, h, 8)), jnp.float32) for h in (4, 2, 2)]


def sevens(q, k, v):
    return q * 0 + 7


def cudnn_attend(q, k, v, ids=None, window=None, scale=0.4):
    documents = most_documents(ids)
    ids = None if ids is None else ids.astype(jnp.int32)
    return cudnn.attend(
        q, k, v, ids, window, scale, sevens, documents=documents, implementation="xla"
    )


@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_causality_and_windows_match_the_reference(window):
    q, k, v = qkv()
    want = attend(q, k, v, scale=0.4, window=window, backend="reference")
    np.testing.assert_allclose(cudnn_attend(q, k, v, window=window), want, atol=1e-6)


def test_scale_may_be_traced():
    q, k, v = qkv()
    want = attend(q, k, v, scale=0.4, backend="reference")
    np.testing.assert_allclose(jax.jit(cudnn_attend)(q, k, v, scale=0.4), want, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bool_, jnp.uint8, jnp.int32])
def test_rows_of_one_document_with_padding_match_the_reference(dtype):
    q, k, v = qkv()
    alone = jnp.asarray([[1] * 9, [1] * 5 + [0] * 4])
    got = cudnn_attend(q, k, v, alone.astype(dtype), 3)
    want = attend(q, k, v, scale=0.4, segment_ids=alone, window=3, backend="reference")
    np.testing.assert_allclose(got[alone > 0], want[alone > 0], atol=1e-5)
    assert np.isfinite(got).all()


def test_more_documents_than_the_code_holds_fall_back():
    q, k, v = qkv()
    ids = jnp.asarray([[1] * 6 + [256] * 3, [1] * 9])
    assert (cudnn_attend(q, k, v, ids, 3) == 7).all()


@pytest.mark.parametrize(
    ("ids", "conditions"), [(None, 0), (jnp.bool_, 0), (jnp.uint8, 0), (jnp.int32, 1)]
)
def test_what_the_type_of_the_segment_ids_tells_needs_no_condition(ids, conditions):
    ids = None if ids is None else jnp.ones((B, T), ids)
    jaxpr = jax.make_jaxpr(lambda *x: cudnn_attend(*x, ids))(*qkv())
    assert sum(equation.primitive.name == "cond" for equation in jaxpr.eqns) == conditions


def test_no_cudnn_is_found_where_jax_has_none():
    if jax.default_backend() == "cpu":
        assert cudnn.capability() is None
    assert cudnn.available() == any("cuda" in name for name in _plugins())


def _plugins():
    from importlib.metadata import entry_points

    return [entry.name for entry in entry_points(group="jax_plugins")]
