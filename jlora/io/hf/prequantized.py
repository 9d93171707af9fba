"""Prequantized folders: weights quantized by bitsandbytes, in the format of transformers.

A module ``P`` with the weight [out, in] (GPT-2's Conv1D is transposed to this, too) is stored as::

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

The bytes of a 4-bit weight may have another type (``bnb_4bit_quant_storage``). All sizes follow
from the model; those in the file are untrusted, only compared with them.
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
import jax.numpy as jnp
import numpy as np

from jlora.config import QuantConfig
from jlora.errors import DataError
from jlora.io.hf.folder import FLOATS, Shards
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
"""Types that 4-bit codes may be stored as."""

LONGEST_STATE = 4096
"""Limit in bytes; the JSON of a ``quant_state`` has about 170."""

Problems = list[tuple[str, str]]
"""(tensor name, problem)."""

NOT_QUANTIZED = "not quantized"


@dataclasses.dataclass(frozen=True)
class StoredMatrix:
    """The prequantization layout of one matrix: its tensors and settings."""

    names: Mapping[str, str]
    """Part → the name of its tensor in the files."""
    config: QuantConfig
    """The settings that quantize in the same way."""
    nested_block: int = NESTED_BLOCK
    nested_offset: float = 0.0
    custom_map: bool = False
    """Whether ``nested_quant_map`` differs from bitsandbytes' dynamic map."""

    @property
    def nested(self) -> bool:
        """Whether ``absmax`` can stay in 8 bits: block size and map are those of NF4Array."""
        double = self.config.bnb_4bit_use_double_quant
        return double and not self.custom_map and self.nested_block == NESTED_BLOCK


def find_quantization_tensors(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """{weight: {part: its name}} of all tensors that belong to quantized weights."""
    found: dict[str, dict[str, str]] = {}
    for name in names:
        if match := PART.fullmatch(name):
            found.setdefault(f"{match[1]}.weight", {})[match[2] or match[3]] = name
    return found


def matrix_shape(tensor: CheckpointTensor) -> tuple[int, ...]:
    """Shape of the quantized matrix: torch's [out, in], or an embedding's rows."""
    return tensor.shape if is_out_in(tensor) else tensor.shape[::-1]


def is_out_in(tensor: CheckpointTensor) -> bool:
    """Whether the file's dense matrix has the quantized orientation (torch Linear, Embedding)."""
    return tensor.transposed != stored_as_in_torch(tensor.path)


def prequantized_shapes(
    shapes: Any,
    groups: Mapping[paths.Path, list[CheckpointTensor]],
    layouts: Mapping[str, StoredMatrix],
) -> Any:
    """The tree of shapes, with abstract quantized arrays for prequantized leaves.

    If one layer's double quantization cannot be represented, ``absmax`` is float32 in all layers.
    """

    def leaf(path: paths.Path, dense: Any) -> Any:
        layers = [layouts[t.name] for t in groups[path] if t.name in layouts]
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
    """One layer's quantized matrix with ``jax.ShapeDtypeStruct`` children."""
    matrix = jax.ShapeDtypeStruct(matrix_shape(tensor), dtype)
    return jax.eval_shape(functools.partial(quantize_matrix, config=config), matrix)


def is_prequantized(
    shards: Shards, weight: str, parts: Mapping[str, str], tensor: CheckpointTensor
) -> bool:
    """Whether ``weight`` is meant to be quantized, even if parts are missing."""
    return len(tensor.shape) == 2 and (bool(parts) or shards.dtype(weight) in ("U8", "I8"))


def read_layout(
    shards: Shards, weight: str, parts: Mapping[str, str], tensor: CheckpointTensor
) -> tuple[StoredMatrix | None, Problems]:
    """The layout of the quantized tensor ``weight``, and all that does not fit the model.

    Reads the safetensors headers, the JSON and the code tables, no weights.
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
    state_part = next((part for part in sorted(parts) if part.startswith(STATE)), None)
    if state_part is None:
        return None, [(f"{weight}.{STATE}nf4", "is missing")]
    kind, double = state_part.removeprefix(STATE), any(part.startswith("nested") for part in parts)
    shape = matrix_shape(tensor)
    state, problems = _read_state(shards, parts[state_part], kind, shape, double)
    wanted = _wanted(math.prod(shape), state, double)
    problems += _fit_bytes(shards, weight, -(-math.prod(shape) // 2))
    for part, (dtype, size) in wanted.items():
        problems += _fit(shards, f"{weight}.{part}", dtype, size)
    problems += _others(parts, (state_part, *wanted))
    if problems:
        return None, problems
    # An NF4Array names its codebook and cannot hold another.
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
    custom_map = not np.array_equal(shards.read(parts["nested_quant_map"]), DYNAMIC_MAP)
    return StoredMatrix(
        names, config, state["nested_blocksize"], state["nested_offset"], custom_map
    ), []


def _wanted(
    size: int, state: Mapping[str, Any], double: bool
) -> dict[str, tuple[str, tuple[int, ...] | None]]:
    """Types and shapes of a 4-bit weight's parts; None if ``state`` does not determine them."""
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
    """The valid values of a ``quant_state``, and problems with the others."""
    size = shards.shape(name)
    if shards.dtype(name) != "U8" or len(size) != 1 or size[0] > LONGEST_STATE:
        return {}, [
            (name, f"is {shards.dtype(name)} {list(size)}, expected the bytes of a short text")
        ]
    try:
        state = json.loads(shards.read(name).tobytes())
    # Deeply nested brackets exhaust Python's stack.
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
        # Also false for NaN, and for what would be infinite in float32.
        good["nested_offset"] = isinstance(offset, int | float) and -limit <= offset <= limit
        good["nested_dtype"] = state.get("nested_dtype") == "float32"
    expected = {"quant_type": " or ".join(FOUR_BIT), "shape": list(shape)}
    problems = []
    for key in (key for key in good if not good[key]):
        why = f"expected {expected[key]}" if key in expected else "which is not valid"
        # Cut short: it comes from the file, and may have LONGEST_STATE bytes.
        problems.append((name, f"says {key} {json.dumps(state.get(key))[:80]}, {why}"))
    return {key: state[key] for key in good if good[key]}, problems


def _is_count(value: Any) -> bool:
    # Not isinstance: JSON's `true` is an int in Python.
    return type(value) is int and value > 0


def _fit(shards: Shards, name: str, dtype: str, shape: tuple[int, ...] | None) -> Problems:
    if name not in shards.files:
        return [(name, "is missing")]
    problems = []
    if shape is not None and shards.shape(name) != shape:
        cause = f"has shape {list(shards.shape(name))}, expected {list(shape)}"
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


class DequantizedShards(Shards):
    """Shards in which the quantized matrices appear as dense tensors of a float ``dtype``."""

    def __init__(self, shards: Shards, dtype: str):
        self._shards, self.problems = shards, shards.problems
        self._parts = find_quantization_tensors(shards.files)
        hidden = {name for parts in self._parts.values() for name in parts.values()}
        self.files = {name: file for name, file in shards.files.items() if name not in hidden}
        self._dtype = dtype
        self._stored_type = next(stored for stored, name in FLOATS.items() if name == dtype)
        self._shapes: dict[str, tuple[int, int]] = {}

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape; for a quantized one the matrix's.

        Raises DataError if its ``quant_state`` has none.
        """
        states = [part for part in self._parts.get(name, {}) if part.startswith(STATE)]
        if not states:
            return self._shards.shape(name)
        state = self._parts[name][states[0]]
        try:
            if name not in self._shapes:
                rows, columns = json.loads(self._shards.read(state).tobytes())["shape"]
                self._shapes[name] = int(rows), int(columns)
            return self._shapes[name]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise DataError("does not say the matrix's shape", where=state) from error

    def dtype(self, name: str) -> str:
        """The type's name."""
        return self._stored_type if name in self._parts else self._shards.dtype(name)

    def read(self, name: str, span: slice | None = None) -> np.ndarray:
        """The tensor's values, or those of a slice of rows."""
        if name not in self._parts:
            return self._shards.read(name, span)
        tensor = CheckpointTensor(name, ("kernel",), None, True, self.shape(name))
        stored, problems = read_layout(self._shards, name, self._parts[name], tensor)
        if stored is None:
            where, cause = problems[0]
            raise DataError(cause, where=where)
        like = _shape(tensor, np.dtype(self._dtype), stored.config)
        kind = jax.tree.structure(like)
        matrix = jax.tree.unflatten(kind, read_children(self._shards, stored, like))
        return np.asarray(jax.tree.map(jnp.asarray, matrix).dequantize())[span or slice(None)]


def mixed_layouts(
    groups: Iterable[list[CheckpointTensor]], stored: Mapping[str, StoredMatrix]
) -> Problems:
    """Problems with layers of one stacked leaf that are quantized in different ways."""
    problems = []
    for first, *others in groups:
        want = layout_text(stored.get(first.name))
        for tensor in others:
            if (have := layout_text(stored.get(tensor.name))) != want:
                cause = f"is {have}, but {first.name} is {want}: all layers must be quantized alike"
                problems.append((tensor.name, cause))
    return problems


def layout_text(stored: StoredMatrix | None) -> str:
    """How a tensor is quantized, as text for errors."""
    return NOT_QUANTIZED if stored is None else scheme_text(stored.config)


def read_children(shards: Shards, stored: StoredMatrix, like: QuantizedArray) -> list[Any]:
    """The children of one quantized matrix, in the shapes that they have in the leaf ``like``."""
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
        absmax = _dequantize_absmax(shards, stored, absmax)
    return [codes, absmax]


def _dequantize_absmax(shards: Shards, stored: StoredMatrix, codes: np.ndarray) -> np.ndarray:
    """``absmax`` in float32 by the file's map and block size; product and sum are rounded."""
    scale = shards.read(stored.names["nested_absmax"])
    group = np.arange(codes.size) // stored.nested_block
    product = shards.read(stored.names["nested_quant_map"])[codes] * scale[group]
    return product + np.float32(stored.nested_offset)
