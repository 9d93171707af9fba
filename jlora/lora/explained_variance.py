"""EVA: initial As from principal components, ranks by explained variance (arXiv 2410.07170).

The components are those of a module's centred inputs over all tokens of some batches, as in PEFT's
incremental PCA. They are found by subspace iteration: every pass multiplies the inputs' scatter
matrices, which are never computed, with the current directions (``InputProbe``).
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
from jlora.lora.targets import Target, find_targets, with_listed_targets
from jlora.tree import matching, paths

MAX_PASSES = 32
"""The limit of passes: directions that explain equal variance never converge."""

ProbedLoss = Callable[[Any, Any], Array]
"""(parameters, inputs) → a scalar that depends on the output of every adapted module."""


def eva(
    key: Array,
    loss: ProbedLoss,
    params: Tree,
    batches: Sequence[tuple[Any, Any]],
    config: LoraConfig,
) -> Adapter:
    """An initial adapter with A from the data and B zero: with it the model is the base model.

    Each direction of each module explains a share of the variance of its inputs. The total of ranks
    of the config goes to the directions with the largest shares, at most ``rho * r`` of them to a
    module; a module without any is not adapted. The result's config is of ordinary LoRA, with this
    in ``target_modules``, ``rank_pattern`` and ``alpha_pattern``. Embeddings start as with True.

    Args:
      key: a JAX random key.
      loss: of the parameters and one batch's inputs; its values do not matter, only that every
        adapted module has a gradient.
      params: the base.
      batches: inputs of ``loss``, and a mask (batch, length) of the tokens to include.
      config: the adapter's; see ``EvaConfig``.

    Raises:
      ConfigError: see ``init_adapter``; or a module has fewer inputs, or the batches have fewer
        tokens, than the ranks it may get.
    """
    resolved, all_targets = find_targets(
        params, dataclasses.replace(config, init_lora_weights="eva")
    )
    targets = [t for t in all_targets if t.kind == "kernel"]
    _check_sizes(targets, batches, config)
    found = _principal_components(key, loss, params, batches, targets, config)
    ranks = _distribute(targets, found, config)
    before = {n: r for t in all_targets for n, r in zip(t.names, t.ranks, strict=True)}
    plain = dataclasses.replace(resolved, init_lora_weights=True)
    adapter = init_adapter(key, params, _redistributed(plain, before, ranks))
    weights = dict(paths.walk(adapter.weights))
    for target in targets:
        path = (*target.path, DELTA[0])
        if path in weights:
            weights[path] = _initial_a(weights[path], target, found[target.leaf], ranks, config)
    return dataclasses.replace(adapter, weights=paths.nest(weights))


@dataclasses.dataclass(frozen=True)
class _Components:
    """Principal components of one leaf's inputs, largest first; "…" is the layer axis, if any."""

    directions: np.ndarray
    """(…, in, k), orthonormal."""
    scatter: np.ndarray
    """(…, k), the sum of squares along each direction."""
    total: np.ndarray
    """(…), the sum of squares along all directions."""


def _settings(config: LoraConfig) -> EvaConfig:
    return config.eva_config or EvaConfig()


def _max_ranks(target: Target, config: LoraConfig) -> list[int]:
    """The maximum rank of the module in each layer."""
    return [round(r * _settings(config).rho) for r in target.ranks]


def _check_sizes(targets: Sequence[Target], batches: Sequence, config: LoraConfig) -> None:
    tokens = sum(int(jnp.sum(mask)) for _, mask in batches)
    for t in targets:
        wanted = max(_max_ranks(t, config))
        if wanted > min(t.shape[0], tokens - 1):
            raise ConfigError(
                f"{t.names[0]} may get {wanted} ranks, from {t.shape[0]} inputs of {tokens} tokens",
                where="lora.eva_config.rho",
                fix="give more data, or lower rho or r",
            )


def _principal_components(
    key: Array,
    loss: ProbedLoss,
    params: Tree,
    batches: Sequence,
    targets: Sequence[Target],
    config: LoraConfig,
) -> dict[paths.Path, _Components]:
    """The principal components of every adapted leaf's inputs."""
    leaves = {leaf.path: leaf for leaf in paths.leaves(params)}
    wanted: dict[paths.Path, int] = {}
    for t in targets:
        wanted[t.leaf] = max(wanted.get(t.leaf, 0), *_max_ranks(t, config))

    def start(path: paths.Path) -> Array:
        *lead, fan_in, _ = leaves[path].value.shape
        # Twice as many as wanted, since the last wanted direction converges with the ratio of its
        # variance to that of the first one left out.
        width = min(fan_in, 2 * wanted[path])
        # The key depends on the width alone: q, k and v, whose inputs are the same, start alike.
        draw = jax.random.normal(jax.random.fold_in(key, fan_in), (fan_in, width))
        return jnp.broadcast_to(jnp.linalg.qr(draw)[0], (*lead, fan_in, width))

    @jax.jit
    def report(params: Tree, directions: Mapping, batch: tuple[Any, Array]) -> dict:
        def observed(slots: Mapping) -> Array:
            return loss(_with_probes(params, slots, directions, batch[1]), batch[0])

        slots = {p: jnp.zeros((*d.shape[:-1], d.shape[-1] + 2)) for p, d in directions.items()}
        return jax.grad(observed)(slots)

    count = jnp.float32(sum(jnp.sum(mask) for _, mask in batches))
    directions = {path: start(path) for path in wanted}
    found: dict[paths.Path, tuple[Array, ...]] = {}
    for number in range(MAX_PASSES):
        reports = [report(params, directions, batch) for batch in batches]
        sums = jax.tree.map(lambda *parts: sum(parts[1:], parts[0]), *reports)
        before, found = found, {p: _ritz(directions[p], sums[p], count) for p in wanted}
        directions = {path: new for path, (*_, new) in found.items()}
        if number and _converged(before, found, wanted, _settings(config).tau):
            break
    host = jax.device_get({path: values[:3] for path, values in found.items()})
    return {path: _Components(*values) for path, values in host.items()}


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
    """One step of subspace iteration (Rayleigh-Ritz).

    Returns the principal directions within the span of the given ones, the scatter along each, the
    total scatter, and the directions of the next pass.

    Args:
      directions: (…, in, k), orthonormal.
      sums: (…, in, k + 2), see ``InputProbe``.
      count: the number of inputs that were summed.
    """
    product, total, squares = sums[..., :-2], sums[..., -2], sums[..., -1]
    along = jnp.matmul(total[..., None, :], directions, precision="highest") / count
    product = product - total[..., None] * along  # centred: the scatter about the mean
    inner = jnp.matmul(directions.mT, product, precision="highest")
    scatter, rotation = jnp.linalg.eigh((inner + inner.mT) / 2)
    rotation, scatter = rotation[..., ::-1], scatter[..., ::-1]
    principal = jnp.matmul(directions, rotation, precision="highest")
    following, _ = jnp.linalg.qr(jnp.matmul(product, rotation, precision="highest"))
    total_scatter = jnp.sum(squares - total * total / count, -1)
    return principal, jnp.maximum(scatter, 0.0), total_scatter, following


def _converged(before: Mapping, now: Mapping, wanted: Mapping[paths.Path, int], tau: float) -> bool:
    """Whether every direction that may be used is nearly that of the pass before."""
    cosines = [
        # The absolute value: an eigenvector's sign is arbitrary, and may change in every pass.
        jnp.min(jnp.abs(jnp.sum(before[p][0][..., :k] * now[p][0][..., :k], -2)))
        for p, k in wanted.items()
    ]
    return bool(jnp.min(jnp.stack(cosines)) >= tau)


def _distribute(
    targets: Sequence[Target], found: Mapping[paths.Path, _Components], config: LoraConfig
) -> dict[str, int]:
    """Module name → rank: the total of ranks goes to the largest shares of explained variance."""
    shares: list[tuple[float, str]] = []
    for layer in range(max(len(t.ranks) for t in targets)):
        for t in targets:
            if layer < len(t.ranks):
                components, limit = found[t.leaf], _max_ranks(t, config)[layer]
                scatter, total = components.scatter, components.total
                if t.stack:
                    scatter, total = scatter[layer], total[layer]
                shares += [(float(s / total), t.names[layer]) for s in scatter[:limit]]
    budget = sum(sum(t.ranks) for t in targets)
    ranks = {name: 0 for t in targets for name in t.names}
    # A stable sort: q, k and v have the same inputs, so equal shares, and the first one gets the
    # rank.
    for _, name in sorted(shares, key=lambda share: -share[0])[:budget]:
        ranks[name] += 1
    return ranks


def _redistributed(
    config: LoraConfig, before: Mapping[str, int], ranks: Mapping[str, int]
) -> LoraConfig:
    """The config with every module's name, rank and alpha.

    ``before`` has the ranks of all modules, ``ranks`` the new ones of those that EVA changes.
    """
    final = {name: r for name, r in {**before, **ranks}.items() if r}
    alphas = {}
    for name, r in final.items():
        alpha = matching.pattern_value(config.alpha_pattern, name, config.lora_alpha)
        adjusts = _settings(config).adjust_scaling_factors and r != before[name]
        alphas[name] = alpha * r / before[name] if adjusts else alpha
    return with_listed_targets(
        config,
        tuple(final),
        rank_pattern=matching.pattern_table(final, config.r),
        alpha_pattern=matching.pattern_table(alphas, config.lora_alpha),
    )


def _initial_a(
    fresh: Array, target: Target, found: _Components, ranks: Mapping[str, int], config: LoraConfig
) -> Array:
    """A (…, in, r) of the first directions, as many as each layer has ranks."""
    values, r = found.directions[..., : fresh.shape[-1]], fresh.shape[-1]
    if _settings(config).whiten:  # by the square roots of the singular values
        values = values / found.scatter[..., None, :r] ** 0.25
    used = np.arange(r) < np.array([ranks[name] for name in target.names])[:, None, None]
    return jnp.where(used if target.stack else used[0], jnp.asarray(values), 0.0)
