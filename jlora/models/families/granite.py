"""granite (IBM): Llama with a multiplier for embeddings, attention, residuals and logits."""

from __future__ import annotations

from jlora.models.config import DecoderConfig, decoder_config
from jlora.models.config_reader import ConfigReader
from jlora.models.families.llama import LLAMA, RMS
from jlora.models.family import Family


def _granite(keys: ConfigReader) -> DecoderConfig:
    keys = keys.of(names=RMS, **LLAMA, bos_token_id=1)
    bias = keys.flag("attention_bias")
    return decoder_config(
        keys,
        scale=keys.number("attention_multiplier", 1.0, float),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=keys.flag("mlp_bias"),
        embedding_scale=keys.number("embedding_multiplier", 1.0, float),
        residual_scale=keys.number("residual_multiplier", 1.0, float),
        logit_scale=1 / keys.number("logits_scaling", 1.0, float),
    )


FAMILIES = {"granite": Family(read=_granite, architecture="GraniteForCausalLM")}
