"""Tensors of PEFT's file and the parts of an adapter's leaves that they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors

from jlora.config import LoraConfig
from jlora.errors import DataError
from jlora.files import storage_errors
from jlora.lora import DELTA, MAGNITUDE, TOKENS
from jlora.lora.adapter import ADDED, LORA_BIAS
from jlora.lora.targets import is_replaced, parameter_rank_of, rank_of
from jlora.tree import paths

TENSOR_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
WEIGHT = {"kernel": "weight", "embedding": "weight", "scale": "weight"}
"""Our leaf keys → torch's, where that is another."""


class TensorView(NamedTuple):
    """A tensor of the file as a view of the leaf that it is a part of."""

    view: np.ndarray
    shape: tuple[int, ...]

    def read(self) -> np.ndarray:
        """The tensor."""
        return np.ascontiguousarray(self.view).reshape(self.shape)

    def write(self, tensor: np.ndarray) -> None:
        """Sets the part of the leaf; ``tensor`` has the slot's shape."""
        self.view[...] = tensor.reshape(self.view.shape)


def tensor_views(
    arrays: Mapping[paths.Path, np.ndarray], config: LoraConfig
) -> dict[str, TensorView]:
    """Every tensor of the file by name: one layer, cut to its rank, in torch's orientation.

    ::

        model.layers.q_proj.lora_A (L, in, r)  →  …model.layers.1.q_proj.lora_A.weight (r₁, in)

    Args:
      arrays: an adapter's leaves by path, on the host; LoRA on whole projections only.
      config: the adapter's resolved config.
    """
    found = {}
    for leaf in paths.leaves(paths.nest(arrays)):
        for i, module in enumerate(leaf.modules()):
            layer = leaf.value[i] if leaf.stack else leaf.value
            slot = _added(leaf, layer, module, config) if leaf.kind in ADDED else None
            if slot is None and leaf.kind not in ADDED and is_replaced(config, module, leaf.kind):
                slot = _replaced(leaf, layer, module, config, _flips(leaf, config, arrays))
            if slot is not None:
                found[PREFIX + slot[0]] = slot[1]
    return found


def _added(
    leaf: paths.Leaf, layer: np.ndarray, module: str, config: LoraConfig
) -> tuple[str, TensorView] | None:
    """Name and slot of what is added to one module; None if this layer is not adapted."""
    if leaf.kind == TOKENS:
        return f"{module}.token_adapter.{leaf.kind}", TensorView(layer, layer.shape)
    if layer.ndim == 3:
        return _of_experts(leaf, layer, module, config)
    if not (r := rank_of(config, module)):
        return None
    if leaf.kind in (LORA_BIAS, MAGNITUDE):
        suffix = "lora_B.bias" if leaf.kind == LORA_BIAS else leaf.kind
        return f"{module}.{suffix}", TensorView(layer, layer.shape)
    cut = (layer[:, :r] if leaf.kind.endswith("A") else layer[:r]).T
    suffix = ".weight" if leaf.kind in DELTA else ""
    return f"{module}.{leaf.kind}{suffix}", TensorView(cut, cut.shape)


def _of_experts(
    leaf: paths.Leaf, layer: np.ndarray, name: str, config: LoraConfig
) -> tuple[str, TensorView] | None:
    """Name and slot of the As (E, in, r) or Bs (E, r, out) of all experts' matrices in one layer.

    peft's A is [E·r, in], expert after expert; its B is [out, r·E], rank after rank. It wraps one
    parameter after the other: the first one of two is within the second one's wrapper.
    """
    if not (r := parameter_rank_of(config, name)):
        return None
    module, _, parameter = name.rpartition(".")
    later = paths.EXPERTS[paths.EXPERTS.index(parameter) + 1 :]
    inner = any(parameter_rank_of(config, f"{module}.{other}") for other in later)
    if leaf.kind == "lora_A":
        view = layer[..., :r].transpose(0, 2, 1)
        shape = (view.shape[0] * r, view.shape[2])
    else:
        view = layer[:, :r].transpose(2, 1, 0)
        shape = (view.shape[0], view.shape[2] * r)
    return f"{module}.{'base_layer.' * inner}{leaf.kind}.weight", TensorView(view, shape)


def _replaced(
    leaf: paths.Leaf, layer: np.ndarray, module: str, config: LoraConfig, flips: bool
) -> tuple[str, TensorView]:
    """Name and slot of a leaf that is trained as a whole; torch has the transpose if it flips."""
    on_lora = "base_layer." if leaf.kind == "bias" and rank_of(config, module) else ""
    value = layer.swapaxes(-1, -2) if flips else layer
    return f"{module}.{on_lora}{WEIGHT.get(leaf.kind, leaf.kind)}", TensorView(value, value.shape)


def _flips(leaf: paths.Leaf, config: LoraConfig, there: Any) -> bool:
    """Whether torch has the transpose.

    That is so for kernels, but for GPT-2's ``Conv1D``, and for gpt-oss's experts, which alone have
    biases ``there`` beside them.
    """
    if leaf.kind in paths.EXPERTS:
        return (*leaf.path[:-1], f"{leaf.kind}_bias") in there
    conv1d = config.fan_in_fan_out and leaf.path[-2] not in paths.OUTPUT_HEADS
    return leaf.kind == "kernel" and not conv1d


def mismatches(tensors: Mapping[str, np.ndarray], slots: Mapping[str, TensorView]) -> list[str]:
    """What is missing, unknown or misshapen in ``tensors``."""
    faults = [f"missing {name}" for name in slots if name not in tensors]
    faults += [f"unknown {name}" for name in tensors if name not in slots]
    for name, slot in slots.items():
        if name in tensors and tensors[name].shape != slot.shape:
            faults.append(f"{name} has shape {tensors[name].shape}, expected {slot.shape}")
    return faults


def drop_base_weights(
    tensors: dict[str, np.ndarray], params: Any, config: LoraConfig, file: Path
) -> None:
    """Takes out the base weights that PEFT adds for an adapted output head or embedding.

    Raises:
      DataError: one differs from the model's own: the adapter is for other values.
    """
    for leaf in paths.leaves(params):
        name = f"{PREFIX}{leaf.module()}.base_layer.weight"
        if leaf.kind not in ("kernel", "embedding") or name not in tensors:
            continue
        if not rank_of(config, leaf.module()):
            continue
        value = tensors.pop(name)
        if not getattr(leaf.value, "is_fully_addressable", False):  # a shape; other hosts' shards
            continue
        own = np.asarray(leaf.value)
        own = own if leaf.kind == "embedding" else own.T
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
