"""The tensors of PEFT's file as views of an adapter's leaves."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
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

PICKLES = {
    "adapter_model.bin": "save it again with safe_serialization=True",
    "adapter_model.pt": "torchtune writes adapter_model.safetensors beside it (checkpointer."
    "safe_serialization: True), in PEFT's format, which it has not for Phi, Llama 3.2 Vision and "
    "Llama 4",
}
"""Files of adapters that are not read, and what to do about them."""


class TensorView(NamedTuple):
    """A tensor of the file as a view of the leaf that contains it."""

    view: np.ndarray
    shape: tuple[int, ...]

    def read(self) -> np.ndarray:
        """The tensor."""
        return np.ascontiguousarray(self.view).reshape(self.shape)

    def write(self, tensor: np.ndarray) -> None:
        """Writes ``tensor``, which has the shape ``shape``, into the leaf."""
        self.view[...] = tensor.reshape(self.view.shape)


def tensor_views(
    arrays: Mapping[paths.Path, np.ndarray], config: LoraConfig
) -> dict[str, TensorView]:
    """The tensors of the file by name: one layer each, cut to its rank, in torch's orientation.

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
            view = _added_leaf_view(leaf, layer, module, config) if leaf.kind in ADDED else None
            if view is None and leaf.kind not in ADDED and is_replaced(config, module, leaf.kind):
                view = _replaced_leaf_view(
                    leaf, layer, module, config, _is_transposed(leaf, config, arrays)
                )
            if view is not None:
                found[PREFIX + view[0]] = view[1]
    return found


def _added_leaf_view(
    leaf: paths.Leaf, layer: np.ndarray, module: str, config: LoraConfig
) -> tuple[str, TensorView] | None:
    """Name and view of a leaf added to one module; None if this layer is not adapted."""
    if leaf.kind == TOKENS:
        return f"{module}.token_adapter.{leaf.kind}", TensorView(layer, layer.shape)
    if layer.ndim == 3:
        return _experts_view(leaf, layer, module, config)
    is_router = module.endswith(".weight")
    if not (r := (parameter_rank_of if is_router else rank_of)(config, module)):
        return None
    module = module.removesuffix(".weight")
    if leaf.kind in (LORA_BIAS, MAGNITUDE):
        suffix = "lora_B.bias" if leaf.kind == LORA_BIAS else leaf.kind
        return f"{module}.{suffix}", TensorView(layer, layer.shape)
    cut = (layer[:, :r] if leaf.kind.endswith("A") else layer[:r]).T
    suffix = ".weight" if leaf.kind in DELTA else ""
    return f"{module}.{leaf.kind}{suffix}", TensorView(cut, cut.shape)


def _experts_view(
    leaf: paths.Leaf, layer: np.ndarray, name: str, config: LoraConfig
) -> tuple[str, TensorView] | None:
    """Name and view of A (E, in, r) or B (E, r, out) of all experts in one layer.

    In peft A is [E·r, in], expert-major, and B is [out, r·E], rank-major. peft wraps a module once
    per adapted parameter: of two, the first is inside the second's ``base_layer``.
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


def _replaced_leaf_view(
    leaf: paths.Leaf, layer: np.ndarray, module: str, config: LoraConfig, transposed: bool
) -> tuple[str, TensorView]:
    """Name and view of a leaf trained as a whole; transposed in torch if ``transposed``."""
    # PEFT's LoRA layer wraps the module, so the base's bias is one level down.
    on_lora = "base_layer." if leaf.kind == "bias" and rank_of(config, module) else ""
    value = layer.swapaxes(-1, -2) if transposed else layer
    return f"{module}.{on_lora}{paths.TORCH_NAMES.get(leaf.kind, leaf.kind)}", TensorView(
        value, value.shape
    )


def _is_transposed(leaf: paths.Leaf, config: LoraConfig, arrays: Any) -> bool:
    """Whether torch has the transpose.

    That is the case for kernels, except GPT-2's ``Conv1D``, and for gpt-oss's experts, which are
    recognised by their biases in ``arrays``.
    """
    if leaf.kind in paths.EXPERTS:
        return (*leaf.path[:-1], f"{leaf.kind}_bias") in arrays
    # GPT-2's heads are nn.Linear, unlike its other layers.
    conv1d = config.fan_in_fan_out and leaf.path[-2] not in paths.OUTPUT_HEADS
    return leaf.kind == "kernel" and not conv1d


def mismatches(tensors: Mapping[str, np.ndarray], views: Mapping[str, TensorView]) -> list[str]:
    """Messages about missing, unknown and misshapen ``tensors``; the layers of one are grouped."""
    missing = _grouped(name for name in views if name not in tensors)
    unknown = _grouped(name for name in tensors if name not in views)
    faults = [f"missing {name}" for name in missing] + [f"unknown {name}" for name in unknown]
    for name, view in views.items():
        if name in tensors and tensors[name].shape != view.shape:
            faults.append(f"{name} has shape {tensors[name].shape}, expected {view.shape}")
    return faults


def only_names_differ(tensors: Mapping[str, np.ndarray], views: Mapping[str, TensorView]) -> bool:
    """Whether the tensors have the shapes of the missing ones: nothing speaks for another base."""
    missing = sorted(view.shape for name, view in views.items() if name not in tensors)
    unknown = sorted(value.shape for name, value in tensors.items() if name not in views)
    fit = all(x.shape == views[name].shape for name, x in tensors.items() if name in views)
    return fit and bool(missing) and missing == unknown


def _grouped(names: Iterable[str]) -> list[str]:
    """One name for those that differ in numbers only, with their count."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"\.\d+\.", ".*.", name), []).append(name)
    return [
        found[0] if len(found) == 1 else f"{pattern} ({len(found)}, such as {found[0]})"
        for pattern, found in groups.items()
    ]


def read_tensors(file: Path) -> dict[str, np.ndarray]:
    """All tensors of a safetensors file.

    Raises:
      DataError: it is damaged or not there; a pickle beside it is named but never opened.
      StorageError: it cannot be read.
    """
    if not file.is_file():
        pickled = [name for name in PICKLES if file.with_name(name).is_file()]
        raise DataError(
            f"{pickled[0]} is a pickle, which could run code"
            if pickled
            else f"no {file.name} here",
            where=str(file.parent),
            fix=PICKLES[pickled[0]] if pickled else None,
        )
    with _opened(file) as f:
        return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118


def read_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors of a safetensors file, by name; none if there is no such file.

    Raises:
      DataError: it is damaged.
      StorageError: it cannot be read.
    """
    if not file.is_file():
        return {}
    with _opened(file) as f:
        return {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}  # noqa: SIM118


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with storage_errors(file), safetensors.safe_open(file, "numpy") as f:
            yield f
    except safetensors.SafetensorError as error:
        raise DataError(f"is damaged: {error}", where=str(file)) from error
