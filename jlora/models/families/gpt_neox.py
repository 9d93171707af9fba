"""gpt_neox (arXiv 2204.06745; Pythia): parallel attention and MLP, QKV projection by head."""

from __future__ import annotations

import functools

from jlora.models.config import DecoderConfig, decoder_config
from jlora.models.config_reader import ConfigReader
from jlora.models.family import Family, TensorPart
from jlora.models.rope import parse_rope

GPT_NEOX = {
    "vocab_size": 50432,
    "hidden_size": 6144,
    "intermediate_size": 24576,
    "num_hidden_layers": 44,
    "num_attention_heads": 64,
    "hidden_act": "gelu",
    "max_position_embeddings": 2048,
    "norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
KEYS = {
    "num_key_value_heads": "",
    "head_dim": "",
    "norm_eps": "layer_norm_eps",
    "rope_theta": "rotary_emb_base",
    "partial_rotary_factor": "rotary_pct",
}


def _gpt_neox(keys: ConfigReader) -> DecoderConfig:
    keys = keys.of(names=KEYS, **GPT_NEOX)
    bias = keys.flag("attention_bias", True)
    return decoder_config(
        keys,
        rope=functools.partial(parse_rope, partial=0.25),
        norm="layer",
        parallel=keys.flag("use_parallel_residual", True),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=True,
        fused_qkv="heads",
        mlp="plain",
    )


FAMILIES = {
    "gpt_neox": Family(
        read=_gpt_neox,
        architecture="GPTNeoXForCausalLM",
        names={
            "model": "gpt_neox",
            "embed_tokens": "embed_in",
            "norm": "final_layer_norm",
            "self_attn": "attention",
            "qkv_proj": "query_key_value",
            "o_proj": "dense",
            "up_proj": "dense_h_to_4h",
            "down_proj": "dense_4h_to_h",
        },
        stored={"lm_head.kernel": (TensorPart("embed_out.weight"),)},
        # The causal masks are in older files only; transformers ignores them as well.
        buffers=r"(.*\.)?(attention\.(masked_)?bias|rotary_emb\.inv_freq)",
    ),
}
