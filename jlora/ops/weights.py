"""What kind a weight is, for code that has to know without multiplying by it.

``dot`` takes every kind of weight, so few callers ask. ``jlora.lora.weight`` has the rest:
``is_weight_leaf`` (to flatten trees), ``base_of`` and ``dense``.
"""

from __future__ import annotations

from typing import Any

from jlora.lora.weight import (
    LoraWeight,
    ReplacedEmbedding,
    Transposed,
    WeightWrapper,
    base_of,
)
from jlora.quant.params import is_quantized

Weight = Any
"""An array (in, out), a quantized array, or a ``WeightWrapper`` (``LoraWeight``, …) on either."""


def has_adapter(weight: Weight) -> bool:
    """Whether an adapter is attached to the weight."""
    return isinstance(weight, WeightWrapper | Transposed)


def has_quantized_base(weight: Weight) -> bool:
    """Whether the weight is quantized, or its base is if an adapter is attached to it."""
    return is_quantized(base_of(weight))


def output_embedding(table: Weight) -> Weight:
    """The embedding as an output head tied to it reads it.

    As in PEFT, LoRA on an embedding and an embedding that is trained in full change the lookup of
    input tokens only; single rows that are trained (``TokenWeight``) are the head's, too.
    """
    return table.base if isinstance(table, LoraWeight | ReplacedEmbedding) else table
