"""The one table of settings: frozen dataclasses with a docstring under each field.

Names and meanings are those of PEFT's ``LoraConfig``, transformers' ``BitsAndBytesConfig`` and
``TrainingArguments``; a setting that belongs to no table is an error. The annotation of a field is
its schema, the docstring its help text, and ``check`` holds what must be true between fields.
Nothing here imports jax.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

from jlora.config.between import (
    CLASSIFICATION,
    classification_faults,
    first_value_faults,
    together_faults,
)
from jlora.config.convert import Bounds, FrozenMap
from jlora.config.fields import (
    OPTAX,
    Count,
    Fault,
    Fraction,
    InputPath,
    LocalPath,
    Natural,
    NonNegative,
    OptaxName,
    Positive,
    Section,
)
from jlora.config.weights import (
    ExportConfig,
    LoraConfig,
    MergeConfig,
    ModelConfig,
    QuantConfig,
    QuantizeConfig,
)


@dataclass(frozen=True, kw_only=True)
class SourceConfig(Section):
    """One source of rows."""

    path: InputPath
    """A jsonl, json, csv or parquet file (txt for text), a folder, a glob, or a hub name."""
    format: Literal["messages", "sharegpt", "alpaca", "prompt_completion", "text", "classification"]
    """How a row is read."""
    weight: Positive = 1.0
    """How many times an epoch takes its rows; a fraction takes part of them."""
    split: str | None = None
    """Split of a hub data set."""
    name: str | None = None
    """Configuration name of a hub data set."""
    adapter: str | None = None
    """The adapter that these rows train, in a run that trains several; its folder has this name."""

    def check(self) -> Iterator[Fault]:
        """See Section."""
        if self.adapter is None:
            return
        if not re.fullmatch(r"[\w-]+", self.adapter) or self.adapter in ("checkpoints", "merged"):
            cause = f"{self.adapter!r} cannot be a folder of the run"
            yield Fault(("adapter",), cause, "use letters, digits, _ and -")


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """Rows, and how they become batches."""

    train: tuple[SourceConfig, ...]
    """Sources to train on."""
    eval: tuple[SourceConfig, ...] = ()
    """Held-out sources."""
    max_length: Annotated[int, Bounds(2)] = 1024
    """Tokens in a row of a batch; longer examples are cut."""
    packing: bool = True
    """Put several examples into one row; attention never crosses from one to another."""
    eval_packing: bool | None = None
    """The same for held-out rows; null: as packing."""
    shuffle: bool = True
    """Order by seed and epoch; false: the files' order."""
    assistant_only_loss: bool = True
    """Loss on assistant or completion tokens only; false: on every token."""
    on_bad_row: Literal["error", "skip"] = "error"
    """A malformed row stops the run, or is counted and left out."""
    chat_template: LocalPath | None = None
    """A jinja file that replaces the tokenizer's chat template."""

    def check(self) -> Iterator[Fault]:
        """See Section."""
        if not self.train:
            yield Fault(("train",), "no source to train on", "add {path: …, format: messages}")
        named = [s.adapter for s in self.train or ()]
        if any(named) and not all(named):
            yield Fault(
                ("train",), "some sources name an adapter, others do not", "name all or none"
            )
        for i, source in enumerate(self.eval):
            if bool(source.adapter) != any(named) or source.adapter not in (*named, None):
                fix = f"name one of {', '.join(map(str, named))}" if any(named) else "leave it out"
                yield Fault((f"eval.{i}.adapter",), f"{source.adapter} is not trained", fix)


SCHEDULES: Mapping[str, tuple[str, ...]] = {
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
class TrainConfig(Section):
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
        """See Section."""
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
        takes = SCHEDULES[self.lr_scheduler_type]
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


Axis = Annotated[int, Bounds(-1)]


@dataclass(frozen=True, kw_only=True)
class MeshConfig(Section):
    """Devices along each axis; one axis may be -1: all that are left."""

    data: Axis = -1
    """Copies of the model, each with its part of the batch."""
    fsdp: Axis = 1
    """Parts of the batch that also share one copy of the parameters between them."""
    tensor: Axis = 1
    """Parts of every matrix, for one and the same part of the batch."""

    def check(self) -> Iterator[Fault]:
        """See Section."""
        axes = {name: getattr(self, name) for name in ("data", "fsdp", "tensor")}
        for name, size in axes.items():
            if size == 0:
                yield Fault((name,), "must be positive or -1, got 0")
        if free := [name for name, size in axes.items() if size == -1][1:]:
            yield Fault((free[0], *axes), "only one axis can be -1")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Section):
    """What ``evaluate`` does besides the held-out loss, and the samples in the report."""

    exact_match: bool = False
    """Generate a reply to each held-out row and compare it with the row's last reply."""
    max_new_tokens: Count = 64
    """Tokens of a reply."""
    samples: Natural = 3
    """Replies shown before and after training."""
    batch_size: Count = 32
    """Replies generated together."""
    max_rows: Count | None = None
    """Held-out rows that replies are generated for; null: all."""


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(Section):
    """What ``generate`` writes."""

    prompt: str | None = None
    """What the user says."""
    file: LocalPath | None = None
    """A jsonl file of prompts (prompt or messages in each line)."""
    chat: bool = True
    """Put the prompt into the chat template; false: continue the text itself."""
    max_new_tokens: Count = 128
    """Most tokens of a reply."""
    do_sample: bool = False
    """Sample; false: always the most likely token."""
    temperature: Positive = 1.0
    """Divides the logits when sampling."""
    top_k: Natural = 0
    """Sample among the k most likely tokens; 0: all."""
    top_p: Annotated[float, Bounds(0, 1, open_low=True)] = 1.0
    """Sample among the most likely tokens that together have this probability."""
    seed: Natural = 0
    """Seed of the sampling."""


@dataclass(frozen=True, kw_only=True)
class Config(Section):
    """All settings of a run."""

    model: ModelConfig
    """The base model."""
    quantization: QuantConfig | None = None
    """Left out: the base model stays as it is."""
    lora: LoraConfig | None = None
    """Left out: full fine-tuning."""
    data: DataConfig
    """Rows, and how they become batches."""
    train: TrainConfig
    """The run."""
    mesh: MeshConfig = MeshConfig()
    """Devices along each axis."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Evaluation and samples."""
    generate: GenerateConfig = GenerateConfig()
    """Generation."""
    merge: MergeConfig = MergeConfig()
    """Merging."""
    export: ExportConfig = ExportConfig()
    """Exporting a checkpoint."""
    quantize: QuantizeConfig = QuantizeConfig()
    """Packing the base on disk."""

    @property
    def compute_dtype(self) -> str:
        """The type of activations: float16 or bfloat16 as ``train`` says, else model.dtype."""
        if self.train.fp16:
            return "float16"
        if self.train.bf16 is None:
            return self.model.dtype
        return "bfloat16" if self.train.bf16 else "float32"

    @property
    def adapters(self) -> tuple[str, ...]:
        """The adapters that are trained together, as the data names them; none: one alone."""
        return tuple(dict.fromkeys(s.adapter for s in self.data.train if s.adapter))

    def alone(self, adapter: str) -> Config:
        """The settings of a run that trains one of several adapters only, in its folder."""

        def own(sources: tuple[SourceConfig, ...]) -> tuple[SourceConfig, ...]:
            return tuple(replace(s, adapter=None) for s in sources if s.adapter == adapter)

        data = replace(self.data, train=own(self.data.train), eval=own(self.data.eval))
        folder = f"{self.train.output_dir.rstrip('/')}/{adapter}"
        return replace(self, data=data, train=replace(self.train, output_dir=folder))

    @property
    def classifies(self) -> bool:
        """Whether the rows have classes to learn, instead of text."""
        return self.data.train[0].format == CLASSIFICATION

    def check(self) -> Iterator[Fault]:
        """See Section."""
        yield from classification_faults(self)
        yield from together_faults(self)
        if self.quantization and not self.lora:
            yield Fault(
                ("quantization", "lora"),
                "packed weights cannot be trained in full",
                "add a lora section, or leave quantization out",
            )
        yield from first_value_faults(self)
        for name, given in (
            ("loraplus_lr_ratio", self.train.loraplus_lr_ratio),
            ("lorafa", self.train.lorafa),
        ):
            if given and not self.lora:
                fix = "add a lora section, or leave it out"
                yield Fault((f"train.{name}", "lora"), "means nothing without an adapter", fix)
        if self.train.early_stopping_patience:
            key = "train.early_stopping_patience"
            if not self.data.eval:
                yield Fault((key, "data.eval"), "needs held-out rows", "add data.eval")
            if self.train.eval_steps is None:
                yield Fault((key, "train.eval_steps"), "needs evaluations", "set train.eval_steps")
