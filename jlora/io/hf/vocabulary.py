"""Embeddings and output heads for a vocabulary of another size than that in the files."""

from __future__ import annotations

import numpy as np

from jlora.errors import ConfigError
from jlora.io.hf.folder import Shards
from jlora.io.hf.match import TensorMap
from jlora.io.hf.names import checkpoint_tensors
from jlora.models.model import Model
from jlora.models.resizing import vocabulary_leaves


def with_vocabulary_rows(shards: Shards, source: TensorMap, model: Model) -> Shards:
    """``shards`` in which embedding and head have as many rows as the model's vocabulary.

    Raises:
      ConfigError: one that has another number is quantized in the files.
    """
    if model.config.vocab_size_in_files is None:
        return shards
    resized = {leaf.path for leaf in vocabulary_leaves(model)}
    names = [t.name for t in checkpoint_tensors(model) if t.path in resized]
    if quantized := [name for name in names if name in source.prequantized]:
        raise ConfigError(
            f"{quantized[0]} is quantized in the files: it cannot get rows for new tokens",
            where="model.new_tokens",
            fix="name the model that it was quantized from",
        )
    return ResizedShards(shards, [source.names[name] for name in names], model.config.vocab_size)


class ResizedShards(Shards):
    """Shards whose tensors ``names`` have ``size`` rows: new ones are the mean of the file's.

    The mean is that of ``resize_token_embeddings`` in transformers, which adds noise to it. It is
    computed in float64 and rounded to the tensor's type in the file, so that the rows are the same
    in whatever data type the model is loaded.
    """

    def __init__(self, shards: Shards, names: list[str], size: int):
        self._shards, self.problems, self.files = shards, shards.problems, shards.files
        self._size = size
        self._means: dict[str, np.ndarray | None] = dict.fromkeys(names)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape."""
        shape = self._shards.shape(name)
        return (self._size, *shape[1:]) if name in self._means else shape

    def dtype(self, name: str) -> str:
        """The type's name."""
        return self._shards.dtype(name)

    def read(self, name: str, span: slice | None = None) -> np.ndarray:
        """The tensor's values, or those of a slice of rows."""
        if name not in self._means:
            return self._shards.read(name, span)
        rows, *rest = self._shards.shape(name)
        start, stop, _ = (span or slice(None)).indices(self._size)
        if stop <= rows:
            return self._shards.read(name, slice(start, stop))
        mean = self._mean(name)
        values = np.empty((stop - start, *rest), mean.dtype)
        if start < rows:
            values[: rows - start] = self._shards.read(name, slice(start, rows))
        values[max(0, rows - start) :] = mean
        return values

    def _mean(self, name: str) -> np.ndarray:
        """The mean of the file's rows; read in chunks, once."""
        if (known := self._means[name]) is not None:
            return known
        rows, *rest = self._shards.shape(name)
        total, dtype = np.zeros(rest), None
        for span in self._shards.spans(name):
            part = self._shards.read(name, span)
            dtype = part.dtype
            total += part.astype(np.float64).sum(axis=0)
        mean = self._means[name] = np.asarray(total / rows).astype(dtype)
        return mean
