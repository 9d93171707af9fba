"""``init_adapter``: an adapter's initial values."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jlora.config import FrozenMap, LoraConfig
from jlora.errors import ConfigError
from jlora.lora import decompositions, terms
from jlora.lora.adapter import (
    DELTA,
    EMBEDDING_DELTA,
    LORA_BIAS,
    MAGNITUDE,
    TOKENS,
    Adapter,
    Tree,
    scaling,
)
from jlora.lora.attaching import path_key
from jlora.lora.targets import Target, find_targets, replaced_leaves, token_rows
from jlora.lora.weight import base_of, dense, is_weight_leaf
from jlora.tree import paths


def init_adapter(
    key: Array, params: Tree, config: LoraConfig, *, original: Tree | None = None
) -> Adapter:
    """A fresh adapter for ``params``: with it the model is the base model, bitwise.

    A is drawn as PEFT draws it (kaiming-uniform with a=√5, that is U(-1/√in, 1/√in); a normal of
    standard deviation 1/r for ``init_lora_weights="gaussian"``) and B is zero; for embeddings A is
    zero and B is normal. ``init_lora_weights=False`` draws both, for tests.

    With these it is the base model up to rounding: DoRA, whose magnitudes are the norms of the
    base's columns; ``orthogonal``, whose A and B have the product zero; PiSSA (``pissa``,
    ``pissa_niter_N``) and OLoRA, which take A and B from each kernel: ``initial`` has a copy, to be
    subtracted, and only ``weights`` are to be trained. ``loftq`` approximates the quantization
    error of each kernel by A and B: the model is close to the original one. Embeddings start as
    with True.

    Args:
      key: a JAX random key.
      params: a tree of arrays (see ``paths``). ``jax.ShapeDtypeStruct`` leaves are enough unless
        values are needed (``bias``, ``modules_to_save``, ``use_dora``,
        ``trainable_token_indices``, PiSSA, OLoRA and LoftQ).
      config: what to adapt; every pattern in it must match something.
      original: for ``loftq``, the dense parameters that ``params`` were quantized from.

    Raises:
      ConfigError: a pattern matches nothing (the message lists similar names); or ``original`` or
        data are needed.
    """
    _check_given(config, original)
    config, targets = find_targets(params, config)
    flat: dict[paths.Path, Any] = {}
    bases, originals = dict(paths.walk(params)), dict(paths.walk(original or {}))
    for target in targets:
        base, dense_base = bases[target.leaf], originals.get(target.leaf)
        flat |= _initial_leaves(path_key(key, target.path), base, dense_base, target, config)
    initial = None
    if config.init_splits_base:  # a copy: the trained leaves may be donated
        taken = {path: leaf for path, leaf in flat.items() if path[-1] in DELTA}
        initial = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), paths.nest(taken)) or None
    for leaf, rows in token_rows(params, config):
        table = dense(leaf.value)
        table = table if leaf.kind == "embedding" else table.mT
        values = jnp.take(table, jnp.asarray(rows), axis=0)
        flat[(*leaf.path[:-1], TOKENS)] = values.astype(jnp.float32)
    for leaf in replaced_leaves(params, config):
        # A copy of float32 leaves, too: the step donates what is trained, and the base must
        # survive.
        flat[leaf.path] = jnp.array(dense(leaf.value), jnp.float32, copy=True)
    widths = {t.path[-2]: t.widths for t in targets if paths.is_part(t.path)}
    if config.init_lora_weights == "loftq":  # no different from then on
        config = dataclasses.replace(config, init_lora_weights=True)
    return Adapter(paths.nest(flat), config, initial, FrozenMap(widths))


def _check_given(config: LoraConfig, original: Tree | None) -> None:
    """ConfigError if this kind of initial values needs more than the parameters."""
    kind, where = config.init_lora_weights, "lora.init_lora_weights"
    if kind == "loftq" and original is None:
        cause = "loftq needs the parameters as they were before quantization"
        fix = "quantized, adapter = jlora.loftq(key, params, config, quantization)"
        raise ConfigError(cause, where=where, fix=fix)
    if kind == "eva":
        cause, fix = "eva needs data", "adapter = jlora.eva(key, loss, params, batches, config)"
        raise ConfigError(cause, where=where, fix=fix)


def _initial_leaves(
    key: Array, base: Any, original: Any, target: Target, config: LoraConfig
) -> dict[paths.Path, Array]:
    """The leaves of one target by path."""
    a, b = _init_pair(key, base, original, target, config)
    names = EMBEDDING_DELTA if target.kind == "embedding" else DELTA
    leaves = {(*target.path, names[0]): a, (*target.path, names[1]): b}
    if config.lora_bias:
        bias = jnp.zeros((*b.shape[:-2], b.shape[-1]))
        if config.init_lora_weights is False:
            r = np.maximum(np.array(target.ranks), 1)[:, None] if target.stack else b.shape[-2]
            bias = _uniform(path_key(key, (LORA_BIAS,)), bias.shape, r)
        leaves[(*target.path, LORA_BIAS)] = bias
    if config.use_dora:
        # PiSSA and OLoRA subtract their first delta from the base: the sum is the base itself.
        delta_b = jnp.zeros_like(b) if config.init_splits_base else b
        leaves[(*target.path, MAGNITUDE)] = _magnitude(base, target, (a, delta_b), config)
    return leaves


def _init_pair(
    key: Array, base: Any, original: Any, target: Target, config: LoraConfig
) -> tuple[Array, Array]:
    """A and B of a target; see ``init_adapter``."""
    (fan_in, fan_out), r = target.shape, max(target.ranks)
    lead = (len(target.ranks),) if target.stack else ()
    lead += (target.experts,) if target.experts else ()
    ranks = np.array(target.ranks, np.float32).reshape(lead[:1] if target.stack else ())
    ranks = ranks.reshape(*ranks.shape, *(1,) * (len(lead) + 2 - ranks.ndim))
    used, rank = np.arange(r) < ranks, np.maximum(ranks, 1)
    key_a, key_b = jax.random.split(key)
    shape_a, shape_b = (*lead, fan_in, r), (*lead, r, fan_out)
    if target.kind == "embedding":
        a = jnp.zeros(shape_a)
        a = jax.random.normal(key_a, shape_a) if config.init_lora_weights is False else a
        b = jax.random.normal(key_b, shape_b)
    elif config.init_lora_weights == "orthogonal":
        draw = functools.partial(decompositions.orthogonal, fan_in=fan_in, fan_out=fan_out)
        a, b = _by_layer(lambda x: draw(x[0], r, x[1]), target, key, (used[..., 0, :],))
    elif config.init_splits_base or (
        # Leaves that stay dense under LoftQ have no quantization error to start from.
        config.init_lora_weights == "loftq" and is_weight_leaf(base_of(base))
    ):
        scale = jnp.asarray(scaling(config, target.modules))
        decompose = functools.partial(_decomposed, target, config, r)
        a, b = _by_layer(decompose, target, key, (base, original, scale))
    else:
        a = _uniform(key_a, shape_a, fan_in)
        if config.init_lora_weights == "gaussian":
            a = jax.random.normal(key_a, shape_a) / rank
        b = jnp.zeros(shape_b)
        if config.init_lora_weights is False:  # PEFT draws the Bs of all experts as one layer
            b = _uniform(key_b, shape_b, rank * max(target.experts, 1))
    return jnp.where(used, a, 0.0), jnp.where(used.mT, b, 0.0)


def _by_layer(
    make: Callable[[Any], tuple[Array, Array]], target: Target, key: Array, values: tuple
) -> tuple[Array, Array]:
    """``make((key, *values))`` for every layer, one after the other to limit memory."""
    if target.stack is None:
        return make((key, *values))
    return jax.lax.map(make, (jax.random.split(key, len(target.ranks)), *values))


def _decomposed(target: Target, config: LoraConfig, r: int, layer: tuple) -> tuple[Array, Array]:
    """A and B from one layer's kernel, or (LoftQ) from its quantization error."""
    key, base, original, scale = layer
    kind, end = str(config.init_lora_weights), target.start + target.shape[1]
    w = dense(base).astype(jnp.float32)
    if original is not None:
        w = dense(original).astype(jnp.float32) - w
    w = w[:, target.start : end]
    if kind == "olora":
        return decompositions.triangular(w, r)
    if niter := kind.partition("_niter_")[2]:
        return decompositions.nearly_principal(key, w, r, scale, niter=int(niter))
    return decompositions.principal(w, r, scale)


def _magnitude(base: Any, target: Target, pair: tuple[Array, Array], config: LoraConfig) -> Array:
    """DoRA's initial magnitudes: the column norms of W + s·A@B."""
    a, b = pair
    scale = jnp.asarray(scaling(config, target.modules))
    columns = terms.ColumnRange(target.path, target.start, target.shape[1], base.shape[-1])
    norms = terms.column_norms(base, a, columns.place(b), scale, layers=target.stack is not None)
    return norms[..., target.start : target.start + target.shape[1]]


def _uniform(key: Array, shape: tuple[int, ...], fan_in: Any) -> Array:
    """PyTorch's initial values of a linear layer (kaiming-uniform with a=√5)."""
    bound = 1 / np.sqrt(np.asarray(fan_in, np.float32))
    return jax.random.uniform(key, shape, minval=-1.0) * bound
