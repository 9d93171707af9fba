"""Folders with bitsandbytes weights as transformers saves them, written from jlora's arrays."""

import json
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from jlora.config import QuantConfig
from jlora.io.hf import load_pretrained
from jlora.io.hf.names import checkpoint_tensors
from jlora.quant.codebooks import DYNAMIC_MAP, FOUR_BIT
from jlora.quant.int8 import Int8Array
from jlora.quant.params import is_quantized
from jlora.tree import paths


def quantize_folder(folder: Path, config: QuantConfig, dtype: str = "float32") -> dict:
    """Quantizes a folder's weights in place; returns the quantized parameters."""
    model, params = load_pretrained(folder, dtype=dtype, quantization=config)
    file = load_file(folder / "model.safetensors")
    for tensor in checkpoint_tensors(model):
        leaf = paths.get(params, tensor.path)
        if is_quantized(leaf):
            at = ... if tensor.layer is None else tensor.layer
            layer = jax.tree.map(lambda x, at=at: np.array(x[at]), leaf)
            del file[tensor.name]
            file |= parts(tensor.name, layer)
    save_file(file, folder / "model.safetensors", metadata={"format": "pt"})
    hf = json.loads((folder / "config.json").read_text())
    hf["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(hf))
    return params


def parts(weight: str, q) -> dict[str, np.ndarray]:
    """The tensors of one quantized matrix."""
    if isinstance(q, Int8Array):
        form = {f"{weight}_format": np.zeros((), np.uint8)}
        return {weight: q.codes, f"{weight.removesuffix('weight')}SCB": q.absmax} | form
    state = {"quant_type": q.quant_type, "blocksize": q.block_size, "dtype": "float32"}
    state["shape"] = list(q.matrix_shape)
    found = {
        weight: q.codes.reshape(-1, 1),
        f"{weight}.absmax": q.absmax.reshape(-1),
        f"{weight}.quant_map": FOUR_BIT[q.quant_type],
    }
    if q.nested_absmax is not None:
        found[f"{weight}.nested_absmax"] = q.nested_absmax
        found[f"{weight}.nested_quant_map"] = DYNAMIC_MAP
        state |= {"nested_blocksize": 256, "nested_dtype": "float32"}
        state["nested_offset"] = float(q.nested_offset)
    return found | {f"{weight}.quant_state.bitsandbytes__{q.quant_type}": as_bytes(state)}


def as_bytes(state) -> np.ndarray:
    """The bytes of a JSON text, as an array."""
    return np.frombuffer(json.dumps(state).encode(), np.uint8).copy()
