"""Untying an output head from the input embedding."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from jlora.errors import ConfigError
from jlora.models.model import Model
from jlora.models.registry import family_of
from jlora.ops.weights import output_embedding
from jlora.tree import paths


def untie(model: Any, params: Mapping[str, Any]) -> tuple[Model, dict[str, Any]]:
    """The same model with a separate output head, a transposed copy of the embedding.

    An adapter merged into the embedding then leaves the head unchanged (PEFT's merge of a tied
    embedding changes the logits). ``config.json`` is updated.

    Raises:
      ConfigError: the head is not tied, or ``model`` is no model of jlora's.
    """
    untied = with_untied_head(model)
    table = output_embedding(paths.get(params, _embedding_path(model)))
    head = family_of(untied.config).rename(("lm_head", "kernel"))
    return untied, paths.nest({**dict(paths.walk(params)), head: table.mT})


def with_untied_head(model: Any) -> Model:
    """``untie`` without parameters: those are then read from the files of the tied model.

    Raises: as ``untie``.
    """
    if not isinstance(model, Model):
        raise ConfigError(
            f"{type(model).__name__} is no model of jlora's: where its head is tied is in its code",
            where="untie",
            fix="give the module an output layer, and its kernel the embedding's transpose",
        )
    if not model.config.head_is_tied:
        has = "a score head" if model.config.num_labels else "a separate output head"
        raise ConfigError(
            f"the output head is not tied: the model has {has} already",
            where="untie",
            fix="leave it out",
        )
    untied = {"tie_word_embeddings": False}
    # Of a text tower it is also at the top level, where it precedes the one in text_config.
    hf = {**json.loads(model.config.hf_json_with(**untied)), **untied}
    config = dataclasses.replace(
        model.config,
        tie_word_embeddings=False,
        untied=True,
        hf_json=json.dumps(hf, sort_keys=True),
    )
    return dataclasses.replace(model, config=config)


def head_differs(model: Model, params: Mapping[str, Any]) -> bool:
    """Whether the head is tied, but an adapter in ``params`` changes the embedding only.

    Merged, the two would be different weights, for which a tied model has no place.
    """
    if not model.config.head_is_tied:
        return False
    table = paths.get(params, _embedding_path(model))
    return output_embedding(table) is not table


def _embedding_path(model: Model) -> paths.Path:
    return family_of(model.config).rename(("model", "embed_tokens", "embedding"))
