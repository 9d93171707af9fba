"""The ``quantize`` section."""

from __future__ import annotations

from dataclasses import dataclass

from jlora.config.engine.schema import ConfigSection, OutputFolder


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig(ConfigSection):
    """Where ``jlora quantize`` writes the model; the ``quantization`` section says how."""

    output_dir: OutputFolder | None = None
    """Folder for the quantized model; null: quantized/ in train.output_dir."""
