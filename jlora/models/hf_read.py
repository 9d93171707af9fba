"""Reads a transformers folder into a model and its parameter tree.

Headers are checked against the tree that the configuration asks for before anything is allocated;
then leaf after leaf is read, cast, quantized and placed.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora import paths
from jlora.config import QuantConfig
from jlora.errors import ConfigError, DataError
from jlora.models import hf_packed, mxfp4
from jlora.models.hf_folder import FLOATS, Shards, find_folder, open_shards, read_json
from jlora.models.hf_names import Tensor, embedding_name, head_name, tensors
from jlora.models.hf_packed import Stored, size_text
from jlora.models.model import Model
from jlora.models.registry import family, parse
from jlora.quantization import describe, is_packed, pack, quantize_params, rows_first


def load_pretrained(
    path_or_hub_id: str | Path,
    dtype: str = "bfloat16",
    quantization: QuantConfig | None = None,
    mesh: jax.sharding.Mesh | None = None,
    revision: str | None = None,
    attention: str = "auto",
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

    Raises:
      ConfigError: the model is not there, its configuration is not supported, or the folder is
        packed otherwise than ``quantization`` says.
      DataError: a file is missing or damaged, or its tensors are not those of the model: all
        missing, unexpected, misshapen and doubled ones are named.
    """
    folder = find_folder(path_or_hub_id, revision)
    model = read_model(folder, dtype=dtype, attention=attention)
    with open_shards(folder) as stored:
        shards = mxfp4.Decoded(stored) if model.config.quant_method == "mxfp4" else stored
        source = check(shards, model, folder)
        if source.packed and quantization is not None:
            _check_packing(source, model, quantization)
        return model, read_params(shards, source, model, quantization, mesh)


def read_model(folder: Path, **options: Any) -> Model:
    """The model that a folder's ``config.json`` describes, without its parameters.

    Ids that end a reply are those of ``config.json`` and ``generation_config.json`` together.
    """
    config = parse(read_json(folder / "config.json"), where=str(folder / "config.json"))
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
    """Tensor of the model → the one in the file."""
    packed: Mapping[str, Stored]
    """Those that are packed in the file."""


def check(shards: Shards, model: Model, folder: Path) -> Source:
    """Which tensor of the file each tensor of the model is.

    Names differ in checkpoints of the base model alone and in tied ones that store the head.
    Whether a tensor is packed is for the file to say, if ``config.json`` says that any is.
    """
    expected = {t.name: t for t in tensors(model)}
    trunk, buffers = embedding_name(model).split(".")[0], family(model.config).buffers
    names, problems = {}, list(shards.problems)
    parts = hf_packed.find_parts(shards.files) if model.config.prequantized else {}
    known = {name for group in parts.values() for name in group.values()}
    for name in shards.files:
        full = name if name in expected else f"{trunk}.{name}"
        if full in expected and full not in names:
            names[full] = name
        elif name in known or re.fullmatch(buffers, name) or _is_tied_head(name, model):
            continue
        else:
            problems.append((name, "is not part of this model"))
    head = head_name(model)
    if model.config.tie_word_embeddings and head in shards.files:
        problems += _use_tied_head(shards, names, embedding_name(model), head)
    packed, packs = {}, model.config.prequantized
    for name, tensor in expected.items():
        own = parts.get(names.get(name, ""), {})
        if name not in names:
            problems.append((name, "is missing"))
        elif packs and hf_packed.is_packed(shards, names[name], own, tensor):
            packed[name], faults = hf_packed.inspect(shards, names[name], own, tensor)
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
        problems += hf_packed.differing(_groups(model).values(), packed)
    if problems:
        raise DataError(
            f"the weights do not fit config.json:\n{_listing(problems)}",
            where=str(folder),
            fix="use the config.json and the weights of one model",
        )
    return Source(names, packed)


def _check_packing(source: Source, model: Model, quantization: QuantConfig) -> None:
    """ConfigError where ``quantization`` is not how the folder is packed.

    Which modules are packed is for the folder to say, unless ``quantization`` names some.
    """
    wanted = jax.eval_shape(lambda p: quantize_params(p, quantization), model.shapes)
    named = quantization.llm_int8_skip_modules or quantization.include_modules
    for tensor in tensors(model):
        stored = source.packed.get(tensor.name)
        packs = is_packed(paths.get(wanted, tensor.path)) if named else stored is not None
        have, want = hf_packed.how(stored), describe(quantization) if packs else "not packed"
        if have != want:
            raise ConfigError(
                f"asks for {tensor.name} {want}, but the base model came packed: it is {have}",
                where="quantization",
                fix="leave the section out, and the base is used as it is; "
                "or name the model that it was packed from",
            )


def _is_tied_head(name: str, model: Model) -> bool:
    return name == head_name(model) and model.config.tie_word_embeddings


def _use_tied_head(
    shards: Shards, names: dict[str, str], embedding: str, head: str
) -> list[tuple[str, str]]:
    """Lets the head stand in for a missing embedding; a differing one is a problem."""
    stored = names.setdefault(embedding, head)
    if stored == head or shards.shape(stored) != shards.shape(head):
        return []
    if np.array_equal(shards.read(stored), shards.read(head)):
        return []
    return [(head, f"differs from {stored}, but tie_word_embeddings says that they are one")]


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


def _groups(model: Model) -> dict[paths.Path, list[Tensor]]:
    """The tensors of every leaf, in the order of its layers."""
    groups: dict[paths.Path, list[Tensor]] = {}
    for tensor in tensors(model):
        groups.setdefault(tensor.path, []).append(tensor)
    return groups


def read_params(
    shards: Shards,
    source: Source,
    model: Model,
    quantization: QuantConfig | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> dict[str, Any]:
    """The parameter tree, read leaf by leaf; ``source`` as ``check`` returns it."""
    groups, names = _groups(model), source.names
    shapes = model.shapes
    if source.packed:
        shapes = hf_packed.packed_shapes(shapes, groups, source.packed)
    elif quantization is not None:
        shapes = jax.eval_shape(lambda p: quantize_params(p, quantization), shapes)
    place = _placer(shapes, mesh)

    def read(path: paths.Path, shape: Any) -> Any:
        group = groups[path]
        if source.packed and is_packed(shape):
            return place(path, hf_packed.read_leaf(shards, source.packed, group, shape))
        if quantization is not None and is_packed(shape):
            return place(path, _packed(shards, names, group, shape, quantization))
        return place(path, _dense(shards, names, group, shape))

    return paths.map_leaves(read, shapes)


def _placer(shapes: Any, mesh: jax.sharding.Mesh | None):
    """A function (path, host arrays) → arrays on their devices."""
    if mesh is None:
        return lambda path, leaf: jax.tree.map(jnp.asarray, leaf)
    from jlora import sharding

    where = sharding.shardings(shapes, mesh)
    return lambda path, leaf: sharding.place(leaf, paths.get(where, path))


def _dense(shards: Shards, names: Mapping, group: list[Tensor], shape: Any) -> np.ndarray:
    """A leaf's values, stacked over layers, in ``shape.dtype``."""
    out = np.empty(shape.shape, shape.dtype)
    for tensor in group:
        out[tensor.index] = _value(shards, names, tensor, out.dtype)
    return out


def _packed(
    shards: Shards, names: Mapping, group: list[Tensor], shape: Any, config: QuantConfig
) -> Any:
    """A packed leaf on the host; each layer is packed, and let go, before the next one is read."""
    out = jax.tree.map(lambda child: np.empty(child.shape, child.dtype), shape)

    def fill(tensor: Tensor) -> None:
        value = _value(shards, names, tensor, np.dtype(shape.dtype))
        packed = pack(jnp.asarray(value if rows_first(tensor.path) else value.T), config)
        for child, new in zip(jax.tree.leaves(out), jax.tree.leaves(packed), strict=True):
            child[... if tensor.layer is None else tensor.layer] = new

    for tensor in group:
        fill(tensor)
    return out


def _value(shards: Shards, names: Mapping, tensor: Tensor, dtype: np.dtype) -> np.ndarray:
    """A tensor in ``dtype``, turned as in the tree."""
    value = _cast(shards.read(names[tensor.name]), dtype, tensor.name)
    return value.swapaxes(-1, -2) if tensor.transposed else value


def _cast(value: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """``value`` in ``dtype``; DataError when float16 cannot hold it."""
    if value.dtype == dtype:
        return value
    with np.errstate(over="ignore"):
        cast = value.astype(dtype)
    if dtype == np.float16 and np.isinf(cast).any():
        raise DataError("holds values beyond float16's range", where=name, fix="dtype: bfloat16")
    return cast
