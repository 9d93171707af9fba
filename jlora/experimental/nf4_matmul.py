"""Fused products with 4-bit matrices: each tile is dequantized on its way into the matrix unit.

``dot`` writes the dequantized matrix in 16 bits and reads it back: 0.5 + 2 + 2 bytes a parameter. A
Pallas kernel reads only the codes, but dequantizes a tile again for each tile of activations: it
gains with few rows, and with many a GPU's ALUs limit it. No device has measured where it wins, so
no setting selects it; ``benchmarks/nf4_matmul.py`` has the arithmetic of both and measures them.

Both kernels (Triton, Mosaic) read the matrix as it was quantized, [rows, cols] with blocks along
the rows, and contract either axis: ``x @ W`` and the gradient ``g @ W.T`` are the same kernel. A
tile's values are bitwise those of ``nf4.dequantize``; only the order of the float32 sum differs.

Pallas is imported in the functions that use it: the import takes a third of a second.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jlora.quant.codebooks import FOUR_BIT
from jlora.quant.nf4 import NF4Array, dequantize_absmax, is_rowwise_matrix, look_up


class Tiles(NamedTuple):
    """The sizes that one step of a kernel works on."""

    x_rows: int
    rows: int
    """Of the quantized matrix."""
    cols: int
    """Of the quantized matrix, in values: two to a byte."""
    splits: int = 1
    """Parts of the contraction that run in parallel and are summed afterwards (GPU)."""


def nf4_matmul(
    x: Float[Array, "*batch k"],
    q: NF4Array,
    transpose: bool = False,
    dtype: Any = None,
    *,
    platform: str,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Float[Array, "*batch n"]:
    """``x @ q``, or ``x @ q.mT`` if ``transpose``, summed in float32.

    Args:
      x: activations, bfloat16 or float32.
      q: a matrix whose rows consist of whole blocks (``rowwise``), transposed or not. It is a
        constant: the product has no gradient.
      transpose: multiply by the transpose.
      dtype: of the result; None is ``x.dtype``.
      platform: the kernel, "cuda" (Triton) or "tpu" (Mosaic).
      tiles: None chooses by shape. Sizes that tiles do not divide are padded, which copies.
      interpret: Pallas' interpret mode, on any device.

    Raises:
      ValueError: ``q`` is stacked, is no matrix, or has blocks that straddle rows.
    """
    if not is_rowwise_matrix(q):
        raise ValueError(f"needs one matrix of whole blocks, not {q}")
    axis = int(q.transposed != transpose)
    flat = x.reshape(-1, x.shape[-1])
    tiles = tiles or choose_tiles(platform, flat.shape[0], q, axis)
    # A block longer than a tile is split, with its absmax repeated.
    block = min(q.block_size, tiles.cols if platform == "cuda" else tiles.cols // 8)
    absmax = jnp.repeat(dequantize_absmax(q), q.block_size // block, axis=1)
    operands = (
        _pad(flat, tiles.x_rows, (tiles.rows, tiles.cols)[axis] * tiles.splits),
        _pad(q.codes, *_padding(tiles, axis, 2)),
        _pad(absmax, *_padding(tiles, axis, block)),
    )
    call = _triton if platform == "cuda" else _mosaic
    values = FOUR_BIT[q.quant_type], q.dtype
    out_dtype = jnp.dtype(x.dtype if dtype is None else dtype)
    out = call(*operands, values, out_dtype, axis, tiles, interpret)
    out = out[: flat.shape[0], : q.matrix_shape[1 - axis]]
    return out.reshape(*x.shape[:-1], -1)


def _padding(tiles: Tiles, axis: int, values: int) -> tuple[int, int]:
    """The multiples to pad an array to that has one entry for every ``values`` columns."""
    splits = (tiles.splits, 1) if axis == 0 else (1, tiles.splits)
    return tiles.rows * splits[0], tiles.cols * splits[1] // values


def choose_tiles(platform: str, x_rows: int, q: NF4Array, axis: int) -> Tiles:
    """Tiles for a shape, reasoned from the sizes of registers and memories; not measured."""
    rows, cols = q.matrix_shape
    if platform == "tpu":
        # Each tile of x dequantizes the matrix anew: as many rows of x as VMEM holds.
        # The 32 x 128 tiles of uint8 make 256 columns the minimum, and give absmax 8 rows.
        return Tiles(min(_up(x_rows, 16), 1024), _divisor(rows, 512, 128), _divisor(cols, 512, 256))
    x_tile = min(max(16, 1 << (x_rows - 1).bit_length()), 128)
    tiles = Tiles(x_tile, 128 if x_tile > 32 else 64, 128)
    # Two programs a multiprocessor, to have more loads in flight; each has four steps at least.
    programs = -(-x_rows // x_tile) * -(-q.matrix_shape[1 - axis] // tiles[2 - axis])
    steps = -(-q.matrix_shape[axis] // tiles[1 + axis])
    fits = [
        s
        for s in (8, 4, 2)
        if x_rows <= 64 and steps % s == 0 and steps // s >= 4 and programs * s <= 512
    ]
    return tiles._replace(splits=fits[0] if fits else 1)


def _divisor(size: int, largest: int, least: int) -> int:
    """The largest power of two in [least, largest] that divides ``size``; else ``least``."""
    while largest > least and size % largest:
        largest //= 2
    return largest


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _pad(x: Array, *multiples: int) -> Array:
    missing = [(0, -size % m) for size, m in zip(x.shape, multiples, strict=True)]
    return jnp.pad(x, missing) if any(after for _, after in missing) else x


def _cost(x, codes, absmax, n, dtype) -> dict[str, int]:
    """The kernel's cost for XLA's scheduler and ``cost_analysis``, which cannot look inside."""
    moved = sum(a.size * a.dtype.itemsize for a in (x, codes, absmax))
    moved += x.shape[0] * n * dtype.itemsize
    flops = 4 * x.shape[0] * codes.size
    return {"flops": flops, "bytes_accessed": moved, "transcendentals": 0}


def _triton(x, codes, absmax, values, dtype, axis, tiles, interpret):
    """GPU: each program holds one tile of the result in registers and loops over the contraction.

    The quantized matrix is the left operand, which the matrix unit reads from registers, where it
    is dequantized; and the right side wastes less on few rows of ``x``. Codes are looked up in a
    table in memory, one load from the first-level cache each; selecting by bits takes fifteen
    operations and would be the bottleneck.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    table, w_dtype = values
    shape, sizes = (codes.shape[0], 2 * codes.shape[1]), (tiles.rows, tiles.cols)
    free, k = sizes[1 - axis], sizes[axis]
    steps = shape[axis] // (k * tiles.splits)
    groups = tiles.cols // (shape[1] // absmax.shape[1])

    def kernel(x_ref, codes_ref, absmax_ref, table_ref, out_ref):
        def step(i, total):
            def part(ref, size):
                where = pl.ds(i * size, size)
                return ref[where, :] if axis == 0 else ref[:, where]

            code = part(codes_ref, k if axis == 0 else k // 2).astype(jnp.int32)
            scale = part(absmax_ref, k if axis == 0 else groups)
            scale = jnp.broadcast_to(scale[..., None], (*scale.shape, tiles.cols // 2 // groups))
            scale = scale.reshape(code.shape)
            even_odd = [(table_ref[c] * scale).astype(w_dtype) for c in (code >> 4, code & 15)]
            w = jnp.stack(even_odd, axis=-1).reshape(sizes).astype(x.dtype)
            xs = x_ref[:, pl.ds(i * k, k)]
            dims = (((axis,), (1,)), ((), ()))
            return total + jax.lax.dot_general(w, xs, dims, preferred_element_type=jnp.float32)

        first = pl.program_id(2) * steps
        total = jnp.zeros((free, tiles.x_rows), jnp.float32)
        total = jax.lax.fori_loop(first, first + steps, step, total)
        out_ref[...] = total.T.astype(out_ref.dtype)

    def along(array, size):
        block = (array.shape[0], size) if axis == 0 else (size, array.shape[1])
        return pl.BlockSpec(block, lambda i, j, s: (0, j) if axis == 0 else (j, 0))

    grid = (x.shape[0] // tiles.x_rows, shape[1 - axis] // free, tiles.splits)
    out = pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[
            pl.BlockSpec((tiles.x_rows, x.shape[1]), lambda i, j, s: (i, 0)),
            along(codes, tiles.cols // 2 if axis == 0 else tiles.rows),
            along(absmax, groups if axis == 0 else tiles.rows),
            pl.BlockSpec((16,), lambda i, j, s: (0,)),
        ],
        out_specs=pl.BlockSpec((None, tiles.x_rows, free), lambda i, j, s: (s, i, j)),
        out_shape=jax.ShapeDtypeStruct(
            (tiles.splits, x.shape[0], shape[1 - axis]),
            dtype if tiles.splits == 1 else jnp.float32,
        ),
        compiler_params=plgpu.CompilerParams(num_warps=8 if tiles.rows > 64 else 4, num_stages=3),
        cost_estimate=pl.CostEstimate(**_cost(x, codes, absmax, shape[1 - axis], dtype)),
        interpret=interpret,
        name="nf4_matmul",
    )(x, codes, absmax, table)
    return out[0] if tiles.splits == 1 else jnp.sum(out, axis=0).astype(dtype)


def _mosaic(x, codes, absmax, values, dtype, axis, tiles, interpret):
    """TPU: the grid's last axis loops over the contraction, with the sum in VMEM.

    The tile is transposed first. Blocks then run along sublanes, where a row of ``absmax`` scales
    32 values at once, and where two bfloat16 share a 32-bit lane, so that even and odd values are
    interleaved by a shift.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    table, w_dtype = values
    shape, sizes = (codes.shape[0], 2 * codes.shape[1]), (tiles.rows, tiles.cols)
    groups = tiles.cols // (shape[1] // absmax.shape[1])

    def kernel(x_ref, codes_ref, absmax_ref, out_ref, total_ref):
        @pl.when(pl.program_id(2) == 0)
        def _():
            total_ref[...] = jnp.zeros_like(total_ref)

        code = codes_ref[...].T.astype(jnp.int32).reshape(groups, -1, tiles.rows)
        scale = absmax_ref[...][:, None, :]
        even_odd = [(look_up(table, c) * scale).astype(w_dtype) for c in (code >> 4, code & 15)]
        w = _interleave(*(half.reshape(-1, tiles.rows) for half in even_odd)).astype(x.dtype)
        dims = (((1,), (1 - axis,)), ((), ()))
        product = jax.lax.dot_general(x_ref[...], w, dims, preferred_element_type=jnp.float32)
        total_ref[...] += product
        out_ref[...] = total_ref[...].astype(out_ref.dtype)

    def by_tile(block):  # axis 1 is contracted, or axis 0
        return pl.BlockSpec(block, lambda i, j, t: (j, t) if axis == 1 else (t, j))

    free, k = sizes[1 - axis], sizes[axis]
    return pl.pallas_call(
        kernel,
        grid=(x.shape[0] // tiles.x_rows, shape[1 - axis] // free, shape[axis] // k),
        in_specs=[
            pl.BlockSpec((tiles.x_rows, k), lambda i, j, t: (i, t)),
            by_tile((tiles.rows, tiles.cols // 2)),
            pl.BlockSpec((groups, tiles.rows), lambda i, j, t: (t, j) if axis == 1 else (j, t)),
        ],
        out_specs=pl.BlockSpec((tiles.x_rows, free), lambda i, j, t: (i, j)),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], shape[1 - axis]), dtype),
        scratch_shapes=[pltpu.VMEM((tiles.x_rows, free), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(**_cost(x, codes, absmax, shape[1 - axis], dtype)),
        interpret=interpret,
        name="nf4_matmul",
    )(x, codes, absmax.T)


def _interleave(even: Array, odd: Array) -> Array:
    """(2n, m) whose rows 2i and 2i + 1 are row i of each."""
    return jnp.stack([even, odd], axis=1).reshape(-1, even.shape[1])
