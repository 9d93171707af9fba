"""Model configurations: what the decoder needs to know of a transformers ``config.json``.

``read`` takes from it what all families have, under the names that a family gives it; what sets a
family apart comes from the family's own reader (``families``). Defaults and meaning are those of
the transformers configuration class of the same ``model_type``. A switch that changes the
computation and is not implemented is a ConfigError naming its key; keys that the model of that type
does not read are kept, unread, in ``hf``. Dropout of the base model (``*_pdrop``, ``*_dropout``) is
never applied: the base computes in evaluation mode also in training.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any, Literal

from jlora.models.config_reader import ConfigReader
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
class ExpertsConfig:
    """A sparse mixture of experts and how it routes."""

    number: int
    per_token: int
    intermediate_size: int
    normalized: bool
    """The weights of a token's experts sum to 1; else they are shares among all experts."""
    shared_size: int | None = None
    """The inner width of an expert that all tokens go through, its result gated."""
    clamped_swiglu: tuple[float, float] | None = None
    """gpt-oss's experts: alpha and the limit of their activation."""


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder. Hashable, so that a model can be closed over by ``jax.jit``.

    The first fields every model has; the others are what families differ in, and their defaults
    are Llama's.
    """

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
    ropes: tuple[Rope | None, ...]
    """Per layer: how queries and keys are rotated; None is not at all."""
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    hf_json: str = dataclasses.field(repr=False)
    """The ``config.json`` this came from, as sorted JSON."""

    norm: Literal["rms", "rms_offset", "layer", "layer_no_bias"] = "rms"
    """Which norm; see ``layers.make_norm``."""
    norms: tuple[str, ...] = ("before_attention", "before_mlp")
    """Where a block has norms: before or after attention and MLP."""
    norm_after_sum: bool = False
    """The norms follow the residual sums (OPT-350m), instead of standing before the branches."""
    final_norm: bool = True
    parallel: bool = False
    """Attention and MLP read the same stream; where there is one norm, its output."""
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    fused_qkv: Literal["parts", "heads"] | None = None
    """One projection: all queries, keys and values in turn, or so within every head."""
    mlp: Literal["gated", "fused", "plain"] = "gated"
    """``down(act(gate) * up)`` with two projections or a fused one, or ``down(act(up))``."""
    experts: ExpertsConfig | None = None
    """A sparse mixture in place of the MLP."""
    qk_norm: Literal["head", "each_head", "all"] | None = None
    """A norm of queries and keys before rotation: one scale for a head's features, one for every
    head's own, or one norm over all heads together."""
    qk_norm_kind: Literal["rms", "rms_offset", "layer", "layer_no_bias"] = "rms"
    interleaved_rope: bool = False
    """Rotation turns neighbouring features, not those half a head apart."""
    attention_softcap: float | None = None
    sinks: bool = False
    """Every head has a learned logit that takes part in the softmax and adds nothing."""
    learned_positions: int | None = None
    """Rows in the table of position embeddings before position 0; None is no table."""
    projected_embedding: int | None = None
    """The embedding's width where it is not the stream's."""
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    num_labels: int | None = None
    """A score head of so many classes in place of the language model's head."""

    @property
    def hf(self) -> dict[str, Any]:
        """The ``config.json`` this came from, as a fresh dict."""
        return json.loads(self.hf_json)

    @property
    def quant_method(self) -> str | None:
        """Who packed the folder's weights (``quantization_config``), if they are packed."""
        how = self.hf.get("quantization_config")
        return None if how is None else how.get("quant_method", "bitsandbytes")

    @property
    def prequantized(self) -> bool:
        """Whether the folder's weights are packed and stay so; MXFP4 is read dense."""
        return self.quant_method not in (None, "mxfp4")

    @property
    def position_limit(self) -> int | None:
        """Positions that exist at all; None where any may be computed (rotary embeddings)."""
        return None if self.learned_positions is None else self.max_position_embeddings

    @property
    def num_outputs(self) -> int:
        """The logits of a token: one a class, or one a token of the vocabulary."""
        return self.num_labels or self.vocab_size

    @property
    def id2label(self) -> tuple[str, ...]:
        """The names of a classifier's classes, in order; none of a language model's."""
        names = self.hf.get("id2label")
        names = names if isinstance(names, dict) else {}
        return tuple(str(names.get(str(i), f"LABEL_{i}")) for i in range(self.num_labels or 0))

    @property
    def feature_size(self) -> int:
        """The width of what the head reads."""
        return self.projected_embedding or self.hidden_size


def decoder_config(
    keys: ConfigReader,
    *,
    rope: Callable[[ConfigReader, int, int], Sequence[Rope | None] | Rope | None] = parse_rope,
    windows: Sequence[int | None] | int | None = None,
    scale: Sequence[float] | float | None = None,
    **differences: Any,
) -> DecoderConfig:
    """The configuration in a ``config.json``; ``keys`` know the family's names and defaults.

    Args:
      keys: the file's keys.
      rope: from the keys, the head's size and the number of positions, to what rotates queries and
        keys: in all layers, or in each.
      windows: what layers see: all, or each.
      scale: the factor on query-key products in all layers, or in each; None is
        ``head_dim ** -0.5``.
      differences: other fields of DecoderConfig.
    """
    hidden, heads = keys.number("hidden_size"), keys.number("num_attention_heads")
    layers, positions = keys.number("num_hidden_layers"), keys.number("max_position_embeddings")
    if keys.get("head_dim") is None and hidden % heads:
        raise keys.fail("hidden_size", f"{hidden} is not a multiple of {heads} attention heads")
    head_dim = keys.number("head_dim", hidden // heads)
    kv_heads = keys.number("num_key_value_heads", heads)
    if heads % kv_heads:
        raise keys.fail("num_key_value_heads", f"{kv_heads} does not divide {heads} heads")
    scale = head_dim**-0.5 if scale is None else scale
    return DecoderConfig(
        model_type=keys.hf["model_type"],
        vocab_size=keys.number("vocab_size"),
        hidden_size=hidden,
        intermediate_size=keys.number("intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        hidden_act=keys.choice("hidden_act", options=ACTIVATIONS),
        norm_eps=keys.number("norm_eps", kind=float),
        max_position_embeddings=positions,
        initializer_range=keys.number("initializer_range", 0.02, float),
        tie_word_embeddings=keys.flag("tie_word_embeddings", False),
        windows=_each(windows, layers),
        scales=_each(scale, layers),
        ropes=_each(rope(keys, head_dim, positions), layers),
        eos_token_ids=keys.tokens("eos_token_id"),
        bos_token_id=keys.token("bos_token_id"),
        hf_json=json.dumps(dict(keys.hf), sort_keys=True),
        **differences,
    )


def _each(value: Any, layers: int) -> tuple[Any, ...]:
    """A value per layer."""
    return tuple(value) if isinstance(value, list | tuple) else (value,) * layers


def is_sliding(keys: ConfigReader, otherwise: Callable[[int], bool]) -> list[bool]:
    """Per layer: whether it sees a window; ``layer_types`` says it, else ``otherwise`` does.

    Raises ConfigError for a list of another length and for other types of layers.
    """
    layers, types = keys.number("num_hidden_layers"), keys.get("layer_types")
    if types is None:
        return [otherwise(i) for i in range(layers)]
    if not isinstance(types, list) or len(types) != layers:
        raise keys.fail("layer_types", f"must be a list with {layers} entries, not {types!r}")
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            raise keys.fail("layer_types", f"{kind!r} is not supported")
    return [kind == "sliding_attention" for kind in types]
