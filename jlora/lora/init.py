"""``init_adapter``: the adapter before its first step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jlora import paths
from jlora.config import LoraConfig
from jlora.config.convert import FrozenMap
from jlora.lora import terms
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
from jlora.lora.attaching import fold
from jlora.lora.weight import dense
from jlora.targets import Target, find_targets, replaced_leaves, token_rows


def init_adapter(key: Array, params: Tree, config: LoraConfig) -> Adapter:
    """A fresh adapter for ``params``: with it the model is the base model, bitwise.

    A is drawn as PEFT draws it (kaiming-uniform with a=√5, that is U(-1/√in, 1/√in); a normal of
    standard deviation 1/r for ``init_lora_weights="gaussian"``) and B is zero; for embeddings A is
    zero and B is normal. ``init_lora_weights=False`` draws both, for tests. DoRA's magnitudes are
    the norms of the base's columns, which is the base model up to rounding.

    Args:
      key: a JAX random key.
      params: a tree of arrays (see ``paths``); shapes are enough (``jax.ShapeDtypeStruct``) unless
        values are copied or computed from (``bias``, ``modules_to_save``, ``use_dora``,
        ``trainable_token_indices``).
      config: what to adapt; every pattern in it must match something.

    Raises:
      ConfigError: a pattern matches nothing; the message lists near names.
    """
    config, targets = find_targets(params, config)
    flat: dict[paths.Path, Any] = {}
    bases = dict(paths.walk(params))
    for target in targets:
        flat |= _first_values(fold(key, target.path), bases[target.leaf], target, config)
    for leaf, rows in token_rows(params, config):
        values = jnp.take(dense(leaf.value), jnp.asarray(rows), axis=0)
        flat[(*leaf.path[:-1], TOKENS)] = values.astype(jnp.float32)
    for leaf in replaced_leaves(params, config):
        flat[leaf.path] = jnp.array(dense(leaf.value), jnp.float32, copy=True)
    widths = {t.path[-2]: t.widths for t in targets if paths.is_part(t.path)}
    return Adapter(paths.nest(flat), config, parts=FrozenMap(widths))


def _first_values(
    key: Array, base: Any, target: Target, config: LoraConfig
) -> dict[paths.Path, Array]:
    """The leaves of one target by path."""
    a, b = _init_pair(key, target, config)
    names = EMBEDDING_DELTA if target.kind == "embedding" else DELTA
    leaves = {(*target.path, names[0]): a, (*target.path, names[1]): b}
    if config.lora_bias:
        bias = jnp.zeros((*b.shape[:-2], b.shape[-1]))
        if config.init_lora_weights is False:
            r = np.maximum(np.array(target.ranks), 1)[:, None] if target.stack else b.shape[-2]
            bias = _uniform(fold(key, (LORA_BIAS,)), bias.shape, r)
        leaves[(*target.path, LORA_BIAS)] = bias
    if config.use_dora:
        leaves[(*target.path, MAGNITUDE)] = _magnitude(base, target, (a, b), config)
    return leaves


def _init_pair(key: Array, target: Target, config: LoraConfig) -> tuple[Array, Array]:
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
    else:
        a = _uniform(key_a, shape_a, fan_in)
        if config.init_lora_weights == "gaussian":
            a = jax.random.normal(key_a, shape_a) / rank
        b = jnp.zeros(shape_b)
        if config.init_lora_weights is False:  # peft has the Bs of all experts in one layer
            b = _uniform(key_b, shape_b, rank * max(target.experts, 1))
    return jnp.where(used, a, 0.0), jnp.where(used.mT, b, 0.0)


def _magnitude(base: Any, target: Target, pair: tuple[Array, Array], config: LoraConfig) -> Array:
    """DoRA's first magnitudes: the norms of the columns of W + s·A@B."""
    a, b = pair
    scale = jnp.asarray(scaling(config, target.path, target.stack, len(target.ranks)))
    where = terms.Columns(target.path, target.start, target.shape[1], base.shape[-1])
    norms = terms.norms(base, a, where.place(b), scale, layers=target.stack is not None)
    return norms[..., target.start : target.start + target.shape[1]]


def _uniform(key: Array, shape: tuple[int, ...], fan_in: Any) -> Array:
    """Torch's own first values of a linear layer (kaiming-uniform with a=√5)."""
    bound = 1 / np.sqrt(np.asarray(fan_in, np.float32))
    return jax.random.uniform(key, shape, minval=-1.0) * bound
