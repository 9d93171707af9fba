"""Reads a transformers folder into a model and its parameter tree.

Headers are checked against the tree that the configuration asks for before anything is allocated;
then tensor after tensor is read, cast, placed and quantized: the host holds one at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.config import QuantConfig
from jlora.distributed import sharding
from jlora.errors import ConfigError, DataError
from jlora.io.hf import mxfp4, prequantized
from jlora.io.hf.folder import CHUNK_BYTES, FLOATS, Shards, find_folder, open_shards, read_json
from jlora.io.hf.names import (
    SCORE_HEAD,
    CheckpointTensor,
    checkpoint_tensors,
    embedding_name,
    head_name,
)
from jlora.io.hf.placement import Index, assemble_leaf
from jlora.io.hf.prequantized import Problems, StoredMatrix, size_text
from jlora.io.hf.score_head import ScoreHeadShards
from jlora.models.model import Model
from jlora.models.registry import as_classifier, family_of, parse_config
from jlora.quant.params import is_quantized, quantize_matrix, quantize_params, scheme_text
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
) -> tuple[Model, dict[str, Any]]:
    """The model in a transformers folder or hub repository, and its frozen parameters.

    Args:
      path_or_hub_id: a folder with ``config.json`` and safetensors, or a hub model's name.
      dtype: ``float32``, ``bfloat16`` or ``float16``: what is computed in, and what weights that
        are not quantized are kept in, whatever the file holds.
      quantization: packs linear layers as they are read (see ``quantize_params``). A folder that
        bitsandbytes packed is taken as it is, without it, or with one that packs in the same way.
      mesh: places every leaf on it; None leaves that to JAX's default device.
      revision: a hub repository's branch, tag or commit.
      attention: see ``attention.BACKENDS``.
      progress: called after every tensor with the bytes that are read and those there are in all.
      num_labels: makes a classifier of so many classes of a language model: in place of its head
        comes a fresh score head. A classifier's folder needs no number.
      seed: of the fresh head.
      cancel: asked before every tensor, such as the ``is_set`` of a ``threading.Event``; when it
        returns True, nothing more is read.

    Raises:
      ConfigError: the model is not there, its configuration is not supported, or the folder is
        packed otherwise than ``quantization`` says, or has another number of classes.
      DataError: a file is missing or damaged, or its tensors are not those of the model: all
        missing, unexpected, misshapen and doubled ones are named.
      LoadingCancelledError: ``cancel`` returned True.
    """
    folder = find_folder(path_or_hub_id, revision)
    model = read_model(folder, dtype=dtype, attention=attention)
    fresh = num_labels is not None and model.config.num_labels is None
    if num_labels is not None:
        model = dataclasses.replace(model, config=as_classifier(model.config, num_labels))
    with open_shards(folder) as stored:
        shards = mxfp4.DecodedShards(stored) if model.config.quant_method == "mxfp4" else stored
        if fresh:
            shards = with_score_head(shards, model, seed)
        source = check(shards, model, folder)
        if source.prequantized and quantization is not None:
            _check_packing(source, model, quantization)
        return model, read_params(shards, source, model, quantization, mesh, progress, cancel)


def with_score_head(shards: Shards, model: Model, seed: int) -> Shards:
    """``shards`` of a classifier, with a fresh score head if they have none."""
    if SCORE_HEAD in shards.files:
        return shards
    return ScoreHeadShards(shards, model.config, head_name(model), seed)


def read_model(folder: Path, **options: Any) -> Model:
    """The model that a folder's ``config.json`` describes, without its parameters.

    Ids that end a reply are those of ``config.json`` and ``generation_config.json`` together.
    """
    config = parse_config(read_json(folder / "config.json"), where=str(folder / "config.json"))
    if (folder / "generation_config.json").exists():
        more = read_json(folder / "generation_config.json").get("eos_token_id")
        more = more if isinstance(more, list) else [] if more is None else [more]
        ids = tuple(dict.fromkeys((*config.eos_token_ids, *more)))
        config = dataclasses.replace(config, eos_token_ids=ids)
    return Model(config, **options)


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the tensors of a model are in its file."""

    names: Mapping[str, str]
    """CheckpointTensor of the model → the one in the file."""
    prequantized: Mapping[str, StoredMatrix]
    """Those that are packed in the file."""


def check(shards: Shards, model: Model, folder: Path) -> Source:
    """Which tensor of the file each tensor of the model is.

    Names differ in checkpoints of the base model alone and in tied ones that store the head.
    Whether a tensor is packed is for the file to say, if ``config.json`` says that any is.
    """
    expected = {t.name: t for t in checkpoint_tensors(model)}
    parts = (
        prequantized.find_quantization_tensors(shards.files) if model.config.prequantized else {}
    )
    names, problems = _find(shards, model, expected, parts)
    packed, packs = {}, model.config.prequantized
    for name, tensor in expected.items():
        own = parts.get(names.get(name, ""), {})
        if name not in names:
            problems.append((name, "is missing"))
        elif packs and prequantized.is_prequantized(shards, names[name], own, tensor):
            packed[name], faults = prequantized.inspect(shards, names[name], own, tensor)
            problems += faults
            parts.pop(names[name], None)
        elif shards.shape(names[name]) != tensor.shape:
            shape = size_text(shards.shape(names[name]))
            problems.append((name, f"has shape {shape}, expected {size_text(tensor.shape)}"))
        elif shards.dtype(names[name]) not in FLOATS:
            problems.append((name, f"is of type {shards.dtype(names[name])}, not a float"))
    orphans = (name for group in parts.values() for name in group.values())
    problems += [(name, "is not part of this model") for name in orphans]
    if packs and not packed:
        problems.append(("quantization_config", "is in config.json, but no tensor is packed"))
    if None not in packed.values():
        problems += prequantized.differing(_groups(model).values(), packed)
    problems += _check_tied_head(shards, model, names, bool(problems))
    if problems:
        raise DataError(
            f"the weights do not fit config.json:\n{_listing(problems)}",
            where=str(folder),
            fix="use the config.json and the weights of one model",
        )
    return Source(names, packed)


def _find(
    shards: Shards, model: Model, expected: Iterable[str], parts: Mapping[str, Mapping[str, str]]
) -> tuple[dict[str, str], Problems]:
    """{tensor of the model: the file's}, and what the shards have otherwise or twice."""
    names, problems = {}, list(shards.problems)
    table, head = embedding_name(model), head_name(model)
    known = {name for group in parts.values() for name in group.values()}
    if model.config.tie_word_embeddings:
        known.add(head)
    for name in shards.files:
        full = name if name in expected else f"{table.split('.')[0]}.{name}"
        if full in names:
            problems.append((name, f"is there as {names[full]} too"))
        elif full in expected:
            names[full] = name
        elif name not in known and not re.fullmatch(family_of(model.config).buffers, name):
            problems.append((name, "is not part of this model"))
    if model.config.tie_word_embeddings and head in shards.files:
        names.setdefault(table, head)
    return names, problems


def _check_tied_head(
    shards: Shards, model: Model, names: Mapping[str, str], spoilt: bool
) -> Problems:
    """What is wrong with a head beside the embedding that it is tied to.

    Their values are compared only where nothing else is wrong.
    """
    head, table = head_name(model), names.get(embedding_name(model))
    if not model.config.tie_word_embeddings or head not in shards.files or table in (None, head):
        return []
    if (shape := shards.shape(head)) != shards.shape(table):
        expected = size_text(shards.shape(table))
        return [(head, f"has shape {size_text(shape)}, expected {expected}")]
    if spoilt or shards.same(table, head):
        return []
    return [(head, f"differs from {table}, but tie_word_embeddings says that they are one")]


def _check_packing(source: Source, model: Model, quantization: QuantConfig) -> None:
    """ConfigError where ``quantization`` is not how the folder is packed.

    Which modules are packed is for the folder to say, unless ``quantization`` names some.
    """
    wanted = jax.eval_shape(lambda p: quantize_params(p, quantization), model.shapes)
    named = quantization.llm_int8_skip_modules or quantization.include_modules
    for tensor in checkpoint_tensors(model):
        stored = source.prequantized.get(tensor.name)
        packs = is_quantized(paths.get(wanted, tensor.path)) if named else stored is not None
        have, want = prequantized.how(stored), scheme_text(quantization) if packs else "not packed"
        if have != want:
            raise ConfigError(
                f"asks for {tensor.name} {want}, but the base model came packed: it is {have}",
                where="quantization",
                fix="leave the section out, and the base is used as it is; "
                "or name the model that it was packed from",
            )


def _listing(problems: Iterable[tuple[str, str]]) -> str:
    """One line a problem; the same one in many layers is one line with their number."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, cause in problems:
        groups.setdefault((re.sub(r"\.\d+\.", ".*.", name), cause), []).append(name)
    lines = []
    for (pattern, cause), names in groups.items():
        many = len(names) > 1
        lines.append(f"  {pattern if many else names[0]} {cause}{f' ({len(names)}×)' * many}")
    return "\n".join(lines)


def _groups(model: Model) -> dict[paths.Path, list[CheckpointTensor]]:
    """The tensors of every leaf, in the order of its layers."""
    groups: dict[paths.Path, list[CheckpointTensor]] = {}
    for tensor in checkpoint_tensors(model):
        groups.setdefault(tensor.path, []).append(tensor)
    return groups


def read_params(
    shards: Shards,
    source: Source,
    model: Model,
    quantization: QuantConfig | None = None,
    mesh: jax.sharding.Mesh | None = None,
    progress: Callable[[int, int], None] | None = None,
    cancel: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """The parameter tree, read tensor by tensor; ``source`` as ``check`` returns it."""
    groups, shapes = _groups(model), model.shapes
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
    """A leaf's tensors by the place on its leading axes that they are in, or share."""
    parts: dict[Index, list[CheckpointTensor]] = {}
    for tensor in group:
        index = tuple(i for i in tensor.index if isinstance(i, int))
        parts.setdefault(index, []).append(tensor)
    return parts


def _size(shards: Shards, source: Source, group: Iterable[CheckpointTensor]) -> int:
    """Bytes of tensors in the file, all parts of packed ones included."""
    stored = [source.prequantized.get(tensor.name) for tensor in group]
    names = [
        [source.names[tensor.name]] if packed is None else packed.names.values()
        for tensor, packed in zip(group, stored, strict=True)
    ]
    return sum(shards.nbytes(name) for own in names for name in own)


def _read(
    shards: Shards,
    source: Source,
    group: list[CheckpointTensor],
    shape: Any,
    quantization: QuantConfig | None,
) -> Any:
    """One part of a leaf: lying as in the file, or packed."""
    first = group[0]
    if first.name in source.prequantized:
        return prequantized.read(shards, source.prequantized[first.name], shape)
    value = _dense(shards, source.names, group, shape)
    if quantization is None or not is_quantized(shape):
        return value
    matrix = jnp.asarray(value)
    return quantize_matrix(matrix if prequantized.is_out_in(first) else matrix.mT, quantization)


def _dense(shards: Shards, names: Mapping, group: list[CheckpointTensor], shape: Any) -> np.ndarray:
    """The tensors of one part in ``shape.dtype``, joined where there are several."""
    dtype = np.dtype(shape.dtype)

    def value(tensor: CheckpointTensor) -> np.ndarray:
        return _value(shards, names[tensor.name], dtype)

    if len(group) == 1:
        return value(group[0])
    within = [tuple(i for i in tensor.index if isinstance(i, slice)) for tensor in group]
    lead = len(group[0].index) - len(within[0])
    own = shape.shape[lead:]
    whole = np.empty((*own[:-2], *own[:-3:-1]) if group[0].transposed else own, dtype)
    turn = (lambda x: x.swapaxes(-1, -2)) if group[0].transposed else (lambda x: x)
    for tensor, at in zip(group, within, strict=True):
        turn(whole)[at] = turn(value(tensor))
    return whole


def _value(shards: Shards, name: str, dtype: np.dtype) -> np.ndarray:
    """A tensor of the file in ``dtype``; one to be cast is not held whole in both."""
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
    if dtype == np.float16 and np.isinf(cast).any():
        raise DataError("holds values beyond float16's range", where=name, fix="dtype: bfloat16")
    return cast
