"""An adapter's factors A and B by module, and an adapter from such factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jlora.config import FrozenMap, LoraConfig
from jlora.lora import Adapter
from jlora.lora.adapter import PAIRS
from jlora.lora.targets import (
    listed_names,
    rank_of,
    scaling_of,
    with_listed_targets,
    with_module_settings,
)
from jlora.tree import paths


class ModuleFactors(NamedTuple):
    """A and B of a module in all layers; a module that is not stacked has one layer."""

    leaf: paths.Leaf  # of A: its path has the module
    a: Any  # (layers, in, r)
    b: Any  # (layers, r, out)
    ranks: np.ndarray  # (layers,): number of columns in use; 0: the layer is not adapted
    scales: np.ndarray  # (layers,), float64


def adapter_factors(adapter: Adapter) -> dict[paths.Path, ModuleFactors]:
    """All factors of an adapter, by the path of A."""
    leaves = {leaf.path: leaf for leaf in paths.leaves(adapter.weights)}
    found = {}
    for path, leaf in leaves.items():
        if leaf.kind not in PAIRS:
            continue
        names = leaf.modules()
        a, b = leaf.value, leaves[(*path[:-1], PAIRS[leaf.kind])].value
        found[path] = ModuleFactors(
            leaf,
            a if leaf.stack else a[None],
            b if leaf.stack else b[None],
            np.array([rank_of(adapter.config, name) for name in names]),
            np.array([scaling_of(adapter.config, name) for name in names]),
        )
    return found


def other_leaves(adapter: Adapter) -> dict[paths.Path, Any]:
    """An adapter's leaves besides A and B: biases, saved modules, DoRA's magnitudes."""
    pairs = {*PAIRS, *PAIRS.values()}
    return {path: value for path, value in paths.walk(adapter.weights) if path[-1] not in pairs}


def adapter_from_factors(
    modules: Mapping[paths.Path, ModuleFactors],
    others: Mapping[paths.Path, Any],
    config: LoraConfig,
    parts: Mapping[str, tuple[int, ...]],
) -> Adapter:
    """The adapter with these factors; columns that a layer does not use are set to zero.

    Args:
      modules: the factors.
      others: leaves that are neither A nor B.
      config: everything but ranks and alphas, which are set from ``modules``.
      parts: see ``Adapter``.
    """
    flat = dict(others)
    for path, f in modules.items():
        used = np.arange(f.a.shape[-1]) < f.ranks[:, None]
        a, b = jnp.where(used[:, None, :], f.a, 0.0), jnp.where(used[:, :, None], f.b, 0.0)
        flat[path] = a if f.leaf.stack else a[0]
        flat[(*path[:-1], PAIRS[path[-1]])] = b if f.leaf.stack else b[0]
    return Adapter(paths.nest(flat), _with_ranks(config, modules), parts=FrozenMap(parts))


def _with_ranks(config: LoraConfig, modules: Mapping[paths.Path, ModuleFactors]) -> LoraConfig:
    """The config with the ranks and scales of the modules."""
    settings = {
        name: (r, scale)
        for f in modules.values()
        for name, r, scale in zip(
            f.leaf.modules(), f.ranks.tolist(), f.scales.tolist(), strict=True
        )
        if r
    }
    return with_module_settings(config, settings)


def joined_target_config(
    adapters: Sequence[Adapter], modules: Mapping[paths.Path, ModuleFactors]
) -> LoraConfig:
    """The first adapter's config with the targets of all adapters.

    As in PEFT, names are united and regular expressions joined. If configs mix the two, or differ
    in layers or exclusions, all modules are listed.
    """
    configs = [adapter.config for adapter in adapters]
    targets = [c.target_modules for c in configs]
    limits = {(c.exclude_modules, c.layers_to_transform, c.layers_pattern) for c in configs}
    if len(limits) == 1 and all(isinstance(t, str) for t in targets):
        different = list(dict.fromkeys(targets))
        joined = "|".join(f"({t})" for t in different) if different[1:] else different[0]
        return replace(configs[0], target_modules=joined)
    if len(limits) == 1 and not any(isinstance(t, str) for t in targets):
        names = dict.fromkeys(name for t in targets for name in t or ())
        return replace(configs[0], target_modules=tuple(names))
    adapted = [
        (f.leaf.modules_at(f.leaf.path[:-1]), (f.ranks > 0).tolist()) for f in modules.values()
    ]
    return with_listed_targets(configs[0], listed_names(adapted))
