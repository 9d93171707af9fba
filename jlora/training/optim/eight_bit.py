"""Optimizer moments in 8 bits, in blocks of 256 values, as in bitsandbytes (arXiv 2110.02861).

A block's values are divided by its largest magnitude (``absmax``) and rounded to the nearest entry
of the dynamic map: the signed one for a first moment, the unsigned one for a second::

    float32 (32, 4096, 16)     8 MiB
    Blockwise                  codes uint8 (32, 4096, 16), absmax float32 (32, 256, 1)    2.03 MiB

so AdamW's two moments take 2.03 bytes a parameter instead of 8.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jlora.quant.codebooks import DYNAMIC_MAP, DYNAMIC_THRESHOLDS, UNSIGNED_MAP, UNSIGNED_THRESHOLDS
from jlora.quant.nf4 import nearest_code

BLOCK = 256

MIN_SIZE = 4096
"""Leaves with fewer values stay in float32, as ``min_8bit_size`` in bitsandbytes.

The layers of a stacked leaf are counted together."""

MOMENTS = {"mu": True, "nu": False}
"""Fields of optax's states that are moments → whether they are signed."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blockwise:
    """A float32 array quantized to 8 bits: a pytree of two arrays of the same rank.

    Blocks run over the values in row-major order. ``codes`` has the array's shape, and ``absmax``,
    for an array (…, m, n), is::

        (…, m, n / 256)         n is a multiple of 256: lora_B (…, r, out), most kernels
        (…, m * n / 256, 1)     m * n is: lora_A (…, in, r); a block is 256 / r rows
        (blocks,)                otherwise, and for a vector; the last block may be short

    So both are sharded along the same axes as the parameter (``sharding.spec`` goes by name and
    rank). Every shard holds whole blocks with their absmax if the mesh divides the blocks as it
    does the dimension; otherwise absmax is replicated. The values are the same.
    """

    codes: Any
    """uint8"""
    absmax: Any
    """float32"""
    signed: bool = dataclasses.field(metadata={"static": True})


def quantize_blockwise(values: Float[Array, "..."], signed: bool) -> Blockwise:
    """Rounds to the nearest value of the map; ties get the lower code.

    In the unsigned map, values between 0 and the smallest positive entry are rounded up to it. A
    block of zeros stays exactly zero, and one whose absmax is subnormal becomes zero. A block that
    contains a NaN or an infinity has no finite value once dequantized.
    """
    blocks = _blocks(values.astype(jnp.float32))
    absmax = jnp.max(jnp.abs(blocks), axis=-1)
    # The reciprocal of a subnormal is infinite, or that of zero where subnormals are flushed.
    scale = jnp.where(absmax >= jnp.finfo(jnp.float32).tiny, 1 / absmax, 0)
    thresholds = DYNAMIC_THRESHOLDS if signed else UNSIGNED_THRESHOLDS
    codes = nearest_code(thresholds, blocks * scale[..., None])
    codes = codes.reshape(-1)[: values.size].reshape(values.shape)
    return Blockwise(codes, absmax, signed)


def dequantize_blockwise(q: Blockwise) -> Float[Array, "..."]:
    """The dequantized float32 array."""
    table = jnp.asarray(DYNAMIC_MAP if q.signed else UNSIGNED_MAP)
    values = table[_blocks(q.codes)] * q.absmax[..., None]
    return values.reshape(-1)[: q.codes.size].reshape(q.codes.shape)


def _blocks(x: Array) -> Array:
    """The array as (*shape of absmax, 256), padded with zeros."""
    *lead, m, n = (1, 1, *x.shape)[-max(x.ndim, 2) :]
    if x.ndim > 1 and n % BLOCK == 0:
        return x.reshape(*lead, m, n // BLOCK, BLOCK)
    if x.ndim > 1 and m * n % BLOCK == 0:
        return x.reshape(*lead, m * n // BLOCK, 1, BLOCK)
    return jnp.pad(x.reshape(-1), (0, -x.size % BLOCK)).reshape(-1, BLOCK)


def eight_bit(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """``inner`` with its moments (``MOMENTS``) stored in 8 bits between steps.

    A step dequantizes them, updates them in float32, computes the parameters' update from the
    float32 moments, and only then quantizes them again, as bitsandbytes does. In the state of
    ``inner``, a Blockwise replaces every moment of at least ``MIN_SIZE`` values.
    """

    def quantized(state: Any) -> Any:
        signs = {name: sign for name, sign in MOMENTS.items() if hasattr(state, name)}
        return state._replace(
            **{
                name: _quantize_moments(getattr(state, name), signed)
                for name, signed in signs.items()
            }
        )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = inner.update(updates, _dequantize_moments(state), params)
        return updates, quantized(state)

    return optax.GradientTransformation(lambda params: quantized(inner.init(params)), update)


def _quantize_moments(moments: Any, signed: bool) -> Any:
    def one(leaf: Array) -> Any:
        return quantize_blockwise(leaf, signed) if leaf.size >= MIN_SIZE else leaf

    return jax.tree.map(one, moments)


def _dequantize_moments(state: Any) -> Any:
    def one(leaf: Any) -> Any:
        return dequantize_blockwise(leaf) if isinstance(leaf, Blockwise) else leaf

    return jax.tree.map(one, state, is_leaf=lambda x: isinstance(x, Blockwise))
