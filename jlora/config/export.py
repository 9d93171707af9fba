"""The ``export`` section."""

from __future__ import annotations

from dataclasses import dataclass

from jlora.config.engine.schema import ConfigSection, LocalPath, Natural, OutputFolder


@dataclass(frozen=True, kw_only=True)
class ExportConfig(ConfigSection):
    """Which checkpoint ``jlora export`` converts, and where it writes the result."""

    checkpoint: Natural | LocalPath | None = None
    """Step or folder of the checkpoint, such as 500; null: the newest complete one."""
    output_dir: OutputFolder | None = None
    """Folder for the adapter or model; null: exported/<step> in train.output_dir."""
