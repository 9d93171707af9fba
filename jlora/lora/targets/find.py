"""Which weights a LoraConfig adapts, by PEFT's rules; every pattern in it must match something."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jlora.config import LoraConfig
from jlora.errors import ConfigError
from jlora.lora.targets.faults import target_faults
from jlora.lora.targets.names import resolve, with_names_of_parameters, with_score_heads
from jlora.lora.targets.rules import (
    has_token_rows,
    is_replaced,
    parameter_rank_of,
    rank_of,
    token_indices,
)
from jlora.lora.targets.target import Target
from jlora.tree import paths


def find_targets(params: Any, config: LoraConfig) -> tuple[LoraConfig, list[Target]]:
    """The config with ``target_modules`` resolved to names, and its targets in tree order.

    Raises:
      ConfigError: listing every pattern that matches nothing, with similar names, and modules that
        are named twice or cannot be adapted.
    """
    leaves = paths.leaves(params)
    candidates = _candidates(leaves)
    # Set whatever the user wrote: PEFT transposes A @ B where fan_in_fan_out says so.
    conv1d = any(c.path[-1] == "c_attn" for c in candidates)  # GPT-2 stores (in, out)
    layers = [c for c in candidates if c.kind == "kernel" and not paths.is_part(c.path)]
    linear = [path for c in layers for path in _module_paths(c)]
    config = with_names_of_parameters(
        config,
        [name for c in candidates if not c.is_parameter for name in c.names],
        [name for c in candidates if c.is_parameter for name in c.names],
    )
    config = dataclasses.replace(resolve(with_score_heads(config), linear), fan_in_fan_out=conv1d)
    ranked = [_ranked(c, config) for c in candidates]
    targets = [t for t in ranked if any(t.ranks)]
    faults = target_faults(config, leaves, candidates, targets)
    if not faults and not targets and not config.trainable_token_indices:
        faults.append("target_modules: everything it matches is excluded")
    if faults:
        raise ConfigError("; ".join(faults), where="lora", fix="every pattern must match a module")
    return config, _without_covered_parts(config, targets)


def match_table(targets: Sequence[Target]) -> list[dict[str, Any]]:
    """Rows of a table: module (``*`` for the layer), layers adapted, shape, rank, parameters."""
    rows = []
    for t in across_runs(targets):
        used = [r for r in t.ranks if r]
        rows.append(
            {
                "module": t.modules.name(),
                "layers": len(used),
                "shape": t.shape,
                "r": used[0] if len(set(used)) == 1 else f"{min(used)}–{max(used)}",
                "parameters": sum(used) * sum(t.shape) * max(t.experts, 1),
            }
        )
    return rows


def across_runs(targets: Sequence[Target]) -> list[Target]:
    """The targets, those of one module in several runs of layers as one, to be shown."""
    found: dict[Any, Target] = {}
    for t in targets:
        path = paths.without_run(t.path, t.stack)
        stack = t.stack and paths.without_run(t.stack, t.stack)
        first = found.get((path, t.shape), t._replace(names=(), ranks=()))
        names, ranks = (*first.names, *t.names), (*first.ranks, *t.ranks)
        found[path, t.shape] = t._replace(path=path, stack=stack, names=names, ranks=ranks)
    return list(found.values())


def replaced_leaves(params: Any, config: LoraConfig) -> list[paths.Leaf]:
    """The leaves that are trained as a whole, in at least one layer."""
    return [
        leaf
        for leaf in paths.leaves(params)
        if any(is_replaced(config, name, leaf.kind) for name in leaf.modules())
    ]


def token_rows(params: Any, config: LoraConfig) -> list[tuple[paths.Leaf, Sequence[int]]]:
    """The embeddings and heads of which tokens are trained, and the indices of those tokens."""
    tables = (leaf for leaf in paths.leaves(params) if has_token_rows(leaf))
    found = [(leaf, token_indices(config, leaf.module())) for leaf in tables]
    return [(leaf, rows) for leaf, rows in found if rows]


def _candidates(leaves: Sequence[paths.Leaf]) -> list[Target]:
    """Every weight that can be adapted: linear layers and their parts, embeddings, parameters."""
    found = []
    shapes = {leaf.path: leaf.shape for leaf in leaves}
    for leaf in leaves:
        module, shape = leaf.path[:-1], leaf.shape

        def target(path: paths.Path, *rest: Any, leaf: paths.Leaf = leaf) -> Target:
            names = tuple(leaf.modules_at(path).names())
            return Target(path, leaf.stack, names, *rest)

        if leaf.kind in paths.EXPERTS and len(shape) == 3:
            experts, fan_out, fan_in = shape
            found.append(target(leaf.path, (fan_in, fan_out), (), leaf.kind, experts))
        elif leaf.kind == "weight" and paths.is_parameter(leaf.path) and len(shape) == 2:
            found.append(target(leaf.path, shape[::-1], (), leaf.kind))
        elif leaf.kind in ("kernel", "embedding") and len(shape) == 2 and module:
            found.append(target(module, shape, (), leaf.kind))
            widths = paths.part_widths(module, shapes) if leaf.kind == "kernel" else ()
            for name, width in zip(paths.FUSED.get(module[-1], ()), widths, strict=False):
                part = (*module, name)
                found.append(target(part, (shape[0], width), (), leaf.kind, 0, widths))
    return found


def _module_paths(target: Target) -> list[paths.Path]:
    """The target's path; if it is itself the stacked node, the path of each of its layers.

    The last name of such a layer is its number.
    """
    if target.path != target.stack:
        return [target.path]
    return [tuple(name.split(".")) for name in target.names]


def _ranked(target: Target, config: LoraConfig) -> Target:
    rank = parameter_rank_of if target.is_parameter else rank_of
    return target._replace(ranks=tuple(rank(config, name) for name in target.names))


def _without_covered_parts(config: LoraConfig, targets: Sequence[Target]) -> list[Target]:
    """The targets without the parts of projections that a regular expression matches as well.

    Raises:
      ConfigError: a weight would be trained twice, as a part and as a whole.
    """
    by_path = {t.path: t for t in targets}
    result = []
    for t in targets:
        if not paths.is_part(t.path):
            result.append(t)
            continue
        projection = by_path.get(paths.whole_projection(t.path))
        projections = t.modules._replace(path=paths.whole_projection(t.path)).names()
        saved = any(is_replaced(config, name, "kernel") for name in projections)
        if projection is None and not saved:
            result.append(t)
        elif projection is None or not _covers(config, projection, t):
            raise ConfigError(
                f"{t.path[-2]} and its part {t.path[-1]} would both be trained",
                where="lora.target_modules",
                fix=f"name either {t.path[-2]} or the parts to adapt",
            )
    return result


def _covers(config: LoraConfig, projection: Target, part: Target) -> bool:
    """Whether a regular expression matches the projection wherever it matches the part."""
    layers = zip(projection.ranks, part.ranks, strict=True)
    return isinstance(config.target_modules, str) and all(whole or not r for whole, r in layers)
