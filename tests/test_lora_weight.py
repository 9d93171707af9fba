"""LoraWeight and TokenWeight in place of a weight: ``dot`` and ``embed``, compared with NumPy."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jlora.lora import LoraWeight, TokenWeight
from jlora.ops.dot import columns, dot, embed, grouped_dot
from jlora.ops.dropout import keep_mask
from jlora.quant import nf4

IN, OUT, R = 64, 96, 3
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(2, 5, IN)), jnp.float32)


def array(*shape):
    return jnp.asarray(RNG.normal(size=shape) * 0.3, jnp.float32)


def dora(base=None, **fields):
    base = array(IN, OUT) if base is None else base
    pair = {"lora_A": array(IN, R), "lora_B": array(R, OUT), "scale": jnp.float32(1.5)}
    return LoraWeight(base, **pair, gain=1 + array(OUT), **fields)


def dense_sum(w, base=None):
    base = np.asarray(w.base if base is None else base, np.float64)
    return base + float(w.scale) * np.float64(w.lora_A) @ np.float64(w.lora_B)


def test_dora_scales_the_columns_of_base_plus_delta():
    w = dora()
    want = np.float64(X) @ (dense_sum(w) * np.float64(w.gain))
    np.testing.assert_allclose(dot(X, w), want, atol=2e-5)
    np.testing.assert_allclose(w.dequantize(), dense_sum(w) * np.float64(w.gain), atol=1e-6)
    quantized = dora(nf4.quantize(array(OUT, IN)).mT)
    want = np.float64(X) @ (
        dense_sum(quantized, quantized.base.dequantize()) * np.float64(quantized.gain)
    )
    np.testing.assert_allclose(dot(X, quantized), want, atol=5e-5)


def test_the_gain_keeps_float32_under_bfloat16():
    """A factor of 1.002 is 1 in bfloat16: the magnitude would stop learning."""
    w = dataclasses.replace(dora(), gain=jnp.full((OUT,), 1.002, jnp.float32))
    plain = dataclasses.replace(w, gain=None)
    x = X.astype(jnp.bfloat16)
    got, without = (np.float64(dot(x, v, jnp.float32)) for v in (w, plain))
    np.testing.assert_allclose(got, 1.002 * without, rtol=1e-4, atol=1e-4)
    assert dot(x, w).dtype == jnp.bfloat16


def test_dora_under_dropout_matches_peft():
    """peft: W x + (m - 1) W d(x) + m s B A d(x), with one mask for both."""
    w = dora(dropout_key=jax.random.key(3), dropout=0.4)
    keep = np.asarray(keep_mask(X, jax.random.key(3), 0.4))
    dropped = np.where(keep, np.float64(X) / 0.6, 0.0)
    gain, base = np.float64(w.gain), np.float64(w.base)
    delta = dropped @ (dense_sum(w) - base)
    want = np.float64(X) @ base + (gain - 1) * (dropped @ base) + gain * delta
    np.testing.assert_allclose(dot(X, w), want, atol=3e-5)


def test_a_bias_is_added_to_the_product_before_the_gain():
    bias = array(OUT)
    w = dataclasses.replace(dora(), bias=bias, gain=None)
    want = np.float64(X) @ dense_sum(w) + np.float64(bias)
    np.testing.assert_allclose(dot(X, w), want, atol=2e-5)


def test_columns_of_every_child():
    w = dataclasses.replace(dora(), bias=array(OUT))
    part = columns(w, jnp.int32(32), 32)
    np.testing.assert_allclose(dot(X, part), dot(X, w)[..., 32:64], atol=1e-5)


def test_embedding_with_gain():
    w = dora()
    ids = jnp.asarray([[3, 3, 0], [63, 7, 1]])
    want = (dense_sum(w) * np.float64(w.gain))[np.asarray(ids)]
    np.testing.assert_allclose(embed(ids, w), want, atol=1e-6)


def tokens(indices=(9, 2, 40)):
    return TokenWeight(array(IN, OUT), array(len(indices), OUT), jnp.asarray(indices, jnp.int32))


def replaced(w):
    table = np.array(w.base)
    table[np.asarray(w.indices)] = w.rows
    return table


def test_trained_rows_replace_rows_of_the_table():
    w = tokens()
    ids = jnp.asarray(RNG.permutation(IN).reshape(4, -1))
    np.testing.assert_array_equal(embed(ids, w), replaced(w)[np.asarray(ids)])
    np.testing.assert_array_equal(w.dequantize(), replaced(w))
    quantized = dataclasses.replace(w, base=nf4.quantize(w.base))
    want = replaced(dataclasses.replace(w, base=quantized.base.dequantize()))
    np.testing.assert_array_equal(embed(ids, quantized), want[np.asarray(ids)])


def test_the_tied_head_uses_the_trained_rows_in_full_and_by_columns():
    w = tokens()
    x = jnp.asarray(RNG.normal(size=(5, OUT)), jnp.float32)
    want = np.asarray(x) @ replaced(w).T
    np.testing.assert_allclose(dot(x, w.mT), want, atol=1e-5)
    np.testing.assert_allclose(w.mT.dequantize(), replaced(w).T)
    for start in (0, 8, 32):  # rows outside of the part are omitted, at both ends
        got = dot(x, columns(w.mT, jnp.int32(start), 32))
        np.testing.assert_allclose(got, want[:, start : start + 32], atol=1e-5)


def test_gradients_of_rows_match_those_of_the_full_table():
    w = tokens()
    ids = jnp.asarray([[9, 9, 5, 40]])

    def loss(table, embed, dot):
        return jnp.sum(jnp.sin(dot(embed(ids, table), table.mT)))

    got = jax.grad(lambda rows: loss(dataclasses.replace(w, rows=rows), embed, dot))(w.rows)
    table_gradient = jax.grad(lambda t: loss(t, lambda i, t: t[i], jnp.matmul))(
        jnp.asarray(replaced(w))
    )
    np.testing.assert_allclose(got, table_gradient[w.indices], atol=1e-4)


def test_each_group_has_its_own_adapter():
    base, sizes = array(3, 4, 6), jnp.asarray([2, 0, 3])
    w = LoraWeight(base, array(3, 4, R), array(3, R, 6), jnp.float32(0.5))
    x = jnp.asarray(RNG.normal(size=(5, 4)), jnp.float32)
    dense = np.float64(base) + 0.5 * np.float64(w.lora_A) @ np.float64(w.lora_B)
    want = np.einsum("ni,nio->no", np.float64(x), dense[[0, 0, 2, 2, 2]])
    np.testing.assert_allclose(grouped_dot(x, w, sizes), want, atol=1e-5)
    np.testing.assert_allclose(w.dequantize(), dense, atol=1e-6)
    turned = w.mT  # [out, in], as experts are stored
    np.testing.assert_allclose(turned.dequantize(), dense.swapaxes(1, 2), atol=1e-6)
    np.testing.assert_allclose(grouped_dot(x, turned.mT, sizes), want, atol=1e-5)
    assert turned.shape == (3, 6, 4)


def test_the_transpose_of_a_dora_weight():
    w = dora()
    turned = w.mT
    assert turned.mT is w and turned.shape == w.shape[::-1] and turned.dtype == w.dtype
    np.testing.assert_array_equal(turned.dequantize(), w.dequantize().mT)


def test_weights_pass_through_transforms():
    for w in (dora(), tokens()):
        again = jax.tree.map(lambda x: x, w)
        chex.assert_trees_all_equal(again, w)
        assert (w.shape, w.ndim, w.dtype) == ((IN, OUT), 2, jnp.float32)
