"""starcoder2 (arXiv 2402.19173): LayerNorm, biases everywhere, an MLP without gate, a window."""

from __future__ import annotations

from jlora.models.config import DecoderConfig, decoder_config
from jlora.models.config_reader import ConfigReader
from jlora.models.family import Family

STARCODER2 = {
    "vocab_size": 49152,
    "hidden_size": 3072,
    "intermediate_size": 12288,
    "num_hidden_layers": 30,
    "num_attention_heads": 24,
    "num_key_value_heads": 2,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 4096,
    "norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "initializer_range": 0.018042,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
}


def _starcoder2(keys: ConfigReader) -> DecoderConfig:
    keys = keys.of(names={"norm_eps": "norm_epsilon"}, **STARCODER2)
    bias = keys.flag("use_bias", True)
    return decoder_config(
        keys,
        windows=keys.optional("sliding_window"),
        norm="layer",
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        mlp="plain",
    )


FAMILIES = {
    "starcoder2": Family(
        read=_starcoder2,
        architecture="Starcoder2ForCausalLM",
        names={"up_proj": "c_fc", "down_proj": "c_proj"},
    ),
}
