"""Which leaves of a parameter tree are packed, and how: from settings to packed leaves.

A packed leaf is an ``NF4Array`` (four bits) or an ``Int8Array`` (eight). Both are pytrees that have
``shape``, ``dtype``, ``mT``, ``dequantize()`` and ``take(rows)``; nothing else asks which it is.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jlora.config import QuantConfig
from jlora.errors import ConfigError, did_you_mean
from jlora.quant import int8, nf4
from jlora.quant.int8 import Int8Array
from jlora.quant.nf4 import NF4Array
from jlora.tree import paths

QUANTIZED = (NF4Array, Int8Array)
QuantizedArray = NF4Array | Int8Array


def is_quantized(leaf: Any) -> bool:
    """Whether a leaf of a tree is a packed array."""
    return isinstance(leaf, QUANTIZED)


def quantize_matrix(
    w: Float[Array, "*lead rows cols"], config: QuantConfig
) -> NF4Array | Int8Array:
    """A matrix as ``config`` wants it; of several each for itself, one after the other."""
    if w.ndim > 2:
        return jax.lax.map(functools.partial(quantize_matrix, config=config), w)
    if config.load_in_8bit:
        return int8.quantize(w)
    double, kind = config.bnb_4bit_use_double_quant, config.bnb_4bit_quant_type
    return nf4.quantize(w, config.block_size, double, kind)


def quant_config_of(leaf: QuantizedArray) -> QuantConfig:
    """The settings that pack as a leaf is packed."""
    if isinstance(leaf, Int8Array):
        return QuantConfig(load_in_8bit=True)
    return QuantConfig(
        bnb_4bit_quant_type=leaf.quant_type,  # pyright: ignore[reportArgumentType]
        bnb_4bit_use_double_quant=leaf.nested_absmax is not None,
        block_size=leaf.block_size,
    )


def scheme_text(config: QuantConfig) -> str:
    """How ``config`` packs, for people; equal texts pack alike."""
    if config.load_in_8bit:
        return "int8"
    double = " with double quantization" if config.bnb_4bit_use_double_quant else ""
    return f"{config.bnb_4bit_quant_type}{double}, blocks of {config.block_size}"


def quantize_params(params: Any, config: QuantConfig) -> Any:
    """A tree with its linear layers packed: every floating ``kernel`` that is a matrix per layer.

    So are the matrices of experts (``paths.EXPERTS``), each for itself, and they stand as they are.
    Kernels (in, out) are packed as bitsandbytes packs torch's [out, in] and stand transposed.
    Embeddings, norms, biases, output heads (``paths.OUTPUT_HEADS``) and the modules named in
    ``llm_int8_skip_modules`` stay as they are, and so does what is packed already. Embeddings
    (vocabulary, dim) and output heads are packed when ``include_modules`` names them::

        {"q_proj": {"kernel": (L, in, out)}}  →  {"q_proj": {"kernel": NF4Array (L, in, out)}}

    Raises:
      ConfigError: a module to skip or to include matches none, or only some layers of a stacked
        kernel.
    """
    leaves = paths.leaves(params)
    _check_names(leaves, config)
    packed: dict[paths.Path, Any] = {}
    for leaf in leaves:
        if _is_wanted(leaf, config):
            packed[leaf.path] = _pack_leaf(leaf, config)
    return paths.map_leaves(lambda path, leaf: packed.get(path, leaf), params)


def stored_as_in_torch(path: paths.Path) -> bool:
    """Whether torch keeps a leaf's matrix as it is here, not as [out, in] for (in, out)."""
    return path[-1] in ("embedding", *paths.EXPERTS)


def _is_wanted(leaf: paths.Leaf, config: QuantConfig) -> bool:
    is_array = not is_quantized(leaf.value) and hasattr(leaf.value, "dtype")
    axes = 3 if leaf.kind in paths.EXPERTS else 2
    if not (is_array and len(leaf.shape) == axes):
        return False
    if not jnp.issubdtype(leaf.value.dtype, jnp.floating):
        return False
    if _named(leaf, config.llm_int8_skip_modules, "llm_int8_skip_modules"):
        return False
    if _named(leaf, config.include_modules, "include_modules"):
        return leaf.kind in ("kernel", "embedding", *paths.EXPERTS)
    return leaf.kind in ("kernel", *paths.EXPERTS) and not _named(leaf, paths.OUTPUT_HEADS, "")


def _named(leaf: paths.Leaf, names: Sequence[str], key: str) -> bool:
    hit = [any(_names(name, module) for name in names) for module in leaf.modules()]
    if any(hit) and not all(hit):
        raise ConfigError(
            f"names only some layers of {leaf.module()}, but they are one array",
            where=f"quantization.{key}",
            fix="name the module without its layer number",
        )
    return any(hit)


def _names(name: str, module: str) -> bool:
    """Whether ``name`` is the module, a node above it, or the end of its name at a dot."""
    return f".{module}.".startswith(f".{name}.") or f".{module}".endswith(f".{name}")


def _check_names(leaves: Sequence[paths.Leaf], config: QuantConfig) -> None:
    modules = [module for leaf in leaves for module in leaf.modules()]
    for key in ("llm_int8_skip_modules", "include_modules"):
        for name in getattr(config, key):
            harmless = key == "llm_int8_skip_modules" and name in paths.OUTPUT_HEADS
            if harmless or any(_names(name, m) for m in modules):
                continue
            last = [part for m in modules for part in (m.rsplit(".", 1)[-1], m)]
            raise ConfigError(
                f"no module is called {name!r}",
                where=f"quantization.{key}",
                fix=did_you_mean(name, last) or "name a module of the model",
            )


def _pack_leaf(leaf: paths.Leaf, config: QuantConfig) -> NF4Array | Int8Array:
    def one(w: Array) -> NF4Array | Int8Array:
        return (
            quantize_matrix(w, config)
            if stored_as_in_torch(leaf.path)
            else quantize_matrix(w.mT, config).mT
        )

    # Layer after layer, so that only one exists in float32 at a time.
    return one(leaf.value) if leaf.stack is None else jax.lax.map(one, leaf.value)
