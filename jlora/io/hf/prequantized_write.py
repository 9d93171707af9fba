"""Packed matrices written as bitsandbytes has them; ``hf_packed`` describes the format.

``config.json`` says how they are packed and which linear layers are not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jlora.errors import ConfigError
from jlora.io.hf.prequantized import STATE
from jlora.models.model import Model
from jlora.ops.weights import has_adapter
from jlora.quant.codebooks import DYNAMIC_MAP, FOUR_BIT
from jlora.quant.int8 import Int8Array
from jlora.quant.nf4 import NESTED_BLOCK, NF4Array
from jlora.quant.params import is_quantized
from jlora.tree import paths

BESIDE = 1536
"""Bytes of tables and JSON that lie beside one matrix, at most."""

TIED_HEAD = "lm_head"
"""The linear layer that transformers has where the head is the embedding."""


def check_writable(params: Mapping[str, Any]) -> None:
    """ConfigError if transformers could not load ``params`` packed; shapes are enough."""
    leaves = paths.leaves(params)
    packed = [leaf for leaf in leaves if is_quantized(leaf.value)]
    adapted = [x for x in leaves if has_adapter(x.value)]
    _refuse(
        adapted,
        "layers with an adapter cannot be written packed",
        "write the base alone (jlora.detach), or leave packed out",
    )
    _refuse(
        [leaf for leaf in packed if leaf.kind in paths.EXPERTS],
        "transformers cannot load packed experts",
        "name experts in quantization.llm_int8_skip_modules",
    )
    _refuse(
        [leaf for leaf in packed if leaf.kind == "embedding"],
        "transformers cannot load a packed embedding",
        "leave it out of quantization.include_modules",
    )
    _refuse(
        [leaf for leaf in packed if not leaf.value.transposed],
        "packed as (in, out), but bitsandbytes packs [out, in]",
        "pack the parameters with jlora.quantize",
    )
    if not packed:
        fix = "load the model with quantization=jlora.QuantConfig(…), or leave packed out"
        raise ConfigError("no parameter is packed", where="packed", fix=fix)
    if len({_format(leaf.value) for leaf in packed}) > 1:
        fix = "pack all of them alike"
        raise ConfigError("a folder has one format, these have several", where="packed", fix=fix)


def _refuse(leaves: Sequence[paths.Leaf], cause: str, fix: str) -> None:
    if leaves:
        raise ConfigError(cause, where=", ".join(leaf.module() for leaf in leaves), fix=fix)


def _format(leaf: Any) -> tuple[str, bool]:
    """The code's name and whether there is a second level."""
    if isinstance(leaf, Int8Array):
        return "int8", False
    return leaf.quant_type, leaf.nested_absmax is not None


def nbytes(leaf: Any, matrices: int) -> int:
    """What one of a leaf's matrices occupies in the file, at most."""
    return leaf.nbytes // matrices + BESIDE


def entries(module: str, leaf: NF4Array | Int8Array) -> dict[str, np.ndarray]:
    """The tensors of one packed matrix, whose children are on the host, by their names."""
    weight = f"{module}.weight"
    if isinstance(leaf, Int8Array):
        row_major = np.zeros((), np.uint8)
        return {weight: leaf.codes, f"{module}.SCB": leaf.absmax, f"{weight}_format": row_major}
    state = {
        "quant_type": leaf.quant_type,
        "blocksize": leaf.block_size,
        "dtype": str(np.dtype(leaf.dtype)),
        "shape": leaf.matrix_shape,
    }
    tensors = {
        weight: leaf.codes.reshape(-1, 1),
        f"{weight}.absmax": leaf.absmax.reshape(-1),
        f"{weight}.quant_map": FOUR_BIT[leaf.quant_type],
    }
    if leaf.nested_absmax is not None:
        state["nested_blocksize"] = NESTED_BLOCK
        state["nested_dtype"] = "float32"
        state["nested_offset"] = float(leaf.nested_offset)
        tensors[f"{weight}.nested_absmax"] = leaf.nested_absmax
        tensors[f"{weight}.nested_quant_map"] = DYNAMIC_MAP
    text = np.frombuffer(json.dumps(state).encode("ascii"), np.uint8)
    tensors[f"{weight}.{STATE}{leaf.quant_type}"] = text
    return tensors


def quantization_config(model: Model, params: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers' ``BitsAndBytesConfig`` writes of these parameters.

    ``llm_int8_skip_modules`` names every linear layer that is not packed: without the list
    transformers would guess, and leave out the head.
    """
    leaves = paths.leaves(params)
    code, double = _format(next(leaf.value for leaf in leaves if is_quantized(leaf.value)))
    eight = code == "int8"
    dense = [leaf for leaf in leaves if leaf.kind == "kernel" and not is_quantized(leaf.value)]
    skipped = [module for leaf in dense for module in leaf.modules()]
    if model.config.tie_word_embeddings:
        skipped.append(TIED_HEAD)
    return {
        "_load_in_4bit": not eight,
        "_load_in_8bit": eight,
        "bnb_4bit_compute_dtype": "float32" if eight else model.dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "fp4" if eight else code,  # transformers' default where unused
        "bnb_4bit_use_double_quant": double,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": skipped,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": not eight,
        "load_in_8bit": eight,
        "quant_method": "bitsandbytes",
    }
