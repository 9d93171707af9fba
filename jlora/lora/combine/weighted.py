"""``add_weighted_adapter``: one adapter from several, by all of PEFT's combination types."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jlora.lora import Adapter
from jlora.lora.attaching import path_key
from jlora.lora.combine.factors import (
    ModuleFactors,
    adapter_factors,
    adapter_from_factors,
    joined_target_config,
)
from jlora.lora.combine.pruning import Rule, merge_tensors
from jlora.lora.combine.refusals import BY_FACTOR, PRUNES, adapter_faults, refuse, setting_faults
from jlora.lora.combine.truncation import truncate, truncate_product
from jlora.tree import paths

FactorPair = tuple[Array, Array, np.ndarray]
"""A (layers, in, r), B (layers, r, out) and the number of ranks that each layer uses."""


def add_weighted_adapter(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    combination_type: str = "svd",
    *,
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    key: Key[Array, ""] | None = None,
) -> Adapter:
    """One adapter from several: Δ ≈ Σ w·Δ, by one of PEFT's combination types.

    - ``cat``: exact; A and B are concatenated, so that ranks add up.
    - ``svd``: the best approximation of the exact sum of rank ``svd_rank``.
    - ``linear``: As and Bs are summed separately, each times √|w·scale|, with the sign on A.
    - ``ties``, ``magnitude_prune``: as ``linear``, of the largest values only; ``ties`` takes the
      mean of those with the majority's sign.
    - ``dare_linear``, ``dare_ties``: as these, of random values, divided by ``density``.
    - the last four with ``_svd``: of the dense deltas; the result is truncated to ``svd_rank``.

    A module that some adapters lack is combined from the others. The result's scale is one. Unlike
    PEFT, the type also applies to a single adapter, ``cat`` does not store the unused columns of an
    adapter, and the result has the layers of all adapters, not those of the first.

    Args:
      adapters: adapters of one tree.
      weights: of the adapters; negative ones subtract.
      combination_type: see above.
      svd_rank: rank of the result of ``svd`` types; None: the largest rank of the adapters.
      svd_clamp: a quantile in (0.5, 1]; ``svd`` types clip the values of A and B there.
      density: the fraction of values that pruning types keep, in (0, 1].
      majority_sign_method: ``total`` elects the sign of the sum, ``frequency`` that of most values.
      key: a JAX random key; the ``dare`` types need it.

    Raises:
      ConfigError: listing every reason why the adapters cannot be combined.
    """
    modules = [adapter_factors(adapter) for adapter in adapters]
    faults = list(setting_faults(combination_type, svd_rank, svd_clamp, density, key))
    if majority_sign_method not in ("total", "frequency"):
        faults.append(f"majority_sign_method: {majority_sign_method!r} (total or frequency)")
    if not adapters or len(adapters) != len(weights):
        faults.append(f"{len(adapters)} adapters and {len(weights)} weights")
    faults += adapter_faults(adapters, modules, by_factor=combination_type in BY_FACTOR)
    refuse(faults, "add_weighted_adapter")

    elect = majority_sign_method if combination_type.removesuffix("_svd").endswith("ties") else None
    rule = Rule(PRUNES[combination_type], elect, 1.0 if density is None else density)
    configs = [adapter.config for adapter in adapters]
    rank = svd_rank or max(r for c in configs for r in (c.r, *c.rank_pattern.values()))
    combined: dict[paths.Path, ModuleFactors] = {}
    for path in dict.fromkeys(path for flat in modules for path in flat):
        having = [i for i, flat in enumerate(modules) if path in flat]
        terms = [modules[i][path] for i in having]
        term_weights = jnp.stack([jnp.asarray(weights[i], jnp.float32) for i in having])
        module_key = None if key is None else path_key(key, path)
        if combination_type == "cat":
            a, b, ranks = _cat(terms, term_weights)
        elif combination_type in BY_FACTOR:
            a, b, ranks = _merge_factors(terms, term_weights, module_key, rule)
        else:
            a, b, ranks = _merge_deltas(terms, term_weights, module_key, rule, rank, svd_clamp)
        combined[path] = ModuleFactors(terms[0].leaf, a, b, ranks, np.ones(len(ranks)))
    config = dataclasses.replace(joined_target_config(adapters, combined), init_lora_weights=True)
    parts = {name: widths for adapter in adapters for name, widths in adapter.parts.items()}
    return adapter_from_factors(combined, {}, config, parts)


def _cat(terms: Sequence[ModuleFactors], weights: Array) -> FactorPair:
    """Factors concatenated, with the columns in use first in each layer."""
    a, b = _concatenated(terms, weights)
    used = np.concatenate([np.arange(f.a.shape[-1]) < f.ranks[:, None] for f in terms], 1)
    ranks = used.sum(1)
    # A layer's rank counts columns from the first on: unused ones in between would be saved, and
    # some in use cut off.
    order = np.argsort(~used, axis=1, stable=True)[:, : ranks.max()]
    a = jnp.take_along_axis(a, order[:, None, :], 2)
    return a, jnp.take_along_axis(b, order[:, :, None], 1), ranks


def _merge_factors(
    terms: Sequence[ModuleFactors], weights: Array, key: Array | None, rule: Rule
) -> FactorPair:
    """As and Bs merged separately, layer by layer; ranks are equal."""
    a, b = _stacked(terms)
    ranks = np.stack([f.ranks for f in terms], 1)
    scaled = weights * _scales(terms)  # (layers, n)
    root = jnp.sqrt(jnp.abs(scaled))
    keys = [None, None] if key is None else jax.random.split(key, (2, len(a)))
    # Of the ranks in use: PEFT prunes tensors without the padding that is in `a` and `b` here.
    sizes = [(rule.density * ranks * width).astype(np.int32) for width in (a.shape[2], b.shape[3])]
    a = _merge_layers(a, jnp.where(scaled < 0, -root, root), sizes[0], keys[0], rule)
    return a, _merge_layers(b, root, sizes[1], keys[1], rule), ranks.max(1)


def _merge_deltas(
    terms: Sequence[ModuleFactors],
    weights: Array,
    key: Array | None,
    rule: Rule,
    rank: int,
    clamp: float | None,
) -> FactorPair:
    """The deltas merged and truncated to ``rank``; they are dense only if they are pruned."""
    if rule.prune is None:
        a, b = _concatenated(terms, weights)
        a, b = truncate_product(a, b, rank)
    else:
        a, b = _stacked(terms)
        keys = None if key is None else jax.random.split(key, len(a))
        scales = jnp.asarray(_scales(terms))
        a, b = _merge_products(a, b, scales, weights, keys, rule, rank)
    if clamp is not None:
        values = jnp.concatenate([a.reshape(len(a), -1), b.reshape(len(b), -1)], 1)
        # One bound for A and B together, a quantile of signed values, as in PEFT.
        high = jnp.quantile(values, clamp, axis=1)[:, None, None]
        a, b = jnp.clip(a, -high, high), jnp.clip(b, -high, high)
    return a, b, np.where(np.any([f.ranks for f in terms], 0), a.shape[-1], 0)


@functools.partial(jax.jit, static_argnames="rule")
def _merge_layers(
    tensors: Float[Array, "layers n in out"],
    weights: Float[Array, "layers n"],
    sizes: Int[Any, "layers n"],
    keys: Key[Array, " layers"] | None,
    rule: Rule,
) -> Float[Array, "layers in out"]:
    def layer(x):
        tensors, weights, sizes, key = x
        return merge_tensors(tensors, weights, sizes, key, rule)

    return jax.lax.map(layer, (tensors, weights, sizes, keys))


@functools.partial(jax.jit, static_argnames=("rule", "rank"))
def _merge_products(
    a: Float[Array, "layers n in r"],
    b: Float[Array, "layers n r out"],
    scales: Float[Array, "layers n"],
    weights: Float[Array, " n"],
    keys: Key[Array, " layers"] | None,
    rule: Rule,
    rank: int,
) -> tuple[Float[Array, "layers in k"], Float[Array, "layers k out"]]:
    """The merged deltas, truncated to ``rank``; one layer at a time is dense."""
    n, fan_in, fan_out = a.shape[1], a.shape[2], b.shape[3]
    sizes = jnp.full(n, int(rule.density * (fan_in * fan_out)))

    def layer(x):
        a, b, scale, key = x
        deltas = scale[:, None, None] * jnp.matmul(a, b, precision="highest")
        return truncate(merge_tensors(deltas, weights, sizes, key, rule), rank)

    return jax.lax.map(layer, (a, b, scales, keys))


def _concatenated(terms: Sequence[ModuleFactors], weights: Array) -> tuple[Array, Array]:
    """Σ w·scale·A@B as one product: A (layers, in, Σr) and B (layers, Σr, out)."""
    scaled = weights * _scales(terms)
    a = [scaled[:, i, None, None] * f.a for i, f in enumerate(terms)]
    return jnp.concatenate(a, -1), jnp.concatenate([f.b for f in terms], -2)


def _stacked(terms: Sequence[ModuleFactors]) -> tuple[Array, Array]:
    """A (layers, n, in, r) and B (layers, n, r, out), padded to the largest rank."""
    r = max(f.a.shape[-1] for f in terms)
    a = [jnp.pad(f.a, ((0, 0), (0, 0), (0, r - f.a.shape[2]))) for f in terms]
    b = [jnp.pad(f.b, ((0, 0), (0, r - f.b.shape[1]), (0, 0))) for f in terms]
    return jnp.stack(a, 1), jnp.stack(b, 1)


def _scales(terms: Sequence[ModuleFactors]) -> np.ndarray:
    """The scale of every layer and adapter: (layers, n), float32."""
    return np.stack([f.scales for f in terms], 1).astype(np.float32)
