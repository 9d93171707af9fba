"""Adapters in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``.

Checked against peft 0.21: the same names, shapes, dtypes and, for the same values, the same bytes.
Only safetensors are read and written; nothing is unpickled.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from jlora.config import LoraConfig
from jlora.errors import DataError
from jlora.files import write_atomic
from jlora.io.peft.base_model import differences, write_base_record
from jlora.io.peft.config import read_config, write_config
from jlora.io.peft.conversion import to_peft_form
from jlora.io.peft.initial_factors import abstract_initial_factors, with_initial_factors
from jlora.io.peft.older_releases import rename_old_tensors
from jlora.io.peft.tensors import (
    TENSOR_FILE,
    drop_base_weights,
    mismatches,
    read_tensors,
    tensor_views,
)
from jlora.lora import Adapter, init_adapter
from jlora.tree import paths


def save_adapter(
    directory: str | Path, adapter: Adapter, base: dict[str, str] | None = None
) -> int:
    """Writes the folder that ``PeftModel.from_pretrained`` takes, and reads it back.

    Parts of a fused projection (GPT-2's ``q_proj``) are written as LoRA on the whole of it, which
    is how PEFT can hold them. Tensors are float32.

    Args:
      directory: made if it is not there.
      adapter: what to write.
      base: ``base_record(params, adapter.config)`` of the base model, for ``load_adapter`` to know
        it again; PEFT takes no notice of it.

    Returns:
      The size of the tensor file in bytes.

    What PiSSA and OLoRA started from is subtracted: the file is an ordinary LoRA for the base as it
    is, of twice the rank. See ``jlora.residual`` for the other way.

    Raises:
      DataError: the adapter is empty, not finite or without its ``initial``: nothing is written.
      StorageError: the disk is full or not writable; files already there stay whole.
    """
    adapter = to_peft_form(adapter)
    if adapter.config.init_splits_base:
        raise DataError(
            f"a {adapter.config.init_lora_weights} adapter without what it started from",
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
    file = Path(directory) / TENSOR_FILE
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
    """Reads a PEFT adapter for the model whose parameters (or their shapes) are ``params``.

    A ``pissa`` or ``olora`` adapter is for a base that gave up its first A and B: they are computed
    again, as PEFT does when it loads one, and become ``initial``. That needs values.

    Raises:
      DataError: the folder is not a LoRA adapter, is damaged, or does not fit: every missing,
        unknown and misshapen tensor is listed, and whether the base model is another one.
      ConfigError: it uses a feature of PEFT that jlora lacks, its patterns match nothing, or the
        base that it was trained on cannot be computed from ``params``.
    """
    file = Path(directory) / TENSOR_FILE
    config = read_config(directory)
    shapes = _shapes(config, params)
    arrays = {path: np.zeros(x.shape, np.float32) for path, x in paths.walk(shapes.weights)}
    slots = tensor_views(arrays, shapes.config)
    tensors = rename_old_tensors(read_tensors(file), slots, shapes.config, file)
    drop_base_weights(tensors, params, shapes.config, file)
    faults = [*mismatches(tensors, slots), *differences(directory, params, shapes.config)]
    if faults:
        more = [f"… and {len(faults) - 20} more"] if faults[20:] else []
        listing = "\n  ".join(faults[:20] + more)
        raise DataError(
            f"the adapter does not fit the model:\n  {listing}",
            where=str(file),
            fix="use the base model that it was trained on",
        )
    for name, slot in slots.items():
        slot.write(tensors[name])
    weights = paths.nest({path: jnp.asarray(array) for path, array in arrays.items()})
    return with_initial_factors(dataclasses.replace(shapes, weights=weights), params, config, file)


def abstract_adapter_from_folder(directory: str | Path, params: Any) -> Adapter:
    """What ``load_adapter`` gives, as shapes; of the folder only ``adapter_config.json`` is read.

    Raises:
      DataError: the folder is not a LoRA adapter.
      ConfigError: it uses a feature of PEFT that jlora lacks, or its patterns match nothing.
    """
    config = read_config(directory)
    return abstract_initial_factors(_shapes(config, params), params, config)


def _shapes(config: LoraConfig, params: Any) -> Adapter:
    """A plain adapter of this config for these parameters (or their shapes), as shapes."""
    plain = dataclasses.replace(config, init_lora_weights=True)
    fresh = functools.partial(init_adapter, config=plain)
    arrays = paths.nest({leaf.path: leaf.value for leaf in paths.leaves(params)})
    return jax.eval_shape(fresh, jax.random.key(0), arrays)


def file_bytes(adapter: Adapter) -> int:
    """Bytes of the tensors that ``save_adapter`` writes for an adapter of these shapes."""
    whole = jax.eval_shape(to_peft_form, adapter)
    zero = np.float32(0)
    arrays = {path: np.broadcast_to(zero, x.shape) for path, x in paths.walk(whole.weights)}
    return sum(4 * math.prod(slot.shape) for slot in tensor_views(arrays, whole.config).values())


def to_peft_tensors(adapter: Adapter) -> dict[str, np.ndarray]:
    """The tensors of ``adapter_model.safetensors``: float32, in torch's orientation."""
    adapter = to_peft_form(adapter)
    arrays = {path: np.asarray(a, np.float32) for path, a in paths.walk(adapter.weights)}
    return {name: slot.read() for name, slot in tensor_views(arrays, adapter.config).items()}
