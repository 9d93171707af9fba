"""Dropout by a hash of each element's index: cheap enough to be drawn again in the backward pass.

A counter-based generator: an element is kept or not by 32 bits that are a function of a JAX key and
of the element's index alone. It takes ten operations an element; Threefry, JAX's own, ninety. The
hash is lowbias32, of C. Wellons' "Prospecting for Hash Functions" (2018).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt32

from jlora.ops.matmul import barrier_after

FACTORS = 0x7FEB352D, 0x846CA68B
"""lowbias32's."""


def keep_levels(dropout: float) -> int:
    """The probability to keep an element, in units of 2⁻³²: neither all of them nor none."""
    return min(max(round((1 - dropout) * 2**32), 1), 2**32 - 1)


def keep_scale(dropout: float) -> float:
    """The factor of what is kept, by which the mean is that of the input."""
    return 2**32 / keep_levels(dropout)


def drop(x: Float[Array, "*batch in"], key: Array, dropout: float) -> Float[Array, "*batch in"]:
    """``x`` with zeros in place of what is dropped; multiply the product by ``keep_scale``.

    Scaling the weight instead of ``x`` leaves ``x`` without a second rounding.
    """
    # Without the barrier XLA hoists the zero, broadcast to the shape of x, out of the layers' scan.
    return jnp.where(keep_mask(x, key, dropout), x, barrier_after(jnp.zeros((), x.dtype), x))


def keep_mask(x: Float[Array, "*batch in"], key: Array, dropout: float) -> Bool[Array, "*batch in"]:
    """True for each element of ``x`` that is kept, whatever its value, with 1 - ``dropout``.

    A function of the key and the element's index only, so it is the same on any mesh.
    """
    return random_bits(x, key) < jnp.uint32(keep_levels(dropout))


def random_bits(x: Float[Array, "*batch in"], key: Array) -> UInt32[Array, "*batch in"]:
    """32 random bits for each element of ``x``; the high ones are the better mixed."""
    words = jax.random.key_data(key)
    row = _row_numbers(x.shape)
    # Two words for each row. With one, rows whose first words are close would have the same bits,
    # shifted; with both derived from both words of the key, no such pair is left.
    small = _hash_all(row, words), _hash_all(row, words[::-1]), _numbers(x.shape[-1])
    # Small arrays behind a barrier: XLA hoists indices of the shape of x out of the layers' scan,
    # and every layer then reads them (docs/log.md).
    first, second, column = barrier_after(small, x)
    bits = first + column
    bits = (bits ^ (bits >> 16)) * jnp.uint32(FACTORS[0])
    # lowbias32, with the row's second word in its middle, and without its last step: that changes
    # the low half only.
    return (bits ^ (bits >> 15) ^ second) * jnp.uint32(FACTORS[1])


def _row_numbers(shape: tuple[int, ...]) -> UInt32[Array, "*batch 1"]:
    """The number of each row, modulo 2³²."""
    *axes, _ = shape
    total, stride = jnp.zeros((1,) * len(shape), jnp.uint32), 1
    for i, size in reversed(list(enumerate(axes))):
        place = _numbers(size) * jnp.uint32(stride % 2**32)
        total, stride = total + place.reshape(-1, *(1,) * (len(axes) - i)), stride * size
    return total


def _numbers(size: int) -> UInt32[Array, " size"]:
    return jnp.arange(size, dtype=jnp.uint32)


def _hash_all(x: Array, words: Array) -> Array:
    """A hash of ``x`` and all ``words``; a bijection of ``x``."""
    for word in words:
        x = _hash(x ^ word)
    return x


def _hash(x: Array) -> Array:
    """lowbias32, a bijection of uint32."""
    x = (x ^ (x >> 16)) * jnp.uint32(FACTORS[0])
    x = (x ^ (x >> 15)) * jnp.uint32(FACTORS[1])
    return x ^ (x >> 16)
