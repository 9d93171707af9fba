"""Eight bits a value with one scale a row, as bitsandbytes' ``load_in_8bit`` stores weights.

::

    w    bfloat16 (out, in)                                       2 bytes a value
    q    codes int8 (out, in), absmax float32 (out,)              1 byte a value

A value is ``codes * absmax / 127`` (bitsandbytes' ``CB`` and ``SCB``; LLM.int8, arXiv 2208.07339).
Only weights are in 8 bits: products are computed in the activations' type, none of which is rounded
to 8 bits or held back as an outlier.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from jlora.errors import ConfigError

_RECIPROCAL = np.float32(1 / 127)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Int8Array:
    """A matrix in 8 bits a value; a pytree of its children, with the rest static.

    ::

        codes   int8 (*lead, rows, cols)
        absmax  float32 (*lead, rows)

    Rows may be sharded with their ``absmax``, columns anywhere with ``absmax`` on all of them.
    ``lead`` are axes that vmap, scan or stacking put in front; they belong to ``shape``.
    A transform may put anything in the children's place, such as shardings.
    """

    codes: Any
    absmax: Any
    dtype: np.dtype = dataclasses.field(metadata={"static": True})
    """The dtype that ``dequantize`` gives."""
    transposed: bool = dataclasses.field(default=False, metadata={"static": True})
    """Whether the array stands for the transpose (last two axes) of what was quantized."""

    @property
    def lead(self) -> tuple[int, ...]:
        """The axes in front of the matrix's own."""
        return tuple(self.codes.shape[:-2])

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array that this stands for."""
        *lead, rows, cols = self.codes.shape
        return (*lead, cols, rows) if self.transposed else (*lead, rows, cols)

    @property
    def ndim(self) -> int:
        """How many axes ``shape`` has."""
        return len(self.codes.shape)

    @property
    def size(self) -> int:
        """How many values it holds."""
        return math.prod(self.codes.shape)

    @property
    def nbytes(self) -> int:
        """What its children occupy, in bytes."""
        return self.size + 4 * math.prod(self.absmax.shape)

    @property
    def mT(self) -> Int8Array:
        """The transpose of the last two axes; nothing moves."""
        return dataclasses.replace(self, transposed=not self.transposed)

    def dequantize(self, dtype: Any = None) -> Array:
        """``dequantize(self, dtype)``."""
        return dequantize(self, dtype)

    def take(self, ids: Int[Array, "*ids"]) -> Float[Array, "*ids cols"]:
        """Rows ``ids`` of what was quantized, in ``dtype``; no other row is dequantized."""
        if self.transposed or self.ndim != 2:
            raise ValueError(f"takes rows of one untransposed matrix, not of {self}")
        return _values(self.codes[ids], self.absmax[ids]).astype(self.dtype)

    def __repr__(self) -> str:
        shape = self.shape if hasattr(self.codes, "shape") else "a transform"
        return f"Int8Array({shape}, {self.dtype})"


def quantize(w: Num[Array, "*lead rows cols"]) -> Int8Array:
    """Packs a matrix, or stacked ones, row by row; halves go to the even neighbour.

    The codes are bitsandbytes' where ``w`` is exact in float16, to which it rounds first. A row of
    zeros stays exactly zero.

    Raises:
      ConfigError: ``w`` is not floating point.
    """
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise ConfigError(f"cannot quantize an array of {w.dtype}", fix="give it floating point")
    return _quantize(w)


@jax.jit
def _quantize(w):
    absmax = jnp.max(jnp.abs(w), axis=-1).astype(jnp.float32)
    # Without the barrier XLA widens the values once for both uses and keeps them in memory so.
    w, absmax = jax.lax.optimization_barrier((w, absmax))
    scale = jnp.where(absmax > 0, 127 * (1 / absmax), 0)  # rounded twice, as there
    codes = jnp.round(w.astype(jnp.float32) * scale[..., None]).astype(jnp.int8)
    return Int8Array(codes, absmax, jnp.dtype(w.dtype))


def dequantize(q: Int8Array, dtype: Any = None) -> Float[Array, "..."]:
    """The array that ``q`` stands for, rounded once to ``dtype`` (``q.dtype`` when it is None)."""
    return _dequantize(q, jnp.dtype(q.dtype if dtype is None else dtype))


@functools.partial(jax.jit, static_argnames="dtype")
def _dequantize(q: Int8Array, dtype):
    w = _values(q.codes, q.absmax).astype(dtype)
    return w.mT if q.transposed else w


def _values(codes: Array, absmax: Array) -> Array:
    return codes.astype(jnp.float32) * absmax[..., None] * _RECIPROCAL
