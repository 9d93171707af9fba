"""Model configurations, made from transformers' ``config.json``.

``decoder_config`` reads the keys that all families have; a family's own function (``families``)
reads the rest. Defaults and meaning are those of the transformers configuration class of the same
``model_type``. A setting that changes the computation and is not implemented is a ConfigError
naming its key; keys that are not read stay available in ``hf``. Dropout of the base model
(``*_pdrop``, ``*_dropout``) is never applied: the base is in evaluation mode in training, too.
"""

from __future__ import annotations

import dataclasses
import itertools
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
    """Sizes and routing of a sparse mixture of experts."""

    number: int
    per_token: int
    intermediate_size: int
    normalized: bool
    """Normalise the weights of a token's experts to sum to 1; else: softmax over all experts."""
    shared_size: int | None = None
    """Inner width of a gated expert that processes all tokens, if there is one."""
    clamped_swiglu: tuple[float, float] | None = None
    """gpt-oss: alpha and limit of its experts' activation."""


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Architecture of a decoder; hashable, so that ``jax.jit`` can close over a model.

    Every model sets the fields without a default; the others are differences between families, and
    their defaults are Llama's.
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
    """Per layer: size of the attention window, the token itself included; None is unlimited."""
    scales: tuple[float, ...]
    """Per layer: the factor on attention scores."""
    ropes: tuple[Rope | None, ...]
    """Per layer: the rotary embedding; None for layers without one."""
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    # Text, not a dict, which would not be hashable.
    hf_json: str = dataclasses.field(repr=False)
    """The original ``config.json``, as sorted JSON."""
    generation_json: str = dataclasses.field(default="", repr=False)
    """The text of ``generation_config.json``; empty without one."""

    norm: Literal["rms", "rms_offset", "layer", "layer_no_bias"] = "rms"
    """Kind of norm; see ``layers.make_norm``."""
    norms: tuple[str, ...] = ("before_attention", "before_mlp")
    """Positions of a block's norms: before or after attention and MLP."""
    norm_after_sum: bool = False
    """Post-norm (OPT-350m): norms are applied to the residual sums."""
    final_norm: bool = True
    parallel: bool = False
    """Attention and MLP have the same input; with a single norm, that norm's output."""
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    fused_qkv: Literal["parts", "heads"] | None = None
    """Fused projection: [queries, keys, values], or interleaved head by head; None: separate."""
    mlp: Literal["gated", "fused", "plain"] = "gated"
    """``down(act(gate) * up)`` with separate or fused projections, or ``down(act(up))``."""
    experts: ExpertsConfig | None = None
    """A sparse mixture of experts in place of the MLP."""
    mlp_only_layers: tuple[int, ...] = ()
    """With ``experts``: the layers that have an MLP all the same."""
    unquantized: tuple[frozenset[str], ...] = ()
    """Per layer: the matrices that are not quantized though others are; () if all layers agree."""
    qk_norm: Literal["head", "each_head", "all"] | None = None
    """Norm of queries and keys before rotation: per head with one scale, per head with separate
    scales, or over all heads together."""
    qk_norm_kind: Literal["rms", "rms_offset", "layer", "layer_no_bias"] = "rms"
    interleaved_rope: bool = False
    """Rotary pairs are neighbouring features; else they are half a head apart."""
    attention_softcap: float | None = None
    sinks: bool = False
    """Attention sinks: a learned logit per head that takes part in the softmax without a value."""
    learned_positions: int | None = None
    """Learned position embeddings: rows of the table before position 0; None: no table."""
    projected_embedding: int | None = None
    """Width of the embedding, if it differs from ``hidden_size``."""
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    untied: bool = False
    """The head is separate, and initially the embedding's copy: the files are a tied model's."""
    vocab_size_in_files: int | None = None
    """Rows of the embedding in the files, if the vocabulary was resized since."""
    num_labels: int | None = None
    """Number of classes of a classifier, whose score head replaces the language model's head."""

    @property
    def runs(self) -> tuple[range, ...]:
        """Runs of consecutive layers with the same kinds of weights; each is stacked by itself."""

        def kind(layer: int) -> Any:
            return layer in self.mlp_only_layers, self.unquantized and self.unquantized[layer]

        # Not one stack with zeros where a layer lacks a leaf: if every second layer has experts,
        # half of their memory would be zeros.
        groups = itertools.groupby(range(self.num_hidden_layers), kind)
        runs = [list(layers) for _, layers in groups]
        return tuple(range(run[0], run[-1] + 1) for run in runs)

    @property
    def hf(self) -> dict[str, Any]:
        """The original ``config.json``, as a new dict."""
        return json.loads(self.hf_json)

    def hf_json_with(self, **settings: Any) -> str:
        """``config.json`` with other settings of the language model, wherever it has them."""
        hf = self.hf
        text = hf.get("text_config")
        (text if isinstance(text, dict) else hf).update(settings)
        # Files of some releases repeat settings of the text tower at the top level.
        hf.update({key: value for key, value in settings.items() if key in hf})
        return json.dumps(hf, sort_keys=True)

    @property
    def quant_method(self) -> str | None:
        """The method by which the folder's weights are quantized; None if they are not."""
        settings = self.hf.get("quantization_config")
        return None if settings is None else settings.get("quant_method", "bitsandbytes")

    @property
    def prequantized(self) -> bool:
        """Whether the folder's weights are quantized and stay so when loaded (MXFP4 does not)."""
        return self.quant_method not in (None, "mxfp4")

    @property
    def position_limit(self) -> int | None:
        """The number of positions of a learned table; None if positions are not limited."""
        return None if self.learned_positions is None else self.max_position_embeddings

    @property
    def head_is_tied(self) -> bool:
        """Whether the logits are computed with the embedding; a classifier's are not."""
        return self.tie_word_embeddings and self.num_labels is None

    @property
    def num_outputs(self) -> int:
        """The number of logits per token: classes, or the vocabulary."""
        return self.num_labels or self.vocab_size

    @property
    def id2label(self) -> tuple[str, ...]:
        """The names of a classifier's classes, in order; empty for a language model."""
        names = self.hf.get("id2label")
        names = names if isinstance(names, dict) else {}
        return tuple(str(names.get(str(i), f"LABEL_{i}")) for i in range(self.num_labels or 0))

    @property
    def feature_size(self) -> int:
        """The width of the output head's input."""
        return self.projected_embedding or self.hidden_size


def decoder_config(
    keys: ConfigReader,
    *,
    rope: Callable[[ConfigReader, int, int], Sequence[Rope | None] | Rope | None] = parse_rope,
    windows: Sequence[int | None] | int | None = None,
    scale: Sequence[float] | float | None = None,
    **differences: Any,
) -> DecoderConfig:
    """The DecoderConfig of a ``config.json``.

    Args:
      keys: a reader with the family's names and defaults.
      rope: (keys, head_dim, max_position_embeddings) → the Rope of all layers, or a list.
      windows: the attention window of all layers, or a list.
      scale: the factor on attention scores of all layers, or a list; None is ``head_dim ** -0.5``.
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
        windows=_per_layer(windows, layers),
        scales=_per_layer(scale, layers),
        ropes=_per_layer(rope(keys, head_dim, positions), layers),
        eos_token_ids=keys.tokens("eos_token_id"),
        bos_token_id=keys.token("bos_token_id"),
        hf_json=json.dumps(dict(keys.hf), sort_keys=True),
        **differences,
    )


def _per_layer(value: Any, layers: int) -> tuple[Any, ...]:
    """One value per layer."""
    return tuple(value) if isinstance(value, list | tuple) else (value,) * layers


def is_sliding(keys: ConfigReader, default: Callable[[int], bool]) -> list[bool]:
    """Per layer: whether it has an attention window, from ``layer_types`` or else ``default``.

    Raises ConfigError for a list of the wrong length and for unknown types of layers.
    """
    layers, types = keys.number("num_hidden_layers"), keys.get("layer_types")
    if types is None:
        return [default(i) for i in range(layers)]
    if not isinstance(types, list) or len(types) != layers:
        raise keys.fail("layer_types", f"must be a list with {layers} entries, not {types!r}")
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            raise keys.fail("layer_types", f"{kind!r} is not supported")
    return [kind == "sliding_attention" for kind in types]
