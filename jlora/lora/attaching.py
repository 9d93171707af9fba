"""``attach`` and ``detach``: an adapter on a tree of weights, as factored deltas."""

from __future__ import annotations

import zlib
from collections.abc import Container, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int

from jlora.config import LoraConfig
from jlora.errors import DataError
from jlora.lora import adapter as kinds
from jlora.lora import terms
from jlora.lora.adapter import Adapter, Tree, changed_leaf
from jlora.lora.stack import BIAS_SCALING, SCALING, AdapterStack
from jlora.lora.targets import is_replaced, rank_of, token_indices
from jlora.lora.weight import LoraWeight, ReplacedEmbedding, TokenWeight, base_of, dense
from jlora.tree import paths


def attach(
    params: Tree,
    adapter: Adapter | AdapterStack,
    *,
    dropout_key: Array | None = None,
    adapter_ids: Int[Array | np.ndarray, " rows"] | None = None,
) -> Tree:
    """The tree with the adapter attached: adapted kernels and embeddings become ``LoraWeight``.

    No dense delta is computed. DoRA's column norms are computed here, once for all products.

    Args:
      params: the frozen tree.
      adapter: an adapter made for it, or a stack of adapters (``stack_adapters``).
      dropout_key: enables dropout with ``config.lora_dropout`` (for training); a key is derived for
        every module and layer. A stack has no dropout.
      adapter_ids: index of the adapter that each row of the batch uses; -1: none, and the row's
        results are the base model's, bitwise.

    Raises:
      DataError: the adapter has nodes that ``params`` lacks, or of another shape; ``adapter_ids``
        are out of range (if their values are known: under ``jit`` they are not checked).
    """
    if isinstance(adapter, AdapterStack):
        return _attach_stack(params, adapter, adapter_ids, dropout_key)
    if adapter_ids is not None:
        raise DataError(
            "adapter_ids need a stack of adapters",
            where="adapter_ids",
            fix="stack_adapters([…])",
        )
    leaves = {leaf.path: leaf for leaf in paths.leaves(params)}
    grouped = group_by_base_leaf(adapter.weights, leaves)
    initial = group_by_base_leaf(jax.lax.stop_gradient(adapter.initial or {}), leaves)

    def change(path: paths.Path, value: Any) -> Any:
        if path not in grouped:
            return value
        leaf, changes = leaves[path], dict(grouped[path])
        if path in changes:
            value = _replace(leaf, changes.pop(path), adapter.config)
        rows = changes.pop((*path[:-1], kinds.TOKENS), None)
        if rows is not None:
            value = _with_rows(leaf, value, rows, adapter.config)
        if not changes:
            return value
        return _with_delta(leaf, value, changes, initial.get(path), adapter, dropout_key)

    return paths.map_leaves(change, params)


def _attach_stack(
    params: Tree, stack: AdapterStack, adapter_ids: Any, dropout_key: Array | None
) -> Tree:
    if adapter_ids is None or dropout_key is not None:
        raise DataError(
            "a stack of adapters needs adapter_ids, one for each row, and has no dropout",
            where="attach",
            fix="attach(params, stack, adapter_ids=stack.ids([name, …]))",
        )
    traced = isinstance(adapter_ids, Tracer)
    if not traced and (most := np.max(np.asarray(adapter_ids), initial=-1)) >= len(stack):
        raise DataError(
            f"no adapter {most}: the stack has {len(stack)}, counted from 0", where="adapter_ids"
        )
    leaves = {leaf.path: leaf for leaf in paths.leaves(params)}
    grouped = group_by_base_leaf(stack.weights, leaves)
    scales = dict(paths.walk(jax.lax.stop_gradient(stack.scales)))

    def change(path: paths.Path, value: Any) -> Any:
        if path not in grouped:
            return value
        leaf, changes = leaves[path], grouped[path]
        _check_shapes(leaf, changes, stack.parts, (len(stack),))
        columns = list(terms.module_columns(leaf, changes, stack.parts))
        delta_scales = [scales[(*c.module, SCALING)] for c in columns]
        a, b, scale = terms.concat_factors(leaf, changes, columns, delta_scales)
        ids = jnp.asarray(adapter_ids, jnp.int32)
        # lax.scan slices every child of a stacked leaf, so each layer has a copy of the ids.
        ids = jnp.broadcast_to(ids, (leaf.layers, *ids.shape)) if leaf.layers else ids
        bias = _bias(changes, columns, [scales.get((*c.module, BIAS_SCALING)) for c in columns])
        return LoraWeight(value, a, b, scale, bias=bias, adapter_ids=ids)

    return paths.map_leaves(change, params)


def detach(attached: Tree) -> Tree:
    """The tree without its adapters: ``detach(attach(params, adapter))`` has ``params``' leaves.

    Leaves that the adapter replaced (``bias``, ``modules_to_save``) keep the adapter's values,
    except embeddings.
    """
    return paths.map_leaves(lambda _, leaf: base_of(leaf), attached)


def group_by_base_leaf(
    weights: Tree, base_leaves: Container[paths.Path]
) -> dict[paths.Path, dict[paths.Path, Any]]:
    """Path of a base leaf → the adapter's leaves that change it, by path.

    Raises:
      DataError: the base has no such leaf.
    """
    changes: dict[paths.Path, dict[paths.Path, Any]] = {}
    for path, value in paths.walk(weights):
        target = changed_leaf(path, base_leaves)
        if target not in base_leaves:
            name = ".".join(path)
            raise DataError("the adapter changes a leaf that the model does not have", where=name)
        changes.setdefault(target, {})[path] = value
    return changes


def path_key(key: Array, path: paths.Path) -> Array:
    """A random key for a path: independent of what else is in the tree."""
    # Not hash(), which Python salts: processes of one run would draw different values.
    return jax.random.fold_in(key, zlib.crc32("/".join(path).encode()))


def _replace(leaf: paths.Leaf, value: Array, config: LoraConfig) -> Array | ReplacedEmbedding:
    """``value`` in the base's dtype in the layers that train, the base's values in the others.

    The gradients of the others are then exactly zero.
    """
    trains = np.array([is_replaced(config, name, leaf.kind) for name in leaf.modules()])
    if value.shape != tuple(leaf.value.shape):
        raise _unfit(leaf, f"value {tuple(value.shape)} does")
    value = value.astype(leaf.value.dtype)
    if not trains.all():
        trains = trains.reshape(-1, *(1 for _ in leaf.shape))
        value = jnp.where(trains, value, dense(leaf.value))
    return ReplacedEmbedding(leaf.value, value) if leaf.kind == "embedding" else value


def _with_rows(leaf: paths.Leaf, base: Any, rows: Array, config: LoraConfig) -> TokenWeight:
    indices, is_head = token_indices(config, leaf.module()), leaf.kind == "kernel"
    if rows.shape != (len(indices), leaf.shape[0 if is_head else -1]):
        raise _unfit(leaf, f"rows {rows.shape} of {len(indices)} tokens do")
    return TokenWeight(base, rows, jnp.asarray(indices, jnp.int32), transposed=is_head)


def _with_delta(
    leaf: paths.Leaf,
    base: Any,
    changes: dict[paths.Path, Any],
    initial: dict[paths.Path, Any] | None,
    adapter: Adapter,
    dropout_key: Array | None,
) -> LoraWeight:
    config, parts = adapter.config, adapter.parts
    _check_shapes(leaf, changes, parts)
    columns = list(terms.module_columns(leaf, changes, parts))
    scales = [jnp.asarray(kinds.scaling(config, leaf.modules_at(c.module))) for c in columns]
    bias_scales = [kinds.bias_scaling(config, leaf.modules_at(c.module)) for c in columns]
    a, b, scale = terms.concat_factors(leaf, changes, columns, scales)
    if initial is not None:
        initial_delta = terms.composed_factors(leaf, initial, config, parts)
        a, b, scale = terms.subtract_factors((a, b, scale), initial_delta)
    if paths.is_parameter(leaf.path):  # stored [out, in]
        a, b = b.mT, a.mT
    key, dropout = dropout_key, float(config.lora_dropout)
    if key is not None and dropout:
        key = path_key(key, leaf.path[:-1])
        key = jax.random.split(key, leaf.layers) if leaf.layers else key
    # Attached outside of the scan over layers: in it, the backward pass would compute the norms of
    # DoRA again.
    return LoraWeight(
        base=base,
        lora_A=a,
        lora_B=b,
        scale=scale,
        gain=_gain(leaf, base, changes, (a, b, scale), adapter),
        bias=_bias(changes, columns, bias_scales),
        dropout_key=key if dropout else None,
        dropout=dropout,
    )


def _bias(
    changes: terms.AdapterLeaves, columns: Sequence[terms.ColumnRange], scales: Sequence[Any]
) -> Array | None:
    """The scaled ``lora_bias`` of a kernel's modules, each in its columns."""
    found = []
    for c, scale in zip(columns, scales, strict=True):
        if (value := changes.get((*c.module, kinds.LORA_BIAS))) is not None:
            found.append(c.place(jnp.asarray(scale)[..., None] * value))
    return sum(found[1:], found[0]) if found else None


def _gain(
    leaf: paths.Leaf,
    base: Any,
    changes: dict[paths.Path, Any],
    delta: terms.Delta,
    adapter: Adapter,
) -> Array | None:
    """DoRA's factor of each column: magnitude over norm; 1 in layers that are not adapted."""
    if not any(path[-1] == kinds.MAGNITUDE for path in changes):
        return None
    norm = terms.column_norms(base, *delta, layers=leaf.stack is not None)
    gain = jnp.ones_like(norm)
    for c in terms.module_columns(leaf, changes, adapter.parts):
        names = leaf.modules_at(c.module).names()
        trains = np.array([rank_of(adapter.config, name) > 0 for name in names])
        trains = trains[:, None] if leaf.stack else trains[0]
        magnitude = changes[(*c.module, kinds.MAGNITUDE)]
        part = slice(c.start, c.start + magnitude.shape[-1])
        usable = trains & (norm[..., part] > 0)  # a column of zeros has no direction to scale
        # The divisor is replaced, too: the gradient of a division by zero is NaN even where the
        # result is not selected.
        factor = magnitude / jnp.where(usable, norm[..., part], 1.0)
        gain = gain.at[..., part].set(jnp.where(usable, factor, 1.0))
    return gain


def _check_shapes(
    leaf: paths.Leaf,
    changes: terms.AdapterLeaves,
    parts: terms.PartWidths,
    adapters: tuple[int, ...] = (),
) -> None:
    """DataError unless every A, B, bias and magnitude fits the weight.

    ``adapters`` is the length of a stack's adapter axis, which follows the layer axis.
    """
    *lead, fan_in, fan_out = leaf.value.shape
    lead += adapters
    if paths.is_parameter(leaf.path):
        fan_in, fan_out = fan_out, fan_in
    key_a, key_b = terms.factor_names(leaf)
    for c in terms.module_columns(leaf, changes, parts):
        a, b = changes[(*c.module, key_a)], changes[(*c.module, key_b)]
        width = fan_out if c.total is None else c.width
        fits = a.shape[:-1] == (*lead, fan_in) and b.shape == (*lead, a.shape[-1], width)
        if not fits or c.total not in (None, fan_out):
            raise _unfit(leaf, f"A {a.shape} and B {b.shape} do")
        for kind in (kinds.LORA_BIAS, kinds.MAGNITUDE):
            value = changes.get((*c.module, kind))
            if value is not None and value.shape != (*lead, width):
                raise _unfit(leaf, f"{kind} {value.shape} does")


def _unfit(leaf: paths.Leaf, what: str) -> DataError:
    return DataError(
        f"the adapter's {what} not fit the weight {tuple(leaf.value.shape)}",
        where=leaf.module(),
        fix="use the base model that the adapter was trained on",
    )
