"""cohere and cohere2 (Command R; arXiv 2504.00698): parallel attention and MLP after one LayerNorm.

The norm has no bias, and rope rotates neighbouring features. In cohere2 only layers with an
attention window have rope; the others have no position embedding (NoPE).
"""

from __future__ import annotations

import functools
from typing import Any

from jlora.models.config import DecoderConfig, decoder_config, is_sliding
from jlora.models.config_reader import ConfigReader
from jlora.models.family import Family
from jlora.models.rope import parse_rope

NAMES = {"norm_eps": "layer_norm_eps"}

COHERE = {
    "vocab_size": 256000,
    "hidden_size": 8192,
    "intermediate_size": 22528,
    "num_hidden_layers": 40,
    "num_attention_heads": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 5,
    "eos_token_id": 255001,
}
"""Defaults common to the two."""


def _cohere(keys: ConfigReader) -> DecoderConfig:
    keys = keys.of(names=NAMES, **COHERE)
    return _parallel(
        keys,
        rope=functools.partial(parse_rope, theta=500_000.0),
        qk_norm="each_head" if keys.flag("use_qk_norm") else None,
        qk_norm_kind="layer_no_bias",
    )


def _cohere2(keys: ConfigReader) -> DecoderConfig:
    # Cohere2Config overwrites the file's head_dim with hidden_size / num_attention_heads.
    keys = keys.of(names=NAMES | {"head_dim": ""}, **COHERE, sliding_window=4096)
    period = keys.number("sliding_window_pattern", 4)
    slides = is_sliding(keys, lambda i: (i + 1) % period != 0)
    window = keys.number("sliding_window") if any(slides) else None

    def rope(keys: ConfigReader, head_dim: int, positions: int) -> list:
        layer_rope = parse_rope(keys, head_dim, positions)
        return [layer_rope if sliding else None for sliding in slides]

    windows = [window if sliding else None for sliding in slides]
    return _parallel(keys, rope=rope, windows=windows)


def _parallel(keys: ConfigReader, **differences: Any) -> DecoderConfig:
    bias = keys.flag("attention_bias")
    return decoder_config(
        keys,
        interleaved_rope=True,
        norm="layer_no_bias",
        norms=("before_attention",),
        parallel=True,
        qkv_bias=bias,
        out_bias=bias,
        logit_scale=keys.number("logit_scale", 0.0625, float),
        **differences,
    )


FAMILIES = {
    "cohere": Family(read=_cohere, architecture="CohereForCausalLM"),
    "cohere2": Family(read=_cohere2, architecture="Cohere2ForCausalLM"),
}
