"""NF4 against a NumPy oracle that shares no code with it, and NF4Array as a pytree."""

import hashlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora import nf4
from jlora.config import QuantConfig
from jlora.errors import ConfigError


def oracle_codes(w, block_size):
    """Codes and absmax, one block at a time, by the definition of the format."""
    flat = np.asarray(w, np.float32).reshape(-1)
    codes, absmax = [], []
    for start in range(0, flat.size, block_size):
        block = flat[start : start + block_size]
        largest = np.abs(block).max()
        scale = np.float32(1) / largest if largest else np.float32(0)
        v = np.clip(block * scale, np.float32(-1), np.float32(1))
        table = nf4.CODES.astype(np.float64)
        middle = np.float32((table[1:] + table[:-1]) / 2)
        codes.append(np.searchsorted(middle, v, side="left"))
        absmax.append(largest)
    return np.concatenate(codes), np.array(absmax, np.float32)


def oracle_nested(absmax, offset):
    """Second level by exhaustive search for the nearest of the 256 values."""
    flat = (absmax.reshape(-1) - offset).astype(np.float32)
    codes, largest = [], []
    for start in range(0, flat.size, 256):
        block = flat[start : start + 256]
        top = np.abs(block).max()
        v = block * (np.float32(1) / top)
        codes.append(np.abs(v[:, None].astype(np.float64) - nf4.DYNAMIC_MAP).argmin(axis=1))
        largest.append(top)
    return np.concatenate(codes).reshape(absmax.shape), np.array(largest, np.float32)


def unpack(codes):
    """Nibbles in the order of the values."""
    return np.stack([np.asarray(codes) >> 4, np.asarray(codes) & 15], -1).reshape(-1)


def normal(*shape, seed=0, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32), dtype)


def test_tables_are_the_published_ones():
    digest = "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"
    assert hashlib.sha256(nf4.DYNAMIC_MAP.astype("<f4").tobytes()).hexdigest() == digest
    digest = "8501941daa1b8a90ad1bbfeb632e5101b5dddbc4bb52d6e55abcfd777e60c06a"
    assert hashlib.sha256(nf4.CODES.astype("<f4").tobytes()).hexdigest() == digest
    assert nf4.CODES.dtype == nf4.DYNAMIC_MAP.dtype == np.float32 and nf4.CODES[7] == 0


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
    expected = (nf4.CODES[codes] * np.repeat(absmax, block_size)[: codes.size]).astype(dtype)
    assert q.shape == shape and q.dtype == dtype
    got = nf4.dequantize(q)
    assert got.dtype == dtype
    np.testing.assert_array_equal(np.asarray(got), expected.reshape(shape))


def test_ties_take_the_lower_code():
    block = np.zeros(64, np.float32)
    block[0] = 1.0
    block[1:16] = nf4.THRESHOLDS
    block[16:31] = np.nextafter(nf4.THRESHOLDS, np.float32(2))
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
    expected = nf4.DYNAMIC_MAP[codes] * largest[index] + offset
    np.testing.assert_allclose(np.asarray(nf4.dequantize_absmax(q)), expected, rtol=2e-7)
    tables = nf4.CODES[unpack(q.codes)][: w.size] * np.repeat(expected, block_size)[: w.size]
    ulp = np.spacing(np.float32(np.abs(tables).max()))
    np.testing.assert_allclose(np.asarray(nf4.dequantize(q)).reshape(-1), tables, rtol=0, atol=ulp)


@pytest.mark.parametrize("double_quant", [False, True])
def test_zero_blocks_stay_exactly_zero(double_quant):
    w = np.asarray(normal(16, 128)).copy()
    w[3, 64:] = 0
    w[9] = 0
    got = np.asarray(nf4.dequantize(nf4.quantize(jnp.asarray(w), double_quant=double_quant)))
    assert not got[3, 64:].any() and not got[9].any() and got[3, :64].any()
    zeros = nf4.dequantize(nf4.quantize(jnp.zeros((4, 64)), double_quant=double_quant))
    assert not np.asarray(zeros).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_block_that_is_not_finite_comes_back_so(bad):
    w = np.asarray(normal(2, 128)).copy()
    w[0, 5] = bad
    got = np.asarray(nf4.dequantize(nf4.quantize(jnp.asarray(w), double_quant=False)))
    assert not np.isfinite(got[0, :64]).any()
    assert np.isfinite(got[0, 64:]).all() and np.isfinite(got[1]).all()


def test_error_on_normal_weights_is_the_published_one():
    w = normal(2048, 2048)
    for double_quant, expected in ((False, 0.09196), (True, 0.09199)):
        got = nf4.dequantize(nf4.quantize(w, double_quant=double_quant))
        error = float(jnp.linalg.norm(got - w) / jnp.linalg.norm(w))
        assert abs(error - expected) < 1e-4


def test_bits_per_parameter():
    w = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)
    for double_quant, limit in ((True, 4.13), (False, 4.51)):
        q = jax.eval_shape(lambda w, d=double_quant: nf4.quantize(w, double_quant=d), w)
        assert q.shape == w.shape and q.size == w.size
        assert limit - 0.02 < 8 * q.nbytes / w.size <= limit
        assert q.nbytes == sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(q))


def test_quantizing_makes_no_table_of_distances():
    w = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    analysis = jax.jit(nf4.quantize).lower(w).compile().memory_analysis()
    assert analysis.temp_size_in_bytes <= 2 * 4 * w.size
    q = jax.eval_shape(nf4.quantize, w)
    analysis = jax.jit(nf4.dequantize).lower(q).compile().memory_analysis()
    assert analysis.temp_size_in_bytes <= 4 * w.size / 16


@pytest.mark.parametrize("shape", [(48, 64), (48, 40)])
def test_transposed_stands_for_the_transpose(shape):
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


def test_checkpoints_keep_it(tmp_path):
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


def small_tree():
    return {
        "model": {
            "embed_tokens": {"embedding": normal(10, 64)},
            "layers": {
                "q_proj": {"kernel": normal(3, 64, 32, dtype=jnp.bfloat16), "bias": normal(3, 32)},
                "norm": {"scale": normal(3, 64)},
            },
            "out": {"kernel": normal(64, 32)},
        },
        "lm_head": {"kernel": normal(64, 10)},
    }


def test_quantize_params_packs_kernels_as_bitsandbytes_does():
    params = small_tree()
    packed = nf4.quantize_params(params, QuantConfig())
    q = packed["model"]["layers"]["q_proj"]["kernel"]
    assert q.shape == (3, 64, 32) and q.dtype == jnp.bfloat16
    kernel = params["model"]["layers"]["q_proj"]["kernel"]
    for layer in range(3):
        codes, _ = oracle_codes(np.asarray(kernel[layer]).T, 64)
        np.testing.assert_array_equal(unpack(q.codes[layer]), codes)
    assert isinstance(packed["model"]["out"]["kernel"], nf4.NF4Array)
    same = [("lm_head", "kernel"), ("model", "embed_tokens"), ("model", "layers", "norm")]
    for path in same:
        a, b = params, packed
        for key in path:
            a, b = a[key], b[key]
        assert jax.tree.all(jax.tree.map(lambda x, y: x is y, a, b))
    again = nf4.quantize_params(packed, QuantConfig())
    assert again["model"]["layers"]["q_proj"]["kernel"] is q


def test_quantize_params_leaves_out_what_it_is_told_to():
    skip = QuantConfig(llm_int8_skip_modules=["out", "lm_head"])
    packed = nf4.quantize_params(small_tree(), skip)
    assert isinstance(packed["model"]["out"]["kernel"], jax.Array)
    assert isinstance(packed["model"]["layers"]["q_proj"]["kernel"], nf4.NF4Array)
    skip = QuantConfig(llm_int8_skip_modules=["model.layers"])
    packed = nf4.quantize_params(small_tree(), skip)
    assert isinstance(packed["model"]["layers"]["q_proj"]["kernel"], jax.Array)


@pytest.mark.parametrize(
    ("name", "message"), [("q_porj", "q_proj"), ("model.layers.1.q_proj", "layer number")]
)
def test_quantize_params_explains_a_bad_skip(name, message):
    with pytest.raises(ConfigError, match=message):
        nf4.quantize_params(small_tree(), QuantConfig(llm_int8_skip_modules=[name]))
