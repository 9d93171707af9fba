"""Products with packed 4-bit matrices that dequantize each tile on its way into the matrix unit.

``dot`` multiplies by a packed matrix by writing it out in 16 bits and reading it back: 0.5 + 2 + 2
bytes a parameter. A Pallas kernel reads the codes alone, but dequantizes a tile anew for each tile
of activations that meets it: it gains with few rows, and with many a GPU's ALUs hold it back.
``benchmarks/nf4_matmul.py`` has the arithmetic of both and measures them; what it found is in
``MEASURED``, and only there is the kernel used.

Both kernels see the packed matrix as it was quantized, [rows, cols] with blocks along the rows, and
contract either axis: ``x @ W`` and the gradient ``g @ W.T`` are the same kernel. The tile's values
are bit for bit those of ``nf4.dequantize``; only the order of the float32 sum differs.

Pallas takes a third of a second to import and is not needed before a kernel is, so each does.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jlora.quant.codebooks import FOUR_BIT
from jlora.quant.nf4 import NF4Array, dequantize_absmax, is_rowwise_matrix, look_up

MEASURED: dict[str, int] = {}
"""Platform ("cuda", "tpu") → up to how many rows of ``x`` the kernel was measured to be faster.

Empty: no device was at hand. Written by hand from ``benchmarks/nf4_matmul.py``'s output.
"""


class Tiles(NamedTuple):
    """What one step of a kernel works on."""

    x_rows: int
    rows: int
    """Of the packed matrix."""
    cols: int
    """Of the packed matrix, in values: two to a byte."""
    splits: int = 1
    """Parts of the contraction that run side by side and are summed afterwards (GPU)."""


def fused_wins(platform: str, x_rows: int, q: Any) -> bool:
    """Whether the kernel is known to be faster for ``x_rows`` rows times ``q``.

    Only where tiles cover the matrix without a copy, and on one device: XLA cannot split a kernel
    over a mesh and would gather what it reads.
    """
    if x_rows > MEASURED.get(platform, 0) or not is_rowwise_matrix(q):
        return False
    covered = q.matrix_shape[0] % 128 == 0 and q.matrix_shape[1] % 256 == 0
    return covered and jax.sharding.get_abstract_mesh().size <= 1


def matmul(
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
      q: a packed matrix of whole blocks (``rowwise``), either way round. Not differentiated.
      transpose: multiply by the transpose.
      dtype: of the result; None is ``x.dtype``.
      platform: whose kernel: "cuda" (Triton) or "tpu" (Mosaic).
      tiles: None chooses by shape. Sizes that tiles do not divide are padded, which copies.
      interpret: run on any device, step by step in JAX.

    Raises:
      ValueError: ``q`` is stacked, no matrix, or has blocks that straddle rows.
    """
    if not is_rowwise_matrix(q):
        raise ValueError(f"multiplies by one matrix of whole blocks, not by {q}")
    axis = int(q.transposed != transpose)
    flat = x.reshape(-1, x.shape[-1])
    tiles = tiles or choose_tiles(platform, flat.shape[0], q, axis)
    # Blocks longer than a step's share of absmax are cut; a scale is then repeated.
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
    """What the sizes of an array are multiples of that has one number for ``values`` columns."""
    splits = (tiles.splits, 1) if axis == 0 else (1, tiles.splits)
    return tiles.rows * splits[0], tiles.cols * splits[1] // values


def choose_tiles(platform: str, x_rows: int, q: NF4Array, axis: int) -> Tiles:
    """Tiles for a shape: reasoned from sizes of registers and memories, not measured."""
    rows, cols = q.matrix_shape
    if platform == "tpu":
        # The more rows of x meet a tile, the less often it is dequantized: as many as VMEM holds.
        # A byte's 32 x 128 tiles make 256 columns the least; the 8 rows of absmax follow from it.
        return Tiles(min(_up(x_rows, 16), 1024), _divisor(rows, 512, 128), _divisor(cols, 512, 256))
    x_tile = min(max(16, 1 << (x_rows - 1).bit_length()), 128)
    tiles = Tiles(x_tile, 128 if x_tile > 32 else 64, 128)
    # Two programs a multiprocessor, for as many loads in flight; each keeps four steps at least.
    programs = -(-x_rows // x_tile) * -(-q.matrix_shape[1 - axis] // tiles[2 - axis])
    steps = -(-q.matrix_shape[axis] // tiles[1 + axis])
    fits = [
        s
        for s in (8, 4, 2)
        if x_rows <= 64 and steps % s == 0 and steps // s >= 4 and programs * s <= 512
    ]
    return tiles._replace(splits=fits[0] if fits else 1)


def _divisor(size: int, largest: int, least: int) -> int:
    """The largest power of two between the two that divides ``size``; else ``least``."""
    while largest > least and size % largest:
        largest //= 2
    return largest


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _pad(x: Array, *multiples: int) -> Array:
    missing = [(0, -size % m) for size, m in zip(x.shape, multiples, strict=True)]
    return jnp.pad(x, missing) if any(after for _, after in missing) else x


def _cost(x, codes, absmax, n, dtype) -> dict[str, int]:
    """What XLA's scheduler and ``cost_analysis`` are told: it cannot look into a kernel."""
    moved = sum(a.size * a.dtype.itemsize for a in (x, codes, absmax))
    moved += x.shape[0] * n * dtype.itemsize
    flops = 4 * x.shape[0] * codes.size
    return {"flops": flops, "bytes_accessed": moved, "transcendentals": 0}


def _triton(x, codes, absmax, values, dtype, axis, tiles, interpret):
    """Each program keeps one tile of the result in registers and walks along the contraction.

    The packed matrix is the left operand, which the matrix unit takes from registers, where it was
    dequantized; and few rows of ``x`` fill its right side better than its left. Codes are looked up
    in a table in memory: from the first-level cache that is one load a value, where selecting is
    fifteen operations and would be the bottleneck.
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
            halves = [(table_ref[c] * scale).astype(w_dtype) for c in (code >> 4, code & 15)]
            w = jnp.stack(halves, axis=-1).reshape(sizes).astype(x.dtype)
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
    """The grid's last axis walks along the contraction, with the sum in VMEM.

    The tile is turned first: blocks then run along sublanes, where a row of ``absmax`` scales 32 of
    them at once and where two bfloat16 share a 32-bit lane, so that halves interleave by a shift.
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
        halves = [(look_up(table, c) * scale).astype(w_dtype) for c in (code >> 4, code & 15)]
        w = _interleave(*(half.reshape(-1, tiles.rows) for half in halves)).astype(x.dtype)
        dims = (((1,), (1 - axis,)), ((), ()))
        product = jax.lax.dot_general(x_ref[...], w, dims, preferred_element_type=jnp.float32)
        total_ref[...] += product
        out_ref[...] = total_ref[...].astype(out_ref.dtype)

    def packed(block):  # of an array (rows, cols), or of one that stands (cols, rows)
        return pl.BlockSpec(block, lambda i, j, t: (j, t) if axis == 1 else (t, j))

    free, k = sizes[1 - axis], sizes[axis]
    return pl.pallas_call(
        kernel,
        grid=(x.shape[0] // tiles.x_rows, shape[1 - axis] // free, shape[axis] // k),
        in_specs=[
            pl.BlockSpec((tiles.x_rows, k), lambda i, j, t: (i, t)),
            packed((tiles.rows, tiles.cols // 2)),
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
