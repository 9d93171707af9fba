"""gpt_oss (arXiv 2508.10925): attention sinks, alternating windows, clamped experts with biases."""

from __future__ import annotations

from jlora.models.config import DecoderConfig, ExpertsConfig, decoder_config, is_sliding
from jlora.models.config_reader import ConfigReader
from jlora.models.families.moe import names, per_token
from jlora.models.family import Family
from jlora.models.rope import Rope, parse_rope

GPT_OSS = {
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "norm_eps": 1e-5,
    "sliding_window": 128,
    "num_experts": 128,
    "num_experts_per_tok": 4,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
}
"""Defaults of transformers' GptOssConfig."""

YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _gpt_oss(keys: ConfigReader) -> DecoderConfig:
    keys = keys.of(names=names(keys), **GPT_OSS)
    slides = is_sliding(keys, lambda i: i % 2 == 0)
    window = keys.number("sliding_window") if any(slides) else None
    bias = keys.flag("attention_bias", True)
    experts = ExpertsConfig(
        number=keys.number("num_experts"),
        per_token=per_token(keys),
        intermediate_size=keys.number("intermediate_size"),
        normalized=True,
        clamped_swiglu=(
            keys.number("swiglu_alpha", kind=float),
            keys.number("swiglu_limit", kind=float),
        ),
    )
    return decoder_config(
        keys,
        rope=_rope,
        windows=[window if sliding else None for sliding in slides],
        qkv_bias=bias,
        out_bias=bias,
        sinks=True,
        experts=experts,
    )


def _rope(keys: ConfigReader, head_dim: int, positions: int) -> Rope:
    if not keys.hf.get("rope_parameters") and not keys.hf.get("rope_scaling"):
        # GptOssConfig's default is YaRN, not plain rope.
        keys = ConfigReader({**keys.hf, "rope_parameters": YARN}, keys.where)
    return parse_rope(keys, head_dim, positions, theta=150000.0)


FAMILIES = {
    "gpt_oss": Family(
        read=_gpt_oss,
        architecture="GptOssForCausalLM",
        names={"gate": "router"},
        # [in, out] in its files. In that layout, sharded by name on a 2 × 2 × 2 mesh, logits were
        # wrong: a bug in XLA's partitioner, it seems.
        flipped=("gate_up_proj", "down_proj"),
        quant_methods=("bitsandbytes", "mxfp4"),
    ),
}
