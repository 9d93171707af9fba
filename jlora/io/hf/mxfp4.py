"""MXFP4, the format of gpt-oss's expert matrices; they are dequantized when they are read.

32 consecutive values of a row share a scale, a power of two (OCP Microscaling Formats v1.0)::

    model.layers.0.mlp.experts.gate_up_proj_blocks   (E, out, in / 32, 16)   uint8
    model.layers.0.mlp.experts.gate_up_proj_scales   (E, out, in / 32)       uint8
    model.layers.0.mlp.experts.gate_up_proj          (E, in, out), the dequantized tensor

A byte holds two values, the first in its low bits. A scale is 2 ** (byte - 127); 255 is NaN.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float, UInt8

from jlora.io.hf.folder import Shards
from jlora.quant.nf4 import look_up

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = np.array([*MAGNITUDES, *(-m for m in MAGNITUDES)], np.float32)
"""Values of the 16 codes: one bit of sign, two of exponent, one of mantissa."""

# A table, since jnp.exp2 is not exact: on a CPU it misses most powers of two, by up to 30 units in
# the last place.
E8M0_SCALES = np.append(np.ldexp(np.float32(1), np.arange(255) - 127), np.float32(np.nan))
BLOCKS, SCALED = "_blocks", "_scales"


class DecodedShards(Shards):
    """Shards in which each MXFP4 matrix appears as one bfloat16 tensor (exact)."""

    def __init__(self, shards: Shards):
        self._shards, self.problems = shards, list(shards.problems)
        self.files = dict(shards.files)
        self._mxfp4: set[str] = set()
        for name in shards.files:
            base = name.removesuffix(BLOCKS)
            if base == name or base + SCALED not in shards.files:
                continue
            if problem := self._misshapen(base):
                self.problems.append((name, problem))
                continue
            self._mxfp4.add(base)
            self.files[base] = self.files.pop(name)
            del self.files[base + SCALED]

    def _misshapen(self, base: str) -> str | None:
        """The problem with shape or type of a matrix's two tensors, if any."""
        blocks, scales = (self._shards.shape(base + part) for part in (BLOCKS, SCALED))
        if len(blocks) != 4 or blocks[-1] != 16 or blocks[:-1] != scales:
            return f"has shape {blocks} and its scales {scales}, which is not MXFP4"
        types = {self._shards.dtype(base + part) for part in (BLOCKS, SCALED)}
        return None if types == {"U8"} else "is of another type than uint8, or its scales are"

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape; for MXFP4 the dequantized one."""
        if name not in self._mxfp4:
            return self._shards.shape(name)
        experts, rows, groups = self._shards.shape(name + SCALED)
        return experts, 32 * groups, rows

    def dtype(self, name: str) -> str:
        """The type's name."""
        return "BF16" if name in self._mxfp4 else self._shards.dtype(name)

    def read(self, name: str, span: slice | None = None) -> np.ndarray:
        """The tensor's values, or a slice of them; MXFP4 is dequantized expert by expert."""
        if name not in self._mxfp4:
            return self._shards.read(name, span)
        experts, *matrix = self.shape(name)
        numbers = range(experts)[span or slice(None)]
        out = np.empty((len(numbers), *matrix), ml_dtypes.bfloat16)
        for i, expert in enumerate(numbers):
            one = slice(expert, expert + 1)
            out[i] = decode(*(self._shards.read(name + p, one)[0] for p in (BLOCKS, SCALED)))
        return out


@jax.jit
def decode(
    blocks: UInt8[Array | np.ndarray, "rows groups 16"],
    scales: UInt8[Array | np.ndarray, "rows groups"],
) -> Float[Array, "cols rows"]:
    """The transpose of an MXFP4 matrix, dequantized to bfloat16."""
    blocks, scale = jnp.asarray(blocks), jnp.asarray(E8M0_SCALES)[scales]
    pairs = jnp.stack([look_up(E2M1, blocks & 15), look_up(E2M1, blocks >> 4)], axis=-1)
    values = pairs.reshape(*scale.shape, 32) * scale[..., None]
    return values.reshape(scale.shape[0], -1).astype(jnp.bfloat16).T
