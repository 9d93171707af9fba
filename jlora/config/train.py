"""The ``train`` section."""

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
    Positive,
)

OPTAX = "optax."

OptaxName = Annotated[str, Prefix(OPTAX)]
"""An optimizer of optax by its name there."""

SCHEDULER_KWARGS: Mapping[str, tuple[str, ...]] = {
    "linear": (),
    "cosine": ("num_cycles",),
    "constant": (),
    "constant_with_warmup": (),
    "polynomial": ("lr_end", "power"),
    "inverse_sqrt": ("timescale",),
    "cosine_with_min_lr": ("min_lr", "min_lr_rate", "num_cycles"),
}
"""Schedule → the keys it takes in lr_scheduler_kwargs (transformers' names)."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(ConfigSection):
    """The run (names of ``TrainingArguments``)."""

    ALIASES: ClassVar = {
        "optim": dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf"), "adamw")
        | {
            "adamw_bnb_8bit": "adamw_8bit",
            "paged_adamw": "paged_adamw_32bit",
            "lion_32bit": "lion",
            "paged_lion": "paged_lion_32bit",
        }
    }

    output_dir: str
    """Folder for everything the run writes."""
    num_train_epochs: Positive = 3.0
    """Passes over the data; a fraction is fine."""
    max_steps: int = -1
    """Optimizer steps; when positive it wins over num_train_epochs."""
    per_device_train_batch_size: Count = 4
    """Rows on each device of the data and fsdp axes in one forward pass."""
    per_device_eval_batch_size: Count | None = None
    """The same in evaluation; null: as in training."""
    gradient_accumulation_steps: Count = 4
    """Forward passes in one optimizer step."""
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
    """Shape of the learning rate over the run."""
    lr_scheduler_kwargs: Mapping[str, float] = FrozenMap()
    """Extra arguments of the schedule, such as min_lr or num_cycles."""
    warmup_ratio: Fraction = 0.03
    """Part of the run in which the rate rises from zero."""
    warmup_steps: Natural = 0
    """Steps of the same; when positive it wins over warmup_ratio."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay, on matrices only."""
    adam_beta1: Fraction = 0.9
    """First moment's decay."""
    adam_beta2: Fraction = 0.999
    """Second moment's decay."""
    adam_epsilon: Positive = 1e-8
    """Added to the root of the second moment."""
    max_grad_norm: NonNegative | None = 1.0
    """Clip the gradient's global norm to this; 0 or null: never."""
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
    """Optimizer. 8bit: moments in 8 bits; paged: in host memory; or one of optax by its name."""
    optim_args: Mapping[str, int | float | bool | str | None] = FrozenMap()
    """Arguments of an optax.NAME, such as {b1: 0.95}."""
    loraplus_lr_ratio: Positive | None = None
    """LoRA+: B, biases and other vectors learn at this many times learning_rate; null: off."""
    loraplus_lr_embedding: Positive = 1e-6
    """LoRA+: the learning rate of adapted embeddings."""
    lorafa: bool = False
    """LoRA-FA: A stays as it was drawn, and B follows the full weight's gradient."""
    gradient_checkpointing: bool = True
    """Recompute each layer in the backward pass; false keeps its matrix products and recomputes
    what lies between them."""
    activation_offloading: bool = False
    """Keep in the host's memory what gradient_checkpointing keeps of a layer, its input."""
    bf16: bool | None = None
    """Compute in bfloat16; null: in the type of model.dtype. With both false, in float32."""
    fp16: bool = False
    """Compute in float16 with dynamic loss scaling."""
    seed: Natural = 42
    """Seed of initial weights, dropout and data order."""
    logging_steps: Count = 10
    """Steps between lines of metrics.jsonl."""
    eval_steps: Count | None = 100
    """Steps between evaluations; null: only at the end."""
    save_steps: Count | None = 500
    """Steps between checkpoints; null: only at the end."""
    save_total_limit: Count | None = 3
    """Checkpoints kept; null: all."""
    early_stopping_patience: Count | None = None
    """Stop after so many evaluations without improvement; null: never."""
    early_stopping_threshold: NonNegative = 0.0
    """How much lower eval_loss must be to count as improvement."""
    resume: Literal["auto", "never"] | LocalPath = "auto"
    """auto: go on from the last whole checkpoint; never; or a checkpoint's folder."""
    compilation_cache: bool = True
    """Keep compiled programs on disk for the next start."""
    check_memory: bool = True
    """Do not start what the compiled step shows to be too much for the devices' memory."""

    def check(self) -> Iterator[Fault]:
        """See ConfigSection."""
        if self.activation_offloading and not self.gradient_checkpointing:
            cause = "offloads what gradient_checkpointing keeps, which is off"
            fix = "set gradient_checkpointing to true, or leave it out"
            yield Fault(("activation_offloading", "gradient_checkpointing"), cause, fix)
        if self.bf16 and self.fp16:
            yield Fault(("fp16", "bf16"), "both fp16 and bf16 are true", "set one to false")
        if self.max_steps == 0 or self.max_steps < -1:
            yield Fault(("max_steps",), f"must be positive or -1, got {self.max_steps}")
        if not self.output_dir:
            yield Fault(("output_dir",), "is empty", "name a folder, such as outputs/run1")
        keys = ("lr_scheduler_kwargs", "lr_scheduler_type")
        takes = SCHEDULER_KWARGS[self.lr_scheduler_type]
        for name in self.lr_scheduler_kwargs:
            if name not in takes:
                known = f"it takes {', '.join(takes)}" if takes else "it takes none"
                yield Fault(keys, f"{self.lr_scheduler_type} has no argument {name!r}", known)
        if self.optim_args and not self.optim.startswith(OPTAX):
            fix = "set adam_beta1, adam_beta2 or adam_epsilon, or choose one of optax by its name"
            yield Fault(("optim_args", "optim"), f"{self.optim} takes none", fix)
        minima = {"min_lr", "min_lr_rate"} & set(self.lr_scheduler_kwargs)
        if self.lr_scheduler_type == "cosine_with_min_lr" and len(minima) != 1:
            yield Fault(keys, "cosine_with_min_lr needs one of min_lr and min_lr_rate")
