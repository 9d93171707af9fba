"""gpt2 (Radford et al. 2019): learned positions, LayerNorm, a fused query-key-value projection."""

from __future__ import annotations

from jlora.models.config import DecoderConfig, decoder_config
from jlora.models.config_reader import ConfigReader
from jlora.models.family import Family

KEYS = {
    "num_key_value_heads": "",
    "head_dim": "",
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "intermediate_size": "n_inner",
    "hidden_act": "activation_function",
    "norm_eps": "layer_norm_epsilon",
    "max_position_embeddings": "n_positions",
}

GPT2 = {
    "vocab_size": 50257,
    "hidden_size": 768,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "hidden_act": "gelu_new",
    "norm_eps": 1e-5,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "eos_token_id": 50256,
}
"""Defaults of transformers' GPT2Config."""


def _gpt2(keys: ConfigReader) -> DecoderConfig:
    keys = keys.of(names=KEYS, **GPT2)
    hidden, heads = keys.number("hidden_size"), keys.number("num_attention_heads")
    keys = keys.of(names=KEYS, **GPT2, intermediate_size=4 * hidden)
    layers = keys.number("num_hidden_layers")
    scale = (hidden // heads) ** -0.5 if keys.flag("scale_attn_weights", True) else 1.0
    inverse = keys.flag("scale_attn_by_inverse_layer_idx")
    return decoder_config(
        keys,
        rope=lambda *_: None,
        scale=[scale / (i + 1) if inverse else scale for i in range(layers)],
        norm="layer",
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        fused_qkv="parts",
        mlp="plain",
        learned_positions=0,
    )


FAMILIES = {
    "gpt2": Family(
        read=_gpt2,
        architecture="GPT2LMHeadModel",
        names={
            "model": "transformer",
            "embed_tokens": "wte",
            "embed_positions": "wpe",
            "layers": "h",
            "norm": "ln_f",
            "self_attn": "attn",
            "qkv_proj": "c_attn",
            "o_proj": "c_proj",
            "up_proj": "c_fc",
            "down_proj": "c_proj",
            "input_layernorm": "ln_1",
            "post_attention_layernorm": "ln_2",
        },
        transposed=False,
        # Causal masks, which transformers ignores as well.
        buffers=r"(.*\.)?attn\.(masked_)?bias",
    ),
}
