"""Model configurations: what a decoder needs to know of a transformers ``config.json``.

``parse`` reads the dict of a ``config.json`` into a small frozen dataclass. Defaults and meaning
are those of the transformers configuration class of the same ``model_type``. A switch that changes
the computation and is not implemented is a ConfigError naming its key; keys that the model of that
type does not read are kept, unread, in ``hf``. Dropout of the base model (``*_pdrop``,
``attention_dropout``) is never applied: the base computes in evaluation mode also in training.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

from jlora.errors import ConfigError, did_you_mean
from jlora.models.keys import Keys
from jlora.models.rope import Rope, parse_rope

ACTIVATIONS = (
    "silu",
    "swish",
    "relu",
    "gelu",
    "gelu_new",
    "gelu_fast",
    "gelu_pytorch_tanh",
    "quick_gelu",
)
"""Values of ``hidden_act`` / ``activation_function`` that ``layers.activation`` knows."""


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """What every family has. Hashable, so that a model can be closed over by ``jax.jit``."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str
    norm_eps: float
    max_position_embeddings: int
    initializer_range: float
    tie_word_embeddings: bool
    windows: tuple[int | None, ...]
    """Per layer: how many tokens back, itself included, a token sees; None is all of them."""
    scales: tuple[float, ...]
    """Per layer: the factor on query-key products."""
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    hf_json: str = dataclasses.field(repr=False)
    """The ``config.json`` this came from, as sorted JSON."""

    @property
    def hf(self) -> dict[str, Any]:
        """The ``config.json`` this came from, as a fresh dict."""
        return json.loads(self.hf_json)

    @property
    def prequantized(self) -> bool:
        """Whether the folder's weights are packed (``quantization_config``)."""
        return self.hf.get("quantization_config") is not None

    @property
    def position_limit(self) -> int | None:
        """Positions that exist at all; None where any may be computed (rotary embeddings)."""
        return None


@dataclasses.dataclass(frozen=True)
class LlamaConfig(DecoderConfig):
    """llama, mistral, qwen2, qwen3: one decoder with small differences."""

    rope: Rope
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMSNorm over each head's query and key before the rotation."""


@dataclasses.dataclass(frozen=True)
class GPT2Config(DecoderConfig):
    """gpt2: learned positions, LayerNorm, fused query-key-value projection."""

    @property
    def position_limit(self) -> int:
        """See DecoderConfig."""
        return self.max_position_embeddings


def parse(hf: Mapping[str, Any], *, where: str = "config.json") -> DecoderConfig:
    """The configuration in a ``config.json``'s dict.

    Raises ConfigError for an unknown ``model_type``, a missing or malformed value and every switch
    that is not supported; ``where`` is the place that errors name.
    """
    model_type = hf.get("model_type")
    if not isinstance(model_type, str) or model_type not in PARSERS:
        remote = " (auto_map points to code of its own, which jlora never runs)"
        raise ConfigError(
            f"model_type {model_type!r} is not supported{remote if 'auto_map' in hf else ''}",
            where=f"{where}: model_type",
            fix=did_you_mean(str(model_type), PARSERS) or f"supported: {', '.join(PARSERS)}",
        )
    keys = Keys(hf, where)
    _check_quantized(keys)
    keys.only("is_encoder_decoder", False)
    keys.only("add_cross_attention", False)
    return PARSERS[model_type](keys)


def _check_quantized(keys: Keys) -> None:
    """ConfigError for weights that another library than bitsandbytes has quantized."""
    how = keys.hf.get("quantization_config")
    if how is None:
        return
    how = how if isinstance(how, dict) else {}
    old = how.get("load_in_4bit") or how.get("load_in_8bit")  # from before the key below
    method = how.get("quant_method", "bitsandbytes" if old else None)
    if method != "bitsandbytes":
        raise keys.fail(
            "quantization_config",
            f"the weights are already quantized, by {method!r}; only bitsandbytes is supported",
            "name the model in 16 bits, and quantize it here with the section quantization",
        )


def _common(keys: Keys) -> dict[str, Any]:
    """The fields that have one name in all families but GPT-2."""
    hidden, heads = keys.number("hidden_size", 4096), keys.number("num_attention_heads", 32)
    return {
        "model_type": keys.hf["model_type"],
        "vocab_size": keys.number("vocab_size", 32000),
        "hidden_size": hidden,
        "num_hidden_layers": keys.number("num_hidden_layers", 32),
        "num_attention_heads": heads,
        "hidden_act": keys.choice("hidden_act", "silu", ACTIVATIONS),
        "norm_eps": keys.number("rms_norm_eps", 1e-6, float),
        "initializer_range": keys.number("initializer_range", 0.02, float),
        "tie_word_embeddings": keys.flag("tie_word_embeddings", False),
        "bos_token_id": keys.token("bos_token_id"),
        "hf_json": json.dumps(dict(keys.hf), sort_keys=True),
    }


def _llama_like(keys: Keys, windows: tuple, **defaults: Any) -> LlamaConfig:
    common = _common(keys)
    hidden, heads = common["hidden_size"], common["num_attention_heads"]
    if keys.hf.get("head_dim") is None and "head_dim" not in defaults and hidden % heads:
        raise keys.fail("hidden_size", f"{hidden} is not a multiple of {heads} attention heads")
    head_dim = keys.number("head_dim", defaults.pop("head_dim", hidden // heads))
    kv_heads = keys.number("num_key_value_heads", defaults.pop("num_key_value_heads", heads))
    if heads % kv_heads:
        raise keys.fail("num_key_value_heads", f"{kv_heads} does not divide {heads} heads")
    positions = keys.number("max_position_embeddings", defaults.pop("max_position_embeddings"))
    return LlamaConfig(
        **common,
        intermediate_size=keys.number("intermediate_size", defaults.pop("intermediate_size")),
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=positions,
        windows=windows,
        scales=(head_dim**-0.5,) * common["num_hidden_layers"],
        eos_token_ids=keys.tokens("eos_token_id", defaults.pop("eos_token_id", None)),
        rope=parse_rope(keys, head_dim, positions),
        **defaults,
    )


def _llama(keys: Keys) -> LlamaConfig:
    bias = keys.flag("attention_bias", False)
    return _llama_like(
        keys,
        _uniform(keys, None),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=keys.flag("mlp_bias", False),
        intermediate_size=11008,
        max_position_embeddings=2048,
        eos_token_id=2,
    )


def _mistral(keys: Keys) -> LlamaConfig:
    window = keys.hf.get("sliding_window", 4096)
    if window is not None:
        window = keys.number("sliding_window", 4096)
    kind = "sliding_attention" if window else "full_attention"
    if set(_layer_types(keys) or [kind]) != {kind}:
        raise keys.fail("layer_types", "a pattern of layer types is not supported for mistral")
    return _llama_like(
        keys,
        _uniform(keys, window),
        num_key_value_heads=8,
        intermediate_size=14336,
        max_position_embeddings=4096 * 32,
        eos_token_id=2,
    )


def _qwen2(keys: Keys) -> LlamaConfig:
    return _llama_like(
        keys,
        _layer_windows(keys),
        qkv_bias=True,
        num_key_value_heads=32,
        intermediate_size=22016,
        max_position_embeddings=32768,
    )


def _qwen3(keys: Keys) -> LlamaConfig:
    bias = keys.flag("attention_bias", False)
    return _llama_like(
        keys,
        _layer_windows(keys),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
        head_dim=128,
        num_key_value_heads=32,
        intermediate_size=22016,
        max_position_embeddings=32768,
    )


def _uniform(keys: Keys, window: int | None) -> tuple[int | None, ...]:
    return (window,) * keys.number("num_hidden_layers", 32)


def _layer_windows(keys: Keys) -> tuple[int | None, ...]:
    """Qwen's rule: ``layer_types``, else the layers from ``max_window_layers`` on slide."""
    layers = keys.number("num_hidden_layers", 32)
    window = None
    if keys.flag("use_sliding_window", False) and keys.hf.get("sliding_window", 4096) is not None:
        window = keys.number("sliding_window", 4096)
    types = _layer_types(keys)
    if types is None:
        first = keys.hf.get("max_window_layers", 28)
        if type(first) is not int:
            raise keys.fail("max_window_layers", f"must be int, not {first!r}")
        return tuple(window if i >= first else None for i in range(layers))
    if len(types) != layers:
        raise keys.fail("layer_types", f"has {len(types)} entries for {layers} layers")
    if window is None and "sliding_attention" in types:
        raise keys.fail("layer_types", "sliding_attention without use_sliding_window")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _layer_types(keys: Keys) -> list[str] | None:
    types = keys.hf.get("layer_types")
    if types is not None and not isinstance(types, list):
        raise keys.fail("layer_types", f"must be a list, not {types!r}")
    for kind in types or ():
        if kind not in ("full_attention", "sliding_attention"):
            raise keys.fail("layer_types", f"{kind!r} is not supported")
    return types


def _gpt2(keys: Keys) -> GPT2Config:
    hidden, heads = keys.number("n_embd", 768), keys.number("n_head", 12)
    layers = keys.number("n_layer", 12)
    if hidden % heads:
        raise keys.fail("n_embd", f"{hidden} is not a multiple of {heads} heads")
    scale = (hidden // heads) ** -0.5 if keys.flag("scale_attn_weights", True) else 1.0
    inverse = keys.flag("scale_attn_by_inverse_layer_idx", False)
    return GPT2Config(
        model_type="gpt2",
        vocab_size=keys.number("vocab_size", 50257),
        hidden_size=hidden,
        intermediate_size=keys.number("n_inner", 4 * hidden),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=hidden // heads,
        hidden_act=keys.choice("activation_function", "gelu_new", ACTIVATIONS),
        norm_eps=keys.number("layer_norm_epsilon", 1e-5, float),
        max_position_embeddings=keys.number("n_positions", 1024),
        initializer_range=keys.number("initializer_range", 0.02, float),
        tie_word_embeddings=keys.flag("tie_word_embeddings", True),
        windows=(None,) * layers,
        scales=tuple(scale / (i + 1) if inverse else scale for i in range(layers)),
        eos_token_ids=keys.tokens("eos_token_id", 50256),
        bos_token_id=keys.token("bos_token_id"),
        hf_json=json.dumps(dict(keys.hf), sort_keys=True),
    )


PARSERS: dict[str, Callable[[Keys], DecoderConfig]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gpt2": _gpt2,
}
"""``model_type`` → the function that reads its ``config.json``."""
