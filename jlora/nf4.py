"""NF4, the 4-bit format of QLoRA (arXiv 2305.14314), as bitsandbytes stores it.

An array is cut into blocks of 64 consecutive values. Each value is divided by its block's largest
magnitude (``absmax``) and becomes the nearest of 16 codes; two codes share a byte. Double
quantization keeps ``absmax`` in 8 bits too, which leaves 4.127 bits a parameter::

    w      float32 (4096, 4096)                                   64 MiB
    q      codes uint8 (4096, 2048), absmax uint8 (4096, 64),     8.25 MiB
           nested_absmax float32 (1024,), nested_offset float32 ()

``quantize`` and ``dequantize`` are pure and jitted; an ``NF4Array`` is a pytree and goes through
jit, vmap, scan, sharding and checkpoints like the array it stands for.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import math
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num, UInt8

from jlora import paths
from jlora.config import QuantConfig
from jlora.errors import ConfigError, did_you_mean

CODES = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)
"""What the 16 codes stand for; code 7 is exactly zero."""


def midpoints(values: np.ndarray) -> np.ndarray:
    """The float32 thresholds between neighbours of a sorted table."""
    return ((values[1:].astype(np.float64) + values[:-1]) / 2).astype(np.float32)


def _dynamic_map() -> np.ndarray:
    # The published formula depends on its library's rounding, so the table itself is kept: the
    # upper 128 of its 256 values, little-endian float32. The rest are 0 and the mirror images.
    packed = (
        "c-jrjUr1A77zXg;zk*p^R1*tyNrGXB;F)ea-}in8Wfubp{{%v|K|(td8B9_Tlw?u!ViglI=}fwC3q-}hdEpdOLP>"
        "-(4MKKN5wi<L11S^@M1Ag__xHR!v+--yLpNJ%&hoNt7wQr=YtUw&*$><6E%WyL^leAp_AAHptyM=>AWQlDr&tMga"
        "7FAqP|mzP%KQB><z)P?QjsWP?noUA`+e+Z=>Y3~^NwB4o@5_7KQZ=egMGWV#X1%a*t54eJY`(sg}DX%F|%-2M&Zk"
        "c?c5T2$vu%6kLq(g9skPBAGdjP@)W&^d|Cm8_DU$;SwYK(cFOcRNs=1L5_(8v@{uR<g!-=cQ_6UO9HzadLEOV+N{"
        ">)fAEk2l7$u9R$dyS@I-bPdA|2gX!R8uS<?q-!CQUPmlu;;TxlBa$Y9UEZp=r&qN3ej<^{21_VU=IQhww8Z3?l}c"
        "KtByj!j@oPVC%3=*bmrm*e>j!sFMG~CDkx;R8706N>aWW)vu^l`Kp>S%&;4<BG@fhDXa{37gh<Yg4MtrFoM;>oT@"
        "ClVD+#D*nL<FtQF>gwZXiwc9<U)fOWxoV7;(@<e+*E`xeI3"
    )
    upper = np.frombuffer(zlib.decompress(base64.b85decode(packed)), "<f4").astype(np.float32)
    return np.concatenate([-upper[-2::-1], np.zeros(1, np.float32), upper])


DYNAMIC_MAP = _dynamic_map()
"""bitsandbytes' 8-bit map of [-1, 1], in which double quantization writes ``absmax``."""

THRESHOLDS = midpoints(CODES)
DYNAMIC_THRESHOLDS = midpoints(DYNAMIC_MAP)

NESTED_BLOCK = 256
"""How many ``absmax`` share one ``nested_absmax``."""

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class NF4Array:
    """A packed array; a pytree of its children, with the rest static.

    Seen as a matrix of ``rows = prod(matrix_shape[:-1])`` by ``cols = matrix_shape[-1]``, its
    blocks run along the rows. With ``cols`` divisible by ``block_size`` the children keep both
    dimensions, so that either may be sharded in whole blocks; otherwise blocks straddle rows and
    the children are flat. Read in order, both are bitsandbytes' bytes::

        codes          uint8 (*lead, rows, cols / 2)            or  (*lead, ceil(n / 2))
        absmax         float32, or uint8 with double quantization:
                       (*lead, rows, cols / block_size)         or  (*lead, ceil(n / block_size))
        nested_absmax  float32 (*lead, ceil(blocks / 256)), or None
        nested_offset  float32 (*lead), or None

    ``lead`` are axes that vmap, scan or stacking put in front; they belong to ``shape``.
    A transform may put anything in the children's place, such as shardings.
    """

    codes: Any
    absmax: Any
    nested_absmax: Any
    nested_offset: Any
    matrix_shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    """The shape that was quantized."""
    dtype: np.dtype = dataclasses.field(metadata={"static": True})
    """The dtype that ``dequantize`` gives."""
    block_size: int = dataclasses.field(default=64, metadata={"static": True})
    transposed: bool = dataclasses.field(default=False, metadata={"static": True})
    """Whether the array stands for the transpose (last two axes) of what was quantized."""

    @property
    def rowwise(self) -> bool:
        """Whether the children keep rows and columns (see above) or are flat."""
        return bool(self.matrix_shape) and self.matrix_shape[-1] % self.block_size == 0

    @property
    def lead(self) -> tuple[int, ...]:
        """The axes in front of the quantized array's own."""
        return tuple(self.codes.shape[: -2 if self.rowwise else -1])

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array that this stands for."""
        own = self.matrix_shape
        return (*self.lead, *((*own[:-2], own[-1], own[-2]) if self.transposed else own))

    @property
    def ndim(self) -> int:
        """How many axes ``shape`` has."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """How many values it holds."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """What its children occupy, in bytes."""
        children = jax.tree.leaves(self)
        return sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in children)

    @property
    def mT(self) -> NF4Array:
        """The transpose of the last two axes; nothing moves."""
        if len(self.matrix_shape) < 2:
            raise ValueError(f"mT needs a matrix; this NF4Array has shape {self.shape}")
        return dataclasses.replace(self, transposed=not self.transposed)

    def dequantize(self, dtype: Any = None) -> Array:
        """``dequantize(self, dtype)``."""
        return dequantize(self, dtype)

    def __repr__(self) -> str:
        kind = "float32" if self.nested_absmax is None else "8-bit"
        shape = self.shape if hasattr(self.codes, "shape") else f"transform of {self.matrix_shape}"
        return f"NF4Array({shape}, {self.dtype}, blocks of {self.block_size}, {kind} absmax)"


def quantize(w: Num[Array, "..."], block_size: int = 64, double_quant: bool = True) -> NF4Array:
    """Packs an array of any rank, with the nibbles that bitsandbytes' ``quantize_4bit`` gives.

    Blocks run over the values in row-major order, the last one may be short. A block of zeros stays
    exactly zero; one with a NaN or an infinity in it comes back without a finite value.

    Raises:
      ConfigError: ``block_size`` is not one of ``BLOCK_SIZES``, or ``w`` does not hold floats.
    """
    if block_size not in BLOCK_SIZES:
        sizes = ", ".join(map(str, BLOCK_SIZES))
        raise ConfigError(f"{block_size} values a block", where="block_size", fix=f"use {sizes}")
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise ConfigError(f"cannot quantize an array of {w.dtype}", fix="give it floating point")
    return _quantize(w, block_size, double_quant)


@functools.partial(jax.jit, static_argnames=("block_size", "double_quant"))
def _quantize(w, block_size, double_quant):
    rowwise = w.ndim > 0 and w.shape[-1] % block_size == 0
    if rowwise:
        blocks = w.reshape(-1, w.shape[-1] // block_size, block_size)
    else:
        blocks = jnp.pad(w.reshape(-1), (0, -w.size % block_size)).reshape(-1, block_size)
    codes, absmax = quantize_blocks(blocks.astype(jnp.float32))
    codes = codes.reshape(*codes.shape[:-2], -1)
    if not rowwise:
        codes = codes[: (w.size + 1) // 2]
    nested = (absmax, None, None)
    if double_quant:
        # The maximum changes nothing but keeps XLA from contracting the mean's product with the
        # subtraction, which would then not subtract the rounded mean that is stored.
        nested = quantize_absmax(absmax, jnp.maximum(jnp.mean(absmax), 0))
    shape, dtype = tuple(w.shape), jnp.dtype(w.dtype)
    return NF4Array(codes, *nested, shape, dtype, block_size)


def quantize_blocks(
    blocks: Float[Array, "*n block"],
) -> tuple[UInt8[Array, "*n block/2"], Float[Array, "*n"]]:
    """Bytes (first value in the high half) and largest magnitudes of float32 blocks."""
    absmax = jnp.max(jnp.abs(blocks), axis=-1)
    # The format multiplies by the reciprocal; a zero block must not become 0 · inf.
    scale = jnp.where(absmax > 0, 1 / absmax, 0)
    v = jnp.clip(blocks * scale[..., None], -1, 1)
    # Strictly above a threshold: a tie takes the lower code. XLA fuses the 15 comparisons.
    codes = jnp.sum(v[..., None] > THRESHOLDS, axis=-1, dtype=jnp.uint8)
    return codes[..., 0::2] << 4 | codes[..., 1::2], absmax


def quantize_absmax(
    absmax: Float[Array, "*n"], offset: Float[Array, ""]
) -> tuple[UInt8[Array, "*n"], Float[Array, " m"], Float[Array, ""]]:
    """Second level: absmax - offset in blocks of 256, to the nearest value of the dynamic map."""
    centred = jnp.pad((absmax - offset).reshape(-1), (0, -absmax.size % NESTED_BLOCK))
    blocks = centred.reshape(-1, NESTED_BLOCK)
    largest = jnp.max(jnp.abs(blocks), axis=-1)
    v = blocks * jnp.where(largest > 0, 1 / largest, 0)[:, None]
    codes = jnp.searchsorted(DYNAMIC_THRESHOLDS, v.reshape(-1)).astype(jnp.uint8)
    return codes[: absmax.size].reshape(absmax.shape), largest, offset


def dequantize(q: NF4Array, dtype: Any = None) -> Float[Array, "..."]:
    """The array that ``q`` stands for: code · absmax in float32, rounded once to ``dtype``.

    ``dtype`` is ``q.dtype`` when it is None.
    """
    return _dequantize(q, jnp.dtype(q.dtype if dtype is None else dtype))


@functools.partial(jax.jit, static_argnames="dtype")
def _dequantize(q: NF4Array, dtype):
    own, half = (*q.lead, *q.matrix_shape), q.block_size // 2
    absmax, codes = dequantize_absmax(q), q.codes
    if not q.rowwise:
        missing = absmax.shape[-1] * half - codes.shape[-1]
        codes = jnp.pad(codes, [(0, 0)] * len(q.lead) + [(0, missing)])
    codes = codes.reshape(*absmax.shape, half)
    # Scaling and rounding each half before they are interleaved keeps float32 out of memory.
    halves = [
        (jnp.asarray(CODES)[c] * absmax[..., None]).astype(dtype) for c in (codes >> 4, codes & 15)
    ]
    w = jnp.stack(halves, axis=-1)
    if not q.rowwise:
        w = w.reshape(*q.lead, -1)[..., : math.prod(q.matrix_shape)]
    w = w.reshape(own)
    return w.mT if q.transposed else w


def dequantize_absmax(q: NF4Array) -> Float[Array, "*blocks"]:
    """The largest magnitudes of all blocks in float32, shaped as ``q.absmax``."""
    if q.nested_absmax is None:
        return q.absmax
    lead, blocks = q.lead, q.absmax.shape[len(q.lead) :]
    scale = jnp.repeat(q.nested_absmax, NESTED_BLOCK, axis=-1)[..., : math.prod(blocks)]
    offset = q.nested_offset.reshape(*lead, *(1 for _ in blocks))
    return jnp.asarray(DYNAMIC_MAP)[q.absmax] * scale.reshape(*lead, *blocks) + offset


def quantize_params(params: Any, config: QuantConfig) -> dict:
    """A tree with its linear layers packed: every floating ``kernel`` that is a matrix per layer.

    Kernels (in, out) are packed as bitsandbytes packs torch's [out, in] and stand transposed.
    Embeddings, norms, biases, output heads (``paths.OUTPUT_HEADS``) and the modules named in
    ``llm_int8_skip_modules`` stay as they are, and so does what is packed already::

        {"q_proj": {"kernel": (L, in, out)}}  →  {"q_proj": {"kernel": NF4Array (L, in, out)}}

    Raises:
      ConfigError: a module to skip matches none, or only some layers of a stacked kernel.
    """
    if not config.load_in_4bit:
        return params
    leaves = paths.leaves(params)
    skip = tuple(config.llm_int8_skip_modules)
    _check_skips(leaves, skip)
    packed: dict[paths.Path, NF4Array] = {}
    for leaf in leaves:
        if _is_matrix(leaf) and not _skipped(leaf, (*paths.OUTPUT_HEADS, *skip)):
            packed[leaf.path] = _quantize_kernel(leaf.value, config)
    return paths.map_leaves(lambda path, leaf: packed.get(path, leaf), params)


def _is_matrix(leaf: paths.Leaf) -> bool:
    is_array = not isinstance(leaf.value, NF4Array) and hasattr(leaf.value, "dtype")
    floating = is_array and jnp.issubdtype(leaf.value.dtype, jnp.floating)
    return floating and leaf.kind == "kernel" and len(leaf.shape) == 2


def _skipped(leaf: paths.Leaf, names: Sequence[str]) -> bool:
    hit = [any(_names(name, module) for name in names) for module in leaf.modules()]
    if any(hit) and not all(hit):
        raise ConfigError(
            f"only some layers of {leaf.module()} would be left out, but they are one array",
            where="quantization.llm_int8_skip_modules",
            fix="name the module without its layer number",
        )
    return any(hit)


def _names(name: str, module: str) -> bool:
    """Whether ``name`` is the module, a node above it, or the end of its name at a dot."""
    return f".{module}.".startswith(f".{name}.") or f".{module}".endswith(f".{name}")


def _check_skips(leaves: Sequence[paths.Leaf], names: Sequence[str]) -> None:
    modules = [module for leaf in leaves for module in leaf.modules()]
    for name in names:
        if name not in paths.OUTPUT_HEADS and not any(_names(name, m) for m in modules):
            last = [part for m in modules for part in (m.rsplit(".", 1)[-1], m)]
            raise ConfigError(
                f"no module is called {name!r}",
                where="quantization.llm_int8_skip_modules",
                fix=did_you_mean(name, last) or "name a module of the model",
            )


def _quantize_kernel(kernel: Array, config: QuantConfig) -> NF4Array:
    double = config.bnb_4bit_use_double_quant

    def pack(k: Array) -> NF4Array:
        return quantize(k.mT, config.block_size, double).mT

    # Layer after layer, so that only one exists in float32 at a time.
    return pack(kernel) if kernel.ndim == 2 else jax.lax.map(pack, kernel)
