"""int8 with one scale for each row, as bitsandbytes' ``load_in_8bit`` stores weights.

::

    w    bfloat16 (out, in)                                       2 bytes a value
    q    codes int8 (out, in), absmax float32 (out,)              1 byte a value

A value is ``codes * absmax / 127`` (bitsandbytes' ``CB`` and ``SCB``; LLM.int8, arXiv 2208.07339).
Only weights are quantized: products are computed in the activations' dtype, so there is no outlier
decomposition of activations.
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

# bitsandbytes multiplies by this constant; dividing by 127 would round differently.
_RECIPROCAL = np.float32(1 / 127)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Int8Array:
    """A matrix quantized to int8: a pytree with the children ``codes`` and ``absmax``.

    ::

        codes   int8 (*lead, rows, cols)
        absmax  float32 (*lead, rows)

    Rows may be sharded together with ``absmax``, columns with ``absmax`` replicated. ``lead`` are
    leading axes of vmap, scan or stacked layers; they are part of ``shape``. JAX transforms may
    replace the children by other objects, such as shardings.
    """

    codes: Any
    absmax: Any
    dtype: np.dtype = dataclasses.field(metadata={"static": True})
    """The dtype of the dequantized array."""
    transposed: bool = dataclasses.field(default=False, metadata={"static": True})
    """Whether this is the transpose (last two axes) of the array that was quantized."""

    @property
    def lead(self) -> tuple[int, ...]:
        """The leading axes, before the matrix."""
        return tuple(self.codes.shape[:-2])

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dequantized array."""
        *lead, rows, cols = self.codes.shape
        return (*lead, cols, rows) if self.transposed else (*lead, rows, cols)

    @property
    def ndim(self) -> int:
        """The number of axes of ``shape``."""
        return len(self.codes.shape)

    @property
    def size(self) -> int:
        """The number of values."""
        return math.prod(self.codes.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of its children."""
        return self.size + 4 * math.prod(self.absmax.shape)

    @property
    def mT(self) -> Int8Array:
        """The transpose of the last two axes: a flag, no data moves."""
        return dataclasses.replace(self, transposed=not self.transposed)

    def dequantize(self, dtype: Any = None) -> Array:
        """``dequantize(self, dtype)``."""
        return dequantize(self, dtype)

    def take(self, ids: Int[Array, "*ids"]) -> Float[Array, "*ids cols"]:
        """Rows ``ids`` of the quantized matrix, in ``dtype``; only these are dequantized."""
        if self.transposed or self.ndim != 2:
            raise ValueError(f"take needs one matrix that is not transposed, not {self}")
        return _values(self.codes[ids], self.absmax[ids]).astype(self.dtype)

    def __repr__(self) -> str:
        shape = self.shape if hasattr(self.codes, "shape") else "a transform"
        return f"Int8Array({shape}, {self.dtype})"


def quantize(w: Num[Array, "*lead rows cols"]) -> Int8Array:
    """Quantizes a matrix, or stacked ones, row by row; ties round to even.

    The codes equal bitsandbytes' if ``w`` is exact in float16, to which bitsandbytes rounds first.
    A row of zeros stays exactly zero.

    Raises:
      ConfigError: ``w`` is not floating point.
    """
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise ConfigError(f"cannot quantize an array of {w.dtype}", fix="give it floating point")
    return _quantize(w)


@jax.jit
def _quantize(w):
    # Converted after the maximum, which is exact in every dtype: no float32 copy of w.
    absmax = jnp.max(jnp.abs(w), axis=-1).astype(jnp.float32)
    # Without the barrier XLA converts to float32 once for both uses, and stores that in memory.
    w, absmax = jax.lax.optimization_barrier((w, absmax))
    # torch's 127 / absmax is this product; rounded once, it would move 0.03 % of the codes by one.
    scale = jnp.where(absmax > 0, 127 * (1 / absmax), 0)  # rounded twice, as in bitsandbytes
    codes = jnp.round(w.astype(jnp.float32) * scale[..., None]).astype(jnp.int8)
    return Int8Array(codes, absmax, jnp.dtype(w.dtype))


def dequantize(q: Int8Array, dtype: Any = None) -> Float[Array, "..."]:
    """The dequantized array, rounded once to ``dtype`` (default: ``q.dtype``)."""
    return _dequantize(q, jnp.dtype(q.dtype if dtype is None else dtype))


@functools.partial(jax.jit, static_argnames="dtype")
def _dequantize(q: Int8Array, dtype):
    w = _values(q.codes, q.absmax).astype(dtype)
    return w.mT if q.transposed else w


def _values(codes: Array, absmax: Array) -> Array:
    return codes.astype(jnp.float32) * absmax[..., None] * _RECIPROCAL
