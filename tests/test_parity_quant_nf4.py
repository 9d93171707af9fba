"""NF4 and FP4 compared with bitsandbytes' CPU kernels.

Where the block size does not divide the last dimension, only codes and absmax are compared:
bitsandbytes' ``dequantize_4bit`` is wrong for these shapes on AVX-512. For blocks of 2048 and more
it would be, too, but there it falls back to torch.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.config import QuantConfig
from jlora.ops.dot import dot, embed
from jlora.quant import codebooks, nf4
from jlora.quant.params import quantize_params

torch = pytest.importorskip("torch")
bnb = pytest.importorskip("bitsandbytes.functional")

DTYPES = ["float32", "bfloat16", "float16"]
CODES = ["nf4", "fp4"]
SHAPES = [((96, 256), 64), ((33, 384), 128), ((17, 96), 32), ((4, 8192), 4096)]
SHAPES += [((3, 2, n), n) for n in (256, 512, 1024, 2048)]
UNEVEN = [((7, 33), 64), ((5, 100), 64), ((3, 67), 32), ((50,), 64), ((64, 33), 64)]


def weights(shape, dtype, seed=0):
    """The same values for jlora and torch; rows differ by up to three orders of magnitude."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal(shape) * 10 ** rng.uniform(-3, 0, (*shape[:-1], 1))
    tensor = torch.from_numpy(w.astype(np.float32)).to(getattr(torch, dtype))
    return jnp.asarray(tensor.float().numpy()).astype(dtype), tensor


def bnb_quantize(tensor, block_size, double_quant, code="nf4"):
    return bnb.quantize_4bit(
        tensor, blocksize=block_size, compress_statistics=double_quant, quant_type=code
    )


def as_numpy(tensor):
    return tensor.float().numpy()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "block_size"), SHAPES + UNEVEN)
@pytest.mark.parametrize("code", CODES)
def test_codes_and_absmax_match_bitsandbytes(code, shape, block_size, dtype):
    w, tensor = weights(shape, dtype)
    q = nf4.quantize(w, block_size, double_quant=False, quant_type=code)
    bnb_codes, state = bnb_quantize(tensor, block_size, False, code)
    actual, expected = np.asarray(q.codes).reshape(-1), bnb_codes.numpy().reshape(-1)
    if w.size % 2:  # the last low nibble holds no value
        assert actual[-1] >> 4 == expected[-1] >> 4
        actual, expected = actual[:-1], expected[:-1]
    np.testing.assert_array_equal(actual, expected)
    np.testing.assert_array_equal(np.asarray(q.absmax).reshape(-1), as_numpy(state.absmax))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "block_size"), SHAPES)
@pytest.mark.parametrize("code", CODES)
def test_dequantized_values_match_bitsandbytes(code, shape, block_size, dtype):
    w, tensor = weights(shape, dtype)
    bnb_codes, state = bnb_quantize(tensor, block_size, False, code)
    expected = as_numpy(bnb.dequantize_4bit(bnb_codes, state, quant_type=code))
    q = nf4.quantize(w, block_size, double_quant=False, quant_type=code)
    np.testing.assert_array_equal(np.asarray(q.dequantize()).astype(np.float32), expected)


def from_bitsandbytes(bnb_codes, state, shape, dtype, block_size, code):
    """bitsandbytes' tensors as an ``NF4Array``."""
    rows, cols = shape
    return nf4.NF4Array(
        codes=jnp.asarray(bnb_codes.numpy().reshape(rows, cols // 2)),
        absmax=jnp.asarray(state.absmax.numpy().reshape(rows, cols // block_size)),
        nested_absmax=jnp.asarray(state.state2.absmax.numpy()),
        nested_offset=jnp.asarray(state.offset.numpy()),
        matrix_shape=shape,
        dtype=jnp.dtype(dtype),
        block_size=block_size,
        quant_type=code,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "block_size"), [((512, 256), 64), ((256, 384), 128)])
@pytest.mark.parametrize("code", CODES)
def test_bitsandbytes_double_quantization_dequantizes_exactly(code, shape, block_size, dtype):
    _, tensor = weights(shape, dtype)
    bnb_codes, state = bnb_quantize(tensor, block_size, True, code)
    expected = as_numpy(bnb.dequantize_4bit(bnb_codes, state, quant_type=code))
    q = from_bitsandbytes(bnb_codes, state, shape, dtype, block_size, code)
    np.testing.assert_array_equal(np.asarray(q.dequantize()).astype(np.float32), expected)
    # The same inside larger programs, where XLA may fuse: in a product and in a lookup of rows.
    eye = jnp.eye(shape[0], dtype=dtype)
    product = jax.jit(lambda q: dot(eye, q, jnp.float32))(q)
    np.testing.assert_array_equal(np.asarray(product), expected)
    ids = jnp.asarray([[3, 0], [shape[0] - 1, 3]])
    rows = jax.jit(embed)(ids, q)
    np.testing.assert_array_equal(np.asarray(rows).astype(np.float32), expected[np.asarray(ids)])


def test_code_tables_match_bitsandbytes():
    _, state = bnb_quantize(weights((64, 64), "float32")[1], 64, True)
    np.testing.assert_array_equal(codebooks.DYNAMIC_MAP, state.state2.code.numpy())
    np.testing.assert_array_equal(codebooks.NF4, state.code.numpy())
    _, state = bnb_quantize(weights((64, 64), "float32")[1], 64, True, "fp4")
    np.testing.assert_array_equal(codebooks.FP4, state.code.numpy())
    assert state.state2.blocksize == nf4.NESTED_BLOCK


def test_quantized_absmax_matches_bitsandbytes_given_its_offset():
    w, tensor = weights((2048, 1024), "bfloat16", seed=3)
    q = nf4.quantize(w)
    _, state = bnb_quantize(tensor, 64, True)
    np.testing.assert_allclose(np.asarray(q.nested_offset), state.offset.numpy(), rtol=5e-7)
    absmax = nf4.quantize(w, double_quant=False).absmax
    codes, largest, _ = nf4.quantize_absmax(absmax, jnp.asarray(state.offset.numpy()))
    np.testing.assert_array_equal(np.asarray(largest), state.state2.absmax.numpy())
    steps = np.asarray(codes).reshape(-1).astype(int) - state.absmax.numpy().astype(int)
    # bitsandbytes' CPU kernel finds codes in a table of 65,536 entries, a few of them wrongly.
    assert np.mean(steps != 0) < 0.0025 and np.abs(steps).max() <= 3


def test_blocks_of_zeros_match_bitsandbytes_and_stay_zero():
    w, tensor = weights((64, 128), "float32")
    w, tensor = w.at[5, 64:].set(0), tensor.clone()
    tensor[5, 64:] = 0
    q = nf4.quantize(w, double_quant=False)
    bnb_codes, _ = bnb_quantize(tensor, 64, False)
    np.testing.assert_array_equal(np.asarray(q.codes).reshape(-1), bnb_codes.numpy().reshape(-1))
    assert not np.asarray(q.dequantize())[5, 64:].any()


def test_a_tree_is_quantized_like_torchs_linear_layers():
    kernel, _ = weights((128, 64), "bfloat16")  # (in, out)
    tree = {"layers": {"q_proj": {"kernel": jnp.stack([kernel, kernel * 2])}}}
    q = quantize_params(tree, QuantConfig())["layers"]["q_proj"]["kernel"]
    for layer, factor in enumerate((1, 2)):
        linear = torch.from_numpy(np.asarray(kernel.T, np.float32) * factor).bfloat16()
        bnb_codes, _ = bnb_quantize(linear.contiguous(), 64, True)
        np.testing.assert_array_equal(
            np.asarray(q.codes[layer]).reshape(-1), bnb_codes.numpy().reshape(-1)
        )
    assert q.shape == (2, 128, 64)


def test_the_error_is_no_larger_than_that_of_bitsandbytes():
    w, tensor = weights((1024, 1024), "float32", seed=7)
    expected = as_numpy(bnb.dequantize_4bit(*bnb_quantize(tensor, 64, True)))
    bnb_error = np.linalg.norm(expected - np.asarray(w))
    error = float(jnp.linalg.norm(jax.jit(lambda w: nf4.quantize(w).dequantize() - w)(w)))
    assert error <= bnb_error * 1.0001
