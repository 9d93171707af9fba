"""A new score head for training a classifier from a language model's folder."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np

from jlora.io.hf.folder import Shards
from jlora.io.hf.names import SCORE_HEAD
from jlora.models.config import DecoderConfig


class ScoreHeadShards(Shards):
    """Shards with a newly initialised score head in place of the language model's head.

    It is initialised as in transformers: normal with standard deviation ``initializer_range``.
    """

    def __init__(self, shards: Shards, config: DecoderConfig, head: str, seed: int):
        self._shards, self.problems = shards, shards.problems
        self.files = {SCORE_HEAD: Path(SCORE_HEAD), **shards.files}
        if not config.tie_word_embeddings:  # a tied head's tensor may be the embedding
            module = head.removesuffix("weight")
            self.files = {k: v for k, v in self.files.items() if not k.startswith(module)}
        size = config.num_outputs, config.feature_size
        drawn = config.initializer_range * jax.random.normal(jax.random.key(seed), size)
        self._score = np.asarray(drawn)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape."""
        return self._score.shape if name == SCORE_HEAD else self._shards.shape(name)

    def dtype(self, name: str) -> str:
        """The type's name."""
        return "F32" if name == SCORE_HEAD else self._shards.dtype(name)

    def read(self, name: str, span: slice | None = None) -> np.ndarray:
        """The tensor's values, or those of a slice of rows."""
        if name != SCORE_HEAD:
            return self._shards.read(name, span)
        return self._score if span is None else self._score[span]
