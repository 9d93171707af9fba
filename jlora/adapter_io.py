"""Adapters in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``.

Checked against peft 0.21: the same names, shapes, dtypes and, for the same values, the same bytes.
Only safetensors are read and written; nothing is unpickled.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from jlora import paths
from jlora.config import LoraConfig
from jlora.errors import ConfigError, DataError
from jlora.files import storage_errors, write_atomic
from jlora.lora import DELTA, Adapter, whole_projections
from jlora.targets import Target, find_targets, rank_of, replaced_leaves

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."

OTHER_KEYS: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "auto_mapping": None,
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "inference_mode": True,
    "kasa_config": None,
    "layer_replication": None,
    "loftq_config": {},
    "lora_bias": False,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "monteclora_config": None,
    "peft_type": "LORA",
    "qalora_group_size": 16,
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "velora_config": None,
}
"""PEFT's keys that jlora has no setting for, with the value that means "not used"."""

IGNORED = {"auto_mapping", "inference_mode", "megatron_core", "peft_version", "runtime_config"}
IGNORED |= {"qalora_group_size", "ensure_weight_tying", "loftq_config"}
"""Keys that change nothing for a loaded LoRA adapter, whatever their value."""


class _Slot(NamedTuple):
    """Where one tensor of the file lies in the tree: a layer of a leaf, cut to its rank."""

    path: paths.Path
    layer: int | None
    rank: int | None  # of A's or B's rank axis; None for a whole leaf
    transposed: bool
    shape: tuple[int, ...]  # in the file


def save_adapter(directory: str | Path, adapter: Adapter) -> int:
    """Writes the folder that ``PeftModel.from_pretrained`` takes, and reads it back.

    Parts of a fused projection (GPT-2's ``q_proj``) are written as LoRA on the whole of it, which
    is how PEFT can hold them. Tensors are float32.

    Returns:
      The size of the tensor file in bytes.

    Raises:
      DataError: the adapter is empty or not finite: nothing is written.
      StorageError: the disk is full or not writable; files already there stay whole.
    """
    tensors = to_peft_tensors(adapter)
    faults = [name for name, value in tensors.items() if not np.all(np.isfinite(value))]
    if faults or not tensors:
        raise DataError(
            f"not saved: {len(faults)} tensors are not finite" if faults else "nothing to save",
            where=faults[0] if faults else str(directory),
            fix="go back to an earlier checkpoint and lower the learning rate",
        )
    folder = Path(directory)
    data = safetensors.numpy.save(tensors, metadata={"format": "pt"})
    write_atomic(folder / TENSOR_FILE, data)
    write_atomic(
        folder / CONFIG_FILE, json.dumps(to_peft_config(adapter), indent=2, sort_keys=True)
    )
    written = _read_tensors(folder / TENSOR_FILE)
    if any(not np.array_equal(written[name], value) for name, value in tensors.items()):
        raise DataError("what was written does not read back", where=str(folder / TENSOR_FILE))
    return len(data)


def load_adapter(directory: str | Path, params: Any) -> Adapter:
    """Reads a PEFT adapter for the model whose parameters (or their shapes) are ``params``.

    Raises:
      DataError: the folder is not a LoRA adapter, is damaged, or does not fit: every missing,
        unknown and misshapen tensor is listed.
      ConfigError: it uses a feature of PEFT that jlora lacks, or its patterns match nothing.
    """
    folder = Path(directory)
    config, targets = find_targets(params, read_config(folder))
    tensors = _read_tensors(folder / TENSOR_FILE)
    _drop_bases(tensors, params, targets, folder)
    slots = _slots(params, config, targets)
    _check(tensors, slots, folder)
    flat: dict[paths.Path, np.ndarray] = {}
    for target in targets:
        lead = (len(target.ranks),) if target.stack else ()
        r = max(target.ranks)
        flat[(*target.path, "lora_A")] = np.zeros((*lead, target.shape[0], r), np.float32)
        flat[(*target.path, "lora_B")] = np.zeros((*lead, r, target.shape[1]), np.float32)
    for leaf in replaced_leaves(params, config, targets):
        flat[leaf.path] = np.zeros(leaf.value.shape, np.float32)
    for name, slot in slots.items():
        value = tensors[name].astype(np.float32)
        _view(flat[slot.path], slot)[...] = value.T if slot.transposed else value
    import jax.numpy as jnp

    return Adapter(paths.nest({path: jnp.asarray(a) for path, a in flat.items()}), config)


def read_config(directory: str | Path) -> LoraConfig:
    """The LoraConfig in ``adapter_config.json``; see ``load_adapter`` for the errors."""
    file = Path(directory) / CONFIG_FILE
    if not file.is_file():
        raise DataError(
            f"no {CONFIG_FILE} here", where=str(directory), fix="give the folder of a PEFT adapter"
        )
    try:
        with storage_errors(file):
            raw = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"is not JSON: {error}", where=str(file)) from error
    if not isinstance(raw, dict) or raw.get("peft_type") != "LORA":
        kind = raw.get("peft_type") if isinstance(raw, dict) else None
        raise DataError(f"is not a LoRA adapter (peft_type: {kind})", where=str(file))
    known = {f.name for f in dataclasses.fields(LoraConfig)}
    used = [
        key
        for key, value in raw.items()
        if key not in known | IGNORED and value not in (None, False, {}, [], OTHER_KEYS.get(key))
    ]
    if used:
        raise ConfigError(f"uses {', '.join(used)}, which jlora does not support", where=str(file))
    fields = {k: v for k, v in raw.items() if k in known and v is not None}
    return LoraConfig(**fields)


def to_peft_config(adapter: Adapter) -> dict[str, Any]:
    """The contents of ``adapter_config.json``."""
    config = whole_projections(adapter).config
    ours = {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}
    del ours["init_from"]
    return {**OTHER_KEYS, **ours}


def to_peft_tensors(adapter: Adapter) -> dict[str, np.ndarray]:
    """The tensors of ``adapter_model.safetensors``: float32, in torch's orientation."""
    adapter = whole_projections(adapter)
    stacks = paths.stacks(adapter.weights)
    tensors: dict[str, np.ndarray] = {}
    for path, value in paths.walk(adapter.weights):
        stack = paths.stack_of(path, stacks)
        value = np.asarray(value, np.float32)
        for i in range(len(value) if stack else 1):
            module = paths.module_name(path[:-1], stack, i)
            layer = i if stack else None
            if path[-1] in DELTA:
                name, transposed = f"{PREFIX}{module}.{path[-1]}.weight", True
                r = rank_of(adapter.config, module)
            else:
                (name, transposed), r = _whole_name(path, module, adapter.config), None
            if r != 0:
                part = _view(value, _Slot(path, layer, r, transposed, ()))
                tensors[name] = np.ascontiguousarray(part.T if transposed else part)
    return tensors


def _whole_name(path: paths.Path, module: str, config: LoraConfig) -> tuple[str, bool]:
    """The file's name of a leaf that is saved whole, and whether it is transposed there."""
    kind = path[-1]
    conv1d = config.fan_in_fan_out and path[-2] not in paths.OUTPUT_HEADS
    suffix = "bias" if kind == "bias" else "weight"
    if kind == "bias" and rank_of(config, module):
        suffix = "base_layer.bias"
    return f"{PREFIX}{module}.{suffix}", kind == "kernel" and not conv1d


def _slots(params: Any, config: LoraConfig, targets: list[Target]) -> dict[str, _Slot]:
    """Every tensor that the file must hold, by name."""
    slots: dict[str, _Slot] = {}
    for t in targets:
        for i, (name, r) in enumerate(zip(t.names, t.ranks, strict=True)):
            layer = i if t.stack else None
            for key, shape in (("lora_A", (r, t.shape[0])), ("lora_B", (t.shape[1], r))):
                if r:
                    slot = _Slot((*t.path, key), layer, r, True, shape)
                    slots[f"{PREFIX}{name}.{key}.weight"] = slot
    for leaf in replaced_leaves(params, config, targets):
        for i, module in enumerate(leaf.modules()):
            name, transposed = _whole_name(leaf.path, module, config)
            shape = leaf.shape[::-1] if transposed else leaf.shape
            slots[name] = _Slot(leaf.path, i if leaf.stack else None, None, transposed, shape)
    return slots


def _drop_bases(
    tensors: dict[str, np.ndarray], params: Any, targets: list[Target], folder: Path
) -> None:
    """Takes out the base weights that PEFT adds for an adapted output head.

    Raises:
      DataError: one differs from the model's own: the adapter is for other values.
    """
    for target in targets:
        name = f"{PREFIX}{target.names[0]}.base_layer.weight"
        value = tensors.pop(name, None) if target.path[-1] in paths.OUTPUT_HEADS else None
        kernel = paths.get(params, target.path)["kernel"] if value is not None else None
        if value is None or not getattr(kernel, "is_fully_addressable", False):
            continue
        own = np.asarray(kernel).T
        if own.shape != value.shape or not np.array_equal(value.astype(own.dtype), own):
            raise DataError(
                f"{name} is not the model's own weight",
                where=str(folder / TENSOR_FILE),
                fix="use the base model that it was trained on",
            )


def _view(array: np.ndarray, slot: _Slot) -> np.ndarray:
    """The part of a leaf that a slot stands for, as a view in the tree's orientation."""
    if slot.layer is not None:
        array = array[slot.layer]
    if slot.rank is None:
        return array
    return array[:, : slot.rank] if slot.path[-1] == "lora_A" else array[: slot.rank]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, tuple) else value


def _read_tensors(file: Path) -> dict[str, np.ndarray]:
    if not file.is_file():
        pickled = file.with_name("adapter_model.bin").is_file()
        raise DataError(
            "the adapter is a pickle, which could run code"
            if pickled
            else f"no {TENSOR_FILE} here",
            where=str(file.parent),
            fix="save it again with safe_serialization=True" if pickled else None,
        )
    try:
        with storage_errors(file), safetensors.safe_open(file, "numpy") as f:
            return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise DataError(f"is damaged: {error}", where=str(file)) from error


def _check(tensors: Mapping[str, np.ndarray], slots: Mapping[str, _Slot], folder: Path) -> None:
    faults = [f"missing {n}" for n in slots if n not in tensors]
    faults += [f"unknown {n}" for n in tensors if n not in slots]
    faults += [
        f"{n} has shape {tensors[n].shape}, expected {s.shape}"
        for n, s in slots.items()
        if n in tensors and tensors[n].shape != s.shape
    ]
    if faults:
        shown = "\n  ".join(
            faults[:20] + ([f"… and {len(faults) - 20} more"] if faults[20:] else [])
        )
        raise DataError(
            f"the adapter does not fit the model:\n  {shown}",
            where=str(folder / TENSOR_FILE),
            fix="use the base model that it was trained on",
        )
