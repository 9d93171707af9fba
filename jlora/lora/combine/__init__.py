"""Adapters made from adapters, or from two full models: pure functions, nothing is trained.

``add_weighted_adapter`` combines several into one in all of PEFT's ways, ``reduce_rank`` makes one
smaller, ``extract_adapter`` finds the one that leads from a model to its fine-tuned successor.
"""

from jlora.lora.combine.extraction import extract_adapter
from jlora.lora.combine.truncation import reduce_rank
from jlora.lora.combine.weighted import add_weighted_adapter

__all__ = ["add_weighted_adapter", "extract_adapter", "reduce_rank"]
