"""All sections together."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from jlora.config.cross_section import (
    CLASSIFICATION,
    classification_faults,
    first_value_faults,
    together_faults,
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
        """See ConfigSection."""
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


def load(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """The settings in a YAML file or a run folder; see ``load_section``."""
    return load_section(Config, path, overrides)


def options() -> Iterator[Option]:
    """Every setting of every section, in order."""
    return section_options(Config)
