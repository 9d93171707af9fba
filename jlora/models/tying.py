"""Untying an output head from the input embedding."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from jlora.errors import ConfigError
from jlora.models.model import Model
from jlora.models.registry import family_of
from jlora.tree import paths


def untie(model: Model, params: Mapping[str, Any]) -> tuple[Model, dict[str, Any]]:
    """The same model with a separate output head, a transposed copy of the embedding.

    An adapter merged into the embedding then leaves the head unchanged (PEFT's merge of a tied
    embedding changes the logits). ``config.json`` is updated.

    Raises:
      ConfigError: the head is not tied.
    """
    if not model.config.tie_word_embeddings or model.config.num_labels is not None:
        raise ConfigError("the output head is not tied", where="tie_word_embeddings")
    hf = {**model.config.hf, "tie_word_embeddings": False}
    config = dataclasses.replace(
        model.config, tie_word_embeddings=False, hf_json=json.dumps(hf, sort_keys=True)
    )
    table = paths.get(params, family_of(config).rename(("model", "embed_tokens", "embedding")))
    head = family_of(config).rename(("lm_head", "kernel"))
    leaves = dict(paths.walk(params))
    return dataclasses.replace(model, config=config), paths.nest({**leaves, head: table.mT})
