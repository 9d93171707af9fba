"""Loading a transformers folder: the model and its parameter tree.

The safetensors headers are checked against the tree that ``config.json`` implies before anything is
allocated. Then tensor by tensor is read, cast, quantized and placed on the devices, so that the
host holds one tensor at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.config import QuantConfig
from jlora.distributed import sharding
from jlora.errors import ConfigError, DataError
from jlora.io.hf import mxfp4, prequantized
from jlora.io.hf.folder import (
    CHUNK_BYTES,
    FLOATS,
    GENERATION,
    Shards,
    find_folder,
    open_shards,
    read_json,
)
from jlora.io.hf.match import TensorMap, match_tensors, tensors_by_leaf, unquantized_matrices
from jlora.io.hf.names import (
    SCORE_HEAD,
    CheckpointTensor,
    checkpoint_tensors,
    head_name,
)
from jlora.io.hf.placement import Index, assemble_leaf
from jlora.io.hf.score_head import ScoreHeadShards
from jlora.io.hf.vocabulary import with_vocabulary_rows
from jlora.models.model import Model
from jlora.models.registry import as_classifier, family_of, parse_config
from jlora.models.resizing import vocabulary_leaves, with_vocab_size
from jlora.models.tying import with_untied_head
from jlora.quant.params import (
    is_quantized,
    quantize_matrix,
    quantize_params,
    scheme_text,
    skipped_in_some_layers,
)
from jlora.tree import paths


class LoadingCancelledError(Exception):
    """``load_pretrained`` stopped between two tensors because its ``cancel`` returned True."""


def load_pretrained(
    path_or_hub_id: str | Path,
    dtype: str = "bfloat16",
    quantization: QuantConfig | None = None,
    mesh: jax.sharding.Mesh | None = None,
    revision: str | None = None,
    attention: str = "auto",
    progress: Callable[[int, int], None] | None = None,
    num_labels: int | None = None,
    seed: int = 0,
    cancel: Callable[[], bool] | None = None,
    untie: bool = False,
    vocab_size: int | None = None,
    stacked_for: QuantConfig | None = None,
) -> tuple[Model, dict[str, Any]]:
    """The model in a transformers folder or hub repository, and its frozen parameters.

    Args:
      path_or_hub_id: a folder with ``config.json`` and safetensors, or a hub model's name.
      dtype: ``float32``, ``bfloat16`` or ``float16``: the compute dtype and that of all leaves
        that are not quantized, whatever the file's dtype.
      quantization: quantizes linear layers as they are read (see ``quantize_params``). A folder
        that bitsandbytes quantized is taken as it is, without it, or with one that quantizes in
        the same way.
      mesh: the devices to place the leaves on; None means JAX's default device.
      revision: a hub repository's branch, tag or commit.
      attention: one of ``ops.attention.BACKENDS``.
      progress: called after every tensor with the bytes read so far and in total.
      num_labels: makes a language model a classifier with this number of classes: a new score
        head replaces its head. Not needed for a classifier's folder.
      seed: for the initialisation of the score head.
      cancel: asked before every tensor, such as the ``is_set`` of a ``threading.Event``; when it
        returns True, nothing more is read.
      untie: gives a tied output head its own copy of the embedding, as ``jlora.untie`` does.
      vocab_size: another number of tokens of the embedding and the output head, as
        ``jlora.resize_token_embeddings`` gives them: new rows are the mean of those in the files.
      stacked_for: stacks the layers as for this ``quantization``, but reads them dense.

    Raises:
      ConfigError: the model is not there, its configuration is not supported, or the folder is
        quantized otherwise than ``quantization`` says, or has another number of classes, or an
        embedding or head in it that needs more rows is quantized.
      DataError: a file is missing or damaged, or its tensors do not fit the model: all missing,
        unexpected, misshapen and duplicate ones are listed.
      LoadingCancelledError: ``cancel`` returned True.
    """
    folder = find_folder(path_or_hub_id, revision)
    model = read_model(folder, quantization or stacked_for, dtype=dtype, attention=attention)
    if untie:
        model = with_untied_head(model)
    if vocab_size is not None:
        model = with_vocab_size(model, vocab_size)
    fresh = num_labels is not None and model.config.num_labels is None
    if num_labels is not None:
        model = dataclasses.replace(model, config=as_classifier(model.config, num_labels))
    with open_tensors(folder, model, seed if fresh else None) as (shards, source):
        if source.prequantized and quantization is not None:
            _check_same_quantization(source, model, quantization)
        return model, read_params(shards, source, model, quantization, mesh, progress, cancel)


def read_vocabulary(folder: Path, model: Model) -> dict[str, Any]:
    """The model's embedding and output head alone, dense, as a part of its parameter tree."""
    groups, found = tensors_by_leaf(model), {}
    with open_tensors(folder, model, seed=0) as (shards, source):
        for leaf in vocabulary_leaves(model):
            (tensor,) = groups[leaf.path]
            value = _value(shards, source.names[tensor.name], np.dtype(leaf.value.dtype))
            found[leaf.path] = jnp.asarray(value.mT if tensor.transposed else value)
    return paths.nest(found)


@contextlib.contextmanager
def open_tensors(
    folder: Path, model: Model, seed: int | None = None
) -> Iterator[tuple[Shards, TensorMap]]:
    """The tensors of a model in a folder, MXFP4 decoded, and where they are.

    With a ``seed`` a classifier gets a new score head if the files have none. The embedding and the
    output head have as many rows as the model's vocabulary.

    Raises:
      DataError: the tensors do not fit the model.
      ConfigError: an embedding or head that needs more rows is quantized.
    """
    with open_shards(folder) as stored:
        shards = mxfp4.DecodedShards(stored) if model.config.quant_method == "mxfp4" else stored
        lacks_head = model.config.num_labels is not None and SCORE_HEAD not in shards.files
        if lacks_head and seed is not None:
            shards = ScoreHeadShards(shards, model.config, head_name(model), seed)
        source = match_tensors(shards, model, folder)
        yield with_vocabulary_rows(shards, source, model), source


def read_model(folder: Path, quantization: QuantConfig | None = None, **options: Any) -> Model:
    """The model that a folder's ``config.json`` describes, without its parameters.

    Its end-of-sequence ids are those of ``config.json`` and ``generation_config.json`` combined.
    Layers that differ in the modules that are quantized are not stacked together. Which do is said
    by the headers of a prequantized folder's weights, if they are there; else by ``quantization``.
    """
    config = parse_config(read_json(folder / "config.json"), where=str(folder / "config.json"))
    # Chat models often name the token that ends a turn there only, and transformers stops at it.
    if (folder / GENERATION).exists():
        generation = read_json(folder / GENERATION)
        more = generation.get("eos_token_id")
        more = more if isinstance(more, list) else [] if more is None else [more]
        ids = tuple(dict.fromkeys((*config.eos_token_ids, *more)))
        text = json.dumps(generation, indent=2) + "\n"
        config = dataclasses.replace(config, eos_token_ids=ids, generation_json=text)
    source = str(folder) if family_of(config).other_tensors else None
    model = Model(config, source=source, **options)
    if config.prequantized and any(folder.glob("*.safetensors")):
        with open_shards(folder) as shards:
            config = dataclasses.replace(config, unquantized=unquantized_matrices(shards, model))
    elif quantization is not None and not config.prequantized:
        apart = skipped_in_some_layers(model.shapes, quantization)
        config = dataclasses.replace(config, unquantized=apart)
    return dataclasses.replace(model, config=config)


def _check_same_quantization(source: TensorMap, model: Model, quantization: QuantConfig) -> None:
    """ConfigError if ``quantization`` differs from how the folder is quantized.

    Which modules are quantized is compared only if ``quantization`` names modules.
    """
    wanted = jax.eval_shape(lambda p: quantize_params(p, quantization), model.shapes)
    named = quantization.llm_int8_skip_modules or quantization.include_modules
    for tensor in checkpoint_tensors(model):
        stored = source.prequantized.get(tensor.name)
        if is_quantized(paths.get(wanted, tensor.path)) if named else stored is not None:
            want = scheme_text(quantization)
        else:
            want = prequantized.NOT_QUANTIZED
        have = prequantized.layout_text(stored)
        if have != want:
            raise ConfigError(
                f"asks for {tensor.name} {want}, but the base model is already quantized: "
                f"it is {have}",
                where="quantization",
                fix="leave the section out, and the base is used as it is; "
                "or name the model that it was quantized from",
            )


def read_params(
    shards: Shards,
    source: TensorMap,
    model: Model,
    quantization: QuantConfig | None = None,
    mesh: jax.sharding.Mesh | None = None,
    progress: Callable[[int, int], None] | None = None,
    cancel: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """The parameter tree, read tensor by tensor; ``source`` is from ``match_tensors``."""
    groups, shapes = tensors_by_leaf(model), model.shapes
    if source.prequantized:
        shapes = prequantized.prequantized_shapes(shapes, groups, source.prequantized)
    elif quantization is not None:
        shapes = jax.eval_shape(lambda p: quantize_params(p, quantization), shapes)
    layout = None if mesh is None else sharding.shardings(shapes, mesh)
    size = functools.partial(_size, shards, source)
    done, total = 0, sum(size(group) for group in groups.values())

    def leaf(path: paths.Path, shape: Any) -> Any:
        parts = _parts(groups[path])

        def read(index: Index) -> Any:
            nonlocal done
            if cancel is not None and cancel():
                raise LoadingCancelledError
            part = _read(shards, source, parts[index], shape, quantization)
            done += size(parts[index])
            if progress is not None:
                progress(done, total)
            return part

        where = None if layout is None else paths.get(layout, path)
        turned = groups[path][0].transposed and not is_quantized(shape)
        return assemble_leaf(shape, where, parts, read, turned)

    return paths.map_leaves(leaf, shapes)


def _parts(group: list[CheckpointTensor]) -> dict[Index, list[CheckpointTensor]]:
    """A leaf's tensors by their index on its leading axes, which several may share."""
    parts: dict[Index, list[CheckpointTensor]] = {}
    for tensor in group:
        index = tuple(i for i in tensor.index if isinstance(i, int))
        parts.setdefault(index, []).append(tensor)
    return parts


def _size(shards: Shards, source: TensorMap, group: Iterable[CheckpointTensor]) -> int:
    """Bytes of tensors in the files, including all parts of quantized ones."""
    stored = [source.prequantized.get(tensor.name) for tensor in group]
    names = [
        [source.names[tensor.name]] if parts is None else parts.names.values()
        for tensor, parts in zip(group, stored, strict=True)
    ]
    return sum(shards.nbytes(name) for parts in names for name in parts)


def _read(
    shards: Shards,
    source: TensorMap,
    group: list[CheckpointTensor],
    shape: Any,
    quantization: QuantConfig | None,
) -> Any:
    """One part of a leaf: dense in the file's orientation, or the quantized matrix."""
    first = group[0]
    if first.name in source.prequantized:
        return prequantized.read_children(shards, source.prequantized[first.name], shape)
    value = _dense(shards, source.names, group, shape)
    if quantization is None or not is_quantized(shape):
        return value
    # Rounded to the model's dtype before: transformers casts first, then bitsandbytes quantizes.
    matrix = jnp.asarray(value)
    return quantize_matrix(matrix if prequantized.is_out_in(first) else matrix.mT, quantization)


def _dense(shards: Shards, names: Mapping, group: list[CheckpointTensor], shape: Any) -> np.ndarray:
    """The tensors of one part in ``shape.dtype``, joined if there are several."""
    dtype = np.dtype(shape.dtype)

    def value(tensor: CheckpointTensor) -> np.ndarray:
        return _value(shards, names[tensor.name], dtype)

    if len(group) == 1:
        return value(group[0])
    within = [tuple(i for i in tensor.index if isinstance(i, slice)) for tensor in group]
    lead = len(group[0].index) - len(within[0])
    matrix = shape.shape[lead:]
    joined = np.empty((*matrix[:-2], *matrix[:-3:-1]) if group[0].transposed else matrix, dtype)
    turn = (lambda x: x.swapaxes(-1, -2)) if group[0].transposed else (lambda x: x)
    for tensor, at in zip(group, within, strict=True):
        turn(joined)[at] = turn(value(tensor))
    return joined


def _value(shards: Shards, name: str, dtype: np.dtype) -> np.ndarray:
    """A tensor in ``dtype``; large ones are cast in chunks, never held whole in both dtypes."""
    if shards.nbytes(name) <= CHUNK_BYTES or FLOATS[shards.dtype(name)] == dtype.name:
        return _cast(shards.read(name), dtype, name)
    out = np.empty(shards.shape(name), dtype)
    for span in shards.spans(name):
        out[span] = _cast(shards.read(name, span), dtype, name)
    return out


def _cast(value: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """``value`` in ``dtype``; DataError when float16 cannot hold it."""
    if value.dtype == dtype:
        return value
    with np.errstate(over="ignore"):
        cast = value.astype(dtype)
    # bfloat16 has the range of float32.
    if dtype == np.float16 and np.isinf(cast).any():
        raise DataError("holds values beyond float16's range", where=name, fix="dtype: bfloat16")
    return cast
