"""The conversion of an adapter to the form that PEFT can store.

PEFT has no parts of fused projections: its GPT-2 has one A for queries, keys and values. And
``target_modules`` must not match modules of torch which jlora does not have and cannot know of: an
expression those without weights (``mlp.act_fn``), the end of a name those of a vision tower.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jlora.config import LoraConfig
from jlora.lora import DELTA, EMBEDDING_DELTA, MAGNITUDE, TOKENS, Adapter, terms
from jlora.lora.adapter import ADDED, LORA_BIAS, bias_scaling
from jlora.lora.targets import (
    listed_names,
    names_of_all,
    parameter_rank_of,
    rank_of,
    scaling_of,
    with_listed_targets,
    with_module_settings,
)
from jlora.tree import paths


def to_peft_form(adapter: Adapter) -> Adapter:
    """The equivalent adapter that PEFT can store: whole projections, targets in a list.

    The ranks of a projection's parts add up. The initial factors of PiSSA and OLoRA are subtracted
    the same way, which doubles the rank. In both cases the scales go into B, so that the scale is
    one in all modules. Patterns that give all modules the same rank and scale become ``r`` and
    ``lora_alpha``, for consumers that ignore patterns. Any other adapter that PEFT can store
    already is returned unchanged.
    """
    config = adapter.config
    leaves = {leaf.path: leaf for leaf in paths.leaves(adapter.weights)}
    # Beside it are towers that jlora does not load, whose modules may have the same last names.
    text_tower = any("language_model" in path for path in leaves)
    in_parts = any(paths.is_part(path[:-1]) for path in leaves)
    if in_parts or adapter.initial is not None:
        weights, settings = _with_whole_projections(adapter, leaves)
        # Otherwise PEFT would subtract the initial factors from its base once more.
        init = True if adapter.initial is not None else config.init_lora_weights
        config = dataclasses.replace(config, init_lora_weights=init)
        adapter = Adapter(weights, with_module_settings(config, settings))
    else:
        settings = _settings_of_all(leaves, config)
        uniform = len({*settings.values()}) == 1 and (config.rank_pattern or config.alpha_pattern)
        if uniform:
            adapter = dataclasses.replace(adapter, config=with_module_settings(config, settings))
        if not isinstance(config.target_modules, str) and not text_tower:
            return adapter
    wholes = [
        leaf.modules_at(terms.adapter_node(leaf))
        for leaf, _ in _weights(leaves)
        if not paths.is_parameter(leaf.path)
    ]
    if text_tower:
        names = [name for whole in wholes for name in whole.names() if name in settings]
    else:
        adapted = [(whole, [name in settings for name in whole.names()]) for whole in wholes]
        names = listed_names(adapted, names_of_all(config))
    return dataclasses.replace(adapter, config=with_listed_targets(adapter.config, names))


Settings = dict[str, tuple[int, float]]
"""Name of a module → rank and scale."""


def _with_whole_projections(
    adapter: Adapter, leaves: Mapping[paths.Path, paths.Leaf]
) -> tuple[dict[str, Any], Settings]:
    """The weights of whole projections of scale one, without what the adapter started from."""
    first = dict(paths.walk(adapter.initial or {}))
    weights = {
        path: leaf.value
        for path, leaf in leaves.items()
        if path[-1] not in ADDED or path[-1] == TOKENS
    }
    settings: Settings = {}
    for leaf, added in _weights(leaves):
        module, names = terms.adapter_node(leaf), terms.factor_names(leaf)
        a, b, scale = terms.composed_factors(leaf, added, adapter.config, adapter.parts)
        if initial := {path: first[path] for path in added if path in first}:
            first_terms = terms.composed_factors(leaf, initial, adapter.config, adapter.parts)
            a, b, scale = terms.subtract_factors((a, b, scale), first_terms)
        b = scale.reshape(*scale.shape, *(1,) * (b.ndim - scale.ndim)) * b
        weights |= {(*module, names[0]): a, (*module, names[1]): b}
        weights |= _in_columns(leaf, added, adapter)
        is_whole = (*module, names[0]) in added and not initial
        for name, r in _ranks(leaf, added, adapter).items():
            settings[name] = (r if is_whole else a.shape[-1], 1.0)
    return paths.nest(weights), settings


def _ranks(leaf: paths.Leaf, added: Leaves, adapter: Adapter) -> dict[str, int]:
    """Name of the projection → rank, in each layer that adapts it or a part of it."""
    found = {}
    wholes = leaf.modules_at(terms.adapter_node(leaf)).names()
    for c in terms.module_columns(leaf, added, adapter.parts):
        settings = _settings(leaf, c.module, adapter.config)
        names = leaf.modules_at(c.module).names()
        found |= {w: settings[n][0] for w, n in zip(wholes, names, strict=True) if n in settings}
    return found


def _settings_of_all(leaves: Mapping[paths.Path, paths.Leaf], config: LoraConfig) -> Settings:
    """The settings of an adapter of whole projections."""
    found: Settings = {}
    for leaf, _ in _weights(leaves):
        found |= _settings(leaf, terms.adapter_node(leaf), config)
    return found


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
        bare = len(delta.shape) == 3 or module[-1] == "weight"  # the node is the leaf itself
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


def _settings(leaf: paths.Leaf, module: paths.Path, config: LoraConfig) -> Settings:
    """The settings of a weight's ``module``, or of this part of it, in the layers that adapt it."""
    rank = parameter_rank_of if paths.is_parameter(leaf.path) else rank_of
    names = leaf.modules_at(module).names()
    return {name: (r, scaling_of(config, name)) for name in names if (r := rank(config, name))}
