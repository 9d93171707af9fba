"""The ``lora`` section: the adapter (``jlora.LoraConfig``)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from jlora.config.engine.convert import Bounds, FrozenMap, Prefix
from jlora.config.engine.faults import Fault
from jlora.config.engine.schema import (
    ConfigSection,
    Count,
    Fraction,
    LocalPath,
    Natural,
    Positive,
)

INIT_SPLITS_BASE = re.compile(r"pissa(_niter_\d+)?|olora")
"""Values of init_lora_weights that split a weight into A @ B and a residual, the new base."""

PRESETS = ("all-linear", "attention", "mlp")
"""Values of target_modules that are not regular expressions."""


@dataclass(frozen=True, kw_only=True)
class LoftQConfig(ConfigSection):
    """LoftQ initialization (arXiv 2310.08659); fields of PEFT's ``LoftQConfig``."""

    loftq_bits: Literal[4] = 4
    """Bits of the quantized base; the quantization section must say nf4, too."""
    loftq_iter: Count = 1
    """Number of quantize-then-SVD rounds. A training run does one: more rounds change the base,
    which must then be saved (jlora.loftq)."""


@dataclass(frozen=True, kw_only=True)
class EvaConfig(ConfigSection):
    """EVA initialization (arXiv 2410.07170); fields of PEFT's ``EvaConfig``."""

    rho: Annotated[float, Bounds(1)] = 2.0
    """Maximum rank of a module, as a multiple of r: ranks are redistributed to the modules whose
    inputs they explain best. 1: every module has rank r."""
    tau: Annotated[float, Bounds(0, 1)] = 0.99
    """Cosine similarity between the components of successive passes at which they count as
    converged."""
    use_label_mask: bool = True
    """Use only tokens with a label, not every non-padding token."""
    label_mask_value: Literal[-100] = -100
    """Label of tokens without loss."""
    whiten: bool = False
    """Divide each component by the square root of its singular value."""
    adjust_scaling_factors: bool = True
    """Change each module's lora_alpha in proportion to its rank, so that the scale stays."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig(ConfigSection):
    """The adapter: fields, defaults and matching rules of PEFT's ``LoraConfig``."""

    r: Count = 8
    """Rank of the adapter."""
    # Not 0, which PEFT accepts: nothing would train.
    lora_alpha: Annotated[int, Bounds(0, open_low=True)] | Positive = 8
    """The delta is scaled by lora_alpha / r."""
    lora_dropout: Fraction = 0.0
    """Dropout probability of the adapter's input during training."""
    target_modules: Sequence[str] | str | None = None
    """Modules to adapt: a list of names or suffixes, a regular expression, or a preset
    (all-linear, attention, mlp); null: the architecture's default."""
    exclude_modules: Sequence[str] | str | None = None
    """Modules not to adapt: a list of names or suffixes, or a regular expression."""
    layers_to_transform: Natural | Sequence[Natural] | None = None
    """Indices of the layers to adapt; null: all."""
    layers_pattern: Sequence[str] | str | None = None
    """Name of the list of layers, for models in which the layer index is not the first number in a
    module's name."""
    rank_pattern: Mapping[str, Count] = FrozenMap()
    """Ranks that differ from r, by module name suffix or regular expression."""
    alpha_pattern: Mapping[str, Positive] = FrozenMap()
    """Alphas that differ from lora_alpha, by module name suffix or regular expression."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases of the base model to train: none, all, or those of adapted modules (lora_only)."""
    use_rslora: bool = False
    """Rank-stabilized LoRA: scale the delta by lora_alpha / sqrt(r)."""
    modules_to_save: Sequence[str] | None = None
    """Modules to train in full and save with the adapter."""
    lora_bias: bool = False
    """Add a trainable bias to B."""
    use_dora: bool = False
    """DoRA: train the magnitude of each weight column separately from its direction."""
    target_parameters: Sequence[str] | None = None
    """Parameters to adapt that are not the weight of a module, by name or suffix, such as
    mlp.experts.gate_up_proj and mlp.experts.down_proj."""
    trainable_token_indices: Sequence[Natural] | Mapping[str, Sequence[Natural]] | None = None
    """Token ids whose embeddings are trained, in embed_tokens or in the modules that are named."""
    init_lora_weights: (
        bool
        | Literal["gaussian", "orthogonal", "pissa", "olora", "loftq", "eva"]
        | Annotated[str, Prefix("pissa_niter_", "N")]
    ) = True
    """Initial A and B. true: A Kaiming-uniform, B zero; gaussian: A normal with deviation 1 / r, B
    zero; false: both random; orthogonal: both orthogonal; pissa: top singular vectors of the
    weight (pissa_niter_N: by a fast randomized SVD with N iterations); olora: QR decomposition of
    the weight; loftq: SVD of the quantization error; eva: A from the principal components of the
    module's inputs."""
    loftq_config: LoftQConfig = LoftQConfig()
    """Settings for init_lora_weights: loftq."""
    eva_config: EvaConfig | None = None
    """Settings for init_lora_weights: eva; null: the defaults."""
    fan_in_fan_out: bool = False
    """Ignored, and accepted because GPT-2 recipes set it: the model determines the layout of its
    weights."""
    task_type: Literal["CAUSAL_LM", "SEQ_CLS"] | None = "CAUSAL_LM"
    """SEQ_CLS trains a classification head with the adapter, on rows of the format
    classification."""
    init_from: LocalPath | None = None
    """Folder of a PEFT adapter to continue from, instead of a new one."""
    base_model_name_or_path: str | None = None
    """Name of the base model for adapter_config.json; null: model.name_or_path."""
    revision: str | None = None
    """Revision of the base model for adapter_config.json."""

    @property
    def init_splits_base(self) -> bool:
        """Whether initialization replaces the base by a residual (PiSSA, OLoRA)."""
        init = self.init_lora_weights
        return isinstance(init, str) and INIT_SPLITS_BASE.fullmatch(init) is not None

    @property
    def run_splits_base(self) -> bool:
        """Whether a run does so: one that starts from ``init_from`` does not initialize."""
        return self.init_splits_base and not self.init_from

    @property
    def init_needs_more_than_params(self) -> bool:
        """Whether initialization needs unquantized weights (LoftQ) or data (EVA), too."""
        return self.init_lora_weights in ("loftq", "eva")

    @property
    def effective_init(self) -> bool | str | None:
        """``init_lora_weights``, or None if the run starts from ``init_from``."""
        return None if self.init_from else self.init_lora_weights

    def check(self) -> Iterator[Fault]:
        """See ConfigSection."""
        yield from _init_faults(self)
        yield from _pattern_faults(self)
        if self.target_modules == () and not (
            self.target_parameters or self.trainable_token_indices
        ):
            cause = "the list is empty: nothing would train"
            yield Fault(("target_modules",), cause, "try all-linear")
        targets = self.target_modules
        is_regex = isinstance(targets, str) and targets.lower() not in PRESETS
        # As in PEFT, where layers_to_transform is an error beside a regular expression.
        if is_regex and self.layers_to_transform is not None:
            yield Fault(
                ("layers_to_transform", "target_modules"),
                "has no effect when target_modules is a regular expression",
                "put the layers into the expression, or list the names of the modules",
            )
        if self.layers_pattern and self.layers_to_transform is None:
            keys = ("layers_pattern", "layers_to_transform")
            yield Fault(keys, "has no effect without layers_to_transform")
        # This and the next, too, are errors in PEFT.
        if self.lora_bias and self.use_dora:
            cause = "DoRA does not support a bias"
            yield Fault(("lora_bias", "use_dora"), cause, "set one to false")
        if self.lora_bias and not isinstance(self.init_lora_weights, bool):
            yield Fault(
                ("lora_bias", "init_lora_weights"),
                f"is not supported with init_lora_weights: {self.init_lora_weights}",
                "use init_lora_weights: true",
            )
        tokens = self.trainable_token_indices
        for indices in tokens.values() if isinstance(tokens, Mapping) else [tokens or ()]:
            if len(set(indices)) < len(indices):
                yield Fault(("trainable_token_indices",), "a token is listed twice")


def _init_faults(config: LoraConfig) -> Iterator[Fault]:
    init, key = config.init_lora_weights, "init_lora_weights"
    if isinstance(init, str) and init.startswith("pissa") and not INIT_SPLITS_BASE.fullmatch(init):
        yield Fault((key,), f"expected a number after pissa_niter_, got {init!r}", "try 16")
    odd = [r for r in (config.r, *config.rank_pattern.values()) if r % 2]
    if init == "orthogonal" and odd:
        # As in PEFT, A and B are made from alternate rows of one orthogonal r × r matrix.
        yield Fault((key, "r", "rank_pattern"), f"orthogonal needs even ranks, got {odd[0]}")


def _pattern_faults(config: LoraConfig) -> Iterator[Fault]:
    for name in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"):
        value = getattr(config, name)
        patterns = [value] if isinstance(value, str) else value or ()
        if isinstance(value, str | Mapping):  # lists hold plain names
            for pattern in patterns:
                try:
                    re.compile(pattern)
                except re.error as bad:
                    cause = f"{pattern!r} is not a regular expression: {bad}"
                    yield Fault((name,), cause)
        if any(not pattern for pattern in patterns):
            yield Fault((name,), "an empty name matches nothing")
