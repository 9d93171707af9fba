"""The ``export`` section."""

from __future__ import annotations

from dataclasses import dataclass

from jlora.config.engine.schema import ConfigSection, LocalPath, Natural


@dataclass(frozen=True, kw_only=True)
class ExportConfig(ConfigSection):
    """Which weights of a run ``export`` writes, and where."""

    checkpoint: Natural | LocalPath | None = None
    """A checkpoint's step, such as 500, or its folder; null: the newest whole one."""
    output_dir: str | None = None
    """Folder for the adapter or the model; null: exported/<step>, below train.output_dir."""
