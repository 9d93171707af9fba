"""LoRA (arXiv 2106.09685) and its variants, as pure functions on trees.

An adapter mirrors the nodes of the parameter tree that it changes::

    params   {"model": {"layers": {"self_attn": {"q_proj": {"kernel": (L, in, out)}, …
    adapter  {"model": {"layers": {"self_attn": {"q_proj": {"lora_A": (L, in, r),
                                                            "lora_B": (L, r, out)}, …

``adapter`` lists the kinds of leaves. ``attach`` wraps the weights with an adapter's factored
deltas, ``detach`` undoes it; ``merge`` adds the dense deltas to the weights, ``unmerge`` subtracts
them. The leaves of ``params`` are arrays, or anything with ``shape``, ``dtype`` and
``dequantize()``.
"""

from jlora.lora.adapter import DELTA, EMBEDDING_DELTA, MAGNITUDE, TOKENS, Adapter, scaling
from jlora.lora.attaching import attach, detach
from jlora.lora.explained_variance import eva
from jlora.lora.init import init_adapter
from jlora.lora.merging import merge, unmerge
from jlora.lora.stack import AdapterStack, stack_adapters
from jlora.lora.weight import LoraWeight, ReplacedEmbedding, TokenWeight

__all__ = [
    "DELTA",
    "EMBEDDING_DELTA",
    "MAGNITUDE",
    "TOKENS",
    "Adapter",
    "AdapterStack",
    "LoraWeight",
    "ReplacedEmbedding",
    "TokenWeight",
    "attach",
    "detach",
    "eva",
    "init_adapter",
    "merge",
    "scaling",
    "stack_adapters",
    "unmerge",
]
