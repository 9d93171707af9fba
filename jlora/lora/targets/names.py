"""Names in place of presets: all-linear, attention, mlp, and the architecture's default."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from jlora.config import PRESETS, LoraConfig
from jlora.errors import ConfigError
from jlora.tree import paths

DEFAULT_TARGETS: tuple[tuple[set[str], tuple[str, ...]], ...] = (
    ({"q_proj", "v_proj", "dense"}, ("q_proj", "v_proj", "fc1", "fc2")),  # Phi
    ({"q_proj", "v_proj"}, ("q_proj", "v_proj")),
    ({"c_attn"}, ("c_attn",)),
    ({"query_key_value"}, ("query_key_value",)),
)
"""Linear layers that tell an architecture, in order, and PEFT's default targets there."""

SCORE_HEADS = ("classifier", "score")
"""What PEFT adds to modules_to_save for SEQ_CLS: models call their head by one of the names."""

ATTENTION = re.compile(r"(self_)?attn|.*attention.*", re.IGNORECASE)
"""Nodes of attention modules."""


def resolve(config: LoraConfig, linear: Sequence[paths.Path]) -> LoraConfig:
    """Names in place of a preset and of the architecture's default.

    Args:
      config: as given.
      linear: the paths of the tree's linear layers, without parts of fused ones.

    Raises:
      ConfigError: there is no default for such a tree, or a preset finds nothing.
    """
    wanted = config.target_modules
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
    """The config whose targets are these names, given in full, and nothing else says which."""
    return dataclasses.replace(
        config,
        target_modules=tuple(names),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        **fields,
    )


def _preset(wanted: str, linear: Sequence[paths.Path]) -> tuple[str, ...]:
    """Suffixes of the linear layers of all attention modules, or of all others in layers."""
    chosen, others = set(), set()
    for path in linear:
        attends = any(ATTENTION.fullmatch(node) for node in path[:-1])
        in_layers = any(node in paths.STACKED for node in path)
        takes = attends if wanted == "attention" else in_layers and not attends
        (chosen if takes else others).add(path[-2:])
    last = {path[-1] for path in others}
    return tuple(sorted({path[-1] if path[-1] not in last else ".".join(path) for path in chosen}))


def with_heads(config: LoraConfig) -> LoraConfig:
    """The config with the classifier's head among the modules to save, as PEFT has it."""
    if config.task_type != "SEQ_CLS":
        return config
    saved = config.modules_to_save or ()
    heads = (head for head in SCORE_HEADS if head not in saved)
    return dataclasses.replace(config, modules_to_save=(*saved, *heads))
