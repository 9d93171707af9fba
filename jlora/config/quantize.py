"""The ``quantize`` section."""

from __future__ import annotations

from dataclasses import dataclass

from jlora.config.engine.schema import ConfigSection


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig(ConfigSection):
    """Where ``quantize`` writes; how it packs is in ``quantization``."""

    output_dir: str | None = None
    """Folder for the packed model; null: quantized, below train.output_dir."""
