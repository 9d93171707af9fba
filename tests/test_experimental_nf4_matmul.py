"""The fused products, interpreted on the CPU, compared with the dequantized matrix's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.experimental.nf4_matmul import Tiles, choose_tiles, nf4_matmul
from jlora.quant import nf4
from jlora.quant.codebooks import FOUR_BIT

ROWS, COLS = 96, 256
TILES = {"cuda": Tiles(8, 32, 64, splits=2), "tpu": Tiles(8, 32, 128)}

BOTH = pytest.mark.parametrize("platform", ["cuda", "tpu"])


def operands(x_shape, transpose, dtype=jnp.float32, shape=(ROWS, COLS), **settings):
    """x, a transposed quantized matrix, and their product in float64."""
    rng = np.random.default_rng(0)
    q = nf4.quantize(jnp.asarray(rng.normal(size=shape), dtype), **settings).mT
    x = jnp.asarray(rng.normal(size=(*x_shape, shape[0] if transpose else shape[1])), dtype)
    dense = np.asarray(q.dequantize(), np.float64)
    return x, q, np.asarray(x, np.float64) @ (dense.T if transpose else dense)


@functools.partial(jax.jit, static_argnames=("transpose", "dtype", "platform", "tiles"))
def interpreted(x, q, transpose=False, dtype=None, *, platform, tiles=None):
    tiles = tiles or TILES[platform]
    return nf4_matmul(x, q, transpose, dtype, platform=platform, tiles=tiles, interpret=True)


def assert_close(got, exact, dtype):
    # Sums of n float32 products err by less than n/2 units of 2^-24 of the sum of magnitudes, here
    # about 14 for values near 1; bfloat16 rounds the sum once more, by at most 2^-9 of itself.
    relative = {jnp.float32: 1e-6, jnp.bfloat16: 2.0**-8}[dtype]
    assert got.dtype == dtype
    np.testing.assert_allclose(np.asarray(got, np.float64), exact, rtol=relative, atol=1e-4)


@BOTH
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        (jnp.float32, {}),
        pytest.param(jnp.bfloat16, {}, marks=pytest.mark.slow),
        (jnp.bfloat16, {"quant_type": "fp4", "double_quant": False}),
        pytest.param(jnp.float32, {"quant_type": "fp4", "block_size": 32}, marks=pytest.mark.slow),
        # Longer than a tile.
        pytest.param(jnp.float32, {"block_size": 256}, marks=pytest.mark.slow),
    ],
    ids=lambda v: str(v) if isinstance(v, dict) else v.__name__,
)
def test_both_products_match_the_dequantized_matrix(platform, transpose, dtype, settings):
    x, q, exact = operands((2, 5), transpose, dtype, **settings)
    assert_close(interpreted(x, q, transpose, platform=platform), exact, dtype)


@BOTH
@pytest.mark.parametrize("transpose", [False, True])
def test_sizes_that_tiles_do_not_divide(platform, transpose):
    x, q, exact = operands((3,), transpose, shape=(40, 192))
    assert_close(interpreted(x, q, transpose, platform=platform), exact, jnp.float32)


@BOTH
def test_an_untransposed_matrix_contracts_its_rows(platform):
    x, q, exact = operands((4,), True)
    got = interpreted(x, q.mT, platform=platform)
    assert_close(got, exact, jnp.float32)


@BOTH
def test_every_code_is_dequantized_to_its_value(platform):
    identity = jnp.eye(32, dtype=jnp.float32)
    for kind, table in FOUR_BIT.items():
        codes = jnp.arange(32 * 32, dtype=jnp.uint32).reshape(32, 32).astype(jnp.uint8)
        q = nf4.quantize(jnp.ones((32, 64)), double_quant=False, quant_type=kind)
        q = nf4.NF4Array(
            codes, q.absmax, None, None, q.matrix_shape, q.dtype, q.block_size, quant_type=kind
        )
        got = interpreted(identity, q, platform=platform)
        pairs = np.stack([table[codes >> 4], table[codes & 15]], axis=-1)
        np.testing.assert_array_equal(got, pairs.reshape(32, 64))


@BOTH
def test_sums_are_float32_and_the_result_may_be(platform):
    x, q, exact = operands((4,), False, jnp.bfloat16)
    got = interpreted(x, q, dtype=jnp.float32, platform=platform)
    assert_close(got, exact, jnp.float32)


@BOTH
def test_the_chosen_tiles_give_the_product(platform):
    x, q, exact = operands((17,), False, jnp.bfloat16, shape=(128, 512))
    got = nf4_matmul(x, q, platform=platform, interpret=True)
    assert_close(got, exact, jnp.bfloat16)


def test_under_vmap_and_scan():
    x, q, _ = operands((2, 3), False)
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf[::-1]]) if leaf.ndim else leaf[None], q)
    layers = [jax.tree.map(lambda leaf, i=i: leaf[min(i, len(leaf) - 1)], stack) for i in (0, 1)]
    layers = [jax.tree.map(lambda a, b: b.reshape(a.shape), q, layer) for layer in layers]
    stack = jax.tree.map(lambda *leaf: jnp.stack(leaf), *layers)
    run = functools.partial(interpreted, platform="tpu")
    expected = [x @ layer.dequantize() for layer in layers]
    by_vmap = jax.vmap(run, (None, 0))(x, stack)
    by_scan = jax.lax.scan(lambda c, w: (c, run(x, w)), None, stack)[1]
    for got in (by_vmap, by_scan):
        np.testing.assert_allclose(got, jnp.stack(expected), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", [(3, 64), (2, 64, 64), (64, 40)])
def test_other_quantized_arrays_are_refused(shape):
    q = nf4.quantize(jnp.ones(shape))
    if shape == (3, 64):
        q = jax.tree.map(lambda leaf: leaf[None], q)  # stacked
    with pytest.raises(ValueError, match="one matrix of whole blocks"):
        nf4_matmul(jnp.ones((2, shape[-2])), q, platform="tpu", interpret=True)


@pytest.mark.parametrize("rows", [1, 16, 100, 4096])
@pytest.mark.parametrize("shape", [(14336, 4096), (1024, 4096), (4096, 11008)])
def test_tiles_cover_a_models_shapes_without_padding(rows, shape):
    q = jax.eval_shape(lambda: nf4.quantize(jnp.ones(shape, jnp.bfloat16)))
    for platform in ("cuda", "tpu"):
        for axis in (0, 1):
            tiles = choose_tiles(platform, rows, q, axis)
            sizes = [tiles.rows, tiles.cols]
            sizes[axis] *= tiles.splits
            assert all(size % tile == 0 for size, tile in zip(shape, sizes, strict=True)), tiles
            assert tiles.x_rows < 2 * max(rows, 16)
