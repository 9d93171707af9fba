"""The base's embeddings and output heads that PEFT saves with an adapter.

It does so for those that are adapted, and for all of them after the vocabulary was resized; jlora
then saves those that have rows which the base's files lack and the adapter does not replace.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.config import LoraConfig
from jlora.errors import DataError
from jlora.io.peft.config import read_config
from jlora.io.peft.other_tools import with_peft_names
from jlora.io.peft.tensors import PREFIX, TENSOR_FILE, read_shapes, read_tensors
from jlora.lora.targets import is_replaced, is_saved, rank_of, token_indices
from jlora.lora.targets.names import SCORE_HEADS
from jlora.lora.targets.rules import INPUT_EMBEDDINGS
from jlora.lora.weight import dense
from jlora.models import Model, resize_token_embeddings, vocabulary_leaves
from jlora.tree import paths

NODES = ("", ".base_layer", ".token_adapter.base_layer", ".original_module")
"""Where PEFT has the base's weight: in the module itself, below LoRA, below trained rows, below a
copy that is trained in full."""


def needed_weights(model: Model, config: LoraConfig) -> list[paths.Leaf]:
    """The base's weights that an adapter's folder must hold after the vocabulary was resized.

    They have rows that the base's files lack and that the adapter does not replace.
    """
    size, in_files = model.config.vocab_size, model.config.vocab_size_in_files
    if in_files is None:
        return []
    added = {*range(in_files, size)}

    def is_needed(leaf: paths.Leaf) -> bool:
        name, tied = leaf.module(), leaf.kind == "embedding" and model.config.head_is_tied
        if is_replaced(config, name, leaf.kind) and not tied:
            return False  # a tied head has the base's values even then
        is_trained = bool(added) and added <= {*token_indices(config, name)}
        return leaf.kind == "bias" or not is_trained

    # Both embedding and head. With LoRA on an untied head alone peft 0.21 leaves out the embedding,
    # whose new rows are then lost: logits differ by 1.7 of 2.3 after reloading.
    return [leaf for leaf in vocabulary_leaves(model) if is_needed(leaf)]


def embeddings_to_save(
    model: Model, params: Mapping[str, Any], config: LoraConfig
) -> dict[str, Any]:
    """PEFT's tensors of the ``needed_weights``, for ``save_adapter``; in torch's orientation.

    Args:
      model: the base.
      params: its parameters.
      config: the adapter's.
    """
    values, found = dict(paths.walk(params)), {}
    for leaf in needed_weights(model, config):
        module, value = leaf.module(), dense(values[leaf.path])
        node = NODES[0]
        if rank_of(config, module):
            node = NODES[1]
        elif token_indices(config, module):
            node = NODES[2]
        elif any(is_saved(module, m) for m in config.modules_to_save or ()):
            node = NODES[3]
        name = f"{PREFIX}{module}{node}.{'bias' if leaf.kind == 'bias' else 'weight'}"
        found[name] = value.mT if leaf.kind == "kernel" else value
    return found


def drop_base_weights(
    tensors: dict[str, np.ndarray], params: Any, trained: Collection[str], file: Path
) -> None:
    """Removes the base's embeddings and heads from ``tensors``; ``trained`` ones stay.

    Raises:
      DataError: one differs from the model's weight: the adapter is for another base, or one with
        another vocabulary.
    """
    for name, leaf in [*_saved_weights(tensors, params, trained)]:
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
    _drop_copies(tensors, params, trained)


def _drop_copies(tensors: dict[str, np.ndarray], params: Any, trained: Collection[str]) -> None:
    """Removes what PEFT writes twice after a resize, if both are equal.

    These are modules that are trained in full, and trained rows of a tied head.
    """
    names = {leaf.module() for leaf in base_names(params).values()}
    table = next((n for n in names if n.rpartition(".")[2] in INPUT_EMBEDDINGS), "")
    tied = rf"^({re.escape(PREFIX)})({'|'.join(paths.OUTPUT_HEADS)})(?=\.token_adapter\.)"
    for name in [n for n in tensors if n not in trained]:
        other = name.replace(".modules_to_save.weight", ".weight")
        other = re.sub(tied, rf"\1{table}", other)
        if other != name and np.array_equal(tensors[name], tensors.get(other, ())):
            del tensors[name]


def saved_vocab_size(directory: str | Path, model: Model) -> int | None:
    """The number of tokens of the embedding, or of the output head, in an adapter's folder.

    Where it holds neither, it is that of trained rows if the model's vocabulary is too small for
    them, else None.

    Raises:
      DataError: embedding and head have different numbers.
    """
    file = Path(directory) / TENSOR_FILE
    if not (shapes := read_shapes(file)):
        return None
    names = base_names(model.shapes)
    tables = {leaf.path for leaf in vocabulary_leaves(model)}
    found = with_peft_names(shapes, names, file)
    sizes = {x[0] for name, x in found.items() if name in names and names[name].path in tables}
    if len(sizes) > 1:
        raise DataError(
            f"its embedding and its head have different numbers of tokens: {sorted(sizes)}",
            where=str(file),
        )
    if sizes:
        return sizes.pop()
    wanted = read_config(directory).trainable_token_indices or ()
    lists = wanted.values() if isinstance(wanted, Mapping) else [wanted]
    most = 1 + max((i for indices in lists for i in indices), default=-1)
    return most if most > model.config.vocab_size else None


def with_saved_embeddings(
    directory: str | Path, model: Model, params: Mapping[str, Any]
) -> dict[str, Any]:
    """``params`` with the rows of embeddings and heads that are saved in an adapter's folder.

    Rows that are equal, in the less exact of both data types, stay as they are.

    Args:
      directory: PEFT's folder.
      model: a model with the folder's ``saved_vocab_size``.
      params: its parameters.

    Raises:
      DataError: rows that the model's files lack are not in the folder.
    """
    file = Path(directory) / TENSOR_FILE
    config, names = read_config(directory), base_names(params)
    tensors = with_peft_names(read_tensors(file), names, file)
    trained = {
        f"{PREFIX}{leaf.module()}.{end}"
        for leaf in names.values()
        if is_replaced(config, leaf.module(), leaf.kind)
        for end in (("bias", "base_layer.bias") if leaf.kind == "bias" else ("weight",))
    }
    found = {leaf.path: (leaf, n) for n, leaf in _saved_weights(tensors, params, trained)}
    _check_needed(model, config, found, file)
    leaves = dict(paths.walk(params))
    for path, (leaf, name) in found.items():
        turned = leaf.kind == "kernel"
        differs, value = _take_rows(
            leaf.value, tensors[name].T if turned else tensors[name], turned
        )
        if differs:
            leaves[path] = value
    return paths.nest(leaves)


def _check_needed(
    model: Model, config: LoraConfig, found: Collection[paths.Path], file: Path
) -> None:
    """DataError if the folder lacks rows that the model's files lack, too."""
    for leaf in needed_weights(model, config):
        if leaf.path in found:
            continue
        if leaf.kind == "embedding":
            only = ", only an output head of another size" if found else ""
            cause = f"holds no embedding{only}"
            fix = "name embed_tokens in modules_to_save and train the adapter again"
        else:
            part = "bias of the output head" if leaf.kind == "bias" else "output head"
            cause = f"holds an embedding of {model.config.vocab_size} tokens, but no {part}; the "
            cause += "model's is not tied"
            fix = "save the adapter again with save_embedding_layers=True"
        raise DataError(cause, where=str(file), fix=fix)


# Jitted for arrays that are sharded over several processes.
@functools.partial(jax.jit, static_argnames="columns")
def _take_rows(leaf: Any, saved: Any, columns: bool) -> tuple[Any, Any]:
    """Whether rows (or columns) of a leaf differ from the saved ones, and the leaf with those."""
    here = dense(leaf)
    less = saved.dtype if saved.dtype.itemsize < here.dtype.itemsize else here.dtype
    differs = here.astype(less) != saved.astype(less)
    if here.ndim > 1:
        differs = differs.any(axis=0 if columns else 1, keepdims=True)
    return differs.any(), jnp.where(differs, saved.astype(here.dtype), here)


def with_adapter_embeddings(
    directory: str | Path, model: Model, params: Mapping[str, Any]
) -> tuple[Model, dict[str, Any]]:
    """The model with the embeddings and the head that are saved in an adapter's folder.

    That is the base of an adapter for which the vocabulary was resized.

    Args:
      directory: PEFT's folder.
      model: the base as it was before.
      params: its parameters; saved rows are cast to their dtypes.

    Raises:
      DataError: the folder has no embedding, or its shapes do not fit together.
      ConfigError: an embedding or head that gets rows is quantized.
    """
    size = saved_vocab_size(directory, model)
    if size is None:
        raise DataError(
            "holds no embedding",
            where=str(Path(directory) / TENSOR_FILE),
            fix="use the base model as it is",
        )
    model, resized = resize_token_embeddings(model, params, size)
    return model, with_saved_embeddings(directory, model, resized)


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
    heads = [head for head in paths.OUTPUT_HEADS if head not in SCORE_HEADS]
    tied = {head: tables[0] for head in heads if tables}
    return {
        f"{PREFIX}{module}{node}.{end}": leaf
        for end, found in (("weight", tied | weights), ("bias", biases))
        for module, leaf in found.items()
        for node in NODES
    }


def _saved_weights(
    tensors: Mapping[str, np.ndarray], params: Any, trained: Collection[str]
) -> Iterator[tuple[str, paths.Leaf]]:
    """Names of tensors that are weights of the base, not ``trained`` ones, and the leaves."""
    for name, leaf in base_names(params).items():
        if name in tensors and name not in trained:
            yield name, leaf


def _differing_rows(value: np.ndarray, leaf: paths.Leaf) -> list[int]:
    """Rows of the saved ``value`` that differ in the less exact of both data types."""
    weight = np.asarray(leaf.value)
    weight = weight.T if leaf.kind == "kernel" else weight
    # The file has the data type in which PEFT trained, the model the one in which it was loaded.
    less = value.dtype if value.dtype.itemsize < weight.dtype.itemsize else weight.dtype
    differs = value.astype(less) != weight.astype(less)
    return np.flatnonzero(differs.reshape(len(weight), -1).any(1)).tolist()
