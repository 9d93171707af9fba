"""Saving a model as a transformers folder: ``config.json`` and safetensors shards.

Every shard is written to a temporary name, read back and renamed; ``config.json`` is written last.
transformers loads the folder without missing or unexpected tensors.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from jlora.distributed import sharding
from jlora.errors import ConfigError, DataError, StorageError
from jlora.files import storage_error, storage_errors, write_atomic
from jlora.io.hf import prequantized_write
from jlora.io.hf.folder import INDEX, SINGLE
from jlora.io.hf.names import CheckpointTensor, checkpoint_tensors
from jlora.lora.weight import dense
from jlora.models.model import Model
from jlora.models.registry import family_of
from jlora.models.tying import head_differs
from jlora.quant.params import is_quantized
from jlora.tree import paths

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
STALE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def save_pretrained(
    directory: str | Path,
    model: Model,
    params: Mapping[str, Any],
    max_shard_size: int | str = "5GB",
    quantized: bool = False,
) -> list[Path]:
    """Writes ``model`` and ``params`` to ``directory``; returns the files, ``config.json`` last.

    Quantized leaves are dequantized unless ``quantized``; adapters are merged; dtypes are those of
    the leaves. Shards of an earlier save in the folder are removed. In a multi-process run all
    processes must call it; the first one writes.

    Args:
      directory: created if it does not exist.
      model: the parameters' model.
      params: its whole parameter tree.
      max_shard_size: bytes, or a number with KB, MB, GB, KiB, MiB or GiB; a larger tensor
        is the only one in its shard.
      quantized: keep quantized leaves, in bitsandbytes' format (``prequantized_write``).

    Raises:
      DataError: ``params`` is not the model's tree. StorageError: the disk is full or damaged.
      ConfigError: transformers could not load the quantized leaves, or the size is not valid.
    """
    folder = Path(directory)
    names = _check(model, params)
    if quantized:
        prequantized_write.check_writable(params)
    shards = _plan(names, params, _bytes(max_shard_size), quantized)
    files = [folder / SINGLE]
    if len(shards) > 1:
        files = [_numbered(folder, i + 1, len(shards)) for i in range(len(shards))]
    writes = jax.process_index() == 0
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    weight_map, total = {}, 0
    for file, shard in zip(files, shards, strict=True):
        arrays = {}
        for tensor in shard:
            arrays |= _arrays(params, tensor, quantized)
        weight_map |= dict.fromkeys(arrays, file.name)
        total += sum(value.nbytes for value in arrays.values())
        if writes:
            _write_shard(file, arrays)
    if writes:
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_atomic(folder / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")
            files.append(folder / INDEX)
        write_atomic(folder / "config.json", _config(model, params, quantized))
        _remove_stale(folder, {f.name for f in files})
    return [*files, folder / "config.json"]


def _numbered(folder: Path, i: int, n: int) -> Path:
    return folder / f"model-{i:05d}-of-{n:05d}.safetensors"


def _check(model: Model, params: Mapping[str, Any]) -> list[CheckpointTensor]:
    """The tensors to write; DataError unless ``params`` has exactly the model's leaves."""
    want = {path: tuple(leaf.shape) for path, leaf in paths.walk(model.shapes)}
    have = {path: tuple(leaf.shape) for path, leaf in paths.walk(params)}
    problems = [f"  {'.'.join(p)} is missing" for p in want if p not in have]
    problems += [f"  {'.'.join(p)} is not part of the model" for p in have if p not in want]
    problems += [
        f"  {'.'.join(p)} has shape {have[p]}, expected {want[p]}"
        for p in want
        if p in have and have[p] != want[p]
    ]
    if problems:
        raise DataError("these parameters are not the model's:\n" + "\n".join(problems))
    if head_differs(model, params):
        raise DataError(
            "an adapter changes the embedding, but not the output head that is tied to it",
            where="tie_word_embeddings",
            fix="untie the head first: model, params = jlora.untie(model, params)",
        )
    return checkpoint_tensors(model)


def _bytes(size: int | str) -> int:
    if isinstance(size, int) and size > 0:
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?B)\s*", str(size).upper())
    if not match:
        raise ConfigError(f"{size!r} is not a size", where="max_shard_size", fix='such as "5GB"')
    return int(float(match[1]) * UNITS[match[2]])


def _plan(
    names: list[CheckpointTensor], params: Any, limit: int, quantized: bool
) -> list[list[CheckpointTensor]]:
    """The tensors in order, split into shards of at most ``limit`` bytes."""
    shards: list[list[CheckpointTensor]] = [[]]
    used = 0
    for tensor in names:
        size = _nbytes(tensor, params, quantized)
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += size
    return shards


def _nbytes(tensor: CheckpointTensor, params: Any, quantized: bool) -> int:
    leaf = paths.get(params, tensor.path)
    if quantized and is_quantized(leaf):
        return prequantized_write.stored_bytes(leaf, 1 if tensor.layer is None else leaf.shape[0])
    return int(np.prod(tensor.shape)) * np.dtype(leaf.dtype).itemsize


def _arrays(params: Any, tensor: CheckpointTensor, quantized: bool) -> dict[str, np.ndarray]:
    """One tensor, or the tensors of a quantized matrix, by name, on the host."""
    leaf = paths.get(params, tensor.path)
    lead = tuple(i for i in tensor.index if isinstance(i, int))
    if lead:
        leaf = jax.tree.map(lambda x: x[lead], leaf)
    if quantized and is_quantized(leaf):
        module = tensor.name.removesuffix(".weight")
        return prequantized_write.quantized_tensors(module, jax.tree.map(sharding.gather, leaf))
    value = sharding.gather(dense(leaf))[tensor.index[len(lead) :]]
    return {
        tensor.name: np.ascontiguousarray(value.swapaxes(-1, -2) if tensor.transposed else value)
    }


def _write_shard(file: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes one shard, reads it back and renames it."""
    temporary = file.with_name(f".{file.name}.partial")
    try:
        with storage_errors(file):
            save_file(arrays, temporary, metadata={"format": "pt"})
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
        with safe_open(temporary, framework="numpy") as back:
            for name, value in arrays.items():
                if back.get_tensor(name).tobytes() != value.tobytes():
                    raise StorageError(f"{name} reads back differently", where=str(file))
        with storage_errors(file):
            os.replace(temporary, file)
    except StorageError:
        raise
    except Exception as error:  # safetensors reports a full disk as its own error
        raise storage_error(error, file) from error
    finally:
        temporary.unlink(missing_ok=True)


def _config(model: Model, params: Any, quantized: bool) -> str:
    """The original ``config.json`` with the ``dtype`` of the weights as written."""
    hf = model.config.hf
    hf.pop("torch_dtype", None)
    hf.pop("quantization_config", None)
    if quantized:
        hf["quantization_config"] = prequantized_write.quantization_config(model, params)
    hf.setdefault("architectures", [family_of(model.config).architecture])
    if sorted(model.config.eos_token_ids) != sorted(_ids(hf.get("eos_token_id"))):
        hf["eos_token_id"] = list(model.config.eos_token_ids)  # includes generation_config.json's
    embedding = next(leaf for path, leaf in paths.walk(params) if path[-1] == "embedding")
    hf["dtype"] = str(np.dtype(embedding.dtype))
    return json.dumps(hf, indent=2, sort_keys=True) + "\n"


def _ids(value: int | list[int] | None) -> list[int]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _remove_stale(folder: Path, written: set[str]) -> None:
    for file in folder.iterdir():
        if STALE.fullmatch(file.name) and file.name not in written:
            file.unlink()
