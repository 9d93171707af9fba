"""The ``train`` section: optimization, logging, checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from jlora.config.engine.convert import FrozenMap, Prefix
from jlora.config.engine.faults import Fault
from jlora.config.engine.schema import (
    ConfigSection,
    Count,
    Fraction,
    LocalPath,
    Natural,
    NonNegative,
    OutputFolder,
    Positive,
)

OPTAX = "optax."

OptaxName = Annotated[str, Prefix(OPTAX)]
"""A function of optax that returns an optimizer, such as optax.lamb."""

SCHEDULER_KWARGS: Mapping[str, tuple[str, ...]] = {
    "linear": (),
    "cosine": ("num_cycles",),
    "constant": (),
    "constant_with_warmup": (),
    "polynomial": ("lr_end", "power"),
    "inverse_sqrt": ("timescale",),
    "cosine_with_min_lr": ("min_lr", "min_lr_rate", "num_cycles"),
}
"""lr_scheduler_type → the lr_scheduler_kwargs that it accepts (transformers' names)."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(ConfigSection):
    """The training run: fields of transformers' ``TrainingArguments``."""

    ALIASES: ClassVar = {
        "optim": dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf"), "adamw")
        | {
            "adamw_bnb_8bit": "adamw_8bit",
            "paged_adamw": "paged_adamw_32bit",
            "lion_32bit": "lion",
            "paged_lion": "paged_lion_32bit",
        }
    }

    output_dir: OutputFolder
    """Folder for everything that the run writes."""
    num_train_epochs: Positive = 3.0
    """Number of epochs, which may be fractional."""
    max_steps: int = -1
    """Number of optimizer steps; if positive, it overrides num_train_epochs."""
    per_device_train_batch_size: Count = 4
    """Rows per forward pass on each device (of the mesh axes data and fsdp)."""
    per_device_eval_batch_size: Count | None = None
    """Rows per forward pass in evaluation; null: as in training."""
    gradient_accumulation_steps: Count = 4
    """Forward and backward passes (micro-batches) per optimizer step."""
    # QLoRA's for models of 7B and 13B (arXiv 2305.14314); transformers' 5e-5 is for training in
    # full.
    learning_rate: Positive = 2e-4
    """Peak learning rate."""
    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "constant",
        "constant_with_warmup",
        "polynomial",
        "inverse_sqrt",
        "cosine_with_min_lr",
    ] = "cosine"
    """Learning rate schedule."""
    lr_scheduler_kwargs: Mapping[str, float] = FrozenMap()
    """Arguments of the schedule, such as min_lr or num_cycles."""
    warmup_ratio: Fraction = 0.03
    """Share of the steps used for a linear warmup from 0 to learning_rate."""
    warmup_steps: Natural = 0
    """Number of warmup steps; if positive, it overrides warmup_ratio."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay of matrices; biases and norms have none."""
    adam_beta1: Fraction = 0.9
    """Decay rate of the first moment (Adam, Lion)."""
    adam_beta2: Fraction = 0.999
    """Decay rate of the second moment (Adam, Lion)."""
    adam_epsilon: Positive = 1e-8
    """Adam's epsilon, added to the square root of the second moment."""
    max_grad_norm: NonNegative | None = 1.0
    """Maximum global norm of the gradient, to which it is clipped; 0 or null: no clipping."""
    optim: (
        Literal[
            "adamw",
            "adamw_8bit",
            "paged_adamw_32bit",
            "paged_adamw_8bit",
            "lion",
            "lion_8bit",
            "paged_lion_32bit",
            "paged_lion_8bit",
            "adafactor",
            "sgd",
        ]
        | OptaxName
    ) = "adamw"
    """Optimizer. 8bit: moments are stored in 8 bits; paged: in host memory; optax.NAME: an
    optimizer of optax."""
    optim_args: Mapping[str, int | float | bool | str | None] = FrozenMap()
    """Arguments of the optimizer optax.NAME, such as {b1: 0.95}."""
    loraplus_lr_ratio: Positive | None = None
    """LoRA+: ratio of the learning rate of B and of vectors to that of A; null: off."""
    loraplus_lr_embedding: Positive = 1e-6
    """LoRA+: learning rate of adapted embeddings."""
    lorafa: bool = False
    """LoRA-FA: freeze A at its initial value, and correct the gradient of B to approximate that of
    the full weight."""
    gradient_checkpointing: Literal["auto"] | bool = True
    """Save only the input of each layer and recompute the layer in the backward pass; false: save
    the outputs of its matrix products, too; auto: false if the compiled step then fits, else true,
    else with activation_offloading."""
    activation_offloading: bool = False
    """Store in host memory the layer inputs that gradient_checkpointing saves."""
    bf16: bool | None = None
    """Compute in bfloat16. null: compute in model.dtype; if bf16 and fp16 are both false: in
    float32."""
    fp16: bool = False
    """Compute in float16 with dynamic loss scaling."""
    seed: Natural = 42
    """Random seed of initialization, dropout and data order."""
    full_determinism: bool = False
    """On GPUs, train and evaluate with deterministic kernels only, none chosen by timing: results
    repeat, and a run that is resumed ends, with the same bytes. Elsewhere they do so anyway."""
    logging_steps: Count = 10
    """Optimizer steps between training lines in metrics.jsonl."""
    eval_steps: Count | None = 100
    """Optimizer steps between evaluations; null: only at the end."""
    save_steps: Count | None = 500
    """Optimizer steps between checkpoints; null: only at the end."""
    save_total_limit: Count | None = 3
    """Maximum number of checkpoints to keep, the newest ones; null: all."""
    early_stopping_patience: Count | None = None
    """Stop after this many evaluations in a row without improvement; null: never."""
    early_stopping_threshold: NonNegative = 0.0
    """Minimum decrease of eval_loss that counts as an improvement."""
    resume: Literal["auto", "never"] | LocalPath = "auto"
    """auto: resume from the newest complete checkpoint, if there is one; never: start anew; or the
    folder of a checkpoint."""
    compilation_cache: bool = True
    """Cache compiled programs on disk for later runs."""
    check_memory: bool = True
    """Refuse to start if the compiled step needs more memory than the devices have."""

    def check(self) -> Iterator[Fault]:
        """See ConfigSection."""
        if self.activation_offloading and not self.gradient_checkpointing:
            cause = "needs gradient_checkpointing, which is false"
            fix = "set gradient_checkpointing to true, or leave activation_offloading out"
            yield Fault(("activation_offloading", "gradient_checkpointing"), cause, fix)
        if self.bf16 and self.fp16:
            yield Fault(("fp16", "bf16"), "both fp16 and bf16 are true", "set one to false")
        if self.max_steps == 0 or self.max_steps < -1:
            yield Fault(("max_steps",), f"must be positive or -1, got {self.max_steps}")
        if not self.output_dir:
            yield Fault(("output_dir",), "is empty", "name a folder, such as outputs/run1")
        keys = ("lr_scheduler_kwargs", "lr_scheduler_type")
        accepted = SCHEDULER_KWARGS[self.lr_scheduler_type]
        for name in self.lr_scheduler_kwargs:
            if name not in accepted:
                fix = f"it accepts {', '.join(accepted) or 'none'}"
                yield Fault(keys, f"{self.lr_scheduler_type} has no argument {name!r}", fix)
        if self.optim_args and not self.optim.startswith(OPTAX):
            fix = "set adam_beta1, adam_beta2 or adam_epsilon, or choose an optimizer optax.NAME"
            yield Fault(("optim_args", "optim"), f"{self.optim} accepts none", fix)
        minima = {"min_lr", "min_lr_rate"} & set(self.lr_scheduler_kwargs)
        if self.lr_scheduler_type == "cosine_with_min_lr" and len(minima) != 1:
            yield Fault(keys, "cosine_with_min_lr needs one of min_lr and min_lr_rate")
