"""Another size of the vocabulary: which leaves have a row for each token, and how many rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.errors import ConfigError
from jlora.models.model import Model
from jlora.models.registry import family_of
from jlora.quant.params import is_quantized
from jlora.tree import paths

LEAVES = (("model", "embed_tokens", "embedding"), ("lm_head", "kernel"), ("lm_head", "bias"))
"""The embedding, and the head with its bias where it is not tied."""


def with_vocab_size(model: Model, size: int) -> Model:
    """The model, without parameters, for embeddings and heads of ``size`` tokens.

    ``config.json`` is updated, and the number of rows in the files is remembered.
    """
    config = model.config
    if size == config.vocab_size:
        return model
    in_files = config.vocab_size_in_files or config.vocab_size
    config = dataclasses.replace(
        config,
        vocab_size=size,
        vocab_size_in_files=None if size == in_files else in_files,
        hf_json=config.hf_json_with(vocab_size=size),
    )
    return dataclasses.replace(model, config=config)


def as_in_files(model: Model) -> Model:
    """The model with the vocabulary of its files."""
    return with_vocab_size(model, model.config.vocab_size_in_files or model.config.vocab_size)


def vocabulary_leaves(model: Model) -> list[paths.Leaf]:
    """The leaves of ``model.shapes`` with a row, or in the head a column, for each token."""
    rename = family_of(model.config).rename
    known = {leaf.path: leaf for leaf in paths.leaves(model.shapes)}
    return [known[path] for path in map(rename, LEAVES) if path in known]


def resize_token_embeddings(
    model: Model, params: Mapping[str, Any], size: int
) -> tuple[Model, dict[str, Any]]:
    """The model with embeddings and an output head of ``size`` tokens, as in transformers.

    New rows, and new values of the head's bias, are the mean of the others; transformers adds
    noise to it. ``config.json`` is updated. ``load_pretrained`` has ``vocab_size`` for it.

    Raises:
      ConfigError: an embedding or head is quantized.
    """
    grown = {leaf.path for leaf in vocabulary_leaves(model)}

    def resized(path: paths.Path, leaf: Any) -> Any:
        if path not in grown or size == model.config.vocab_size:
            return leaf
        if is_quantized(leaf):
            raise ConfigError(
                f"{'.'.join(path)} is quantized: its rows cannot change",
                where="resize_token_embeddings",
                fix="load the model with load_pretrained(…, vocab_size=…)",
            )
        axis = leaf.ndim - 1 if path[-1] == "kernel" else 0
        old = leaf.shape[axis]
        kept = jax.lax.slice_in_dim(leaf, 0, min(size, old), axis=axis)
        if size <= old:
            return kept
        # In float64, as where rows are added while the files are read (`io.hf.vocabulary`).
        mean = np.sum(np.asarray(leaf), axis=axis, keepdims=True, dtype=np.float64) / old
        more = [size - old if i == axis else n for i, n in enumerate(leaf.shape)]
        return jnp.concatenate([kept, jnp.broadcast_to(mean.astype(leaf.dtype), more)], axis)

    return with_vocab_size(model, size), paths.map_leaves(resized, params)
