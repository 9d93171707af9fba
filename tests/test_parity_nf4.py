"""NF4 against bitsandbytes' CPU kernels.

Last dimensions that the block size does not divide are compared in codes and absmax only:
bitsandbytes' ``dequantize_4bit`` is wrong for them on AVX-512.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora import nf4
from jlora.config import QuantConfig

torch = pytest.importorskip("torch")
bnb = pytest.importorskip("bitsandbytes.functional")

DTYPES = ["float32", "bfloat16", "float16"]
SHAPES = [((96, 256), 64), ((33, 384), 128), ((17, 96), 32), ((4, 8192), 4096)]
UNEVEN = [((7, 33), 64), ((5, 100), 64), ((3, 67), 32), ((50,), 64)]


def weights(shape, dtype, seed=0):
    """The same values for both, spread over three orders of magnitude from row to row."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal(shape) * 10 ** rng.uniform(-3, 0, (*shape[:-1], 1))
    tensor = torch.from_numpy(w.astype(np.float32)).to(getattr(torch, dtype))
    return jnp.asarray(tensor.float().numpy()).astype(dtype), tensor


def theirs(tensor, block_size, double_quant):
    return bnb.quantize_4bit(
        tensor, blocksize=block_size, compress_statistics=double_quant, quant_type="nf4"
    )


def as_numpy(tensor):
    return tensor.float().numpy()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "block_size"), SHAPES + UNEVEN)
def test_bytes_and_absmax_are_equal(shape, block_size, dtype):
    ours, tensor = weights(shape, dtype)
    q = nf4.quantize(ours, block_size, double_quant=False)
    packed, state = theirs(tensor, block_size, False)
    mine, other = np.asarray(q.codes).reshape(-1), packed.numpy().reshape(-1)
    if ours.size % 2:  # the last low nibble holds no value
        assert mine[-1] >> 4 == other[-1] >> 4
        mine, other = mine[:-1], other[:-1]
    np.testing.assert_array_equal(mine, other)
    np.testing.assert_array_equal(np.asarray(q.absmax).reshape(-1), as_numpy(state.absmax))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "block_size"), SHAPES)
def test_dequantizing_is_exact_without_double_quantization(shape, block_size, dtype):
    ours, tensor = weights(shape, dtype)
    expected = as_numpy(bnb.dequantize_4bit(*theirs(tensor, block_size, False)))
    q = nf4.quantize(ours, block_size, double_quant=False)
    np.testing.assert_array_equal(np.asarray(q.dequantize()).astype(np.float32), expected)


def from_bitsandbytes(packed, state, shape, dtype, block_size):
    """bitsandbytes' tensors in our container."""
    rows, cols = shape
    return nf4.NF4Array(
        codes=jnp.asarray(packed.numpy().reshape(rows, cols // 2)),
        absmax=jnp.asarray(state.absmax.numpy().reshape(rows, cols // block_size)),
        nested_absmax=jnp.asarray(state.state2.absmax.numpy()),
        nested_offset=jnp.asarray(state.offset.numpy()),
        matrix_shape=shape,
        dtype=jnp.dtype(dtype),
        block_size=block_size,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "block_size"), [((512, 256), 64), ((256, 384), 128)])
def test_its_doubly_quantized_bytes_dequantize_to_one_ulp(shape, block_size, dtype):
    _, tensor = weights(shape, dtype)
    packed, state = theirs(tensor, block_size, True)
    expected = as_numpy(bnb.dequantize_4bit(packed, state))
    got = from_bitsandbytes(packed, state, shape, dtype, block_size).dequantize()
    ulp = float(jnp.finfo(dtype).eps) * 2.0 ** np.floor(np.log2(np.abs(expected).max()))
    np.testing.assert_allclose(np.asarray(got).astype(np.float32), expected, rtol=0, atol=ulp)


def test_the_map_is_the_one_it_stores():
    _, state = theirs(weights((64, 64), "float32")[1], 64, True)
    np.testing.assert_array_equal(nf4.DYNAMIC_MAP, state.state2.code.numpy())
    np.testing.assert_array_equal(nf4.CODES, state.code.numpy())
    assert state.state2.blocksize == nf4.NESTED_BLOCK


def test_level_two_equals_it_given_the_offset():
    ours, tensor = weights((2048, 1024), "bfloat16", seed=3)
    q = nf4.quantize(ours)
    _, state = theirs(tensor, 64, True)
    np.testing.assert_allclose(np.asarray(q.nested_offset), state.offset.numpy(), rtol=5e-7)
    absmax = nf4.quantize(ours, double_quant=False).absmax
    codes, largest, _ = nf4.quantize_absmax(absmax, jnp.asarray(state.offset.numpy()))
    np.testing.assert_array_equal(np.asarray(largest), state.state2.absmax.numpy())
    steps = np.asarray(codes).reshape(-1).astype(int) - state.absmax.numpy().astype(int)
    # bitsandbytes' CPU kernel looks codes up in a table of 65,536 entries and misses some.
    assert np.mean(steps != 0) < 0.0025 and np.abs(steps).max() <= 3


def test_zero_blocks_are_zero_for_both():
    ours, tensor = weights((64, 128), "float32")
    ours, tensor = ours.at[5, 64:].set(0), tensor.clone()
    tensor[5, 64:] = 0
    q = nf4.quantize(ours, double_quant=False)
    packed, _ = theirs(tensor, 64, False)
    np.testing.assert_array_equal(np.asarray(q.codes).reshape(-1), packed.numpy().reshape(-1))
    assert not np.asarray(q.dequantize())[5, 64:].any()


def test_a_tree_is_packed_as_torch_linear_layers_are():
    kernel, _ = weights((128, 64), "bfloat16")  # (in, out)
    tree = {"layers": {"q_proj": {"kernel": jnp.stack([kernel, kernel * 2])}}}
    q = nf4.quantize_params(tree, QuantConfig())["layers"]["q_proj"]["kernel"]
    for layer, factor in enumerate((1, 2)):
        linear = torch.from_numpy(np.asarray(kernel.T, np.float32) * factor).bfloat16()
        packed, _ = theirs(linear.contiguous(), 64, True)
        np.testing.assert_array_equal(
            np.asarray(q.codes[layer]).reshape(-1), packed.numpy().reshape(-1)
        )
    assert q.shape == (2, 128, 64)


def test_the_error_is_no_larger_than_its():
    ours, tensor = weights((1024, 1024), "float32", seed=7)
    expected = as_numpy(bnb.dequantize_4bit(*theirs(tensor, 64, True)))
    theirs_error = np.linalg.norm(expected - np.asarray(ours))
    error = float(jnp.linalg.norm(jax.jit(lambda w: nf4.quantize(w).dequantize() - w)(ours)))
    assert error <= theirs_error * 1.0001
