"""Which weights a LoraConfig adapts, by PEFT's rules; every pattern in it must match something."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from jlora import paths
from jlora.config import LoraConfig
from jlora.errors import ConfigError, nearest


class Target(NamedTuple):
    """One weight to adapt: a kernel, or a part of a fused one (``path`` then ends in the part)."""

    path: paths.Path  # the module's path; its last key may be a part's name below the kernel's
    stack: paths.Path | None
    names: tuple[str, ...]  # the module's name in each layer
    shape: tuple[int, int]  # (in, out) of one layer
    ranks: tuple[int, ...]  # one a layer; 0: this layer is not adapted


def find_targets(params: Any, config: LoraConfig) -> tuple[LoraConfig, list[Target]]:
    """The config with ``target_modules`` resolved to names, and what it matches, in tree order.

    Raises:
      ConfigError: listing every pattern that matches nothing, with the nearest names.
    """
    candidates = _candidates(params)
    conv1d = any(c.path[-1] in paths.FUSED for c in candidates)  # GPT-2 stores (in, out)
    config = dataclasses.replace(_resolve(config, candidates), fan_in_fan_out=conv1d)
    targets = []
    for c in candidates:
        ranks = tuple(rank_of(config, name) for name in c.names)
        if any(ranks):
            targets.append(c._replace(ranks=ranks))
    _check_patterns(params, config, candidates, targets)
    return config, _without_covered_parts(targets)


def match_table(targets: Sequence[Target]) -> list[dict[str, Any]]:
    """Rows for people: module (``*`` for the layer), layers adapted, shape, rank, parameters."""
    rows = []
    for t in targets:
        used = [r for r in t.ranks if r]
        rows.append(
            {
                "module": re.sub(r"\.\d+\.", ".*.", t.names[0]) if t.stack else t.names[0],
                "layers": len(used),
                "shape": t.shape,
                "r": used[0] if len(set(used)) == 1 else f"{min(used)}–{max(used)}",
                "parameters": sum(used) * sum(t.shape),
            }
        )
    return rows


def is_target(config: LoraConfig, name: str) -> bool:
    """Whether PEFT would put LoRA on the module ``name`` (target_modules already resolved)."""
    if config.exclude_modules and paths.matches(name, config.exclude_modules):
        return False
    if any(is_saved(name, m) for m in config.modules_to_save or ()):
        return False
    if config.target_modules is None or not paths.matches(name, config.target_modules):
        return False
    wanted = config.layers_to_transform
    # A name given in full is taken whatever its layer, as in PEFT.
    if wanted is None or wanted == () or name in config.target_modules:
        return True
    number = paths.layer_number(name, config.layers_pattern)
    return number is not None and number in ((wanted,) if isinstance(wanted, int) else wanted)


def rank_of(config: LoraConfig, name: str) -> int:
    """The rank of the module ``name``; 0 if it is not adapted."""
    return (
        paths.pattern_value(config.rank_pattern, name, config.r) if is_target(config, name) else 0
    )


def scaling_of(config: LoraConfig, name: str) -> float:
    """alpha/r of the module ``name``, or alpha/√r with rank-stabilized LoRA (arXiv 2312.03732)."""
    r = paths.pattern_value(config.rank_pattern, name, config.r)
    alpha = paths.pattern_value(config.alpha_pattern, name, config.lora_alpha)
    return alpha / math.sqrt(r) if config.use_rslora else alpha / r


def replaced_leaves(params: Any, config: LoraConfig, targets: Sequence[Target]) -> list[paths.Leaf]:
    """The leaves that are trained as a whole: ``bias`` and ``modules_to_save``."""
    adapted = {t.path for t in targets}
    adapted |= {p[:-1] for p in adapted}  # a part's bias is its fused projection's
    chosen = []
    for leaf in paths.leaves(params):
        saved = [any(is_saved(n, m) for m in config.modules_to_save or ()) for n in leaf.modules()]
        if any(saved) and not all(saved):
            raise ConfigError(
                "modules_to_save names some layers of a stack; it must name all or none",
                where=leaf.module(),
            )
        bias = leaf.kind == "bias" and (
            config.bias == "all" or (config.bias == "lora_only" and leaf.path[:-1] in adapted)
        )
        if all(saved) or bias:
            chosen.append(leaf)
    return chosen


def is_saved(name: str, module: str) -> bool:
    """Whether PEFT trains the module ``name`` in full for this entry of ``modules_to_save``.

    As in PEFT, an entry is the end of a module's name, at a dot or not: ``norm`` is also
    ``input_layernorm``. Everything below such a module is trained with it.
    """
    return f"{module}." in f"{name}."


def _candidates(params: Any) -> list[Target]:
    """Every linear layer and every named part of a fused one."""
    found = []
    for leaf in paths.leaves(params):
        if leaf.kind != "kernel" or len(leaf.shape) != 2:
            continue
        module, (fan_in, fan_out) = leaf.path[:-1], leaf.shape
        names = tuple(leaf.modules())
        found.append(Target(module, leaf.stack, names, (fan_in, fan_out), ()))
        parts = paths.FUSED.get(module[-1], ()) if module else ()
        for part in parts:
            part_names = tuple(n.removesuffix(module[-1]) + part for n in names)
            shape = (fan_in, fan_out // len(parts))
            found.append(Target((*module, part), leaf.stack, part_names, shape, ()))
    return found


def _is_part(target: Target) -> bool:
    return len(target.path) > 1 and target.path[-1] in paths.FUSED.get(target.path[-2], ())


def _without_covered_parts(targets: list[Target]) -> list[Target]:
    """A fused projection and its parts at once would count twice: that is refused."""
    whole = {t.path for t in targets}
    for t in targets:
        if _is_part(t) and t.path[:-1] in whole:
            raise ConfigError(
                f"target_modules names both {t.path[-2]} and its part {t.path[-1]}",
                where="lora.target_modules",
                fix=f"name either {t.path[-2]}, or the parts to adapt",
            )
    return targets


def _resolve(config: LoraConfig, candidates: Sequence[Target]) -> LoraConfig:
    """Names in place of "all-linear" and of the architecture's default."""
    wanted = config.target_modules
    linear = {c.path[-1] for c in candidates if not _is_part(c)} - set(paths.OUTPUT_HEADS)
    if isinstance(wanted, str) and wanted.lower() == "all-linear":
        return dataclasses.replace(config, target_modules=tuple(sorted(linear)))
    if wanted is None:
        for names in DEFAULT_TARGETS:
            if set(names) <= linear:
                return dataclasses.replace(config, target_modules=names)
        raise ConfigError(
            "there is no default for this architecture",
            where="lora.target_modules",
            fix=f"name the layers to adapt, for example {sorted(linear)}, or use all-linear",
        )
    return config


DEFAULT_TARGETS: tuple[tuple[str, ...], ...] = (("q_proj", "v_proj"), ("c_attn",))
"""PEFT's defaults, in order: Llama-like models, GPT-2."""


def _check_patterns(
    params: Any, config: LoraConfig, candidates: Sequence[Target], targets: Sequence[Target]
) -> None:
    linear = [n for c in candidates for n in c.names]
    adapted = [n for t in targets for n, r in zip(t.names, t.ranks, strict=True) if r]
    modules = {n for leaf in paths.leaves(params) for n in leaf.modules()}
    faults: list[str] = []

    def need(key: str, pattern: str, hits: bool, names: Sequence[str]) -> None:
        if not hits:
            faults.append(f"{key}: {pattern!r} matches nothing{_near(pattern, names)}")

    target_patterns = config.target_modules
    for p in [target_patterns] if isinstance(target_patterns, str) else target_patterns or ():
        probe = p if isinstance(target_patterns, str) else (p,)
        need("target_modules", p, any(paths.matches(n, probe) for n in linear), linear)
    excluded = config.exclude_modules
    for p in [excluded] if isinstance(excluded, str) else excluded or ():
        probe = p if isinstance(excluded, str) else (p,)
        need("exclude_modules", p, any(paths.matches(n, probe) for n in linear), linear)
    for key, patterns in (
        ("rank_pattern", config.rank_pattern),
        ("alpha_pattern", config.alpha_pattern),
    ):
        for p in patterns:
            hit = any(paths.pattern_value({p: True}, n, False) for n in adapted)
            need(key, p, hit, adapted)
    for m in config.modules_to_save or ():
        need("modules_to_save", m, any(is_saved(n, m) for n in modules), sorted(modules))
    faults += _layer_faults(config, linear)
    if not faults and not adapted:
        faults.append("target_modules: everything it matches is excluded")
    if faults:
        raise ConfigError("; ".join(faults), where="lora", fix="every pattern must match a module")


def _layer_faults(config: LoraConfig, linear: Sequence[str]) -> list[str]:
    wanted = config.layers_to_transform
    if wanted is None or isinstance(config.target_modules, str):
        return []
    there = {paths.layer_number(n, config.layers_pattern) for n in linear} - {None}
    wanted = (wanted,) if isinstance(wanted, int) else wanted
    missing = [i for i in wanted if i not in there]
    if not missing:
        return []
    last = max((i for i in there if i is not None), default=-1)
    return [f"layers_to_transform: no layer {missing}; layers are numbered 0 to {last}"]


def _near(pattern: str, names: Sequence[str]) -> str:
    """The nearest last names, or else what there is."""
    short = sorted({n.rsplit(".", 1)[-1] for n in names})
    close = nearest(pattern.rsplit(".", 1)[-1], short) or short
    return f" (there is: {', '.join(close)})" if close else ""
