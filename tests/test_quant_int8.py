"""Int8Array, compared with its formula in NumPy; as a pytree, and as a weight."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.errors import ConfigError
from jlora.ops.dot import dot, embed
from jlora.quant import int8


def normal(*shape, dtype=np.float32):
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return jnp.asarray(values).astype(dtype)


def formula(w):
    """Codes and absmax of the rows, by LLM.int8's definition."""
    w32 = np.asarray(w, np.float32)
    absmax = np.abs(w32).max(axis=-1)
    scale = np.divide(np.float32(1), absmax, out=np.zeros_like(absmax), where=absmax > 0) * 127
    return np.rint(w32 * scale[..., None]).astype(np.int8), absmax


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_codes_and_values_follow_the_formula(dtype):
    w = normal(3, 7, 33, dtype=dtype).at[1, 2].set(0)
    q = int8.quantize(w)
    codes, absmax = formula(w)
    np.testing.assert_array_equal(np.asarray(q.codes), codes)
    np.testing.assert_array_equal(np.asarray(q.absmax), absmax)
    expected = codes * absmax[..., None] * np.float32(1 / 127)
    got = q.dequantize()
    chex.assert_shape(got, w.shape)
    chex.assert_type(got, dtype)
    np.testing.assert_array_equal(np.asarray(got), expected.astype(got.dtype))
    assert not np.asarray(got)[1, 2].any()
    assert np.abs(expected - np.asarray(w, np.float32)).max() <= absmax.max() / 250


def test_int8_arrays_work_as_weights():
    w, x = normal(12, 20), normal(5, 20)
    q = int8.quantize(w).mT
    assert q.shape == (20, 12) and q.mT.mT.shape == q.shape and (q.ndim, q.size) == (2, 240)
    dense = q.dequantize()
    np.testing.assert_array_equal(np.asarray(dense), np.asarray(q.mT.dequantize()).T)
    np.testing.assert_allclose(np.asarray(dot(x, q)), np.asarray(x @ dense), rtol=1e-5, atol=1e-5)
    gradient = jax.grad(lambda x: jnp.sum(jnp.sin(dot(x, q))))(x)
    expected = jax.grad(lambda x: jnp.sum(jnp.sin(x @ dense)))(x)
    np.testing.assert_allclose(np.asarray(gradient), np.asarray(expected), rtol=1e-4, atol=1e-5)
    ids = jnp.asarray([[4, 0], [4, 11]])
    np.testing.assert_array_equal(np.asarray(embed(ids, q.mT)), np.asarray(dense.T)[ids])
    assert q.nbytes == 240 + 4 * 12


def test_layers_are_stacked_scanned_and_mapped():
    w = normal(3, 8, 16)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *[int8.quantize(m).mT for m in w])
    assert stacked.shape == (3, 16, 8) and "Int8Array" in repr(stacked)
    dense = np.asarray(stacked.dequantize())
    _, scanned = jax.lax.scan(lambda carry, q: (carry, q.dequantize()), 0, stacked)
    np.testing.assert_array_equal(np.asarray(scanned), dense)
    np.testing.assert_array_equal(np.asarray(jax.vmap(lambda q: q.dequantize())(stacked)), dense)
    chex.assert_trees_all_equal(jax.vmap(lambda m: int8.quantize(m).mT)(w), stacked)
    assert "transform" in repr(jax.tree.map(lambda _: None, stacked))


def test_quantizing_widens_nothing_in_memory():
    w = jax.ShapeDtypeStruct((512, 2048), jnp.bfloat16)
    memory = jax.jit(int8.quantize).lower(w).compile().memory_analysis()
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes <= 2 * w.size


def test_integers_are_refused():
    with pytest.raises(ConfigError, match="int32"):
        int8.quantize(jnp.zeros((4, 4), jnp.int32))


def test_rows_of_a_transpose_cannot_be_taken():
    with pytest.raises(ValueError, match="not transposed"):
        int8.quantize(normal(4, 4)).mT.take(jnp.asarray([0]))
