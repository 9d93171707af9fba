"""phi (arXiv 2309.05463): parallel attention and MLP after one LayerNorm, half-rotary heads.

Also phi3 (arXiv 2404.14219), which is Llama with fused projections.
"""

from __future__ import annotations

import functools

from jlora.models.config import DecoderConfig, decoder_config
from jlora.models.config_reader import ConfigReader
from jlora.models.families.llama import LLAMA, RMS
from jlora.models.family import Family
from jlora.models.rope import parse_rope

PHI = LLAMA | {
    "vocab_size": 51200,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "hidden_act": "gelu_new",
    "norm_eps": 1e-5,
    "bos_token_id": 1,
}
PHI3 = LLAMA | {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 32000,
}


def _phi(keys: ConfigReader) -> DecoderConfig:
    keys = keys.of(names={"norm_eps": "layer_norm_eps"}, **PHI)
    keys.only("tie_word_embeddings", False, why="the head has a bias")
    return decoder_config(
        keys,
        rope=functools.partial(parse_rope, partial=0.5),
        norm="layer",
        norms=("before_attention",),
        parallel=True,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        head_bias=True,
        mlp="plain",
        qk_norm="head" if keys.flag("qk_layernorm") else None,
        qk_norm_kind="layer",
    )


def _phi3(keys: ConfigReader) -> DecoderConfig:
    keys = keys.of(names=RMS, **PHI3)
    for section in ("rope_scaling", "rope_parameters"):
        settings = keys.get(section)
        kind = settings.get("rope_type", settings.get("type")) if type(settings) is dict else None
        # transformers' Phi3Config refuses others, too.
        if kind not in (None, "default", "longrope", "su"):
            raise keys.fail(section, f"rope_type {kind!r} is not supported for phi3")
    return decoder_config(
        keys,
        rope=functools.partial(parse_rope, partial=1.0),
        windows=keys.optional("sliding_window"),
        fused_qkv="parts",
        mlp="fused",
    )


FAMILIES = {
    "phi": Family(
        read=_phi,
        architecture="PhiForCausalLM",
        names={
            "o_proj": "dense",
            "up_proj": "fc1",
            "down_proj": "fc2",
            "norm": "final_layernorm",
            "q_norm": "q_layernorm",
            "k_norm": "k_layernorm",
        },
    ),
    "phi3": Family(read=_phi3, architecture="Phi3ForCausalLM"),
}
