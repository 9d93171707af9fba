"""``merge`` and ``unmerge``: deltas added to dense weights, and subtracted again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jlora.errors import ConfigError, DataError
from jlora.lora.adapter import ADDED, MAGNITUDE, TOKENS, Adapter, Tree, changed_leaf
from jlora.lora.attaching import attach
from jlora.lora.targets.rules import POSITION_EMBEDDINGS
from jlora.lora.weight import LoraWeight, delta, dense, to_float32
from jlora.tree import paths


def merge(params: Tree, adapter: Adapter, *others: Adapter) -> Tree:
    """``params`` with the deltas of one or more adapters added: dense leaves of the base's dtypes.

    Sums are computed in float32 and rounded once. Quantized leaves become dense and are not
    quantized again: the rounding would lose most of what the adapter learned.

    Raises:
      DataError: an adapter does not fit; it has a ``lora_bias`` where the model has no bias; it is
        on an embedding that the output head may be tied to.
      ConfigError: one of several adapters has DoRA, whose factors cannot be added.
    """
    _check_summable((adapter, *others))
    attached = params
    for item in (adapter, *others):
        _check_tied(params, item)
        attached = attach(attached, item)
    return _with_biases(attached, sign=1.0, merge_leaf=dense)


def unmerge(merged: Tree, adapter: Adapter) -> Tree:
    """Subtracts the deltas that ``merge`` added, up to rounding in the leaves' dtypes.

    Raises:
      DataError: the adapter replaced leaves (``bias``, ``modules_to_save``, rows of embeddings) or
        scaled columns (DoRA); their original values are not in the merged tree.
    """
    for path, _ in paths.walk(adapter.weights):
        if path[-1] not in ADDED or path[-1] in (MAGNITUDE, TOKENS):
            raise DataError(
                "the merged tree does not have the values that this leaf replaced",
                where=".".join(path),
                fix="keep the base parameters and merge again instead of unmerging",
            )

    def subtract(leaf: Any) -> Any:
        if not isinstance(leaf, LoraWeight):
            return leaf
        return (to_float32(leaf.base) - delta(leaf)).astype(leaf.dtype)

    return _with_biases(attach(merged, adapter), sign=-1.0, merge_leaf=subtract)


def _with_biases(attached: Tree, sign: float, merge_leaf: Callable[[Any], Any]) -> Tree:
    """The tree with each leaf merged, and every ``lora_bias`` times ``sign`` added to its bias."""
    biases: dict[paths.Path, Any] = {}
    for path, leaf in paths.walk(attached):
        while isinstance(leaf, LoraWeight):
            if leaf.bias is not None:
                where = (*path[:-1], "bias")
                biases[where] = biases.get(where, 0.0) + leaf.bias
            leaf = leaf.base
    present = {path for path, _ in paths.walk(attached)}
    if missing := [".".join(path[:-1]) for path in biases if path not in present]:
        raise DataError(
            "lora_bias cannot be merged: the layer has no bias to add it to",
            where=", ".join(missing),
            fix="keep the adapter apart, or train it without lora_bias",
        )

    def change(path: paths.Path, leaf: Any) -> Any:
        if path not in biases:
            return merge_leaf(leaf)
        return (leaf.astype(jnp.float32) + sign * biases[path]).astype(leaf.dtype)

    return paths.map_leaves(change, attached)


def _check_summable(adapters: tuple[Adapter, ...]) -> None:
    if len(adapters) > 1 and any(adapter.config.use_dora for adapter in adapters):
        raise ConfigError(
            "DoRA scales the columns of the weight it was trained on: it cannot be added to others",
            where="lora.use_dora",
            fix="merge it alone",
        )


def _check_tied(params: Tree, adapter: Adapter) -> None:
    """DataError if merging into an embedding would also change an output head tied to it.

    A head of its own is recognised by its name, or by its columns: one for each row.
    """
    leaves = {leaf.path: leaf for leaf in paths.leaves(params)}
    kernels = [leaf for leaf in leaves.values() if leaf.kind == "kernel" and leaf.stack is None]
    named = any({*leaf.path[-2:-1]} & {*paths.OUTPUT_HEADS} for leaf in kernels)
    widths = {leaf.shape[-1] for leaf in kernels}
    # PEFT's gradient does not pass through a tied head, but its merge writes into the tensor that
    # both share: the merged model's logits are not the adapted one's.
    for path, _ in paths.walk(adapter.weights):
        table = leaves.get(changed_leaf(path, leaves))
        if table is None or table.kind != "embedding" or path[-1] == TOKENS:
            continue
        of_positions = bool({*table.path[-2:-1]} & {*POSITION_EMBEDDINGS})
        if not (named or of_positions or table.shape[0] in widths):
            raise DataError(
                "the output head may be tied to this embedding: merging would change it too, "
                "unlike the adapter",
                where=".".join(path[:-1]),
                fix="untie the head first: model, params = jlora.untie(model, params)",
            )
