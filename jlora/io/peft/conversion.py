"""The conversion of an adapter to the form that PEFT can store.

PEFT has no parts of fused projections: its GPT-2 has one A for queries, keys and values. And an
expression in ``target_modules`` must not match torch's modules without weights (``mlp.act_fn``),
which jlora does not have and cannot know of.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jlora.config import LoraConfig
from jlora.lora import DELTA, EMBEDDING_DELTA, MAGNITUDE, TOKENS, Adapter, terms
from jlora.lora.adapter import ADDED, LORA_BIAS, bias_scaling
from jlora.lora.targets import is_target_parameter, parameter_rank_of, rank_of, with_listed_targets
from jlora.tree import matching, paths


def to_peft_form(adapter: Adapter) -> Adapter:
    """The equivalent adapter that PEFT can store: whole projections, targets in a list.

    The ranks of a projection's parts add up; their scales go into B, and alpha is set so that the
    scale is one. The initial factors of PiSSA and OLoRA are subtracted the same way, which doubles
    the rank.
    An adapter that PEFT can store already is returned unchanged.
    """
    leaves = {leaf.path: leaf for leaf in paths.leaves(adapter.weights)}
    by_names = not isinstance(adapter.config.target_modules, str)
    in_parts = any(paths.is_part(path[:-1]) for path in leaves)
    if by_names and not in_parts and adapter.initial is None:
        return adapter
    first = dict(paths.walk(adapter.initial or {}))
    weights = {
        path: leaf.value
        for path, leaf in leaves.items()
        if path[-1] not in ADDED or path[-1] == TOKENS
    }
    settings: dict[str, tuple[int, float]] = {}
    for leaf, added in _weights(leaves):
        module, names = terms.adapter_node(leaf), terms.factor_names(leaf)
        initial = {path: first[path] for path in added if path in first}
        if (*module, names[0]) in added and not initial:
            weights |= added
            settings |= _whole_settings(leaf, adapter.config)
            continue
        a, b, scale = terms.composed_factors(leaf, added, adapter.config, adapter.parts)
        if initial:
            first_terms = terms.composed_factors(leaf, initial, adapter.config, adapter.parts)
            a, b, scale = terms.subtract_factors((a, b, scale), first_terms)
        weights |= {(*module, names[0]): a, (*module, names[1]): b}
        weights |= _in_columns(leaf, added, adapter)
        settings |= _joint_settings(leaf, added, a.shape[-1], adapter)
    experts = {name for name in settings if is_target_parameter(adapter.config, name)}
    ranks = {name: r for name, (r, _) in settings.items()}
    alphas = {name: alpha for name, (_, alpha) in settings.items()}
    config = with_listed_targets(
        adapter.config,
        [name for name in settings if name not in experts],
        rank_pattern=matching.pattern_table(ranks, adapter.config.r),
        alpha_pattern=matching.pattern_table(alphas, adapter.config.lora_alpha),
        # Otherwise PEFT would subtract the initial factors from its base once more.
        init_lora_weights=True if first else adapter.config.init_lora_weights,
    )
    return Adapter(paths.nest(weights), config)


Leaves = dict[paths.Path, Any]


def _weights(leaves: Mapping[paths.Path, paths.Leaf]) -> Iterator[tuple[paths.Leaf, Leaves]]:
    """The base's weights that are adapted, each with the adapter's leaves for it."""
    groups: dict[paths.Path, dict[paths.Path, paths.Leaf]] = {}
    for path, leaf in leaves.items():
        if path[-1] in ADDED and path[-1] != TOKENS:
            groups.setdefault(paths.whole_projection(path[:-1]), {})[path] = leaf
    for module, added in groups.items():
        delta = next(leaf for path, leaf in added.items() if path[-1] in (*DELTA, *EMBEDDING_DELTA))
        where = (*module, "embedding" if delta.kind in EMBEDDING_DELTA else "kernel")
        bare = len(delta.shape) == 3  # experts: the node is the leaf itself
        base = paths.Leaf(module if bare else where, None, delta.stack, delta.layers)
        yield base, {path: leaf.value for path, leaf in added.items()}


def _in_columns(leaf: paths.Leaf, added: Leaves, adapter: Adapter) -> Leaves:
    """Biases and magnitudes of a projection's parts, placed in those of the whole projection."""
    found: Leaves = {}
    for c in terms.module_columns(leaf, added, adapter.parts):
        scale = bias_scaling(adapter.config, leaf.modules_at(c.module))
        for kind, factor in ((LORA_BIAS, np.asarray(scale)[..., None]), (MAGNITUDE, 1.0)):
            if (*c.module, kind) in added:
                where = (*terms.adapter_node(leaf), kind)
                placed = c.place(jnp.asarray(factor * added[(*c.module, kind)]))
                found[where] = found.get(where, 0.0) + placed
    return found


def _whole_settings(leaf: paths.Leaf, config: LoraConfig) -> dict[str, tuple[int, float]]:
    """Name → (rank, alpha) of each layer whose whole projection is adapted."""
    return {
        name: (r, matching.pattern_value(config.alpha_pattern, name, config.lora_alpha))
        for name, r in _ranks(leaf, terms.adapter_node(leaf), config).items()
        if r
    }


def _ranks(leaf: paths.Leaf, module: paths.Path, config: LoraConfig) -> dict[str, int]:
    """Name → rank in each layer of a weight's ``module``, which may be a part of it."""
    rank = parameter_rank_of if leaf.kind in paths.EXPERTS else rank_of
    return {name: rank(config, name) for name in leaf.modules_at(module).names()}


def _joint_settings(
    leaf: paths.Leaf, added: Leaves, total: int, adapter: Adapter
) -> dict[str, tuple[int, float]]:
    """Name of the projection → (rank, alpha), for each layer that adapts it or a part of it."""
    alpha, found = math.sqrt(total) if adapter.config.use_rslora else total, {}
    wholes = leaf.modules_at(terms.adapter_node(leaf)).names()
    for c in terms.module_columns(leaf, added, adapter.parts):
        ranks = _ranks(leaf, c.module, adapter.config).values()
        found |= {whole: (total, alpha) for whole, r in zip(wholes, ranks, strict=True) if r}
    return found
