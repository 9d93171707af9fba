"""Families: which module computes a model, and how its weights lie in a safetensors file."""

from __future__ import annotations

import dataclasses
from typing import Any

from jlora.models.config import DecoderConfig, GPT2Config, LlamaConfig
from jlora.models.gpt2 import GPT2
from jlora.models.llama import Llama


@dataclasses.dataclass(frozen=True)
class Family:
    """What is the same for all models of one configuration class.

    ``module`` is built as ``module(config, dtype)``. ``trunk`` is the node that transformers calls
    the base model: checkpoints of the base model alone lack this prefix. ``embedding`` is the node
    whose table a tied head shares. ``transposed`` says that linear weights lie [out, in] on disk
    (torch's Linear), not [in, out] (Conv1D). Tensors whose whole name matches ``buffers`` are
    constants that some checkpoints store.
    """

    module: Any
    trunk: str
    embedding: str
    transposed: bool
    buffers: str


FAMILIES: dict[type[DecoderConfig], Family] = {
    LlamaConfig: Family(
        module=Llama,
        trunk="model",
        embedding="model.embed_tokens",
        transposed=True,
        buffers=r"(.*\.)?rotary_emb\.inv_freq",
    ),
    GPT2Config: Family(
        module=GPT2,
        trunk="transformer",
        embedding="transformer.wte",
        transposed=False,
        buffers=r"(.*\.)?attn\.(masked_)?bias",
    ),
}


def family(config: DecoderConfig) -> Family:
    """The family of a configuration."""
    return FAMILIES[type(config)]


def module_of(config: DecoderConfig) -> Any:
    """The NNX module class of a configuration."""
    return family(config).module
