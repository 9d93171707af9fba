"""Writing quantized matrices in bitsandbytes' format; see ``prequantized`` for the format.

``config.json`` gets the ``quantization_config``, which names the layers that are not quantized.
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
"""Upper bound in bytes of the tables and the JSON stored with one matrix."""

TIED_HEAD = "lm_head"
"""transformers' name of the head of tied models."""


def check_writable(params: Mapping[str, Any]) -> None:
    """ConfigError if transformers could not load ``params`` quantized; they may be abstract."""
    leaves = paths.leaves(params)
    quantized = [leaf for leaf in leaves if is_quantized(leaf.value)]
    adapted = [x for x in leaves if has_adapter(x.value)]
    _refuse(
        adapted,
        "layers with an adapter cannot be written quantized",
        "write the base alone (jlora.detach), or leave quantized out",
    )
    _refuse(
        [leaf for leaf in quantized if leaf.kind in paths.EXPERTS],
        "transformers cannot load quantized experts",
        "name experts in quantization.llm_int8_skip_modules",
    )
    _refuse(
        [leaf for leaf in quantized if leaf.kind == "embedding"],
        "transformers cannot load a quantized embedding",
        "leave it out of quantization.include_modules",
    )
    _refuse(
        [leaf for leaf in quantized if not leaf.value.transposed],
        "quantized as (in, out), but bitsandbytes quantizes [out, in]",
        "quantize the parameters with jlora.quantize",
    )
    if not quantized:
        fix = "load the model with quantization=jlora.QuantConfig(…), or leave quantized out"
        raise ConfigError("no parameter is quantized", where="quantized", fix=fix)
    if len({_format(leaf.value) for leaf in quantized}) > 1:
        fix = "quantize all of them with the same settings"
        cause = "a folder has one quantization format, these parameters have several"
        raise ConfigError(cause, where="quantized", fix=fix)


def _refuse(leaves: Sequence[paths.Leaf], cause: str, fix: str) -> None:
    if leaves:
        raise ConfigError(cause, where=", ".join(leaf.module() for leaf in leaves), fix=fix)


def _format(leaf: Any) -> tuple[str, bool]:
    """The name of the format, and whether it is double quantized."""
    if isinstance(leaf, Int8Array):
        return "int8", False
    return leaf.quant_type, leaf.nested_absmax is not None


def stored_bytes(leaf: Any, matrices: int) -> int:
    """Upper bound of the bytes of one of a leaf's matrices in the file."""
    return leaf.nbytes // matrices + BESIDE


def quantized_tensors(module: str, leaf: NF4Array | Int8Array) -> dict[str, np.ndarray]:
    """{name: tensor} of one quantized matrix, whose children are on the host."""
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
    """``quantization_config`` as transformers' ``BitsAndBytesConfig`` writes it.

    ``llm_int8_skip_modules`` names every linear layer that is not quantized: without the list
    transformers guesses, and skips only the head.
    """
    leaves = paths.leaves(params)
    code, double = _format(next(leaf.value for leaf in leaves if is_quantized(leaf.value)))
    eight = code == "int8"
    dense = [leaf for leaf in leaves if leaf.kind == "kernel" and not is_quantized(leaf.value)]
    skipped = [module for leaf in dense for module in leaf.modules()]
    # In torch a tied head is a Linear, too, and is quantized if it is not named.
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
