"""The ``evaluate`` section."""

from __future__ import annotations

from dataclasses import dataclass

from jlora.config.engine.schema import ConfigSection, Count, Natural


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(ConfigSection):
    """Generation during evaluation: exact match, and the samples in the report."""

    exact_match: bool = False
    """Generate a reply to each held-out row and compare it with the row's last reply."""
    max_new_tokens: Count = 64
    """Maximum number of tokens in a generated reply."""
    samples: Natural = 3
    """Number of held-out rows whose replies before and after training are shown."""
    batch_size: Count = 32
    """Number of replies generated at once."""
    max_rows: Count | None = None
    """Maximum number of held-out rows to generate replies for; null: all of them."""
