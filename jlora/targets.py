"""Which weights a LoraConfig adapts, by PEFT's rules; every pattern in it must match something."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jlora import paths
from jlora.config import LoraConfig
from jlora.errors import ConfigError, nearest

DEFAULT_TARGETS: tuple[tuple[set[str], tuple[str, ...]], ...] = (
    ({"q_proj", "v_proj", "dense"}, ("q_proj", "v_proj", "fc1", "fc2")),  # Phi
    ({"q_proj", "v_proj"}, ("q_proj", "v_proj")),
    ({"c_attn"}, ("c_attn",)),
    ({"query_key_value"}, ("query_key_value",)),
)
"""Linear layers that tell an architecture, in order, and PEFT's default targets there."""

SCORE_HEADS = ("classifier", "score")
"""What PEFT adds to modules_to_save for SEQ_CLS: models call their head by one of the names."""


class Target(NamedTuple):
    """One weight to adapt: a linear layer, or a part of a fused one (see ``paths.FUSED``)."""

    path: paths.Path  # the module's
    stack: paths.Path | None
    names: tuple[str, ...]  # the module's name in each layer
    shape: tuple[int, int]  # (in, out) of one layer
    ranks: tuple[int, ...]  # one a layer; 0: this layer is not adapted


def find_targets(params: Any, config: LoraConfig) -> tuple[LoraConfig, list[Target]]:
    """The config with ``target_modules`` resolved to names, and what it matches, in tree order.

    Raises:
      ConfigError: listing every pattern that matches nothing, with the nearest names, and what is
        named twice or is not a linear layer.
    """
    leaves = paths.leaves(params)
    candidates = _candidates(leaves)
    conv1d = any(c.path[-1] in paths.FUSED for c in candidates)  # GPT-2 stores (in, out)
    config = dataclasses.replace(_resolve(_with_heads(config), candidates), fan_in_fan_out=conv1d)
    ranked = [c._replace(ranks=tuple(rank_of(config, n) for n in c.names)) for c in candidates]
    targets = [t for t in ranked if any(t.ranks)]
    modules = sorted({name for leaf in leaves for name in leaf.modules()})
    faults = [
        *_unmatched(config, modules, candidates, targets),
        *_not_linear(config, modules, candidates),
        *_experts_saved(config, leaves),
    ]
    if not faults and not targets:
        faults.append("target_modules: everything it matches is excluded")
    if faults:
        raise ConfigError("; ".join(faults), where="lora", fix="every pattern must match a module")
    return config, _without_covered_parts(config, targets)


def match_table(targets: Sequence[Target]) -> list[dict[str, Any]]:
    """Rows for people: module (``*`` for the layer), layers adapted, shape, rank, parameters."""
    rows = []
    for t in targets:
        used = [r for r in t.ranks if r]
        rows.append(
            {
                "module": paths.module_name(t.path, t.stack, None),
                "layers": len(used),
                "shape": t.shape,
                "r": used[0] if len(set(used)) == 1 else f"{min(used)}–{max(used)}",
                "parameters": sum(used) * sum(t.shape),
            }
        )
    return rows


# What a config says of one module. These look at its name alone; target_modules is resolved.


def is_target(config: LoraConfig, name: str) -> bool:
    """Whether PEFT would put LoRA on the module ``name``."""
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


def is_saved(name: str, module: str) -> bool:
    """Whether PEFT trains the module ``name`` in full for this entry of ``modules_to_save``.

    As in PEFT, an entry is the end of a module's name, at a dot or not: ``norm`` is also
    ``input_layernorm``. Everything below such a module is trained with it.
    """
    return f"{module}." in f"{name}."


def is_replaced(config: LoraConfig, name: str, kind: str) -> bool:
    """Whether the leaf ``kind`` of the module ``name`` is trained as a whole."""
    if any(is_saved(name, m) for m in config.modules_to_save or ()):
        return True
    if kind != "bias" or config.bias == "none":
        return False
    node, _, last = name.rpartition(".")
    parts = [f"{node}.{part}" for part in paths.FUSED.get(last, ())]
    return config.bias == "all" or any(is_target(config, n) for n in (name, *parts))


def rank_of(config: LoraConfig, name: str) -> int:
    """The rank of the module ``name``; 0 if it is not adapted."""
    adapted = is_target(config, name)
    return paths.pattern_value(config.rank_pattern, name, config.r) if adapted else 0


def scaling_of(config: LoraConfig, name: str) -> float:
    """alpha/r of the module ``name``, or alpha/√r with rank-stabilized LoRA (arXiv 2312.03732)."""
    r = paths.pattern_value(config.rank_pattern, name, config.r)
    alpha = paths.pattern_value(config.alpha_pattern, name, config.lora_alpha)
    return alpha / math.sqrt(r) if config.use_rslora else alpha / r


def replaced_leaves(params: Any, config: LoraConfig) -> list[paths.Leaf]:
    """The leaves that are trained as a whole, in some layer at least."""
    return [
        leaf
        for leaf in paths.leaves(params)
        if any(is_replaced(config, name, leaf.kind) for name in leaf.modules())
    ]


def _candidates(leaves: Sequence[paths.Leaf]) -> list[Target]:
    """Every linear layer and every named part of a fused one."""
    found = []
    for leaf in leaves:
        if leaf.kind != "kernel" or len(leaf.shape) != 2 or len(leaf.path) < 2:
            continue
        module, (fan_in, fan_out) = leaf.path[:-1], leaf.shape
        parts = paths.FUSED.get(module[-1], ())
        for path, width in [(module, fan_out)] + [
            ((*module, part), fan_out // len(parts)) for part in parts
        ]:
            names = tuple(paths.module_names(path, leaf.stack, leaf.layers))
            found.append(Target(path, leaf.stack, names, (fan_in, width), ()))
    return found


def _resolve(config: LoraConfig, candidates: Sequence[Target]) -> LoraConfig:
    """Names in place of "all-linear" and of the architecture's default."""
    wanted = config.target_modules
    linear = {c.path[-1] for c in candidates if not paths.is_part(c.path)}
    linear -= set(paths.OUTPUT_HEADS)
    if isinstance(wanted, str) and wanted.lower() == "all-linear":
        return dataclasses.replace(config, target_modules=tuple(sorted(linear)))
    if wanted is None:
        for marks, names in DEFAULT_TARGETS:
            if marks <= linear:
                return dataclasses.replace(config, target_modules=names)
        raise ConfigError(
            "there is no default for this architecture",
            where="lora.target_modules",
            fix=f"name the layers to adapt, for example {sorted(linear)}, or use all-linear",
        )
    return config


def _with_heads(config: LoraConfig) -> LoraConfig:
    """The config with the classifier's head among the modules to save, as PEFT has it."""
    if config.task_type != "SEQ_CLS":
        return config
    saved = config.modules_to_save or ()
    heads = (head for head in SCORE_HEADS if head not in saved)
    return dataclasses.replace(config, modules_to_save=(*saved, *heads))


def _without_covered_parts(config: LoraConfig, targets: Sequence[Target]) -> list[Target]:
    """Leaves out the parts that an expression matches along with their projection.

    Raises:
      ConfigError: a weight would be trained twice, as a part and as a whole.
    """
    wholes = {t.path: t for t in targets}
    kept = []
    for t in targets:
        if not paths.is_part(t.path):
            kept.append(t)
            continue
        cover = wholes.get(paths.whole(t.path))
        projections = paths.module_names(paths.whole(t.path), t.stack, len(t.ranks))
        saved = any(is_replaced(config, name, "kernel") for name in projections)
        if cover is None and not saved:
            kept.append(t)
        elif cover is None or not _covers(config, cover, t):
            raise ConfigError(
                f"{t.path[-2]} and its part {t.path[-1]} would both be trained",
                where="lora.target_modules",
                fix=f"name either {t.path[-2]}, or the parts to adapt",
            )
    return kept


def _covers(config: LoraConfig, projection: Target, part: Target) -> bool:
    """Whether an expression took the projection wherever it took the part."""
    layers = zip(projection.ranks, part.ranks, strict=True)
    return isinstance(config.target_modules, str) and all(whole or not r for whole, r in layers)


def _unmatched(
    config: LoraConfig,
    modules: Sequence[str],
    candidates: Sequence[Target],
    targets: Sequence[Target],
) -> Iterator[str]:
    """A message for every pattern that matches nothing."""
    linear = [n for c in candidates for n in c.names]
    adapted = [n for t in targets for n, r in zip(t.names, t.ranks, strict=True) if r]

    def check(key: str, pattern: str, hits: Iterator[bool], names: Sequence[str]) -> Iterator[str]:
        if not any(hits):
            yield f"{key}: {pattern!r} matches nothing{_near(pattern, names)}"

    for key in ("target_modules", "exclude_modules"):
        value = getattr(config, key) or ()
        for p in [value] if isinstance(value, str) else value:
            probe = p if isinstance(value, str) else (p,)
            yield from check(key, p, (paths.matches(n, probe) for n in linear), linear)
    for key in ("rank_pattern", "alpha_pattern"):
        for p in getattr(config, key):
            hits = (paths.pattern_value({p: True}, n, False) for n in adapted)
            yield from check(key, p, hits, adapted)
    saved = config.modules_to_save or ()
    if config.task_type == "SEQ_CLS":
        if not any(is_saved(n, head) for n in modules for head in SCORE_HEADS):
            yield "task_type: SEQ_CLS needs a model with a score head (load it with num_labels)"
        saved = [m for m in saved if m not in SCORE_HEADS]
    for m in saved:
        yield from check("modules_to_save", m, (is_saved(n, m) for n in modules), modules)
    yield from _missing_layers(config, linear)


def _missing_layers(config: LoraConfig, linear: Sequence[str]) -> Iterator[str]:
    wanted = config.layers_to_transform
    if wanted is None or isinstance(config.target_modules, str):
        return
    numbers = (paths.layer_number(n, config.layers_pattern) for n in linear)
    there = {i for i in numbers if i is not None}
    wanted = (wanted,) if isinstance(wanted, int) else wanted
    if missing := [i for i in wanted if i not in there]:
        last = max(there, default=-1)
        yield f"layers_to_transform: no layer {missing}; layers are numbered 0 to {last}"


def _not_linear(
    config: LoraConfig, modules: Sequence[str], candidates: Sequence[Target]
) -> Iterator[str]:
    """A message if an expression also matches what is not a linear layer; PEFT refuses that too."""
    if not isinstance(config.target_modules, str):
        return
    linear = {n for c in candidates for n in c.names}
    for name in modules:
        parts = name.split(".")
        nodes = (".".join(parts[: i + 1]) for i in range(len(parts)))
        for node in nodes:
            if node not in linear and is_target(config, node):
                yield f"target_modules: it also matches {node}, which is not a linear layer"
                return


def _experts_saved(config: LoraConfig, leaves: Sequence[paths.Leaf]) -> Iterator[str]:
    """A message if experts would be trained in full: files of adapters know no such tensors yet."""
    for m in config.modules_to_save or ():
        for leaf in leaves:
            if leaf.kind in paths.EXPERTS and any(is_saved(n, m) for n in leaf.modules()):
                yield f"modules_to_save: {m!r} would train experts in full, which is not supported"
                return


def _near(pattern: str, names: Sequence[str]) -> str:
    """The nearest last names, or else what there is."""
    short = sorted({n.rsplit(".", 1)[-1] for n in names})
    close = nearest(pattern.rsplit(".", 1)[-1], short) or short
    return f" (there is: {', '.join(close)})" if close else ""
