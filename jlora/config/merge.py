"""The ``merge`` section."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from jlora.config.engine.schema import DTYPE_ALIASES, ConfigSection, DType, OutputFolder


@dataclass(frozen=True, kw_only=True)
class MergeConfig(ConfigSection):
    """What ``jlora merge`` merges the adapter into, and where it writes the model."""

    ALIASES: ClassVar = {"dtype": DTYPE_ALIASES}

    base: Literal["dequantized", "original"] = "dequantized"
    """Weights that a QLoRA adapter is merged into: the dequantized ones, on which it was trained,
    or the unquantized original."""
    output_dir: OutputFolder | None = None
    """Folder for the merged model; null: merged/ in train.output_dir."""
    dtype: DType | None = None
    """Data type of the merged model's file; null: that of each tensor in the base model's files."""
