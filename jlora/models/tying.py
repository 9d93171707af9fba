"""Output heads that are tied to the input embedding, and how to part the two."""

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
    """The same function with an output head of its own, a transposed copy of the embedding.

    What is then merged into the embedding does not change the head; ``config.json`` says so too.

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
    kept = dict(paths.walk(params))
    return dataclasses.replace(model, config=config), paths.nest({**kept, head: table.mT})
