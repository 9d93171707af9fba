"""The ``generate`` section."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from jlora.config.engine.convert import Bounds
from jlora.config.engine.schema import ConfigSection, Count, LocalPath, Natural, Positive


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(ConfigSection):
    """What ``generate`` writes."""

    prompt: str | None = None
    """What the user says."""
    file: LocalPath | None = None
    """A jsonl file of prompts (prompt or messages in each line)."""
    chat: bool = True
    """Put the prompt into the chat template; false: continue the text itself."""
    max_new_tokens: Count = 128
    """Most tokens of a reply."""
    do_sample: bool = False
    """Sample; false: always the most likely token."""
    temperature: Positive = 1.0
    """Divides the logits when sampling."""
    top_k: Natural = 0
    """Sample among the k most likely tokens; 0: all."""
    top_p: Annotated[float, Bounds(0, 1, open_low=True)] = 1.0
    """Sample among the most likely tokens that together have this probability."""
    seed: Natural = 0
    """Seed of the sampling."""
