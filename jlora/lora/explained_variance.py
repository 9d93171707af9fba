"""EVA: As along the data's own directions, ranks where they explain most (arXiv 2410.07170).

The directions are the principal components of what comes into a module, over all tokens of some
batches: those of x less its mean, as in PEFT's incremental PCA of the same tokens. They are found
by subspace iteration: every pass multiplies the scatter matrices, which are never made, with the
directions so far.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jlora.config import EvaConfig, LoraConfig
from jlora.errors import ConfigError
from jlora.lora.adapter import DELTA, Adapter, Tree
from jlora.lora.init import init_adapter
from jlora.lora.probe import InputProbe
from jlora.lora.targets import Target, find_targets, listed
from jlora.tree import matching, paths

MOST_PASSES = 32
"""Directions that explain nearly as much as each other turn for ever."""

Loss = Callable[[Any, Any], Array]
"""(parameters, inputs) → a scalar that depends on every adapted module."""


def eva(
    key: Array, loss: Loss, params: Tree, batches: Sequence[tuple[Any, Any]], config: LoraConfig
) -> Adapter:
    """A fresh adapter, with which the model is the base model: B is zero.

    Each direction of each module explains some share of the variance of its inputs. As many
    directions as the config has ranks are kept, those with the largest shares, at most ``rho * r``
    of a module; one without any is not adapted. The result's config says so by ``target_modules``,
    ``rank_pattern`` and ``alpha_pattern``, and is then one of ordinary LoRA. Embeddings start as
    with True.

    Args:
      key: a JAX random key.
      loss: of the parameters and one batch's inputs; only where its gradient reaches matters.
      params: the base.
      batches: inputs of ``loss``, and a mask (batch, length) of the tokens to look at.
      config: the adapter's; see ``EvaConfig``.

    Raises:
      ConfigError: see ``init_adapter``; or a module has fewer inputs, or is given fewer tokens,
        than the ranks it may get.
    """
    resolved, every = find_targets(params, dataclasses.replace(config, init_lora_weights="eva"))
    targets = [t for t in every if t.kind == "kernel"]
    _check_sizes(targets, batches, config)
    found = _components(key, loss, params, batches, targets, config)
    ranks = _distribute(targets, found, config)
    before = {n: r for t in every for n, r in zip(t.names, t.ranks, strict=True)}
    plain = dataclasses.replace(resolved, init_lora_weights=True)
    adapter = init_adapter(key, params, _redistributed(plain, before, ranks))
    weights = dict(paths.walk(adapter.weights))
    for target in targets:
        where = (*target.path, DELTA[0])
        if where in weights:
            weights[where] = _first_a(weights[where], target, found[target.leaf], ranks, config)
    return dataclasses.replace(adapter, weights=paths.nest(weights))


@dataclasses.dataclass(frozen=True)
class _Found:
    """What the inputs of one leaf are like, largest first; of each layer, or without that axis."""

    directions: np.ndarray
    """(…, in, k)"""
    scatter: np.ndarray
    """(…, k), how much each explains"""
    total: np.ndarray
    """(…), how much there is"""


def _settings(config: LoraConfig) -> EvaConfig:
    return config.eva_config or EvaConfig()


def _most(target: Target, config: LoraConfig) -> list[int]:
    """The most ranks that the module may get, by layer."""
    return [round(r * _settings(config).rho) for r in target.ranks]


def _check_sizes(targets: Sequence[Target], batches: Sequence, config: LoraConfig) -> None:
    tokens = sum(int(jnp.sum(mask)) for _, mask in batches)
    for t in targets:
        wanted = max(_most(t, config))
        if wanted > min(t.shape[0], tokens - 1):
            raise ConfigError(
                f"{t.names[0]} may get {wanted} ranks, from {t.shape[0]} inputs of {tokens} tokens",
                where="lora.eva_config.rho",
                fix="give more data, or lower rho or r",
            )


def _components(
    key: Array,
    loss: Loss,
    params: Tree,
    batches: Sequence,
    targets: Sequence[Target],
    config: LoraConfig,
) -> dict[paths.Path, _Found]:
    """The principal components of every adapted leaf's inputs."""
    leaves = {leaf.path: leaf for leaf in paths.leaves(params)}
    wanted: dict[paths.Path, int] = {}
    for t in targets:
        wanted[t.leaf] = max(wanted.get(t.leaf, 0), *_most(t, config))

    def begin(path: paths.Path) -> Array:
        *lead, fan_in, _ = leaves[path].value.shape
        width = min(fan_in, 2 * wanted[path])  # the same for all that have the same inputs
        draw = jax.random.normal(jax.random.fold_in(key, fan_in), (fan_in, width))
        return jnp.broadcast_to(jnp.linalg.qr(draw)[0], (*lead, fan_in, width))

    @jax.jit
    def report(params: Tree, directions: Mapping, batch: tuple[Any, Array]) -> dict:
        def observed(slots: Mapping) -> Array:
            return loss(_with_probes(params, slots, directions, batch[1]), batch[0])

        slots = {p: jnp.zeros((*d.shape[:-1], d.shape[-1] + 2)) for p, d in directions.items()}
        return jax.grad(observed)(slots)

    count = jnp.float32(sum(jnp.sum(mask) for _, mask in batches))
    directions = {path: begin(path) for path in wanted}
    found: dict[paths.Path, tuple[Array, ...]] = {}
    for number in range(MOST_PASSES):
        reports = [report(params, directions, batch) for batch in batches]
        sums = jax.tree.map(lambda *parts: sum(parts[1:], parts[0]), *reports)
        before, found = found, {p: _ritz(directions[p], sums[p], count) for p in wanted}
        directions = {path: new for path, (*_, new) in found.items()}
        if number and _alike(before, found, wanted, _settings(config).tau):
            break
    host = jax.device_get({path: values[:3] for path, values in found.items()})
    return {path: _Found(*values) for path, values in host.items()}


def _with_probes(params: Tree, slots: Mapping, directions: Mapping, mask: Array) -> dict:
    def change(path: paths.Path, value: Any) -> Any:
        if path not in slots:
            return value
        lead = slots[path].shape[:-2]
        return InputProbe(
            value, slots[path], directions[path], jnp.broadcast_to(mask, (*lead, *mask.shape))
        )

    return paths.map_leaves(change, params)


@jax.jit
def _ritz(directions: Array, sums: Array, count: Array) -> tuple[Array, Array, Array, Array]:
    """The best directions within the given ones, how much they explain and of how much; the next.

    Args:
      directions: (…, in, k), orthonormal.
      sums: (…, in, k + 2), see ``InputProbe``.
      count: how many inputs were summed.
    """
    product, total, squares = sums[..., :-2], sums[..., -2], sums[..., -1]
    along = jnp.matmul(total[..., None, :], directions, precision="highest") / count
    product = product - total[..., None] * along  # the scatter about the mean
    inner = jnp.matmul(directions.mT, product, precision="highest")
    scatter, turn = jnp.linalg.eigh((inner + inner.mT) / 2)
    turn, scatter = turn[..., ::-1], scatter[..., ::-1]
    best = jnp.matmul(directions, turn, precision="highest")
    following, _ = jnp.linalg.qr(jnp.matmul(product, turn, precision="highest"))
    everything = jnp.sum(squares - total * total / count, -1)
    return best, jnp.maximum(scatter, 0.0), everything, following


def _alike(before: Mapping, now: Mapping, wanted: Mapping[paths.Path, int], tau: float) -> bool:
    """Whether no direction that may be needed has turned much."""
    cosines = [
        jnp.min(jnp.abs(jnp.sum(before[p][0][..., :k] * now[p][0][..., :k], -2)))
        for p, k in wanted.items()
    ]
    return bool(jnp.min(jnp.stack(cosines)) >= tau)


def _distribute(
    targets: Sequence[Target], found: Mapping[paths.Path, _Found], config: LoraConfig
) -> dict[str, int]:
    """Name → its rank: the ranks of all go to the directions that explain the largest shares."""
    shares: list[tuple[float, str]] = []
    for layer in range(max(len(t.ranks) for t in targets)):
        for t in targets:
            if layer < len(t.ranks):
                seen, most = found[t.leaf], _most(t, config)[layer]
                scatter, total = seen.scatter, seen.total
                if t.stack:
                    scatter, total = scatter[layer], total[layer]
                shares += [(float(s / total), t.names[layer]) for s in scatter[:most]]
    budget = sum(sum(t.ranks) for t in targets)
    ranks = {name: 0 for t in targets for name in t.names}
    for _, name in sorted(shares, key=lambda share: -share[0])[:budget]:
        ranks[name] += 1
    return ranks


def _redistributed(
    config: LoraConfig, before: Mapping[str, int], ranks: Mapping[str, int]
) -> LoraConfig:
    """The config that names every module, and gives it its rank and alpha.

    ``before`` has the ranks of all modules, ``ranks`` the new ones of those that EVA looked at.
    """
    final = {name: r for name, r in {**before, **ranks}.items() if r}
    alphas = {}
    for name, r in final.items():
        alpha = matching.pattern_value(config.alpha_pattern, name, config.lora_alpha)
        adjusts = _settings(config).adjust_scaling_factors and r != before[name]
        alphas[name] = alpha * r / before[name] if adjusts else alpha
    return listed(
        config,
        tuple(final),
        rank_pattern=matching.pattern_table(final, config.r),
        alpha_pattern=matching.pattern_table(alphas, config.lora_alpha),
    )


def _first_a(
    fresh: Array, target: Target, found: _Found, ranks: Mapping[str, int], config: LoraConfig
) -> Array:
    """A (…, in, r) of directions, as many as each layer has ranks."""
    values, r = found.directions[..., : fresh.shape[-1]], fresh.shape[-1]
    if _settings(config).whiten:  # by the roots of the singular values
        values = values / found.scatter[..., None, :r] ** 0.25
    used = np.arange(r) < np.array([ranks[name] for name in target.names])[:, None, None]
    return jnp.where(used if target.stack else used[0], jnp.asarray(values), 0.0)
