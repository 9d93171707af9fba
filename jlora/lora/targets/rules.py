"""How a LoraConfig applies to one module, by PEFT's rules.

They depend on the module's name only; ``target_modules`` is resolved to names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from jlora.config import LoraConfig
from jlora.tree import matching, paths

INPUT_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in")
"""Names of input embeddings, to which a plain list of ``trainable_token_indices`` refers."""

POSITION_EMBEDDINGS = ("wpe", "embed_positions")
"""Names of tables of positions, to which no output head is tied."""


def is_target(config: LoraConfig, name: str) -> bool:
    """Whether PEFT would adapt the module ``name``."""
    if config.exclude_modules and matching.matches(name, config.exclude_modules):
        return False
    if any(is_saved(name, m) for m in config.modules_to_save or ()):
        return False
    if config.target_modules is None or not matching.matches(name, config.target_modules):
        return False
    wanted = config.layers_to_transform
    # As in PEFT, a full name is a target whatever layers_to_transform says.
    # An empty list of layers is as none.
    if wanted is None or wanted == () or name in config.target_modules:
        return True
    number = matching.layer_number(name, config.layers_pattern)
    return number is not None and number in ((wanted,) if isinstance(wanted, int) else wanted)


def is_target_parameter(config: LoraConfig, name: str) -> bool:
    """Whether PEFT would adapt the parameter ``name`` (``target_parameters``), in any layer."""
    return matching.matches(name, config.target_parameters or ())


def is_saved(name: str, module: str) -> bool:
    """Whether PEFT trains the module ``name`` in full for this entry of ``modules_to_save``.

    As in PEFT, an entry matches the end of a module's name, at a dot or not: ``norm`` matches
    ``input_layernorm``. Modules inside such a module are trained with it.
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
    return matching.pattern_value(config.rank_pattern, name, config.r) if adapted else 0


def parameter_rank_of(config: LoraConfig, name: str) -> int:
    """The rank of the parameter ``name``; 0 if it is not adapted."""
    adapted = is_target_parameter(config, name)
    return matching.pattern_value(config.rank_pattern, name, config.r) if adapted else 0


def scaling_of(config: LoraConfig, name: str) -> float:
    """alpha/r of the module ``name``, or alpha/√r with rank-stabilized LoRA (arXiv 2312.03732)."""
    r = matching.pattern_value(config.rank_pattern, name, config.r)
    alpha = matching.pattern_value(config.alpha_pattern, name, config.lora_alpha)
    return alpha / math.sqrt(r) if config.use_rslora else alpha / r


def token_indices(config: LoraConfig, name: str) -> Sequence[int]:
    """The trained rows of the embedding ``name`` (``trainable_token_indices``)."""
    wanted = config.trainable_token_indices or ()
    if isinstance(wanted, Mapping):
        return next((rows for end, rows in wanted.items() if matching.matches(name, (end,))), ())
    return wanted if name.rpartition(".")[2] in INPUT_EMBEDDINGS else ()


def has_token_rows(leaf: paths.Leaf) -> bool:
    """Whether a leaf is an embedding or an output head, with a row or column for each token."""
    is_head = leaf.kind == "kernel" and leaf.module().rpartition(".")[2] in paths.OUTPUT_HEADS
    return leaf.stack is None and (leaf.kind == "embedding" or is_head)
