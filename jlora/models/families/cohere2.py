"""cohere2 (arXiv 2504.00698): parallel attention and MLP after one LayerNorm without bias.

Layers with an attention window use rope on neighbouring features; the others have no position
embedding (NoPE).
"""

from __future__ import annotations

from jlora.models.config import DecoderConfig, decoder_config, is_sliding
from jlora.models.config_reader import ConfigReader
from jlora.models.family import Family
from jlora.models.rope import parse_rope

COHERE2 = {
    "vocab_size": 256000,
    "hidden_size": 8192,
    "intermediate_size": 22528,
    "num_hidden_layers": 40,
    "num_attention_heads": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "sliding_window": 4096,
    "bos_token_id": 5,
    "eos_token_id": 255001,
}


def _cohere2(keys: ConfigReader) -> DecoderConfig:
    keys = keys.of(names={"norm_eps": "layer_norm_eps", "head_dim": ""}, **COHERE2)
    period, bias = keys.number("sliding_window_pattern", 4), keys.flag("attention_bias")
    slides = is_sliding(keys, lambda i: (i + 1) % period != 0)
    window = keys.number("sliding_window") if any(slides) else None

    def rope(keys: ConfigReader, head_dim: int, positions: int) -> list:
        layer_rope = parse_rope(keys, head_dim, positions)
        return [layer_rope if sliding else None for sliding in slides]

    return decoder_config(
        keys,
        rope=rope,
        interleaved_rope=True,
        windows=[window if sliding else None for sliding in slides],
        norm="layer_no_bias",
        norms=("before_attention",),
        parallel=True,
        qkv_bias=bias,
        out_bias=bias,
        logit_scale=keys.number("logit_scale", 0.0625, float),
    )


FAMILIES = {"cohere2": Family(read=_cohere2, architecture="Cohere2ForCausalLM")}
