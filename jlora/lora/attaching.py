"""``attach`` and ``detach``: adapters on weights, without computing anything densely."""

from __future__ import annotations

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jlora import paths
from jlora.config import LoraConfig
from jlora.errors import DataError
from jlora.lora import adapter as kinds
from jlora.lora import terms
from jlora.lora.adapter import Adapter, Tree, changed
from jlora.lora.weight import LoraWeight, TokenWeight, dense
from jlora.targets import is_replaced, rank_of, token_indices


def attach(params: Tree, adapter: Adapter, *, dropout_key: Array | None = None) -> Tree:
    """The tree with the adapter on it: kernels become ``LoraWeight``, and so do embeddings.

    Nothing is computed densely. DoRA's norms of the columns are computed here, once for all
    products with them.

    Args:
      params: the frozen tree.
      adapter: an adapter made for it.
      dropout_key: draws the dropout of ``config.lora_dropout`` when given (training); every module
        and layer gets a key of its own.

    Raises:
      DataError: the adapter has nodes that ``params`` lacks, or of another shape.
    """
    leaves = {leaf.path: leaf for leaf in paths.leaves(params)}
    own = by_weight(adapter.weights, leaves)
    first = by_weight(jax.lax.stop_gradient(adapter.initial or {}), leaves)

    def change(path: paths.Path, value: Any) -> Any:
        if path not in own:
            return value
        leaf, changes = leaves[path], dict(own[path])
        if path in changes:
            value = _replace(leaf, changes.pop(path), adapter.config)
        rows = changes.pop((*path[:-1], kinds.TOKENS), None)
        if rows is not None:
            value = _with_rows(leaf, value, rows, adapter.config)
        if not changes:
            return value
        return _with_delta(leaf, value, changes, first.get(path), adapter, dropout_key)

    return paths.map_leaves(change, params)


def detach(attached: Tree) -> Tree:
    """The tree without its adapters: ``detach(attach(params, adapter))`` has ``params``' leaves.

    Leaves that the adapter replaced (``bias``, ``modules_to_save``) stay replaced.
    """

    def base(_: paths.Path, leaf: Any) -> Any:
        while isinstance(leaf, LoraWeight | TokenWeight):
            leaf = leaf.base
        return leaf

    return paths.map_leaves(base, attached)


def by_weight(weights: Tree, there: Any) -> dict[paths.Path, dict[paths.Path, Any]]:
    """The adapter's leaves by path, for every leaf of the base that they change.

    Raises:
      DataError: the base has no such leaf.
    """
    changes: dict[paths.Path, dict[paths.Path, Any]] = {}
    for path, value in paths.walk(weights):
        target = changed(path, there)
        if target not in there:
            name = ".".join(path)
            raise DataError("the adapter changes a leaf that the model does not have", where=name)
        changes.setdefault(target, {})[path] = value
    return changes


def fold(key: Array, path: paths.Path) -> Array:
    """A key of its own for every path, whatever else is in the tree."""
    return jax.random.fold_in(key, zlib.crc32("/".join(path).encode()))


def _replace(leaf: paths.Leaf, value: Array, config: LoraConfig) -> Array:
    """``value`` in the base's dtype, in the layers that train; the base's own in the others.

    Their gradients are then exactly zero.
    """
    trains = np.array([is_replaced(config, name, leaf.kind) for name in leaf.modules()])
    if value.shape != tuple(leaf.value.shape):
        raise _unfit(leaf, f"value {tuple(value.shape)} does")
    value = value.astype(leaf.value.dtype)
    if trains.all():
        return value
    return jnp.where(trains.reshape(-1, *(1 for _ in leaf.shape)), value, dense(leaf.value))


def _with_rows(leaf: paths.Leaf, base: Any, rows: Array, config: LoraConfig) -> TokenWeight:
    indices = token_indices(config, leaf.module())
    if rows.shape != (len(indices), leaf.shape[-1]):
        raise _unfit(leaf, f"rows {rows.shape} of {len(indices)} tokens do")
    return TokenWeight(base, rows, jnp.asarray(indices, jnp.int32))


def _with_delta(
    leaf: paths.Leaf,
    base: Any,
    own: dict[paths.Path, Any],
    first: dict[paths.Path, Any] | None,
    adapter: Adapter,
    dropout_key: Array | None,
) -> LoraWeight:
    config, parts = adapter.config, adapter.parts
    _check_shapes(leaf, own, adapter)
    a, b, scale = terms.combine(leaf, own, config, parts)
    if first is not None:
        a, b, scale = terms.without((a, b, scale), terms.combine(leaf, first, config, parts))
    if leaf.kind in paths.EXPERTS:  # they lie [out, in]
        a, b = b.mT, a.mT
    key, dropout = dropout_key, float(config.lora_dropout)
    if key is not None and dropout:
        key = fold(key, leaf.path[:-1])
        key = jax.random.split(key, leaf.layers) if leaf.layers else key
    return LoraWeight(
        base=base,
        lora_A=a,
        lora_B=b,
        scale=scale,
        gain=_gain(leaf, base, own, (a, b, scale), adapter),
        bias=_bias(leaf, own, adapter),
        dropout_key=key if dropout else None,
        dropout=dropout,
    )


def _bias(leaf: paths.Leaf, own: dict[paths.Path, Any], adapter: Adapter) -> Array | None:
    """The scaled biases of a kernel's modules, in their columns."""
    found = []
    for c in terms.columns(leaf, own, adapter.parts):
        if (value := own.get((*c.module, kinds.LORA_BIAS))) is not None:
            scale = kinds.scaling(adapter.config, c.module, leaf.stack, leaf.layers)
            found.append(c.place(jnp.asarray(scale)[..., None] * value))
    return sum(found[1:], found[0]) if found else None


def _gain(
    leaf: paths.Leaf, base: Any, own: dict[paths.Path, Any], delta: tuple, adapter: Adapter
) -> Array | None:
    """DoRA's factors of a weight's columns: magnitude over norm, and 1 where nothing is adapted."""
    if not any(path[-1] == kinds.MAGNITUDE for path in own):
        return None
    norm = terms.norms(base, *delta, layers=leaf.stack is not None)
    gain = jnp.ones_like(norm)
    for c in terms.columns(leaf, own, adapter.parts):
        names = paths.module_names(c.module, leaf.stack, leaf.layers)
        trains = np.array([rank_of(adapter.config, name) > 0 for name in names])
        trains = trains[:, None] if leaf.stack else trains[0]
        magnitude = own[(*c.module, kinds.MAGNITUDE)]
        where = slice(c.start, c.start + magnitude.shape[-1])
        usable = trains & (norm[..., where] > 0)
        factor = magnitude / jnp.where(usable, norm[..., where], 1.0)
        gain = gain.at[..., where].set(jnp.where(usable, factor, 1.0))
    return gain


def _check_shapes(leaf: paths.Leaf, own: dict[paths.Path, Any], adapter: Adapter) -> None:
    """DataError unless every A, B, bias and magnitude fits the weight."""
    *lead, fan_in, fan_out = leaf.value.shape
    if leaf.kind in paths.EXPERTS:
        fan_in, fan_out = fan_out, fan_in
    first, second = terms.pair(leaf)
    for c in terms.columns(leaf, own, adapter.parts):
        a, b = own[(*c.module, first)], own[(*c.module, second)]
        width = fan_out if c.total is None else c.width
        fits = a.shape[:-1] == (*lead, fan_in) and b.shape == (*lead, a.shape[-1], width)
        if not fits or c.total not in (None, fan_out):
            raise _unfit(leaf, f"A {a.shape} and B {b.shape} do")
        for kind in (kinds.LORA_BIAS, kinds.MAGNITUDE):
            value = own.get((*c.module, kind))
            if value is not None and value.shape != (*lead, width):
                raise _unfit(leaf, f"{kind} {value.shape} does")


def _unfit(leaf: paths.Leaf, what: str) -> DataError:
    return DataError(
        f"the adapter's {what} not fit the weight {tuple(leaf.value.shape)}",
        where=leaf.module(),
        fix="use the base model that the adapter was trained on",
    )
