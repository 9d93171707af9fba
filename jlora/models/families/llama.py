"""llama and mistral (arXiv 2302.13971, 2310.06825): pre-norm blocks of rotary attention and MLP."""

from __future__ import annotations

from jlora.models.config import DecoderConfig, decoder_config, is_sliding
from jlora.models.config_reader import ConfigReader
from jlora.models.family import Family

LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "norm_eps": 1e-6,
    "eos_token_id": 2,
}
"""Defaults of transformers' LlamaConfig, most of which other families share."""

RMS = {"norm_eps": "rms_norm_eps"}


def _llama(keys: ConfigReader) -> DecoderConfig:
    keys = keys.of(names=RMS, **LLAMA)
    bias = keys.flag("attention_bias")
    return decoder_config(keys, qkv_bias=bias, out_bias=bias, mlp_bias=keys.flag("mlp_bias"))


def _mistral(keys: ConfigReader) -> DecoderConfig:
    keys = keys.of(
        names=RMS,
        **LLAMA
        | {
            "num_key_value_heads": 8,
            "intermediate_size": 14336,
            "max_position_embeddings": 4096 * 32,
            "sliding_window": 4096,
        },
    )
    window = keys.optional("sliding_window")
    # transformers warns of such files, and ignores the pattern: alternating layers are Ministral's.
    if any(slides != bool(window) for slides in is_sliding(keys, lambda _: bool(window))):
        raise keys.fail("layer_types", "a pattern of layer types is not supported for mistral")
    return decoder_config(keys, windows=window)


FAMILIES = {
    "llama": Family(read=_llama, architecture="LlamaForCausalLM"),
    "mistral": Family(read=_mistral, architecture="MistralForCausalLM"),
}
