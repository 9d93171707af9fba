"""Module names for the presets all-linear, attention and mlp, and for an architecture's default."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from jlora.config import PRESETS, LoraConfig
from jlora.errors import ConfigError
from jlora.tree import matching, paths

DEFAULT_TARGETS: tuple[tuple[set[str], tuple[str, ...]], ...] = (
    # First, since it has the marks of the next line as well.
    ({"q_proj", "v_proj", "dense"}, ("q_proj", "v_proj", "fc1", "fc2")),  # Phi
    ({"q_proj", "v_proj"}, ("q_proj", "v_proj")),
    ({"c_attn"}, ("c_attn",)),
    ({"query_key_value"}, ("query_key_value",)),
)
"""Linear layers that identify an architecture → PEFT's default targets; the first match counts."""

SCORE_HEADS = ("classifier", "score")
"""What PEFT adds to modules_to_save for SEQ_CLS: the possible names of a classification head."""

ATTENTION = re.compile(r"(self_)?attn|.*attention.*", re.IGNORECASE)
"""Names of attention modules."""


def resolve(config: LoraConfig, linear: Sequence[paths.Path]) -> LoraConfig:
    """The config with a preset, or None, replaced by module names.

    Args:
      config: as given.
      linear: the paths of the tree's linear layers, without parts of fused projections.

    Raises:
      ConfigError: there is no default for the architecture, or a preset matches nothing.
    """
    wanted = config.target_modules
    # PEFT's all-linear leaves the output head out, too.
    inner = [path for path in linear if path[-1] not in paths.OUTPUT_HEADS]
    names = sorted({path[-1] for path in inner})
    if isinstance(wanted, str) and wanted.lower() in PRESETS:
        found = tuple(names) if wanted.lower() == "all-linear" else _preset(wanted.lower(), inner)
        if not found:
            raise ConfigError(
                f"{wanted} finds no linear layer",
                where="lora.target_modules",
                fix=f"name the layers to adapt, for example {names}, or use all-linear",
            )
        return dataclasses.replace(config, target_modules=found)
    if wanted is None:
        for marks, default in DEFAULT_TARGETS:
            if marks <= {*names}:
                return dataclasses.replace(config, target_modules=default)
        if config.target_parameters:
            return dataclasses.replace(config, target_modules=())
        raise ConfigError(
            "there is no default for this architecture",
            where="lora.target_modules",
            fix=f"name the layers to adapt, for example {names}, or use all-linear",
        )
    return config


OLD_NAMES = {
    "gate": "gate.weight",
    "w1": "gate_up_proj",
    "w3": "gate_up_proj",
    "w2": "down_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
    "down_proj": "down_proj",
}
"""Linear layers of mixtures in transformers 4 → the parameters that hold their weights since then.

As in ``peft.utils.transformers_weight_conversion``: experts are adapted all together.
"""


def with_names_of_parameters(
    config: LoraConfig, linear: Collection[str], parameters: Collection[str]
) -> LoraConfig:
    """The config with routers and experts that are named as linear layers in target_parameters.

    Of gate and up, which are one matrix, each keeps its rank: together they have twice as much.

    Args:
      config: as given.
      linear: the names of the tree's linear layers and embeddings.
      parameters: those of its parameters without a linear layer.

    Raises:
      ConfigError: only one of gate and up is named.
    """
    if isinstance(config.target_modules, str | None):
        return config
    moved: dict[str, list[str]] = {}
    for name in config.target_modules:
        new = OLD_NAMES.get(name.rpartition(".")[2], "")
        is_there = any(matching.matches(p, (new,)) for p in parameters)
        # Where some layers have MLPs instead of experts, the names are theirs. peft 0.21 adapts the
        # experts then, and cannot adapt these MLPs.
        if is_there and not any(matching.matches(n, (name,)) for n in linear):
            moved.setdefault(new, []).append(name)
    if not moved:
        return config
    fused = moved.get("gate_up_proj", [])
    lasts = {name.rpartition(".")[2] for name in fused}
    if len(lasts) == 1:
        raise ConfigError(
            f"{fused[0]} is one half of the experts' matrix gate_up_proj, which is adapted as one",
            where="lora.target_modules",
            fix="name both halves (w1 and w3, or gate_proj and up_proj), or none",
        )
    both = r".*\.gate_up_proj"
    ranks, alphas = dict(config.rank_pattern), dict(config.alpha_pattern)
    if fused and both not in ranks:
        # As in PEFT, alpha grows with the rank, which keeps the scale; with rsLoRA it becomes √2
        # larger.
        ranks[both], alphas[both] = 2 * config.r, 2 * config.lora_alpha
    gone = {name for names in moved.values() for name in names}
    return dataclasses.replace(
        config,
        target_modules=tuple(name for name in config.target_modules if name not in gone),
        target_parameters=tuple(dict.fromkeys((*(config.target_parameters or ()), *moved))),
        rank_pattern=ranks,
        alpha_pattern=alphas,
    )


AdaptedModules = Iterable[tuple[paths.ModuleStack, Sequence[bool]]]
"""Modules, one a layer, and whether each layer is adapted."""


def listed_names(modules: AdaptedModules, bare: Collection[str] = ()) -> tuple[str, ...]:
    """The shortest names by which PEFT's rules match the adapted modules and no others.

    A module that is adapted in all layers has one name, ``self_attn.q_proj``; others are named in
    full, layer by layer.

    Args:
      modules: each one once.
      bare: last names that only adapted modules have; they are enough.
    """
    modules = [(m, [bool(x) for x in adapted]) for m, adapted in modules]
    states = {n: x for m, adapted in modules for n, x in zip(m.names(), adapted, strict=True)}
    found: list[str] = []
    for m, adapted in modules:
        _, _, inner = m.name().partition(".*.")
        if inner and all(adapted):
            last = inner.rpartition(".")[2]
            found.append(last if last in bare else inner)
        else:
            found += [name for name in m.names() if states[name]]
    if any(matching.matches(name, found) != adapted for name, adapted in states.items()):
        return tuple(name for name, adapted in states.items() if adapted)
    return tuple(dict.fromkeys(found))


def names_of_all(config: LoraConfig) -> set[str]:
    """The last names of which ``config``, resolved, adapts all modules, fused projections too."""
    limits = (config.exclude_modules, config.layers_to_transform)
    targets = config.target_modules
    if isinstance(targets, str) or any(limits):
        return set()
    names = {name for name in targets or () if "." not in name}
    return names | {fused for fused, parts in paths.FUSED.items() if names & {*parts}}


def with_module_settings(
    config: LoraConfig, settings: Mapping[str, tuple[int, float]]
) -> LoraConfig:
    """The config by which PEFT gives every module its (rank, scale).

    Where modules differ, there are patterns. Consumers that ignore those, and compute every scale
    as alpha / r, still have the right scale in as many modules as possible.
    """
    scale = Counter(scale for _, scale in settings.values()).most_common(1)[0][0]
    r = max(rank for rank, _ in settings.values())
    alphas = {name: _alpha(rank, scale) for name, (rank, scale) in settings.items()}
    return dataclasses.replace(
        config,
        r=r,
        lora_alpha=_alpha(r, scale),
        # The scales are in the alphas. PEFT's add_weighted_adapter keeps the first adapter's
        # use_rslora: with it the result is √r too strong.
        use_rslora=False,
        rank_pattern=matching.pattern_table({n: rank for n, (rank, _) in settings.items()}, r),
        alpha_pattern=matching.pattern_table(alphas, _alpha(r, scale)),
    )


def _alpha(rank: int, scale: float) -> float:
    """The alpha of a scale; an integer, as which PEFT declares it, if it is one up to rounding."""
    alpha = float(f"{rank * scale:.14g}")
    return int(alpha) if alpha.is_integer() else alpha


def with_listed_targets(config: LoraConfig, names: Sequence[str], **fields: Any) -> LoraConfig:
    """The config with these names as targets, and no other fields that select targets."""
    return dataclasses.replace(
        config,
        target_modules=tuple(names),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        **fields,
    )


def _preset(wanted: str, linear: Sequence[paths.Path]) -> tuple[str, ...]:
    """Suffixes of the linear layers in attention, or of the others in decoder layers."""
    chosen, others = set(), set()
    for path in linear:
        in_attention = any(ATTENTION.fullmatch(node) for node in path[:-1])
        in_layers = any(node in paths.STACKED for node in path)
        wants = in_attention if wanted == "attention" else in_layers and not in_attention
        # With the parent's name: GPT-2 has a c_proj in attention and another in the MLP.
        (chosen if wants else others).add(path[-2:])
    other_names = {path[-1] for path in others}
    return tuple(
        sorted({path[-1] if path[-1] not in other_names else ".".join(path) for path in chosen})
    )


def with_score_heads(config: LoraConfig) -> LoraConfig:
    """The config with the classification head in ``modules_to_save``, as PEFT adds it."""
    if config.task_type != "SEQ_CLS":
        return config
    saved = config.modules_to_save or ()
    heads = (head for head in SCORE_HEADS if head not in saved)
    return dataclasses.replace(config, modules_to_save=(*saved, *heads))
