"""Adapters as PEFT can hold them.

PEFT knows no parts of fused projections: its GPT-2 has one A for queries, keys and values. And an
expression in ``target_modules`` must not match torch's modules without weights (``mlp.act_fn``),
which jlora does not have and cannot know of.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

from jlora import paths
from jlora.config import LoraConfig
from jlora.lora import DELTA, Adapter, combine
from jlora.targets import rank_of


def for_peft(adapter: Adapter) -> Adapter:
    """The same adapter, with LoRA on whole projections and its targets in a list.

    The ranks of a projection's parts add up; their scales go into B, and alpha is set so that the
    scale is one. An adapter that is so already comes back as it is.
    """
    leaves = {leaf.path: leaf for leaf in paths.leaves(adapter.weights)}
    listed = not isinstance(adapter.config.target_modules, str)
    if listed and not any(paths.is_part(path[:-1]) for path in leaves):
        return adapter
    weights = {path: leaf.value for path, leaf in leaves.items() if path[-1] not in DELTA}
    pairs: dict[paths.Path, dict[paths.Path, Any]] = {}  # by the whole module
    for path, leaf in leaves.items():
        if path[-1] in DELTA:
            pairs.setdefault(paths.whole(path[:-1]), {})[path] = leaf.value
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for module, own in pairs.items():
        some = leaves[next(iter(own))]
        kernel = paths.Leaf((*module, "kernel"), None, some.stack, some.layers)
        a, b, _ = combine(kernel, own, adapter.config)
        weights[(*module, "lora_A")], weights[(*module, "lora_B")] = a, b
        for path in own:
            for name, r, alpha in _settings(kernel, path[:-1], a.shape[-1], adapter.config):
                ranks[name], alphas[name] = r, alpha
    config = dataclasses.replace(
        adapter.config,
        target_modules=tuple(ranks),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        rank_pattern=_patterns(ranks, adapter.config.r),
        alpha_pattern=_patterns(alphas, adapter.config.lora_alpha),
    )
    return Adapter(paths.nest(weights), config)


def _settings(
    kernel: paths.Leaf, part: paths.Path, total: int, config: LoraConfig
) -> Iterator[tuple[str, int, float]]:
    """(name of the whole, rank, alpha) of each layer that is adapted at ``part``."""
    parts = paths.module_names(part, kernel.stack, kernel.layers)
    for name, whole in zip(parts, kernel.modules(), strict=True):
        if (r := rank_of(config, name)) and name == whole:
            yield name, r, paths.pattern_value(config.alpha_pattern, name, config.lora_alpha)
        elif r:
            yield whole, total, math.sqrt(total) if config.use_rslora else total


def _patterns(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """A table for ``rank_pattern``: last names where one value holds for all, else full names.

    No two patterns match one module: a table's order is lost in a file with sorted keys.
    """
    by_last: dict[str, set[Any]] = {}
    for name, value in values.items():
        by_last.setdefault(name.rpartition(".")[2], set()).add(value)
    table = {}
    for name, value in values.items():
        last = name.rpartition(".")[2]
        if value != default:
            table[last if len(by_last[last]) == 1 else name] = value
    return table
