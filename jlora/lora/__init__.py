"""LoRA as pure transforms of trees (arXiv 2106.09685), and what has grown from it.

An adapter mirrors the nodes of the parameter tree it changes::

    params   {"model": {"layers": {"self_attn": {"q_proj": {"kernel": (L, in, out)}, …
    adapter  {"model": {"layers": {"self_attn": {"q_proj": {"lora_A": (L, in, r),
                                                            "lora_B": (L, r, out)}, …

See ``adapter`` for the leaves there are. ``attach`` puts an adapter on the weights, ``detach``
takes it off; ``merge`` folds it into them, ``unmerge`` takes it out again. What ``params`` is made
of does not matter: arrays, or anything with ``shape``, ``dtype`` and ``dequantize()``.
"""

from jlora.lora.adapter import DELTA, EMBEDDING_DELTA, MAGNITUDE, TOKENS, Adapter, scaling
from jlora.lora.attaching import attach, detach
from jlora.lora.explained_variance import eva
from jlora.lora.init import init_adapter
from jlora.lora.merging import merge, unmerge
from jlora.lora.stack import AdapterStack, stack_adapters
from jlora.lora.terms import combine
from jlora.lora.weight import LoraWeight, TokenWeight

__all__ = [
    "DELTA",
    "EMBEDDING_DELTA",
    "MAGNITUDE",
    "TOKENS",
    "Adapter",
    "AdapterStack",
    "LoraWeight",
    "TokenWeight",
    "attach",
    "combine",
    "detach",
    "eva",
    "init_adapter",
    "merge",
    "scaling",
    "stack_adapters",
    "unmerge",
]
