"""Parameter groups: weight decay, LoRA+'s learning rates, and the leaves that LoRA-FA freezes.

By the rules of transformers (``get_decay_parameter_names``) and peft
(``create_loraplus_optimizer``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jlora.config import TrainConfig
from jlora.lora import Adapter
from jlora.tree import paths

FROZEN = "frozen"


def lr_multipliers(config: TrainConfig) -> Mapping[str, float]:
    """Prefix of a group's label → the factor of its learning rate.

    With LoRA+ (arXiv 2402.12354) B, biases and other vectors have a higher rate than A and saved
    modules, and A and B of embeddings have another.
    """
    if config.loraplus_lr_ratio is None:
        return {"": 1.0}
    # A rate in PEFT, here a factor, so that the schedule applies to it.
    embedding = config.loraplus_lr_embedding / config.learning_rate
    return {"": 1.0, "B_": config.loraplus_lr_ratio, "embedding_": embedding}


def frozen_kinds(config: TrainConfig) -> tuple[str, ...]:
    """Keys of leaves in a trainable tree that have no gradient and are not updated."""
    return ("lora_A",) if config.lorafa else ()


def is_frozen(path: Any, kinds: Sequence[str]) -> bool:
    """Whether the leaf at a JAX key path has one of these keys, or is in ``Adapter.initial``."""
    names = _names(path)
    return names[-1] in kinds or names[0] == "initial"


def trainable_leaves(config: TrainConfig, trainable: Any) -> list[Any]:
    """The leaves that an optimizer with these settings updates."""
    flat = jax.tree_util.tree_leaves_with_path(trainable)
    return [leaf for path, leaf in flat if not is_frozen(path, frozen_kinds(config))]


def group_labels(config: TrainConfig, trainable: Any) -> Any:
    """The tree with every leaf replaced by the label of its group.

    A label is a key of ``lr_multipliers`` before ``decay`` or ``no_decay``, or ``frozen``.
    With LoRA+::

        {"lora_A": …, "lora_B": …, "bias": …}
        {"lora_A": "decay", "lora_B": "B_decay", "bias": "B_no_decay"}
    """
    inside = int(isinstance(trainable, Adapter))  # skip the field name ``weights`` in its paths
    leaves = paths.leaves(trainable.weights if inside else trainable)
    vectors = {leaf.path for leaf in leaves if len(leaf.shape) == 1}

    def label(path: Any, _: Any) -> str:
        names = _names(path)
        decay = "decay" if _decays(names[-1]) else "no_decay"
        if is_frozen(path, frozen_kinds(config)):
            return FROZEN
        if config.loraplus_lr_ratio is None:
            return decay
        if names[-1].startswith("lora_embedding_"):
            return f"embedding_{decay}"
        return f"B_{decay}" if names[-1] == "lora_B" or names[inside:] in vectors else decay

    return jax.tree_util.tree_map_with_path(label, trainable)


def _decays(name: str) -> bool:
    return "bias" not in name and name != "scale"


def _names(path: Any) -> paths.Path:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
