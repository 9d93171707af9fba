"""opt (arXiv 2205.01068): learned positions from row 2 on, LayerNorm, ReLU.

Only the 350M model is post-norm and has embeddings narrower than its hidden size.
"""

from __future__ import annotations

from jlora.models.config import DecoderConfig, decoder_config
from jlora.models.config_reader import ConfigReader
from jlora.models.family import Family

OPT = {
    "vocab_size": 50272,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "relu",
    "max_position_embeddings": 2048,
    "norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 2,
}
KEYS = {
    "num_key_value_heads": "",
    "head_dim": "",
    "intermediate_size": "ffn_dim",
    "hidden_act": "activation_function",
    "initializer_range": "init_std",
}


def _opt(keys: ConfigReader) -> DecoderConfig:
    keys = keys.of(names=KEYS, **OPT)
    keys.only("layer_norm_elementwise_affine", True)
    first, bias = keys.flag("do_layer_norm_before", True), keys.flag("enable_bias", True)
    width = keys.number("word_embed_proj_dim", keys.number("hidden_size"))
    return decoder_config(
        keys,
        rope=lambda *_: None,
        norm="layer",
        norm_after_sum=not first,
        final_norm=first and not keys.flag("_remove_final_layer_norm"),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        mlp="plain",
        # transformers' table keeps fairseq's two rows before position 0 (its padding index is 1).
        learned_positions=2,
        projected_embedding=width if width != keys.number("hidden_size") else None,
    )


FAMILIES = {
    "opt": Family(
        read=_opt,
        architecture="OPTForCausalLM",
        names={
            "model": "model.decoder",
            "norm": "final_layer_norm",
            "o_proj": "out_proj",
            "mlp": "",
            "up_proj": "fc1",
            "down_proj": "fc2",
            "input_layernorm": "self_attn_layer_norm",
            "post_attention_layernorm": "final_layer_norm",
        },
    ),
}
