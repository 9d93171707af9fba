"""stablelm (arXiv 2402.17834): LayerNorm, quarter-rotary heads, optional parallel branches."""

from __future__ import annotations

import functools

from jlora.models.config import DecoderConfig, decoder_config
from jlora.models.config_reader import ConfigReader
from jlora.models.families.llama import LLAMA
from jlora.models.family import Family, TensorPart
from jlora.models.rope import parse_rope

STABLELM = LLAMA | {
    "vocab_size": 50304,
    "hidden_size": 2560,
    "intermediate_size": 6912,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def _stablelm(keys: ConfigReader) -> DecoderConfig:
    keys = keys.of(names={"norm_eps": "layer_norm_eps", "head_dim": ""}, **STABLELM)
    parallel = keys.flag("use_parallel_residual")
    return decoder_config(
        keys,
        rope=functools.partial(parse_rope, partial=0.25),
        norm="layer",
        norms=("before_attention",) if parallel else ("before_attention", "before_mlp"),
        parallel=parallel,
        qkv_bias=keys.flag("use_qkv_bias"),
        qk_norm="each_head" if keys.flag("qk_layernorm") else None,
        qk_norm_kind="layer_no_bias",
    )


FAMILIES = {
    "stablelm": Family(
        read=_stablelm,
        architecture="StableLmForCausalLM",
        names={"q_norm": "q_layernorm", "k_norm": "k_layernorm"},
        stored={
            "q_layernorm.scale": (TensorPart("self_attn.q_layernorm.norms.{}.weight"),),
            "k_layernorm.scale": (TensorPart("self_attn.k_layernorm.norms.{}.weight"),),
        },
    ),
}
