"""olmo2 (arXiv 2501.00656): norms after attention and MLP, and of all queries and keys together."""

from __future__ import annotations

from jlora.models.config import DecoderConfig, decoder_config
from jlora.models.config_reader import ConfigReader
from jlora.models.families.llama import LLAMA, RMS
from jlora.models.family import Family

OLMO2 = LLAMA | {"vocab_size": 50304, "norm_eps": 1e-5, "eos_token_id": 50279}


def _olmo2(keys: ConfigReader) -> DecoderConfig:
    keys = keys.of(names=RMS, **OLMO2)
    bias = keys.flag("attention_bias")
    return decoder_config(
        keys, qkv_bias=bias, out_bias=bias, qk_norm="all", norms=("after_attention", "after_mlp")
    )


FAMILIES = {
    "olmo2": Family(
        read=_olmo2,
        architecture="Olmo2ForCausalLM",
        names={
            "attention_out_norm": "post_attention_layernorm",
            "mlp_out_norm": "post_feedforward_layernorm",
        },
    ),
}
