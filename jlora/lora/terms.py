"""The adapter's leaves of one weight, combined into one low-rank delta; column norms for DoRA.

A fused projection (``paths.FUSED``) may have adapters on its parts. Each part has its own range of
the kernel's columns, and its delta is zero in the others.
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

AdapterLeaves = Mapping[paths.Path, Any]
"""Leaves of an adapter that change one weight, by path."""

PartWidths = Mapping[str, tuple[int, ...]]
"""See ``Adapter.parts``."""

Delta = tuple[Any, Any, Array]
"""A (…, in, r), B (…, r, out) and the scale (…) of their product."""


class ColumnRange(NamedTuple):
    """A module and the columns of the weight that it computes: all, or ``width`` of ``total``."""

    module: paths.Path
    start: int = 0
    width: int | None = None
    total: int | None = None

    def place(self, values: Float[Array, "... width"]) -> Float[Array, "... total"]:
        """``values`` in these columns, zeros in the others."""
        if self.total is None:
            return values
        after = self.total - self.start - values.shape[-1]
        return jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(self.start, after)])


def adapter_node(leaf: paths.Leaf) -> paths.Path:
    """The adapter's node for a base leaf: its module, or an expert matrix's own path."""
    return leaf.path[:-1] if leaf.kind in ("kernel", "embedding") else leaf.path


def factor_names(leaf: paths.Leaf) -> tuple[str, str]:
    """The keys of a base leaf's A and B."""
    return EMBEDDING_DELTA if leaf.kind == "embedding" else DELTA


def module_columns(
    leaf: paths.Leaf, changes: AdapterLeaves, parts: PartWidths
) -> Iterator[ColumnRange]:
    """The modules that have leaves among ``changes``: the weight's, or parts of a projection.

    A stack of adapters may have both.
    """
    module = adapter_node(leaf)
    if any(path[:-1] == module for path in changes):
        yield ColumnRange(module)
    names = paths.FUSED.get(module[-1], ())
    for i, name in enumerate(names):
        if any(path[:-1] == (*module, name) for path in changes):
            widths = parts.get(module[-1]) or (_width(changes, (*module, name)),) * len(names)
            yield ColumnRange((*module, name), sum(widths[:i]), widths[i], sum(widths))


def _width(changes: AdapterLeaves, part: paths.Path) -> int:
    """The column count of each part of a projection whose parts are equal."""
    return changes[(*part, DELTA[1])].shape[-1]


def composed_factors(
    leaf: paths.Leaf, changes: AdapterLeaves, config: LoraConfig, parts: PartWidths
) -> Delta:
    """The delta of the weight ``leaf``, of all its modules.

    For parts of a fused projection, the As are concatenated, and each B is scaled and placed in the
    columns of its part.

    Args:
      leaf: the weight; only its path and its layers are used.
      changes: the adapter's leaves of the weight's module or of its parts, by path.
      config: gives the scales.
      parts: see ``Adapter``.
    """
    columns = list(module_columns(leaf, changes, parts))
    scales = [jnp.asarray(scaling(config, leaf.modules_at(c.module))) for c in columns]
    return concat_factors(leaf, changes, columns, scales)


def concat_factors(
    leaf: paths.Leaf,
    changes: AdapterLeaves,
    columns: Sequence[ColumnRange],
    scales: Sequence[Array],
) -> Delta:
    """``composed_factors`` of the modules ``columns``, with one scale for each."""
    key_a, key_b = factor_names(leaf)
    # The usual case: A and B stay the trained leaves, without a copy, and the scale apart.
    if len(columns) == 1 and columns[0].total is None:
        module = columns[0].module
        return changes[(*module, key_a)], changes[(*module, key_b)], scales[0]
    placed = [
        c.place(scale[..., None, None] * changes[(*c.module, key_b)])
        for c, scale in zip(columns, scales, strict=True)
    ]
    a = jnp.concatenate([changes[(*c.module, key_a)] for c in columns], -1)
    # Parts may have different scales (alpha_pattern), so these are in the parts' Bs.
    return a, jnp.concatenate(placed, -2), jnp.ones_like(scales[0])


def subtract_factors(delta: Delta, initial: Delta) -> Delta:
    """The difference of two deltas as one of the sum of their ranks."""
    (a, b, scale), (a0, b0, scale0) = delta, initial
    b, b0 = scale[..., None, None] * b, scale0[..., None, None] * b0
    # Twice the rank, but the adapter applies to the unchanged base: PEFT's way, subtracting from
    # the base's weight, would give every PiSSA adapter a base of its own.
    a, b = jnp.concatenate([a, a0], -1), jnp.concatenate([b, -b0], -2)
    return a, b, jnp.ones_like(scale)


def column_norms(
    base: Any, a: Array, b: Array, scale: Array, *, layers: bool
) -> Float[Array, "*layers out"]:
    """The norm of every column of ``base + scale·A@B``, in float32, with no gradient.

    ``|w + d|² = |w|² + 2·w·d + |d|²`` needs only the product of W with A: the dense sum is never
    computed, and one layer is dequantized at a time. DoRA treats the norm as a constant (arXiv
    2402.09353, section 4.3).

    Args:
      base: a kernel (…, in, out) or an embedding (…, vocabulary, dim), quantized or not.
      a: A (…, in, r).
      b: B (…, r, out).
      scale: the scale of their product.
      layers: whether all have a leading layer axis.
    """

    def one_layer(layer: tuple[Any, Array, Array, Array]) -> Array:
        w, a, b, scale = layer
        w, b = dense(w).astype(jnp.float32), b * scale
        # The magnitude over this norm is close to 1: with the three digits of a default product on
        # an accelerator, step 0 would not be the base model.
        a_w = jnp.matmul(a.mT, w, precision="highest")
        a_delta = jnp.matmul(jnp.matmul(a.mT, a, precision="highest"), b, precision="highest")
        squares = jnp.sum(w * w, 0) + jnp.sum(b * (2 * a_w + a_delta), 0)
        # The sum of a column that the delta nearly cancels may round to less than zero.
        return jnp.sqrt(jnp.maximum(squares, 0.0))

    values = jax.lax.stop_gradient((base, a, b, scale))
    return jax.lax.map(one_layer, values) if layers else one_layer(values)
