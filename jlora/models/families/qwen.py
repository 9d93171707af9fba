"""qwen2 and qwen3 (arXiv 2407.10671, 2505.09388): Llama's block with biases, or with q/k norms."""

from __future__ import annotations

from jlora.models.config import DecoderConfig, decoder_config, is_sliding
from jlora.models.config_reader import ConfigReader
from jlora.models.families.llama import LLAMA, RMS
from jlora.models.family import Family

QWEN = LLAMA | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "eos_token_id": None,
}


def _qwen2(keys: ConfigReader) -> DecoderConfig:
    keys = keys.of(names=RMS, **QWEN)
    return decoder_config(keys, windows=_windows(keys), qkv_bias=True)


def _qwen3(keys: ConfigReader) -> DecoderConfig:
    keys = keys.of(names=RMS, **QWEN | {"head_dim": 128})
    bias = keys.flag("attention_bias")
    return decoder_config(
        keys, windows=_windows(keys), qkv_bias=bias, out_bias=bias, qk_norm="head"
    )


def _windows(keys: ConfigReader) -> list[int | None]:
    """Per layer: the window, by ``layer_types`` or from layer ``max_window_layers`` on."""
    window = keys.optional("sliding_window") if keys.flag("use_sliding_window") else None
    # Not `number`, which refuses 0: windows from the first layer on.
    first = keys.get("max_window_layers")
    if type(first) is not int:
        raise keys.fail("max_window_layers", f"must be int, not {first!r}")
    slides = is_sliding(keys, lambda i: window is not None and i >= first)
    if window is None and any(slides):
        raise keys.fail("layer_types", "sliding_attention without use_sliding_window")
    return [window if sliding else None for sliding in slides]


FAMILIES = {
    "qwen2": Family(read=_qwen2, architecture="Qwen2ForCausalLM"),
    "qwen3": Family(read=_qwen3, architecture="Qwen3ForCausalLM"),
}
