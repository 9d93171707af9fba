"""The adapter's leaves of one weight, put together: parts of fused projections, norms of columns.

A fused projection (``paths.FUSED``) may have adapters on its parts. Each part has columns of its
own in the kernel, and what it adds is placed there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jlora.config import LoraConfig
from jlora.lora.adapter import DELTA, EMBEDDING_DELTA, scaling
from jlora.lora.weight import dense
from jlora.tree import paths

Leaves = Mapping[paths.Path, Any]
Parts = Mapping[str, tuple[int, ...]]


class Columns(NamedTuple):
    """A module and the columns that are its own in the weight: all, or some of ``total``."""

    module: paths.Path
    start: int = 0
    width: int | None = None
    total: int | None = None

    def place(self, values: Float[Array, "... width"]) -> Float[Array, "... total"]:
        """``values`` in their columns, zeros in the others."""
        if self.total is None:
            return values
        after = self.total - self.start - values.shape[-1]
        return jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(self.start, after)])


def module_of(leaf: paths.Leaf) -> paths.Path:
    """The node of the adapter's leaves: the module's, or a bare matrix's own."""
    return leaf.path[:-1] if leaf.kind in ("kernel", "embedding") else leaf.path


def pair(leaf: paths.Leaf) -> tuple[str, str]:
    """The names of a weight's A and B."""
    return EMBEDDING_DELTA if leaf.kind == "embedding" else DELTA


def columns(leaf: paths.Leaf, own: Leaves, parts: Parts) -> Iterator[Columns]:
    """The modules among the ``own`` leaves of a weight: the whole, parts of a projection.

    Only a stack of adapters has both.
    """
    module = module_of(leaf)
    if any(path[:-1] == module for path in own):
        yield Columns(module)
    names = paths.FUSED.get(module[-1], ())
    for i, name in enumerate(names):
        if any(path[:-1] == (*module, name) for path in own):
            widths = parts.get(module[-1]) or (_width(own, (*module, name)),) * len(names)
            yield Columns((*module, name), sum(widths[:i]), widths[i], sum(widths))


def _width(own: Leaves, part: paths.Path) -> int:
    """The columns of each part, where all have as many."""
    return own[(*part, DELTA[1])].shape[-1]


def combine(
    leaf: paths.Leaf, own: Leaves, config: LoraConfig, parts: Parts
) -> tuple[Any, Any, Array]:
    """A (…, in, r), B (…, r, out) and scale (…) of the weight ``leaf``.

    Parts of a fused projection are set side by side: their As are concatenated, their Bs are placed
    at the part's columns with zeros elsewhere, each already scaled.

    Args:
      leaf: the weight; only its path and its layers are used.
      own: the adapter's leaves by path, of the weight's module or of its parts.
      config: gives the scales.
      parts: see ``Adapter``.
    """
    where = list(columns(leaf, own, parts))
    scales = [jnp.asarray(scaling(config, leaf.modules_at(c.module))) for c in where]
    return concat_factors(leaf, own, where, scales)


def concat_factors(
    leaf: paths.Leaf, own: Leaves, where: Sequence[Columns], scales: Sequence[Array]
) -> tuple[Any, Any, Array]:
    """``combine`` of the modules ``where``, with a scale for each."""
    first, second = pair(leaf)
    if len(where) == 1 and where[0].total is None:
        module = where[0].module
        return own[(*module, first)], own[(*module, second)], scales[0]
    placed = [
        c.place(scale[..., None, None] * own[(*c.module, second)])
        for c, scale in zip(where, scales, strict=True)
    ]
    together = jnp.concatenate([own[(*c.module, first)] for c in where], -1)
    return together, jnp.concatenate(placed, -2), jnp.ones_like(scales[0])


def subtract_factors(
    terms: tuple[Any, Any, Array], first: tuple[Any, Any, Array]
) -> tuple[Any, Any, Array]:
    """The terms of ``scale·A@B - first``: what a weight gets that the base has a share of."""
    (a, b, scale), (a0, b0, scale0) = terms, first
    b, b0 = scale[..., None, None] * b, scale0[..., None, None] * b0
    a, b = jnp.concatenate([a, a0], -1), jnp.concatenate([b, -b0], -2)
    return a, b, jnp.ones_like(scale)


def norms(
    base: Any, a: Array, b: Array, scale: Array, *, layers: bool
) -> Float[Array, "*layers out"]:
    """The norm of every column of ``base + scale·A@B``, in float32; no gradient goes through it.

    ``|w + d|² = |w|² + 2·w·d + |d|²`` needs the product of W with A only: the dense sum is never
    made, and one layer at a time is dequantized (DoRA, arXiv 2402.09353, section 4.3).

    Args:
      base: a kernel (…, in, out) or an embedding (…, vocabulary, dim), packed or not.
      a: A; see ``combine``.
      b: B.
      scale: the scale of their product.
      layers: whether all have a leading axis of layers.
    """

    def one(layer: tuple[Any, Array, Array, Array]) -> Array:
        w, a, b, scale = layer
        w, b = dense(w).astype(jnp.float32), b * scale
        across = jnp.matmul(a.mT, w, precision="highest")
        own = jnp.matmul(jnp.matmul(a.mT, a, precision="highest"), b, precision="highest")
        squares = jnp.sum(w * w, 0) + jnp.sum(b * (2 * across + own), 0)
        return jnp.sqrt(jnp.maximum(squares, 0.0))

    values = jax.lax.stop_gradient((base, a, b, scale))
    return jax.lax.map(one, values) if layers else one(values)
