"""mixtral, qwen2_moe and qwen3_moe: Mistral's and Qwen's blocks with experts in place of the MLP.

arXiv 2401.04088, Qwen's blog on Qwen1.5-MoE, and 2505.09388. Files hold one tensor per expert.
"""

from __future__ import annotations

import functools
from typing import Any

from jlora.models.config import DecoderConfig, ExpertsConfig, decoder_config, is_sliding
from jlora.models.config_reader import ConfigReader
from jlora.models.families.llama import LLAMA, RMS
from jlora.models.families.qwen import QWEN
from jlora.models.family import Family, TensorPart
from jlora.models.rope import parse_rope

MIXTRAL = LLAMA | {
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "max_position_embeddings": 4096 * 32,
    "norm_eps": 1e-5,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}

QWEN_MOE = QWEN | {
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "decoder_sparse_step": 1,
}
QWEN2_MOE = QWEN_MOE | {
    "intermediate_size": 5632,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_experts": 60,
    "num_experts_per_tok": 4,
}
QWEN3_MOE = QWEN_MOE | {
    "intermediate_size": 6144,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}


def names(keys: ConfigReader) -> dict[str, str]:
    """The families' names of keys; transformers has two for the number of experts."""
    local = "num_local_experts"
    return {**RMS, "num_experts": local if local in keys.hf else "num_experts"}


def _mixtral(keys: ConfigReader) -> DecoderConfig:
    keys = keys.of(names=names(keys), **MIXTRAL)
    keys.only("router_jitter_noise", 0, why="it is noise that differs in every step")
    experts = ExpertsConfig(
        number=keys.number("num_experts"),
        per_token=per_token(keys),
        intermediate_size=keys.number("intermediate_size"),
        normalized=True,
    )
    rope = functools.partial(parse_rope, theta=1e6)
    return decoder_config(keys, rope=rope, windows=keys.optional("sliding_window"), experts=experts)


def _qwen2_moe(keys: ConfigReader) -> DecoderConfig:
    keys = keys.of(names=RMS, **QWEN2_MOE)
    window = keys.optional("sliding_window") if keys.flag("use_sliding_window") else None
    first_full = keys.number("max_window_layers")
    # Qwen2MoeConfig's rule; Qwen2Config's is the layers from max_window_layers on.
    slides = is_sliding(keys, lambda i: window is not None and i % 2 == 0 and i < first_full)
    if window is None and any(slides):
        raise keys.fail("layer_types", "sliding_attention without use_sliding_window")
    return decoder_config(
        keys,
        windows=[window if sliding else None for sliding in slides],
        qkv_bias=keys.flag("qkv_bias", True),
        **_experts(keys, keys.number("shared_expert_intermediate_size")),
    )


def _qwen3_moe(keys: ConfigReader) -> DecoderConfig:
    keys = keys.of(names=names(keys), **QWEN3_MOE)
    bias = keys.flag("attention_bias")
    return decoder_config(
        keys,
        # Of all layers: unlike Qwen3, transformers' Qwen3Moe ignores max_window_layers.
        windows=keys.optional("sliding_window") if keys.flag("use_sliding_window") else None,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm="head",
        **_experts(keys, None),
    )


def _experts(keys: ConfigReader, shared_size: int | None) -> dict[str, Any]:
    """Qwen's mixture, and the layers without one; nothing if all layers have plain MLPs."""
    layers, step = keys.number("num_hidden_layers"), keys.number("decoder_sparse_step")
    plain = keys.get("mlp_only_layers") or []
    if not isinstance(plain, list) or any(type(layer) is not int for layer in plain):
        raise keys.fail("mlp_only_layers", f"must be a list of layers, not {plain!r}")
    mlp_only = tuple(i for i in range(layers) if i in plain or (i + 1) % step)
    if len(mlp_only) == layers:
        return {}
    experts = ExpertsConfig(
        number=keys.number("num_experts"),
        per_token=per_token(keys),
        intermediate_size=keys.number("moe_intermediate_size"),
        normalized=keys.flag("norm_topk_prob"),
        shared_size=shared_size,
    )
    return {"experts": experts, "mlp_only_layers": mlp_only}


def per_token(keys: ConfigReader) -> int:
    """The number of experts per token."""
    chosen = keys.number("num_experts_per_tok")
    if chosen > keys.number("num_experts"):
        raise keys.fail("num_experts_per_tok", f"{chosen} is more than {keys.name('num_experts')}")
    return chosen


def _expert_tensors(
    module: str, gate: str, up: str, down: str
) -> dict[str, tuple[TensorPart, ...]]:
    """Names of experts stored one by one, with these names of module and matrices."""
    return {
        "mlp.experts.gate_up_proj": (
            TensorPart(f"{module}.experts.{{}}.{gate}.weight", part=0, parts=2),
            TensorPart(f"{module}.experts.{{}}.{up}.weight", part=1, parts=2),
        ),
        "mlp.experts.down_proj": (TensorPart(f"{module}.experts.{{}}.{down}.weight"),),
    }


_QWEN = _expert_tensors("mlp", "gate_proj", "up_proj", "down_proj")

FAMILIES = {
    "mixtral": Family(
        read=_mixtral,
        architecture="MixtralForCausalLM",
        stored={
            "mlp.gate.weight": (TensorPart("block_sparse_moe.gate.weight"),),
            **_expert_tensors("block_sparse_moe", "w1", "w3", "w2"),
        },
    ),
    "qwen2_moe": Family(read=_qwen2_moe, architecture="Qwen2MoeForCausalLM", stored=_QWEN),
    "qwen3_moe": Family(read=_qwen3_moe, architecture="Qwen3MoeForCausalLM", stored=_QWEN),
}
