"""Adapters computed from other adapters or from two models, without training.

``add_weighted_adapter`` combines several adapters into one (PEFT's combination types),
``reduce_rank`` truncates an adapter, and ``extract_adapter`` approximates the difference between a
base model and a fine-tuned one.
"""

from jlora.lora.combine.extraction import extract_adapter
from jlora.lora.combine.truncation import reduce_rank
from jlora.lora.combine.weighted import add_weighted_adapter

__all__ = ["add_weighted_adapter", "extract_adapter", "reduce_rank"]
