"""The ``evaluate`` section."""

from __future__ import annotations

from dataclasses import dataclass

from jlora.config.engine.schema import ConfigSection, Count, Natural


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(ConfigSection):
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
