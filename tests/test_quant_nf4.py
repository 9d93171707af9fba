"""NF4, compared with an independent NumPy oracle, and NF4Array as a pytree."""

import hashlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.errors import ConfigError
from jlora.quant import codebooks, nf4


def oracle_codes(w, block_size):
    """Codes and absmax, one block at a time, by the definition of the format."""
    flat = np.asarray(w, np.float32).reshape(-1)
    codes, absmax = [], []
    for start in range(0, flat.size, block_size):
        block = flat[start : start + block_size]
        largest = np.abs(block).max()
        scale = np.float32(1) / largest if largest else np.float32(0)
        v = np.clip(block * scale, np.float32(-1), np.float32(1))
        table = codebooks.NF4.astype(np.float64)
        middle = np.float32((table[1:] + table[:-1]) / 2)
        codes.append(np.searchsorted(middle, v, side="left"))
        absmax.append(largest)
    return np.concatenate(codes), np.array(absmax, np.float32)


def oracle_nested(absmax, offset):
    """The second level, by exhaustive search for the nearest of the 256 values."""
    flat = (absmax.reshape(-1) - offset).astype(np.float32)
    codes, largest = [], []
    for start in range(0, flat.size, 256):
        block = flat[start : start + 256]
        top = np.abs(block).max()
        v = block * (np.float32(1) / top)
        codes.append(np.abs(v[:, None].astype(np.float64) - codebooks.DYNAMIC_MAP).argmin(axis=1))
        largest.append(top)
    return np.concatenate(codes).reshape(absmax.shape), np.array(largest, np.float32)


def unpack(codes):
    """Nibbles in the order of the values."""
    return np.stack([np.asarray(codes) >> 4, np.asarray(codes) & 15], -1).reshape(-1)


def normal(*shape, seed=0, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32), dtype)


def test_tables_match_the_published_ones():
    digest = "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"
    assert hashlib.sha256(codebooks.DYNAMIC_MAP.astype("<f4").tobytes()).hexdigest() == digest
    digest = "8501941daa1b8a90ad1bbfeb632e5101b5dddbc4bb52d6e55abcfd777e60c06a"
    assert hashlib.sha256(codebooks.NF4.astype("<f4").tobytes()).hexdigest() == digest
    assert (
        codebooks.NF4.dtype == codebooks.DYNAMIC_MAP.dtype == np.float32 and codebooks.NF4[7] == 0
    )


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16])
@pytest.mark.parametrize(
    ("shape", "block_size"),
    [((8, 64), 64), ((3, 5, 128), 32), ((7, 33), 64), ((129,), 64), ((), 32), ((2, 4096), 4096)],
)
def test_codes_and_absmax_equal_the_oracle(shape, block_size, dtype):
    w = normal(*shape, dtype=dtype)
    q = nf4.quantize(w, block_size, double_quant=False)
    codes, absmax = oracle_codes(w, block_size)
    np.testing.assert_array_equal(unpack(q.codes)[: codes.size], codes)
    np.testing.assert_array_equal(np.asarray(q.absmax).reshape(-1), absmax)
    expected = (codebooks.NF4[codes] * np.repeat(absmax, block_size)[: codes.size]).astype(dtype)
    assert q.shape == shape and q.dtype == dtype
    got = nf4.dequantize(q)
    assert got.dtype == dtype
    np.testing.assert_array_equal(np.asarray(got), expected.reshape(shape))


def test_ties_take_the_lower_code():
    block = np.zeros(64, np.float32)
    block[0] = 1.0
    block[1:16] = codebooks.THRESHOLDS["nf4"]
    block[16:31] = np.nextafter(codebooks.THRESHOLDS["nf4"], np.float32(2))
    nibbles = unpack(nf4.quantize(jnp.asarray(block), double_quant=False).codes)
    np.testing.assert_array_equal(nibbles[1:16], np.arange(15))
    np.testing.assert_array_equal(nibbles[16:31], np.arange(1, 16))


@pytest.mark.parametrize(("shape", "block_size"), [((64, 640), 64), ((50, 100), 32), ((8, 64), 64)])
def test_double_quantization_takes_the_nearest_value(shape, block_size):
    w = normal(*shape, seed=1)
    plain = nf4.quantize(w, block_size, double_quant=False)
    q = nf4.quantize(w, block_size)
    offset = np.asarray(q.nested_offset)
    absmax = np.asarray(plain.absmax)
    np.testing.assert_allclose(offset, absmax.astype(np.float64).mean(), rtol=1e-6)
    codes, largest = oracle_nested(absmax, offset)
    np.testing.assert_array_equal(np.asarray(q.absmax), codes)
    np.testing.assert_array_equal(np.asarray(q.nested_absmax), largest)
    np.testing.assert_array_equal(np.asarray(q.codes), np.asarray(plain.codes))
    index = np.arange(codes.size).reshape(codes.shape) // 256
    expected = codebooks.DYNAMIC_MAP[codes] * largest[index] + offset
    np.testing.assert_allclose(np.asarray(nf4.dequantize_absmax(q)), expected, rtol=2e-7)
    tables = codebooks.NF4[unpack(q.codes)][: w.size] * np.repeat(expected, block_size)[: w.size]
    ulp = np.spacing(np.float32(np.abs(tables).max()))
    np.testing.assert_allclose(np.asarray(nf4.dequantize(q)).reshape(-1), tables, rtol=0, atol=ulp)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("code", ["nf4", "fp4"])
def test_zero_blocks_stay_exactly_zero(code, double_quant):
    w = np.asarray(normal(16, 128)).copy()
    w[3, 64:] = 0
    w[9] = 0
    got = np.asarray(nf4.dequantize(nf4.quantize(jnp.asarray(w), 64, double_quant, code)))
    assert not got[3, 64:].any() and not got[9].any() and got[3, :64].any()
    zeros = nf4.dequantize(nf4.quantize(jnp.zeros((4, 64)), 64, double_quant, code))
    assert not np.asarray(zeros).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_non_finite_block_stays_non_finite(bad):
    w = np.asarray(normal(2, 128)).copy()
    w[0, 5] = bad
    got = np.asarray(nf4.dequantize(nf4.quantize(jnp.asarray(w), double_quant=False)))
    assert not np.isfinite(got[0, :64]).any()
    assert np.isfinite(got[0, 64:]).all() and np.isfinite(got[1]).all()


def test_error_on_normal_weights_matches_the_published_one():
    w = normal(2048, 2048)
    published = ((False, "nf4", 0.09196), (True, "nf4", 0.09199), (False, "fp4", 0.12198))
    for double_quant, code, expected in published:
        got = nf4.dequantize(nf4.quantize(w, 64, double_quant, code))
        error = float(jnp.linalg.norm(got - w) / jnp.linalg.norm(w))
        assert abs(error - expected) < 1e-4


def test_bits_per_parameter():
    w = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)
    for double_quant, limit in ((True, 4.13), (False, 4.51)):
        q = jax.eval_shape(lambda w, d=double_quant: nf4.quantize(w, double_quant=d), w)
        assert q.shape == w.shape and q.size == w.size
        assert limit - 0.02 < 8 * q.nbytes / w.size <= limit
        assert q.nbytes == sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(q))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("cols", [2048, 1000])
def test_quantizing_needs_less_than_two_more_matrices(cols, dtype):
    """A model's kernel (in, out), quantized as its transpose; the result is included."""
    w = jax.ShapeDtypeStruct((cols, 512), dtype)
    memory = jax.jit(lambda w: nf4.quantize(w.mT).mT).lower(w).compile().memory_analysis()
    needs = memory.temp_size_in_bytes + memory.output_size_in_bytes
    assert needs <= 2 * w.size * w.dtype.itemsize
    q = jax.eval_shape(nf4.quantize, w)
    memory = jax.jit(nf4.dequantize).lower(q).compile().memory_analysis()
    words = 2 * w.size if dtype == jnp.bfloat16 else 0  # CPUs join pairs of 16-bit values
    assert memory.temp_size_in_bytes <= words + 4 * w.size / 16 + 4096


@pytest.mark.parametrize("shape", [(48, 64), (48, 40)])
def test_transposed_behaves_as_the_transpose(shape):
    q = nf4.quantize(normal(3, *shape))
    assert q.mT.shape == (3, shape[1], shape[0]) and q.mT.mT.shape == q.shape and q.ndim == 3
    np.testing.assert_array_equal(np.asarray(q.mT.dequantize()), np.asarray(q.dequantize()).mT)
    with pytest.raises(ValueError, match="matrix"):
        nf4.quantize(normal(64)).mT  # noqa: B018


@pytest.mark.parametrize("cols", [64, 40])
def test_transforms_see_an_array(cols):
    w = normal(4, 24, cols)
    one_by_one = [nf4.quantize(w[i]).mT for i in range(4)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *one_by_one)
    vmapped = jax.vmap(lambda m: nf4.quantize(m).mT)(w)
    assert stacked.shape == vmapped.shape == (4, cols, 24)
    for a, b in zip(jax.tree.leaves(stacked), jax.tree.leaves(vmapped), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-6)
    dense = np.stack([np.asarray(q.dequantize()) for q in one_by_one])
    np.testing.assert_array_equal(np.asarray(stacked.dequantize()), dense)
    _, scanned = jax.lax.scan(lambda carry, q: (carry, q.dequantize()), 0, stacked)
    np.testing.assert_array_equal(np.asarray(scanned), dense)
    mapped = jax.vmap(lambda q: q.dequantize(jnp.float16))(stacked)
    np.testing.assert_array_equal(np.asarray(mapped), dense.astype(np.float16))
    assert jax.eval_shape(lambda q: q.dequantize(), stacked).shape == dense.shape
    assert "NF4Array" in repr(jax.tree.map(lambda _: None, stacked))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(48, 128), (48, 40), (9, 33)])
def test_taken_rows_equal_the_dequantized_ones(shape, double_quant):
    q = nf4.quantize(normal(*shape, dtype=jnp.bfloat16), 32, double_quant)
    ids = jnp.asarray([[0, 7], [8, 7]], jnp.int32)
    got, expected = jax.jit(nf4.take)(q, ids), np.asarray(q.dequantize())[np.asarray(ids)]
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(got), expected)
    with pytest.raises(ValueError, match="not transposed"):
        q.mT.take(ids)


@pytest.mark.parametrize("double_quant", [True, False])
def test_even_and_odd_columns_separately(double_quant):
    """The method of TPUs: the same values, also after the columns are interleaved."""
    q = nf4.quantize(normal(96, 256), 64, double_quant)
    for leaf in (q, q.mT):
        even, odd = nf4.dequantize_even_odd(leaf)
        np.testing.assert_array_equal(even, nf4.dequantize(q)[:, ::2])
        np.testing.assert_array_equal(odd, nf4.dequantize(q)[:, 1::2])
    stack = jax.vmap(lambda w: nf4.quantize(w, 64, double_quant))(normal(3, 96, 256))
    assert stack.lead == (3,)
    together = nf4._columns(stack, jnp.bfloat16)
    np.testing.assert_array_equal(together, nf4.dequantize(stack, jnp.bfloat16))


def test_taking_rows_dequantizes_no_other():
    q = jax.eval_shape(nf4.quantize, jax.ShapeDtypeStruct((4096, 512), jnp.bfloat16))
    ids = jax.ShapeDtypeStruct((8,), jnp.int32)
    memory = jax.jit(nf4.take).lower(q, ids).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 8 * 512 * 8


def test_checkpoints_preserve_quantized_arrays(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    tree = {
        "a": nf4.quantize(normal(8, 64)),
        "b": nf4.quantize(normal(5, 9), double_quant=False).mT,
    }
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "it", tree)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "it", jax.tree.map(jnp.zeros_like, tree))
    assert jax.tree.structure(restored) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, restored, tree)


@pytest.mark.parametrize(
    ("w", "block_size", "message"),
    [(jnp.zeros((4, 64)), 48, "block_size"), (jnp.zeros((4, 64), jnp.int32), 64, "int32")],
)
def test_what_cannot_be_quantized_is_refused(w, block_size, message):
    with pytest.raises(ConfigError, match=message):
        nf4.quantize(w, block_size)
    with pytest.raises(ConfigError, match="'nf5'"):
        nf4.quantize(jnp.zeros((4, 64)), quant_type="nf5")
