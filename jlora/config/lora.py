"""The ``lora`` section."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from jlora.config.engine.convert import Bounds, FrozenMap, Prefix
from jlora.config.engine.faults import Fault
from jlora.config.engine.schema import ConfigSection, Count, Fraction, LocalPath, Natural, Positive

FROM_WEIGHTS = re.compile(r"pissa(_niter_\d+)?|olora")
"""Values of init_lora_weights that take the first A and B out of the base."""

PRESETS = ("all-linear", "attention", "mlp")
"""Values of target_modules that are not regular expressions."""


@dataclass(frozen=True, kw_only=True)
class LoftQConfig(ConfigSection):
    """How ``init_lora_weights: loftq`` makes base and adapter together."""

    loftq_bits: Literal[4] = 4
    """Bits of the base; how it is packed is in ``quantization``, which has to be nf4."""
    loftq_iter: Count = 1
    """How often the base is packed and the adapter made of what is lost; a training run does it
    once: more change the base, which then has to be kept (jlora.loftq)."""


@dataclass(frozen=True, kw_only=True)
class EvaConfig(ConfigSection):
    """How ``init_lora_weights: eva`` makes adapters of the data's own directions."""

    rho: Annotated[float, Bounds(1)] = 2.0
    """A module gets at most rho * r ranks; they go where they explain most. 1: all get r."""
    tau: Annotated[float, Bounds(0, 1)] = 0.99
    """Cosine similarity of directions between two passes over the data that ends the search."""
    use_label_mask: bool = True
    """Look at the tokens that are trained on only, not at all that are no padding."""
    label_mask_value: Literal[-100] = -100
    """Label of a token that is not trained on."""
    whiten: bool = False
    """Divide each direction by the square root of its singular value."""
    adjust_scaling_factors: bool = True
    """Scale lora_alpha with the rank that a module gets."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig(ConfigSection):
    """The adapter (names, defaults and matching rules of PEFT's ``LoraConfig``)."""

    r: Count = 8
    """Rank."""
    lora_alpha: Annotated[int, Bounds(0, open_low=True)] | Positive = 8
    """The delta is scaled by lora_alpha / r."""
    lora_dropout: Fraction = 0.0
    """Dropout on the adapter's input while training."""
    target_modules: Sequence[str] | str | None = None
    """Names or suffixes, one regular expression, or a preset: all-linear, attention, mlp; null: the
    architecture's own."""
    exclude_modules: Sequence[str] | str | None = None
    """Names, suffixes or one regular expression to leave out of the targets."""
    layers_to_transform: Natural | Sequence[Natural] | None = None
    """Numbers of the layers to adapt; null: all."""
    layers_pattern: Sequence[str] | str | None = None
    """Name of the list of layers, where the first number in a path is not the layer's."""
    rank_pattern: Mapping[str, Count] = FrozenMap()
    """Regular expression of a module's name (its end) → its own rank."""
    alpha_pattern: Mapping[str, Positive] = FrozenMap()
    """Regular expression of a module's name (its end) → its own lora_alpha."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which of the base model's biases train along."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r)."""
    modules_to_save: Sequence[str] | None = None
    """Modules to train in full and save with the adapter."""
    lora_bias: bool = False
    """Give the adapter's B a bias that trains along."""
    use_dora: bool = False
    """Train the norms of the weight's columns apart from their directions (DoRA)."""
    target_parameters: Sequence[str] | None = None
    """Names or suffixes of bare parameters to adapt: mlp.experts.gate_up_proj and down_proj."""
    trainable_token_indices: Sequence[Natural] | Mapping[str, Sequence[Natural]] | None = None
    """Rows of the input embedding (or of those named) to train, and no others."""
    init_lora_weights: (
        bool
        | Literal["gaussian", "orthogonal", "pissa", "olora", "loftq", "eva"]
        | Annotated[str, Prefix("pissa_niter_", "N")]
    ) = True
    """true: A kaiming-uniform, B zero; gaussian: A normal / r, B zero; false: both random;
    orthogonal: A and B orthogonal; pissa: the weight's largest singular vectors (pissa_niter_N:
    nearly, and faster); olora: of its QR decomposition; loftq: of what quantization loses; eva: A
    of the data's own directions."""
    loftq_config: LoftQConfig = LoftQConfig()
    """More about loftq."""
    eva_config: EvaConfig | None = None
    """More about eva; null: its defaults."""
    fan_in_fan_out: bool = False
    """Accepted for GPT-2 recipes; jlora sees itself how a weight is stored."""
    task_type: Literal["CAUSAL_LM", "SEQ_CLS"] | None = "CAUSAL_LM"
    """SEQ_CLS trains a score head with the adapter; the data's format is then classification."""
    init_from: LocalPath | None = None
    """A PEFT adapter folder to start from."""
    base_model_name_or_path: str | None = None
    """The base model's name, as written to adapter_config.json."""
    revision: str | None = None
    """The base model's revision, as written to adapter_config.json."""

    @property
    def from_weights(self) -> bool:
        """Whether the first A and B are a part of the base, which gives it up."""
        kind = self.init_lora_weights
        return isinstance(kind, str) and FROM_WEIGHTS.fullmatch(kind) is not None

    @property
    def begins_from_weights(self) -> bool:
        """``from_weights`` of a run that does not begin with an adapter's folder."""
        return self.from_weights and not self.init_from

    @property
    def needs_more(self) -> bool:
        """Whether first values need more than the parameters: the original ones, or data."""
        return self.init_lora_weights in ("loftq", "eva")

    @property
    def begins_with(self) -> bool | str | None:
        """``init_lora_weights``, or None where ``init_from`` takes its place."""
        return None if self.init_from else self.init_lora_weights

    def check(self) -> Iterator[Fault]:
        """See ConfigSection."""
        yield from _init_faults(self)
        for name in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"):
            value = getattr(self, name)
            patterns = [value] if isinstance(value, str) else value or ()
            if isinstance(value, str | Mapping):
                yield from (f for p in patterns for f in _regex_faults(name, p))
            if any(not pattern for pattern in patterns):
                yield Fault((name,), "an empty name matches nothing")
        if self.target_modules == () and not (
            self.target_parameters or self.trainable_token_indices
        ):
            yield Fault(
                ("target_modules",), "the list is empty: nothing would train", "try all-linear"
            )
        wanted = self.target_modules
        expression = isinstance(wanted, str) and wanted.lower() not in PRESETS
        if expression and self.layers_to_transform is not None:
            yield Fault(
                ("layers_to_transform", "target_modules"),
                "means nothing where target_modules is a regular expression",
                "put the layers into the expression, or list the modules' names",
            )
        if self.layers_pattern and self.layers_to_transform is None:
            yield Fault(
                ("layers_pattern", "layers_to_transform"),
                "means nothing without layers_to_transform",
            )
        if self.lora_bias and self.use_dora:
            yield Fault(("lora_bias", "use_dora"), "DoRA has no bias", "set one to false")
        if self.lora_bias and not isinstance(self.init_lora_weights, bool):
            yield Fault(
                ("lora_bias", "init_lora_weights"),
                "only A and B have first values of that kind",
                "use init_lora_weights: true",
            )
        rows = self.trainable_token_indices
        for indices in rows.values() if isinstance(rows, Mapping) else [rows or ()]:
            if len(set(indices)) < len(indices):
                yield Fault(("trainable_token_indices",), "names a row twice")


def _init_faults(config: LoraConfig) -> Iterator[Fault]:
    kind, key = config.init_lora_weights, "init_lora_weights"
    if isinstance(kind, str) and kind.startswith("pissa") and not FROM_WEIGHTS.fullmatch(kind):
        yield Fault((key,), f"expected a number after pissa_niter_, got {kind!r}", "try 16")
    if isinstance(kind, str) and config.lora_bias:
        yield Fault(("lora_bias", key), f"is only possible with true or false, not {kind}")
    odd = [r for r in (config.r, *config.rank_pattern.values()) if r % 2]
    if kind == "orthogonal" and odd:
        yield Fault((key, "r", "rank_pattern"), f"orthogonal needs even ranks, got {odd[0]}")


def _regex_faults(key: str, pattern: str) -> Iterator[Fault]:
    try:
        re.compile(pattern)
    except re.error as bad:
        yield Fault((key,), f"{pattern!r} is not a regular expression: {bad}")
