"""Tensors of PEFT's file and the parts of an adapter's leaves that they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from jlora import paths
from jlora.config import LoraConfig
from jlora.errors import DataError
from jlora.files import storage_errors
from jlora.lora import DELTA
from jlora.targets import is_replaced, rank_of

TENSOR_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."


def views(arrays: Mapping[paths.Path, np.ndarray], config: LoraConfig) -> dict[str, np.ndarray]:
    """Every tensor of the file, as a view of the leaf that it is a part of.

    A view is one layer, cut to its rank, in torch's orientation: reading it gives the tensor,
    writing to it sets the leaf::

        model.layers.q_proj.lora_A (L, in, r)  →  …model.layers.1.q_proj.lora_A.weight (r₁, in)

    Args:
      arrays: an adapter's leaves by path, on the host; LoRA on whole projections only.
      config: the adapter's resolved config.
    """
    found = {}
    for leaf in paths.leaves(paths.nest(arrays)):
        for i, module in enumerate(leaf.modules()):
            layer = leaf.value[i] if leaf.stack else leaf.value
            r = rank_of(config, module)
            if leaf.kind in DELTA and r:
                cut = layer[:, :r] if leaf.kind == "lora_A" else layer[:r]
                found[f"{PREFIX}{module}.{leaf.kind}.weight"] = cut.T
            elif leaf.kind not in DELTA and is_replaced(config, module, leaf.kind):
                on_lora = "base_layer." if leaf.kind == "bias" and r else ""
                suffix = on_lora + ("bias" if leaf.kind == "bias" else "weight")
                found[f"{PREFIX}{module}.{suffix}"] = layer.T if _flips(leaf, config) else layer
    return found


def _flips(leaf: paths.Leaf, config: LoraConfig) -> bool:
    """Whether torch has the transpose: of kernels, but for GPT-2's ``Conv1D``."""
    conv1d = config.fan_in_fan_out and leaf.path[-2] not in paths.OUTPUT_HEADS
    return leaf.kind == "kernel" and not conv1d


def mismatches(tensors: Mapping[str, np.ndarray], slots: Mapping[str, np.ndarray]) -> list[str]:
    """What is missing, unknown or misshapen in ``tensors``."""
    faults = [f"missing {name}" for name in slots if name not in tensors]
    faults += [f"unknown {name}" for name in tensors if name not in slots]
    for name, slot in slots.items():
        if name in tensors and tensors[name].shape != slot.shape:
            faults.append(f"{name} has shape {tensors[name].shape}, expected {slot.shape}")
    return faults


def drop_bases(tensors: dict[str, np.ndarray], params: Any, config: LoraConfig, file: Path) -> None:
    """Takes out the base weights that PEFT adds for an adapted output head.

    Raises:
      DataError: one differs from the model's own: the adapter is for other values.
    """
    for leaf in paths.leaves(params):
        name = f"{PREFIX}{leaf.module()}.base_layer.weight"
        if leaf.kind != "kernel" or name not in tensors or not rank_of(config, leaf.module()):
            continue
        value = tensors.pop(name)
        if not getattr(leaf.value, "is_fully_addressable", False):  # a shape; other hosts' shards
            continue
        own = np.asarray(leaf.value).T
        if own.shape != value.shape or not np.array_equal(value.astype(own.dtype), own):
            raise DataError(
                f"{name} is not the model's own weight",
                where=str(file),
                fix="use the base model that it was trained on",
            )


def read_tensors(file: Path) -> dict[str, np.ndarray]:
    """All tensors of a safetensors file.

    Raises:
      DataError: it is damaged or not there; a pickle beside it is named but never opened.
      StorageError: it cannot be read.
    """
    if not file.is_file():
        pickled = file.with_name("adapter_model.bin").is_file()
        raise DataError(
            "the adapter is a pickle, which could run code" if pickled else f"no {file.name} here",
            where=str(file.parent),
            fix="save it again with safe_serialization=True" if pickled else None,
        )
    try:
        with storage_errors(file), safetensors.safe_open(file, "numpy") as f:
            return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise DataError(f"is damaged: {error}", where=str(file)) from error
