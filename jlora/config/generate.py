"""The ``generate`` section."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from jlora.config.engine.convert import Bounds
from jlora.config.engine.schema import ConfigSection, Count, LocalPath, Natural, Positive


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(ConfigSection):
    """Prompts and sampling of ``jlora generate``; fields of transformers' ``GenerationConfig``."""

    prompt: str | None = None
    """The prompt: a user message, or a text to continue with chat: false."""
    file: LocalPath | None = None
    """A JSONL file with a prompt or messages in each line."""
    chat: bool = True
    """Apply the chat template to the prompt; false: continue the prompt as plain text."""
    max_new_tokens: Count = 128
    """Maximum number of tokens in a reply."""
    do_sample: bool = False
    """Sample from the distribution; false: greedy decoding."""
    temperature: Positive = 1.0
    """Divisor of the logits when sampling."""
    top_k: Natural = 0
    """Sample among the k most likely tokens only; 0: all tokens."""
    top_p: Annotated[float, Bounds(0, 1, open_low=True)] = 1.0
    """Nucleus sampling: among the most likely tokens whose probabilities add up to top_p."""
    seed: Natural = 0
    """Random seed of the sampling."""
