"""Module names for the presets all-linear, attention and mlp, and for an architecture's default."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from jlora.config import PRESETS, LoraConfig
from jlora.errors import ConfigError
from jlora.tree import paths

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


def with_listed_targets(config: LoraConfig, names: Sequence[str], **fields: Any) -> LoraConfig:
    """The config with full module names as targets, and no other fields that select targets."""
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
