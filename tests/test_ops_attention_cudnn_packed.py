"""Packed rows by a code in extra head dimensions, computed by JAX, against the reference."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.ops.attention import Case, attend, choose, cudnn

B, T = 2, 41
IDS = jnp.asarray(
    [np.repeat([0, 1, 2, 3, 0], [4, 11, 1, 20, 5]), np.repeat([255, 1, 128, 127], [9, 10, 11, 11])]
)


def qkv(dtype, dim, size=1.0):
    rng = np.random.default_rng(0)
    draw = lambda heads: rng.standard_normal((B, T, heads, dim)) * size  # noqa: E731
    return [jnp.asarray(draw(heads), dtype) for heads in (4, 2, 2)]


def loss(function, q, k, v, **more):
    out = function(q, k, v, segment_ids=IDS, **more)
    weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
    return (out.astype(jnp.float32) * weights).sum(), out


def refused(q, k, v):
    return q * jnp.nan


def cudnn_attend(q, k, v, segment_ids, scale, window=None):
    return cudnn.attend(
        q, k, v, segment_ids, window, scale, refused, documents=2**31 - 1, implementation="xla"
    )


@pytest.fixture(autouse=True)
def promotion():
    """JAX's computation promotes 16 bits to 32, also in other threads."""
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    yield
    jax.config.update("jax_numpy_dtype_promotion", "strict")


def both(dtype, dim, size=1.0, **more):
    reference = functools.partial(attend, backend="reference")
    for function in (cudnn_attend, reference):
        gradient = jax.jit(jax.grad(functools.partial(loss, function, **more), (0, 1, 2), True))
        yield jax.tree.leaves(gradient(*qkv(dtype, dim, size)))


@pytest.mark.parametrize(
    ("dtype", "dim", "atol"),
    [(jnp.float32, 80, 1e-5), (jnp.bfloat16, 64, 4e-2)],
)
def test_results_and_gradients_match_the_reference(dtype, dim, atol):
    got, want = both(dtype, dim, scale=dim**-0.5)
    for a, b in zip(got, want, strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(a, b, atol=atol)


def test_large_scores_do_not_leak_between_documents():
    got, want = both(jnp.float32, 64, size=100.0, scale=0.125)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * np.abs(b).max())


def test_windows_and_traced_scales():
    got, want = both(jnp.float32, 64, window=6, scale=jnp.float32(0.125))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_another_document_changes_no_bit():
    q, k, v = qkv(jnp.bfloat16, 64)
    other = np.asarray(IDS) != np.asarray([[3], [127]])
    rng = np.random.default_rng(1)

    def changed(x):
        return jnp.where(other[:, :, None, None], rng.standard_normal(x.shape), x).astype(x.dtype)

    def results(q, k, v):
        weights = jnp.where(other, 0.0, 1.0)[:, :, None, None]

        def total(*qkv):
            return (cudnn_attend(*qkv, IDS, 0.125).astype(jnp.float32) * weights).sum()

        return cudnn_attend(q, k, v, IDS, 0.125), *jax.grad(total, (0, 1, 2))(q, k, v)

    for a, b in zip(results(q, k, v), results(*map(changed, (q, k, v))), strict=True):
        np.testing.assert_array_equal(a[~other], b[~other])


def test_gradients_stay_in_their_document():
    q, k, v = qkv(jnp.bfloat16, 64)
    own_document = np.asarray(IDS) == np.asarray([[3], [127]])
    f = lambda *x: (cudnn_attend(*x, IDS, 0.125)[own_document] ** 2).sum()  # noqa: E731
    for gradient in jax.grad(f, (0, 1, 2))(q, k, v):
        assert np.isfinite(gradient).all()
        assert not gradient[~own_document].any() and gradient[own_document].any()


@pytest.mark.parametrize("ids", [IDS + 1, -IDS])
def test_ids_beyond_the_code_fall_back(ids):
    assert np.isnan(cudnn_attend(*qkv(jnp.bfloat16, 64), ids, 0.1)).all()


def by_jax(monkeypatch, after=lambda out: out):
    """Simulates a GPU whose cuDNN computes what JAX does, then applies ``after``."""
    computed = functools.partial(cudnn._causal, implementation="xla")

    monkeypatch.setattr(cudnn, "_causal", lambda *args, **more: after(computed(*args, **more)))
    monkeypatch.setattr(cudnn, "capability", lambda: (9, 0))
    cudnn.fault.cache_clear()


@pytest.fixture
def forgotten():
    yield
    cudnn.fault.cache_clear()


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize("packed", [False, True])
def test_a_gpu_is_tested_before_it_is_used(monkeypatch, packed):
    assert cudnn.fault("bfloat16", 64, packed) is None, "without a GPU there is nothing to test"
    by_jax(monkeypatch)
    jitted = jax.jit(lambda x: x if cudnn.fault("bfloat16", 64, packed) is None else x / 0)
    assert jitted(1.0) == 1.0, "also while a program is traced"
    by_jax(monkeypatch, lambda out: out * 1.2)
    assert "are not those of the reference" in cudnn.fault("bfloat16", 64, packed)
    by_jax(monkeypatch, lambda out: out * jnp.nan)
    assert "are not those of the reference" in cudnn.fault("bfloat16", 64, packed)


@pytest.mark.usefixtures("forgotten")
def test_a_gpu_that_fails_is_not_used(monkeypatch):
    def no_plan(out):
        raise RuntimeError("cuDNN creates no execution plans")

    by_jax(monkeypatch, no_plan)
    case = Case(dtype="bfloat16", length=512, head_dim=64, documents=2, capability=(9, 0))
    choice = choose("cuda", case)
    assert choice.backend == "chunked"
    assert choice.why.startswith("cuDNN fails on this GPU (cuDNN creates no execution plans); 512")


@pytest.mark.usefixtures("forgotten")
def test_an_absent_gpu_is_judged_by_capability_and_never_tested(monkeypatch):
    def tried(*_):
        raise AssertionError("tried on a GPU that the program is not for")

    monkeypatch.setattr(cudnn, "fault", tried)
    case = Case("bfloat16", length=512, head_dim=64, documents=2, capability=(8, 0))
    absent = dataclasses.replace(case, gpu_is_absent=True)
    assert choose("cuda", absent) == ("cudnn", "made for cuda")
    with pytest.raises(AssertionError, match="tried"):
        choose("cuda", case)
