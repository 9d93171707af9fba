"""Saving a model as a transformers folder: ``config.json`` and safetensors shards.

The files are written to a temporary folder and read back, then moved to their names,
``config.json`` last. transformers loads the folder without missing or unexpected tensors.

What the model's files hold besides the model (a vision tower, the settings of its processor) is
copied from the folder that the model was read from, tensor by tensor.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from jlora.config import QuantConfig
from jlora.distributed import sharding
from jlora.errors import ConfigError, DataError, StorageError
from jlora.files import PARTIAL, staged_folder, storage_errors
from jlora.io.hf import prequantized, prequantized_write
from jlora.io.hf.folder import FLOATS, GENERATION, INDEX, SINGLE, Shards, open_shards
from jlora.io.hf.names import CheckpointTensor, checkpoint_tensors, is_of_others
from jlora.io.hf.read import open_tensors, read_model
from jlora.lora.weight import dense
from jlora.models.model import Model
from jlora.models.registry import family_of
from jlora.models.tying import head_differs
from jlora.quant.params import is_quantized
from jlora.tree import paths

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
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
    the leaves. ``generation_config.json`` is the one that the model was loaded with. Weights of an
    earlier save in the folder are replaced when the new ones are whole. In a multi-process run all
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
    tensors = _check(model, params)
    if quantized:
        prequantized_write.check_writable(params)
    limit = _bytes(max_shard_size)
    writes = jax.process_index() == 0
    weight_map, total = {}, 0
    with _others(model, quantized) as others, staged_model(folder) as staging:
        sizes = [(tensor, _nbytes(tensor, params, quantized)) for tensor in tensors]
        shards = _plan([*sizes, *((name, others.nbytes(name)) for name in others.files)], limit)
        names = [SINGLE]
        if (count := len(shards)) > 1:
            names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        for name, shard in zip(names, shards, strict=True):
            arrays = {}
            for tensor in shard:
                if not isinstance(tensor, str):
                    # In every process: leaves that are sharded over several are gathered.
                    arrays |= _arrays(params, tensor, quantized)
                # The others would read a vision tower only to throw it away.
                elif writes:
                    arrays[tensor] = others.read(tensor)
            weight_map |= dict.fromkeys(arrays, name)
            total += sum(value.nbytes for value in arrays.values())
            if writes:
                _write_shard(staging / name, arrays)
        texts = _processor_texts(model)
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            texts[INDEX] = json.dumps(index, indent=2, sort_keys=True) + "\n"
        if model.config.generation_json:
            texts[GENERATION] = model.config.generation_json
        texts["config.json"] = _config(model, params, quantized, others.files)
        for name, text in texts.items() if writes else ():
            (staging / name).write_text(text, encoding="utf-8")
    return [folder / name for name in (*names, *texts)]


def stored_dtypes(
    folder: Path, quantization: QuantConfig | None = None
) -> dict[paths.Path, np.dtype]:
    """Leaf → the type of its tensors in a model folder, which a merged model keeps.

    The leaves are those of the model as it is loaded with ``quantization``.

    Leaves that are quantized in the folder are left out; float64, which is never loaded, counts as
    float32.
    """
    model, found = read_model(folder, quantization), {}
    with open_tensors(folder, model) as (shards, source):
        for tensor in checkpoint_tensors(model):
            if tensor.name not in source.prequantized:
                name = FLOATS[shards.dtype(source.names[tensor.name])]
                found.setdefault(tensor.path, []).append("float32" if name == "float64" else name)
    return {path: common_dtype(names) for path, names in found.items()}


def common_dtype(dtypes: Iterable[Any]) -> np.dtype:
    """The type that holds the values of all of these: float32 unless they are the same."""
    different = {jnp.dtype(dtype) for dtype in dtypes}
    return different.pop() if len(different) == 1 else np.dtype(np.float32)


def staged_model(directory: str | Path) -> AbstractContextManager[Path]:
    """Where to write the files of a model folder, see ``staged_folder``; for process 0.

    What earlier saves that were killed have left there, as large as a model, is removed first. In
    other processes, which write nothing, it is the folder itself.
    """
    if jax.process_index() != 0:
        return contextlib.nullcontext(Path(directory))
    for left in Path(directory).glob(f"{PARTIAL}*"):
        shutil.rmtree(left, ignore_errors=True)
    # transformers prefers model.safetensors to an index: a stale one would be loaded in place of
    # the new shards.
    return staged_folder(directory, last="config.json", stale=STALE)


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


@contextlib.contextmanager
def _others(model: Model, quantized: bool) -> Iterator[Shards]:
    """The tensors to copy from the model's source: those that belong to no part of the model.

    Quantized ones are dequantized unless ``quantized``.

    Raises StorageError if the source is not there any more.
    """
    if model.source is None:
        yield Shards({}, None)
        return
    if not Path(model.source).is_dir():
        raise StorageError(
            "the folder that the model was read from is gone; its vision tower is copied from it",
            where=model.source,
            fix="put the folder back, then run the same command again",
        )
    with open_shards(Path(model.source)) as shards:
        shards.files = {n: file for n, file in shards.files.items() if is_of_others(n, model)}
        yield shards if quantized else prequantized.DequantizedShards(shards, model.dtype)


def _processor_texts(model: Model) -> dict[str, str]:
    """The settings of the processor of images in the model's source, by file name."""
    files = [Path(model.source) / name for name in PROCESSOR_FILES] if model.source else []
    return {file.name: file.read_text(encoding="utf-8") for file in files if file.is_file()}


def _plan(
    tensors: list[tuple[CheckpointTensor | str, int]], limit: int
) -> list[list[CheckpointTensor | str]]:
    """The tensors, each given with its size, split into shards of at most ``limit`` bytes."""
    shards: list[list[CheckpointTensor | str]] = [[]]
    used = 0
    for tensor, size in tensors:
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
        # safetensors writes an array's memory as it lies, whatever its strides.
        tensor.name: np.ascontiguousarray(value.swapaxes(-1, -2) if tensor.transposed else value)
    }


def _write_shard(file: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes one shard and reads it back."""
    with storage_errors(file, sum(value.nbytes for value in arrays.values())):
        # Without this format transformers refuses the file.
        save_file(arrays, file, metadata={"format": "pt"})
        with safe_open(file, framework="numpy") as back:
            for name, value in arrays.items():
                # Bytes, since a NaN does not equal itself.
                if back.get_tensor(name).tobytes() != value.tobytes():
                    raise StorageError(f"{name} reads back differently", where=str(file))


def _config(model: Model, params: Any, quantized: bool, others: Iterable[str]) -> str:
    """The original ``config.json`` with the ``dtype`` of the weights as written.

    ``others`` are the names of the copied tensors, which are not quantized here.
    """
    hf = model.config.hf
    # The name of `dtype` before transformers 5: two of them could contradict each other.
    hf.pop("torch_dtype", None)
    hf.pop("quantization_config", None)
    if quantized:
        settings = prequantized_write.quantization_config(model, params)
        quantized_others = prequantized.find_quantization_tensors(others)
        dense = [name for name in others if name not in quantized_others]
        settings["llm_int8_skip_modules"] += [name.removesuffix(".weight") for name in dense]
        hf["quantization_config"] = settings
    hf.setdefault("architectures", [family_of(model.config).architecture])
    # Never quantized in a file, so it has the type of the dense leaves.
    embedding = next(leaf for path, leaf in paths.walk(params) if path[-1] == "embedding")
    hf["dtype"] = str(np.dtype(embedding.dtype))
    return json.dumps(hf, indent=2, sort_keys=True) + "\n"
