"""smollm3 (Hugging Face, 2025): Llama, but every fourth layer has no rope (NoPE)."""

from __future__ import annotations

from jlora.models.config import DecoderConfig, decoder_config, is_sliding
from jlora.models.config_reader import ConfigReader
from jlora.models.families.llama import LLAMA, RMS
from jlora.models.family import Family
from jlora.models.rope import parse_rope

SMOLLM3 = LLAMA | {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}


def _smollm3(keys: ConfigReader) -> DecoderConfig:
    keys = keys.of(names=RMS, **SMOLLM3)
    rotated, bias = _rotated_layers(keys), keys.flag("attention_bias")
    window = keys.optional("sliding_window") if keys.flag("use_sliding_window") else None
    slides = is_sliding(keys, lambda i: window is not None and not rotated[i])

    def rope(keys: ConfigReader, head_dim: int, positions: int) -> list:
        layer_rope = parse_rope(keys, head_dim, positions, theta=2_000_000.0)
        return [layer_rope if uses_rope else None for uses_rope in rotated]

    return decoder_config(
        keys,
        rope=rope,
        windows=[window if sliding else None for sliding in slides],
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=keys.flag("mlp_bias"),
    )


def _rotated_layers(keys: ConfigReader) -> list[bool]:
    """Per layer: whether it has rope; ``no_rope_layers`` is 1 for layers that have it."""
    layers, given = keys.number("num_hidden_layers"), keys.get("no_rope_layers")
    period = keys.number("no_rope_layer_interval", 4)
    if given is None:
        return [(i + 1) % period != 0 for i in range(layers)]
    if not isinstance(given, list) or len(given) != layers or set(given) - {0, 1}:
        raise keys.fail("no_rope_layers", f"must be a list of {layers} zeros and ones")
    return [bool(flag) for flag in given]


FAMILIES = {"smollm3": Family(read=_smollm3, architecture="SmolLM3ForCausalLM")}
