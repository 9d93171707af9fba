"""Weights that bitsandbytes has packed, as transformers saves them among the others.

A module ``P`` whose weight is [out, in] in torch (GPT-2's Conv1D is turned so, too) is::

    4 bits   P.weight                                uint8 [ceil(out · in / 2), 1]
             P.weight.absmax                         float32 [blocks]
             P.weight.quant_map                      float32 [16]
             P.weight.quant_state.bitsandbytes__nf4  uint8, JSON; or …__fp4
       with double quantization absmax is uint8, and there are
             P.weight.nested_absmax                  float32 [ceil(blocks / 256)]
             P.weight.nested_quant_map               float32 [256]
    8 bits   P.weight                                int8 [out, in]
             P.SCB                                   float32 [out]
             P.weight_format                         uint8 [], 0 (rows); may be absent

The bytes of a 4-bit weight may be stored as another type (``bnb_4bit_quant_storage``). Sizes are
the model's: what the file says of them is compared with these and never used.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from jlora.config import QuantConfig
from jlora.io.hf.folder import Shards
from jlora.io.hf.names import CheckpointTensor
from jlora.quant.codebooks import DYNAMIC_MAP, FOUR_BIT
from jlora.quant.nf4 import BLOCK_SIZES, NESTED_BLOCK, NF4Array
from jlora.quant.params import QuantizedArray, quantize_matrix, scheme_text, stored_as_in_torch
from jlora.tree import paths

STATE = "quant_state.bitsandbytes__"
PART = re.compile(
    rf"(.*)\.(?:weight\.((?:nested_)?(?:absmax|quant_map)|{STATE}\w+)|(SCB|weight_format))"
)
STORAGE = ("U8", "I8", "F16", "BF16", "F32", "F64")
"""The types that 4-bit codes may be stored as."""

LONGEST_STATE = 4096
"""Bytes; the JSON of a ``quant_state`` is about 170 long."""

Problems = list[tuple[str, str]]
"""(tensor name, what is wrong)."""


@dataclasses.dataclass(frozen=True)
class StoredMatrix:
    """A packed tensor of a file: where its parts are and how it is packed."""

    names: Mapping[str, str]
    """Part → the tensor's name in the file."""
    config: QuantConfig
    """The settings that pack so."""
    nested_block: int = NESTED_BLOCK
    nested_offset: float = 0.0
    own_map: bool = False
    """Whether ``nested_quant_map`` is another one than ours."""

    @property
    def nested(self) -> bool:
        """Whether ``absmax`` can stay in 8 bits: its blocks and its map are ours."""
        double = self.config.bnb_4bit_use_double_quant
        return double and not self.own_map and self.nested_block == NESTED_BLOCK


def find_quantization_tensors(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """{name of a weight: {part: its name}} of all parts beside weights."""
    found: dict[str, dict[str, str]] = {}
    for name in names:
        if match := PART.fullmatch(name):
            found.setdefault(f"{match[1]}.weight", {})[match[2] or match[3]] = name
    return found


def matrix_shape(tensor: CheckpointTensor) -> tuple[int, ...]:
    """What is packed: torch's [out, in], or an embedding's rows."""
    return tensor.shape if is_out_in(tensor) else tensor.shape[::-1]


def is_out_in(tensor: CheckpointTensor) -> bool:
    """Whether the file holds the matrix as torch's Linear or Embedding has it: so it is packed."""
    return tensor.transposed != stored_as_in_torch(tensor.path)


def prequantized_shapes(
    shapes: Any,
    groups: Mapping[paths.Path, list[CheckpointTensor]],
    packed: Mapping[str, StoredMatrix],
) -> Any:
    """A tree of shapes with those of packed leaves in their places.

    Constants of double quantization that are not ours in one layer are undone in all of them.
    """

    def leaf(path: paths.Path, dense: Any) -> Any:
        layers = [packed[t.name] for t in groups[path] if t.name in packed]
        if not layers:
            return dense
        nested = all(layer.nested for layer in layers)
        config = dataclasses.replace(layers[0].config, bnb_4bit_use_double_quant=nested)
        one, layer = _shape(groups[path][0], dense.dtype, config), groups[path][0].layer
        lead = () if layer is None else (len(layers),)
        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct((*lead, *x.shape), x.dtype), one)
        return one if stored_as_in_torch(path) else one.mT

    return paths.map_leaves(leaf, shapes)


def _shape(tensor: CheckpointTensor, dtype: Any, config: QuantConfig) -> QuantizedArray:
    """One layer's packed matrix with ``jax.ShapeDtypeStruct`` children."""
    matrix = jax.ShapeDtypeStruct(matrix_shape(tensor), dtype)
    return jax.eval_shape(functools.partial(quantize_matrix, config=config), matrix)


def is_prequantized(
    shards: Shards, weight: str, parts: Mapping[str, str], tensor: CheckpointTensor
) -> bool:
    """Whether the file means ``weight`` to be packed, be it whole or not."""
    return len(tensor.shape) == 2 and (bool(parts) or shards.dtype(weight) in ("U8", "I8"))


def inspect(
    shards: Shards, weight: str, parts: Mapping[str, str], tensor: CheckpointTensor
) -> tuple[StoredMatrix | None, Problems]:
    """How the tensor ``weight`` of the file is packed, and all that does not fit the model.

    Only headers, the JSON and the tables are read.
    """
    if shards.dtype(weight) == "I8" and not any(part.startswith(STATE) for part in parts):
        return _inspect8(shards, weight, parts, tensor)
    return _inspect4(shards, weight, parts, tensor)


def _inspect8(
    shards: Shards, weight: str, parts: Mapping[str, str], tensor: CheckpointTensor
) -> tuple[StoredMatrix | None, Problems]:
    shape, scale = matrix_shape(tensor), f"{weight.removesuffix('.weight')}.SCB"
    problems = _fit(shards, weight, "I8", shape) + _fit(shards, scale, "F32", shape[:1])
    problems += _others(parts, ("SCB", "weight_format"))
    if layout := parts.get("weight_format"):
        problems += _fit(shards, layout, "U8", ())
        if not problems and (value := int(shards.read(layout))):
            problems.append((layout, f"is {value}: only 0, row after row, is supported"))
    stored = StoredMatrix({"weight": weight, "SCB": scale}, QuantConfig(load_in_8bit=True))
    return (None if problems else stored), problems


def _inspect4(
    shards: Shards, weight: str, parts: Mapping[str, str], tensor: CheckpointTensor
) -> tuple[StoredMatrix | None, Problems]:
    at = next((part for part in sorted(parts) if part.startswith(STATE)), None)
    if at is None:
        return None, [(f"{weight}.{STATE}nf4", "is missing")]
    kind, double = at.removeprefix(STATE), any(part.startswith("nested") for part in parts)
    shape = matrix_shape(tensor)
    state, problems = _read_state(shards, parts[at], kind, shape, double)
    wanted = _wanted(math.prod(shape), state, double)
    problems += _fit_bytes(shards, weight, -(-math.prod(shape) // 2))
    for part, (dtype, size) in wanted.items():
        problems += _fit(shards, f"{weight}.{part}", dtype, size)
    problems += _others(parts, (at, *wanted))
    if problems:
        return None, problems
    if not np.array_equal(shards.read(parts["quant_map"]), FOUR_BIT[kind]):
        return None, [(parts["quant_map"], f"is not bitsandbytes' table of {kind}")]
    config = QuantConfig(
        bnb_4bit_quant_type=state["quant_type"],
        bnb_4bit_use_double_quant=double,
        block_size=state["blocksize"],
    )
    names = {"weight": weight, **{part: parts[part] for part in wanted}}
    if not double:
        return StoredMatrix(names, config), []
    own_map = not np.array_equal(shards.read(parts["nested_quant_map"]), DYNAMIC_MAP)
    return StoredMatrix(
        names, config, state["nested_blocksize"], state["nested_offset"], own_map
    ), []


def _wanted(
    size: int, state: Mapping[str, Any], double: bool
) -> dict[str, tuple[str, tuple[int, ...] | None]]:
    """Types and shapes of a 4-bit weight's parts; None where ``state`` does not say."""
    blocks = -(-size // state["blocksize"]) if "blocksize" in state else None
    parts: dict[str, tuple[str, tuple[int, ...] | None]] = {
        "absmax": ("U8" if double else "F32", blocks and (blocks,)),
        "quant_map": ("F32", (16,)),
    }
    if double:
        group = state.get("nested_blocksize")
        parts["nested_absmax"] = ("F32", (-(-blocks // group),) if blocks and group else None)
        parts["nested_quant_map"] = ("F32", (256,))
    return parts


def _read_state(
    shards: Shards, name: str, kind: str, shape: tuple[int, ...], double: bool
) -> tuple[dict[str, Any], Problems]:
    """What of a ``quant_state`` is as the format and the model want it, and what is not."""
    size = shards.shape(name)
    if shards.dtype(name) != "U8" or len(size) != 1 or size[0] > LONGEST_STATE:
        return {}, [(name, f"is {shards.dtype(name)} {size_text(size)}, not a short text's bytes")]
    try:
        state = json.loads(shards.read(name).tobytes())
    except (ValueError, RecursionError):
        state = None
    if not isinstance(state, dict):
        return {}, [(name, "does not hold a JSON object")]
    good = {
        "quant_type": kind in FOUR_BIT and state.get("quant_type") == kind,
        "blocksize": _is_count(state.get("blocksize")) and state["blocksize"] in BLOCK_SIZES,
        "shape": state.get("shape") == list(shape),
    }
    if double:
        offset, limit = state.get("nested_offset"), float(np.finfo(np.float32).max)
        good["nested_blocksize"] = _is_count(state.get("nested_blocksize"))
        good["nested_offset"] = isinstance(offset, int | float) and -limit <= offset <= limit
        good["nested_dtype"] = state.get("nested_dtype") == "float32"
    expected = {"quant_type": " or ".join(FOUR_BIT), "shape": size_text(shape)}
    problems = []
    for key in (key for key in good if not good[key]):
        why = f"expected {expected[key]}" if key in expected else "which cannot be"
        problems.append((name, f"says {key} {json.dumps(state.get(key))[:80]}, {why}"))
    return {key: state[key] for key in good if good[key]}, problems


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _fit(shards: Shards, name: str, dtype: str, shape: tuple[int, ...] | None) -> Problems:
    if name not in shards.files:
        return [(name, "is missing")]
    problems = []
    if shape is not None and shards.shape(name) != shape:
        cause = f"has shape {size_text(shards.shape(name))}, expected {size_text(shape)}"
        problems.append((name, cause))
    if shards.dtype(name) != dtype:
        problems.append((name, f"is of type {shards.dtype(name)}, expected {dtype}"))
    return problems


def _fit_bytes(shards: Shards, name: str, size: int) -> Problems:
    if shards.dtype(name) not in STORAGE:
        return [(name, f"is of type {shards.dtype(name)}, expected U8")]
    stored = shards.nbytes(name)
    return [] if stored == size else [(name, f"holds {stored} bytes, expected {size}")]


def _others(parts: Mapping[str, str], wanted: Iterable[str]) -> Problems:
    return [
        (name, "is not part of this model") for part, name in parts.items() if part not in wanted
    ]


def size_text(shape: tuple[int, ...]) -> str:
    """A tensor's shape, for people."""
    return f"[{', '.join(map(str, shape))}]"


def differing(
    groups: Iterable[list[CheckpointTensor]], stored: Mapping[str, StoredMatrix]
) -> Problems:
    """Layers that are one array here and are packed in different ways."""
    problems = []
    for first, *others in groups:
        want = how(stored.get(first.name))
        for tensor in others:
            if (have := how(stored.get(tensor.name))) != want:
                cause = f"is {have}, but {first.name} is {want}: all layers must be packed alike"
                problems.append((tensor.name, cause))
    return problems


def how(stored: StoredMatrix | None) -> str:
    """How a tensor is packed, for people."""
    return "not packed" if stored is None else scheme_text(stored.config)


def read(shards: Shards, stored: StoredMatrix, like: QuantizedArray) -> list[Any]:
    """The children of one matrix, in the shapes that they have in the leaf ``like``."""
    children = _read(shards, stored, like)
    shapes = [child.shape[len(like.lead) :] for child in jax.tree.leaves(like)]
    return [np.reshape(child, shape) for child, shape in zip(children, shapes, strict=True)]


def _read(shards: Shards, stored: StoredMatrix, like: QuantizedArray) -> list[Any]:
    names = stored.names
    if not isinstance(like, NF4Array):
        return [shards.read(names["weight"]), shards.read(names["SCB"])]
    codes, absmax = shards.read(names["weight"]), shards.read(names["absmax"])
    codes = codes.reshape(-1).view(np.uint8)
    if like.nested_absmax is not None:
        nested = shards.read(names["nested_absmax"])
        return [codes, absmax, nested, np.float32(stored.nested_offset)]
    if stored.config.bnb_4bit_use_double_quant:
        absmax = _undouble(shards, stored, absmax)
    return [codes, absmax]


def _undouble(shards: Shards, stored: StoredMatrix, codes: np.ndarray) -> np.ndarray:
    """``absmax`` in float32 by the file's own map and blocks; both operations round."""
    scale = shards.read(stored.names["nested_absmax"])
    place = np.arange(codes.size) // stored.nested_block
    product = shards.read(stored.names["nested_quant_map"])[codes] * scale[place]
    return product + np.float32(stored.nested_offset)
