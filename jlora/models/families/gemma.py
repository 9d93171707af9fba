"""gemma, gemma2 and gemma3_text (arXiv 2403.08295, 2408.00118, 2503.19786).

Embeddings are scaled by √D and norms by 1 + scale. The later two have norms before and after
attention and MLP, and alternate layers with and without an attention window.
"""

from __future__ import annotations

import dataclasses
import functools

from jlora.models.config import DecoderConfig, decoder_config, is_sliding
from jlora.models.config_reader import ConfigReader
from jlora.models.families.llama import RMS
from jlora.models.family import Family
from jlora.models.rope import parse_rope

GEMMA = {
    "vocab_size": 256000,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
"""Defaults common to the three."""

GEMMA2 = GEMMA | {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
GEMMA3 = GEMMA2 | {"vocab_size": 262208, "max_position_embeddings": 131072}
TANH = "gelu_pytorch_tanh"


def _gemma(keys: ConfigReader) -> DecoderConfig:
    keys = keys.of(
        names=RMS,
        **GEMMA,
        hidden_size=3072,
        intermediate_size=24576,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=16,
    )
    config = _gemma_config(keys)
    # Early releases say "gelu" and mean its tanh approximation; transformers does the same.
    return dataclasses.replace(config, hidden_act=TANH) if config.hidden_act == "gelu" else config


def _gemma2(keys: ConfigReader) -> DecoderConfig:
    keys = keys.of(
        names=RMS | {"hidden_act": "hidden_activation"},
        **GEMMA2,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
    )
    return _with_four_norms(keys, is_sliding(keys, lambda i: i % 2 == 0))


def _gemma3(keys: ConfigReader) -> DecoderConfig:
    keys = keys.of(names=RMS | {"hidden_act": "hidden_activation"}, **GEMMA3)
    period = keys.number("sliding_window_pattern", 6)
    slides = is_sliding(keys, lambda i: (i + 1) % period != 0)

    def rope(keys: ConfigReader, head_dim: int, positions: int) -> list:
        read_rope = functools.partial(parse_rope, keys, head_dim, positions)
        local_rope = read_rope(layer_type="sliding_attention", theta=10_000.0)
        global_rope = read_rope(layer_type="full_attention", theta=1_000_000.0)
        return [local_rope if sliding else global_rope for sliding in slides]

    return _with_four_norms(keys, slides, rope=rope, qk_norm="head", qk_norm_kind="rms_offset")


def _with_four_norms(keys: ConfigReader, slides: list[bool], **differences) -> DecoderConfig:
    window = keys.number("sliding_window") if any(slides) else None
    return _gemma_config(
        keys,
        windows=[window if sliding else None for sliding in slides],
        scale=keys.number("query_pre_attn_scalar", kind=float) ** -0.5,
        norms=("before_attention", "after_attention", "before_mlp", "after_mlp"),
        attention_softcap=keys.optional("attn_logit_softcapping", float),
        logit_softcap=keys.optional("final_logit_softcapping", float),
        **differences,
    )


def _gemma_config(keys: ConfigReader, **differences) -> DecoderConfig:
    keys.only("use_bidirectional_attention", False)
    bias = keys.flag("attention_bias")
    return decoder_config(
        keys,
        norm="rms_offset",
        qkv_bias=bias,
        out_bias=bias,
        # `_scaled` rounds it to the compute dtype as transformers does: √3072 is 55.5 in bfloat16.
        embedding_scale=keys.number("hidden_size") ** 0.5,
        **differences,
    )


NAMES = {
    "attention_out_norm": "post_attention_layernorm",
    "post_attention_layernorm": "pre_feedforward_layernorm",
    "mlp_out_norm": "post_feedforward_layernorm",
}

FAMILIES = {
    "gemma": Family(read=_gemma, architecture="GemmaForCausalLM"),
    "gemma2": Family(read=_gemma2, architecture="Gemma2ForCausalLM", names=NAMES),
    "gemma3_text": Family(
        read=_gemma3,
        architecture="Gemma3ForCausalLM",
        scored="Gemma3TextForSequenceClassification",
        names=NAMES,
    ),
}
