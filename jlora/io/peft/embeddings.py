"""The base's embeddings and output heads that PEFT saves with an adapter.

It does so for those that are adapted, and for all of them after the vocabulary was resized.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jlora.config import LoraConfig
from jlora.errors import DataError
from jlora.io.peft.other_tools import with_peft_names
from jlora.io.peft.tensors import PREFIX, TENSOR_FILE, read_tensors
from jlora.lora.targets import is_replaced
from jlora.lora.targets.rules import INPUT_EMBEDDINGS
from jlora.models import Model
from jlora.tree import paths


def drop_base_weights(
    tensors: dict[str, np.ndarray], params: Any, config: LoraConfig, file: Path
) -> None:
    """Removes the base's embeddings and heads from ``tensors``; trained ones stay.

    Raises:
      DataError: one differs from the model's weight: the adapter is for another base, or one with
        another vocabulary.
    """
    for name, leaf in [*_saved_weights(tensors, params)]:
        if is_replaced(config, leaf.module(), leaf.kind):
            continue
        value = tensors.pop(name)
        shape = leaf.shape[::-1] if leaf.kind == "kernel" else leaf.shape
        # Abstract leaves, quantized ones and shards on other hosts are not compared by value.
        here = getattr(leaf.value, "is_fully_addressable", False)
        cause = f"it has the shape {value.shape}, here it is {shape}"
        if value.shape == shape:
            rows = _differing_rows(value, leaf) if here else []
            if not rows:
                continue
            cause = f"{len(rows)} rows differ"
        if value.shape[1:] == shape[1:]:
            cause += "; the vocabulary may have been resized"
        raise DataError(
            f"{name} is not the model's weight ({cause})",
            where=str(file),
            fix="use the base model that it was trained on; or take its embeddings from here: "
            "model, params = jlora.with_adapter_embeddings(folder, model, params), for the "
            "commands saved with jlora.save_pretrained",
        )


def with_adapter_embeddings(
    directory: str | Path, model: Model, params: Mapping[str, Any]
) -> tuple[Model, dict[str, Any]]:
    """The model with the embeddings and the head that are saved in an adapter's folder.

    That is the base of an adapter for which the vocabulary was resized.

    Args:
      directory: PEFT's folder.
      model: the base as it was before.
      params: its parameters; saved leaves are cast to their dtypes.

    Raises:
      DataError: the folder has no embedding, or its shapes do not fit together.
    """
    file = Path(directory) / TENSOR_FILE
    tensors = with_peft_names(read_tensors(file), base_names(params), file)
    found = {leaf.path: (leaf, tensors[name]) for name, leaf in _saved_weights(tensors, params)}
    sizes = {value.shape[0] for _, value in found.values()}
    table = next((leaf for leaf, _ in found.values() if leaf.kind == "embedding"), None)
    if table is None:
        # PEFT 0.21 saves no embedding where only the head has an adapter.
        resized = any(value.shape[0] != leaf.shape[-1] for leaf, value in found.values())
        raise DataError(
            "holds no embedding" + (", only an output head of another size" if resized else ""),
            where=str(file),
            fix="name embed_tokens in modules_to_save and train the adapter again"
            if resized
            else "use the base model as it is",
        )
    if len(sizes) > 1:
        raise DataError(
            f"its embedding and its head have different numbers of tokens: {sorted(sizes)}",
            where=str(file),
        )
    (size,) = sizes
    leaves = dict(paths.walk(params))
    for path, (leaf, value) in found.items():
        value = value.T if leaf.kind == "kernel" else value
        leaves[path] = jnp.asarray(value.astype(np.dtype(leaf.value.dtype)))
    heads = [leaf for leaf in paths.leaves(params) if leaf.path[-2:-1] == ("lm_head",)]
    if any(leaf.path not in found and leaf.shape[-1] != size for leaf in heads):
        raise DataError(
            f"holds an embedding of {size} tokens, but no output head; the model's is not tied",
            where=str(file),
            fix="save the adapter again with save_embedding_layers=True",
        )
    hf = model.config.hf_json_with(vocab_size=size)
    config = dataclasses.replace(model.config, vocab_size=size, hf_json=hf)
    return dataclasses.replace(model, config=config), paths.nest(leaves)


def base_names(params: Any) -> dict[str, paths.Leaf]:
    """The names under which PEFT saves weights of the base, and the leaves.

    A tied head's weight is the table. Only an output head is saved with its bias.
    """
    leaves = [leaf for leaf in paths.leaves(params) if leaf.stack is None]
    weights: dict[str, paths.Leaf] = {}
    biases: dict[str, paths.Leaf] = {}
    for leaf in leaves:
        last = leaf.module().rpartition(".")[2]
        if leaf.kind in ("kernel", "embedding") and len(leaf.shape) == 2:
            weights[leaf.module()] = leaf
        elif leaf.kind == "bias" and len(leaf.shape) == 1 and last in paths.OUTPUT_HEADS:
            biases[leaf.module()] = leaf
    tables = [x for name, x in weights.items() if name.rpartition(".")[2] in INPUT_EMBEDDINGS]
    tied = {head: tables[0] for head in paths.OUTPUT_HEADS if tables}
    return {
        f"{PREFIX}{module}{node}.{end}": leaf
        for end, found in (("weight", tied | weights), ("bias", biases))
        for module, leaf in found.items()
        for node in ("", ".base_layer")
    }


def _saved_weights(
    tensors: Mapping[str, np.ndarray], params: Any
) -> Iterator[tuple[str, paths.Leaf]]:
    """Names of tensors that are weights of the base, and the leaves."""
    return ((name, leaf) for name, leaf in base_names(params).items() if name in tensors)


def _differing_rows(value: np.ndarray, leaf: paths.Leaf) -> list[int]:
    weight = np.asarray(leaf.value)
    weight = weight.T if leaf.kind == "kernel" else weight
    differs = value.astype(weight.dtype) != weight
    return np.flatnonzero(differs.reshape(len(weight), -1).any(1)).tolist()
