"""All sections together: ``Config``, and how it is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from jlora.config.adapter_folder import settings_of_adapter
from jlora.config.cross_section import (
    CLASSIFICATION,
    classification_faults,
    exact_match_faults,
    initialization_faults,
    multi_adapter_faults,
)
from jlora.config.data import DataConfig, SourceConfig
from jlora.config.engine.faults import Fault
from jlora.config.engine.help_text import Option, section_options
from jlora.config.engine.loader import load_section
from jlora.config.engine.schema import ConfigSection
from jlora.config.evaluate import EvaluateConfig
from jlora.config.export import ExportConfig
from jlora.config.generate import GenerateConfig
from jlora.config.lora import LoraConfig
from jlora.config.merge import MergeConfig
from jlora.config.mesh import MeshConfig
from jlora.config.model import ModelConfig
from jlora.config.quantization import QuantConfig
from jlora.config.quantize import QuantizeConfig
from jlora.config.train import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Config(ConfigSection):
    """The settings of a run and of the commands that use it."""

    model: ModelConfig
    """The base model."""
    quantization: QuantConfig | None = None
    """Quantization of the base; fields of transformers' BitsAndBytesConfig. Left out: the base
    is not quantized."""
    lora: LoraConfig | None = None
    """The adapter; fields, defaults and matching rules of PEFT's LoraConfig. Left out: full
    fine-tuning."""
    data: DataConfig
    """Training and held-out rows, and how they become batches."""
    train: TrainConfig
    """The training run; fields of transformers' TrainingArguments."""
    mesh: MeshConfig = MeshConfig()
    """Number of devices along each mesh axis; one axis may be -1: all remaining devices."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Generation during evaluation: exact match, and the samples in the report."""
    generate: GenerateConfig = GenerateConfig()
    """Prompts and sampling of jlora generate; fields of transformers' GenerationConfig."""
    merge: MergeConfig = MergeConfig()
    """What jlora merge merges the adapter into, and where it writes the model."""
    export: ExportConfig = ExportConfig()
    """Which checkpoint jlora export converts, and where it writes the result."""
    quantize: QuantizeConfig = QuantizeConfig()
    """Where jlora quantize writes the model; the quantization section says how."""

    @property
    def compute_dtype(self) -> str:
        """Data type of activations: as train.fp16 and train.bf16 say, or else model.dtype."""
        if self.train.fp16:
            return "float16"
        if self.train.bf16 is None:
            return self.model.dtype
        return "bfloat16" if self.train.bf16 else "float32"

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters of a multi-adapter run, in the data's order; otherwise empty."""
        return tuple(dict.fromkeys(s.adapter for s in self.data.train if s.adapter))

    def for_adapter(self, name: str) -> Config:
        """The settings of a run that trains one adapter of a multi-adapter run, in its folder."""

        def of_adapter(sources: tuple[SourceConfig, ...]) -> tuple[SourceConfig, ...]:
            return tuple(replace(s, adapter=None) for s in sources if s.adapter == name)

        data = replace(
            self.data, train=of_adapter(self.data.train), eval=of_adapter(self.data.eval)
        )
        folder = f"{self.train.output_dir.rstrip('/')}/{name}"
        return replace(self, data=data, train=replace(self.train, output_dir=folder))

    @property
    def is_classification(self) -> bool:
        """Whether the model is a classifier: its rows have classes to learn, instead of text."""
        return self.data.train[0].format == CLASSIFICATION

    def check(self) -> Iterator[Fault]:
        """See ConfigSection."""
        yield from classification_faults(self)
        yield from multi_adapter_faults(self)
        yield from exact_match_faults(self)
        if self.quantization and not self.lora:
            yield Fault(
                ("quantization", "lora"),
                "quantized weights cannot be fully fine-tuned",
                "add a lora section, or leave quantization out",
            )
        yield from initialization_faults(self)
        for name, given in (
            ("loraplus_lr_ratio", self.train.loraplus_lr_ratio),
            ("lorafa", self.train.lorafa),
        ):
            if given and not self.lora:
                fix = "add a lora section, or leave it out"
                yield Fault((f"train.{name}", "lora"), "has no effect without an adapter", fix)
        if self.train.early_stopping_patience:
            key = "train.early_stopping_patience"
            if not self.data.eval:
                yield Fault((key, "data.eval"), "needs held-out rows", "add data.eval")
            if self.train.eval_steps is None:
                yield Fault(
                    (key, "train.eval_steps"),
                    "needs evaluations during training",
                    "set train.eval_steps",
                )


def load(
    path: str | os.PathLike[str], overrides: Sequence[str] = (), adapters: bool = False
) -> Config:
    """The settings in a YAML file or a run folder, with overrides; see ``load_section``.

    With ``adapters`` also those that the folder of a PEFT adapter implies.
    """
    return load_section(Config, path, overrides, settings_of_adapter if adapters else None)


def options() -> Iterator[Option]:
    """Every setting of every section, in order."""
    return section_options(Config)
