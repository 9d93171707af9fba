"""Families by ``model_type``, and the configuration that a ``config.json`` describes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jlora.errors import ConfigError, did_you_mean
from jlora.models.config import DecoderConfig
from jlora.models.families import (
    cohere2,
    gemma,
    gpt2,
    gpt_neox,
    gpt_oss,
    granite,
    llama,
    mixture,
    olmo2,
    opt,
    phi,
    qwen,
    smollm3,
    stablelm,
    starcoder2,
)
from jlora.models.family import Family
from jlora.models.keys import Keys

FAMILIES: dict[str, Family] = {
    **llama.FAMILIES,
    **qwen.FAMILIES,
    **gemma.FAMILIES,
    **phi.FAMILIES,
    **gpt2.FAMILIES,
    **gpt_neox.FAMILIES,
    **opt.FAMILIES,
    **starcoder2.FAMILIES,
    **olmo2.FAMILIES,
    **smollm3.FAMILIES,
    **stablelm.FAMILIES,
    **granite.FAMILIES,
    **cohere2.FAMILIES,
    **mixture.FAMILIES,
    **gpt_oss.FAMILIES,
}


def family(config: DecoderConfig) -> Family:
    """The family of a configuration."""
    return FAMILIES[config.model_type]


def parse(hf: Mapping[str, Any], *, where: str = "config.json") -> DecoderConfig:
    """The configuration in a ``config.json``'s dict.

    Raises ConfigError for an unknown ``model_type``, a missing or malformed value and every switch
    that is not supported; ``where`` is the place that errors name.
    """
    model_type = hf.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        remote = " (auto_map points to code of its own, which jlora never runs)"
        raise ConfigError(
            f"model_type {model_type!r} is not supported{remote if 'auto_map' in hf else ''}",
            where=f"{where}: model_type",
            fix=did_you_mean(str(model_type), FAMILIES) or f"supported: {', '.join(FAMILIES)}",
        )
    keys = Keys(hf, where)
    _check_quantized(keys, FAMILIES[model_type])
    keys.only("is_encoder_decoder", False)
    keys.only("add_cross_attention", False)
    return FAMILIES[model_type].read(keys)


def _check_quantized(keys: Keys, own: Family) -> None:
    """ConfigError for weights that are packed in a way that is not read."""
    how = keys.hf.get("quantization_config")
    if how is None:
        return
    how = how if isinstance(how, dict) else {}
    old = how.get("load_in_4bit") or how.get("load_in_8bit")  # from before the key below
    method = how.get("quant_method", "bitsandbytes" if old else None)
    if method not in own.quant_methods:
        raise keys.fail(
            "quantization_config",
            f"the weights are already quantized, by {method!r}; only "
            f"{' and '.join(own.quant_methods)} is supported for {keys.hf['model_type']}",
            "name the model in 16 bits, and quantize it here with the section quantization",
        )
