"""Saving and loading adapters in PEFT's format: JSON config and safetensors.

Tested against peft 0.21: equal names, shapes, dtypes and, for equal values, bytes. Pickles are
never read.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from jlora.config import LoraConfig
from jlora.errors import DataError
from jlora.files import write_atomic
from jlora.io.peft.base_model import base_mismatch, write_base_record
from jlora.io.peft.config import is_mlx, read_config, write_config
from jlora.io.peft.conversion import to_peft_form
from jlora.io.peft.embeddings import base_names, drop_base_weights
from jlora.io.peft.initial_factors import abstract_initial_factors, with_initial_factors
from jlora.io.peft.linear_experts import (
    Layers,
    find_linear_experts,
    linear_views,
    with_one_scale,
    with_target_parameters,
)
from jlora.io.peft.older_releases import rename_old_tensors
from jlora.io.peft.other_tools import MLX_FILE, check_not_torchtune, from_mlx, with_peft_names
from jlora.io.peft.tensors import (
    TENSOR_FILE,
    mismatches,
    only_names_differ,
    read_shapes,
    read_tensors,
    tensor_views,
)
from jlora.lora import Adapter, init_adapter
from jlora.tree import paths


def save_adapter(
    directory: str | Path,
    adapter: Adapter,
    base: dict[str, str] | None = None,
    embeddings: Mapping[str, Any] | None = None,
) -> int:
    """Writes a folder for ``PeftModel.from_pretrained``, and verifies it by reading it back.

    LoRA on parts of a fused projection (GPT-2's ``q_proj``) is written as LoRA on the whole
    projection, since PEFT has no parts. Tensors are float32.

    Args:
      directory: created if it does not exist.
      adapter: the adapter.
      base: ``base_record(params, adapter.config)``, by which ``load_adapter`` recognises the base
        model; PEFT ignores it.
      embeddings: ``embeddings_to_save(model, params, adapter.config)``, rows that are not in the
        base's files; with them PEFT loads the adapter on the base after
        ``base.resize_token_embeddings(…)``.

    Returns:
      The size of the tensor file in bytes.

    For PiSSA and OLoRA the initial A @ B is subtracted by concatenating factors: the file is an
    ordinary LoRA of twice the rank for the original base. See ``jlora.residual`` for the opposite.

    Raises:
      DataError: the adapter is empty, not finite or without its ``initial``: nothing is written.
      StorageError: the disk is full or not writable; existing files are left intact.
    """
    adapter = to_peft_form(adapter)
    if adapter.config.init_splits_base:
        raise DataError(
            f"a {adapter.config.init_lora_weights} adapter without its initial factors",
            where=str(directory),
            fix="put its initial back (dataclasses.replace), or make both with jlora.residual",
        )
    tensors = to_peft_tensors(adapter)
    faults = [name for name, value in tensors.items() if not np.all(np.isfinite(value))]
    if faults or not tensors:
        raise DataError(
            f"not saved: {len(faults)} tensors are not finite" if faults else "nothing to save",
            where=faults[0] if faults else str(directory),
            fix="go back to an earlier checkpoint and lower the learning rate",
        )
    for name, value in (embeddings or {}).items():
        tensors[name] = np.ascontiguousarray(value)
    file = Path(directory) / TENSOR_FILE
    # "pt", as in files that PEFT writes itself.
    data = safetensors.numpy.save(tensors, metadata={"format": "pt"})
    write_atomic(file, data)
    write_config(directory, adapter.config)
    if base is not None:
        write_base_record(directory, base)
    written = read_tensors(file)
    if any(not np.array_equal(written[name], value) for name, value in tensors.items()):
        raise DataError("what was written does not read back", where=str(file))
    return len(data)


def load_adapter(directory: str | Path, params: Any) -> Adapter:
    """Loads a PEFT adapter for the model with the parameters ``params`` (may be abstract).

    Names with the prefixes of other tools, and mlx-lm's folders, are read, too (``other_tools``).

    For ``pissa`` and ``olora`` the initial factors are computed again, as in PEFT, and become
    ``initial``; that needs ``params`` to have values.

    Raises:
      DataError: the folder is not a LoRA adapter, is damaged, or does not fit: every missing,
        unknown and misshapen tensor is listed, and whether the base model differs.
      ConfigError: it uses a feature of PEFT that jlora lacks, its patterns match nothing, or its
        initial factors cannot be computed from ``params``.
    """
    config = read_config(directory)
    file = Path(directory) / (MLX_FILE if is_mlx(directory) else TENSOR_FILE)
    tensors = read_tensors(file)
    check_not_torchtune(tensors, config, file)
    layers = find_linear_experts(tensors, params, config)
    tensors = with_one_scale(tensors, layers, config)
    shapes = _abstract_adapter(config, params, layers)
    # Zeros, which columns beyond a layer's rank keep: the file has no place for them.
    arrays = {path: np.zeros(x.shape, np.float32) for path, x in paths.walk(shapes.weights)}
    linear = {layer.leaf.path for layer in layers.values()}
    others = {path: array for path, array in arrays.items() if path[:-1] not in linear}
    views = tensor_views(others, shapes.config) | linear_views(layers, arrays, config)
    if file.name == MLX_FILE:
        tensors = from_mlx(tensors, views)
    tensors = rename_old_tensors(tensors, views, shapes.config, file)
    # Of names that differ in prefixes only, the adapter's is the one that is meant.
    known = {**dict.fromkeys(base_names(params)), **dict.fromkeys(views)}
    tensors = with_peft_names(tensors, known, file)
    drop_base_weights(tensors, params, views, file)
    if faults := [*mismatches(tensors, views), *base_mismatch(directory, params, shapes.config)]:
        more = [f"… and {len(faults) - 10} more"] if faults[10:] else []
        cause, fix = "the adapter does not fit the model", "use the base model of its training"
        if only_names_differ(tensors, views):
            cause = "the tensors have other names than the adapter's"
            fix = "give them the missing names, or save the adapter again with PEFT"
        raise DataError("\n  ".join([f"{cause}:", *faults[:10], *more]), where=str(file), fix=fix)
    for name, view in views.items():
        view.write(tensors[name])
    weights = paths.nest({path: jnp.asarray(array) for path, array in arrays.items()})
    return with_initial_factors(dataclasses.replace(shapes, weights=weights), params, config, file)


def abstract_adapter_from_folder(directory: str | Path, params: Any) -> Adapter:
    """The abstract result of ``load_adapter``; no tensors are read, only their names.

    Raises:
      DataError: the folder is not a LoRA adapter.
      ConfigError: it uses a feature of PEFT that jlora lacks, or its patterns match nothing.
    """
    config = read_config(directory)
    layers = find_linear_experts(read_shapes(Path(directory) / TENSOR_FILE), params, config)
    return abstract_initial_factors(_abstract_adapter(config, params, layers), params, config)


def _abstract_adapter(config: LoraConfig, params: Any, layers: Layers) -> Adapter:
    """The abstract adapter of this config, without initial factors."""
    if layers:
        config = with_target_parameters(config, layers, params)
    # Shapes are the same for every kind of initial values, and this one needs no base values.
    plain = dataclasses.replace(config, init_lora_weights=True)
    fresh = functools.partial(init_adapter, config=plain)
    arrays = paths.nest({leaf.path: leaf.value for leaf in paths.leaves(params)})
    return jax.eval_shape(fresh, jax.random.key(0), arrays)


def file_bytes(adapter: Adapter, embeddings: Mapping[str, Any] | None = None) -> int:
    """Bytes of the tensors that ``save_adapter`` writes; its arguments may be abstract."""
    whole = jax.eval_shape(to_peft_form, adapter)
    zero = np.float32(0)
    # Views of one number: shapes without memory.
    arrays = {path: np.broadcast_to(zero, x.shape) for path, x in paths.walk(whole.weights)}
    tables = sum(x.size * x.dtype.itemsize for x in (embeddings or {}).values())
    views = tensor_views(arrays, whole.config).values()
    return tables + sum(4 * math.prod(view.shape) for view in views)


def to_peft_tensors(adapter: Adapter) -> dict[str, np.ndarray]:
    """The tensors of ``adapter_model.safetensors``: float32, in torch's orientation."""
    adapter = to_peft_form(adapter)
    arrays = {path: np.asarray(a, np.float32) for path, a in paths.walk(adapter.weights)}
    return {name: view.read() for name, view in tensor_views(arrays, adapter.config).items()}
