"""``merge`` and ``unmerge``: adapters folded into dense weights, and taken out again."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from jlora.errors import ConfigError, DataError
from jlora.lora.adapter import ADDED, EMBEDDING_DELTA, MAGNITUDE, TOKENS, Adapter, Tree
from jlora.lora.attaching import attach
from jlora.lora.weight import LoraWeight, delta, dense, to_float32
from jlora.tree import paths


def merge(params: Tree, adapter: Adapter, *others: Adapter) -> Tree:
    """``params`` with one or more adapters folded in: every leaf a dense array of its base's dtype.

    Sums are computed in float32 and rounded once. Quantized leaves come out dense and are never
    requantized: that would lose what the adapter learned. Deltas of several adapters add up.

    Raises:
      DataError: an adapter does not fit; it has biases (``lora_bias``) where the model has none; it
        is on an embedding that the output head may be tied to.
      ConfigError: several are given, and one with DoRA, whose factors do not add up.
    """
    _check_several((adapter, *others))
    attached = params
    for one in (adapter, *others):
        _check_tied(params, one)
        attached = attach(attached, one)
    return _with_biases(attached, sign=1.0, fold=lambda leaf: dense(leaf))


def unmerge(merged: Tree, adapter: Adapter) -> Tree:
    """Takes out of ``merged`` the deltas that ``merge`` folded in, to the rounding of its dtype.

    Raises:
      DataError: the adapter replaced leaves (``bias``, ``modules_to_save``, rows of embeddings) or
        scaled their columns (DoRA), whose former values are not known here.
    """
    for path, _ in paths.walk(adapter.weights):
        if path[-1] not in ADDED or path[-1] in (MAGNITUDE, TOKENS):
            raise DataError(
                "the merged tree does not hold what this leaf replaced",
                where=".".join(path),
                fix="keep the base parameters, and merge anew instead of unmerging",
            )

    def subtract(leaf: Any) -> Any:
        if not isinstance(leaf, LoraWeight):
            return leaf
        return (to_float32(leaf.base) - delta(leaf)).astype(leaf.dtype)

    return _with_biases(attach(merged, adapter), sign=-1.0, fold=subtract)


def _with_biases(attached: Tree, sign: float, fold: Any) -> Tree:
    """The tree with its weights folded, and what they add to their products moved to the biases."""
    biases: dict[paths.Path, Any] = {}
    for path, leaf in paths.walk(attached):
        while isinstance(leaf, LoraWeight):
            if leaf.bias is not None:
                where = (*path[:-1], "bias")
                biases[where] = biases.get(where, 0.0) + leaf.bias
            leaf = leaf.base
    there = {path for path, _ in paths.walk(attached)}
    if missing := [".".join(path[:-1]) for path in biases if path not in there]:
        raise DataError(
            "lora_bias cannot be merged: the layer has no bias that could take it",
            where=", ".join(missing),
            fix="keep the adapter apart, or train it without lora_bias",
        )

    def change(path: paths.Path, leaf: Any) -> Any:
        if path not in biases:
            return fold(leaf)
        return (leaf.astype(jnp.float32) + sign * biases[path]).astype(leaf.dtype)

    return paths.map_leaves(change, attached)


def _check_several(adapters: tuple[Adapter, ...]) -> None:
    if len(adapters) > 1 and any(adapter.config.use_dora for adapter in adapters):
        raise ConfigError(
            "DoRA scales the columns of the weight it was trained on: it does not add up",
            where="lora.use_dora",
            fix="merge it alone",
        )


def _check_tied(params: Tree, adapter: Adapter) -> None:
    """DataError if what is merged into an embedding would also change an output head tied to it."""
    heads = {path[-2] for path, _ in paths.walk(params) if len(path) > 1} & {*paths.OUTPUT_HEADS}
    for path, _ in paths.walk(adapter.weights):
        if path[-1] in EMBEDDING_DELTA and not heads:
            raise DataError(
                "the model has no output head of its own: one that is tied to this embedding would "
                "change too, which the adapter did not mean",
                where=".".join(path[:-1]),
                fix="give the model a head of its own first: model, params = jlora.untie(model, "
                "params)",
            )
