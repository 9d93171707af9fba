"""The ``merge`` section."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jlora.config.engine.schema import ConfigSection


@dataclass(frozen=True, kw_only=True)
class MergeConfig(ConfigSection):
    """How ``merge`` folds an adapter into its base."""

    base: Literal["dequantized", "original"] = "dequantized"
    """For QLoRA: fold into the dequantized 4-bit weights it trained on, or the original ones."""
    output_dir: str | None = None
    """Folder for the merged model; null: merged, below train.output_dir."""
