"""Quantizing the leaves of a parameter tree by a ``QuantConfig``.

A quantized leaf is an ``NF4Array`` (4 bits) or an ``Int8Array`` (8 bits). Both are pytrees with
``shape``, ``dtype``, ``mT``, ``dequantize()`` and ``take(rows)``.
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
    """Whether a leaf is a quantized array, without an adapter (see ``ops.weights``)."""
    return isinstance(leaf, QUANTIZED)


def quantize_matrix(w: Float[Array, "*lead rows cols"], config: QuantConfig) -> QuantizedArray:
    """A quantized matrix; stacked matrices are quantized one after the other."""
    if w.ndim > 2:
        # Not vmap, which would hold the float32 values of all matrices at once.
        return jax.lax.map(functools.partial(quantize_matrix, config=config), w)
    if config.load_in_8bit:
        return int8.quantize(w)
    double, kind = config.bnb_4bit_use_double_quant, config.bnb_4bit_quant_type
    return nf4.quantize(w, config.block_size, double, kind)


def quant_config_of(leaf: QuantizedArray) -> QuantConfig:
    """The settings by which a leaf was quantized."""
    if isinstance(leaf, Int8Array):
        return QuantConfig(load_in_8bit=True)
    return QuantConfig(
        bnb_4bit_quant_type=leaf.quant_type,  # pyright: ignore[reportArgumentType]
        bnb_4bit_use_double_quant=leaf.nested_absmax is not None,
        block_size=leaf.block_size,
    )


def scheme_text(config: QuantConfig) -> str:
    """The quantization format in words, which identify it."""
    if config.load_in_8bit:
        return "int8"
    double = " with double quantization" if config.bnb_4bit_use_double_quant else ""
    return f"{config.bnb_4bit_quant_type}{double}, blocks of {config.block_size}"


def quantize_params(params: Any, config: QuantConfig) -> Any:
    """The tree with its linear layers quantized: every floating-point ``kernel`` of two axes.

    Kernels (in, out) are quantized as torch's [out, in], as bitsandbytes does, and transposed.
    Expert matrices (``paths.EXPERTS``), which are [out, in], are quantized one by one. Embeddings,
    norms, biases, output heads (``paths.OUTPUT_HEADS``), the modules named in
    ``llm_int8_skip_modules`` and quantized leaves do not change; embeddings (vocabulary, dim) and
    output heads are quantized if ``include_modules`` names them::

        {"q_proj": {"kernel": (L, in, out)}}  →  {"q_proj": {"kernel": NF4Array (L, in, out)}}

    Raises:
      ConfigError: a name to skip or to include matches no module, or only some layers of a stacked
        kernel.
    """
    leaves = paths.leaves(params)
    _check_names(leaves, config)
    quantized: dict[paths.Path, Any] = {}
    for leaf in leaves:
        if _is_selected(leaf, config):
            quantized[leaf.path] = _quantize_leaf(leaf, config)
    return paths.map_leaves(lambda path, leaf: quantized.get(path, leaf), params)


def stored_as_in_torch(path: paths.Path) -> bool:
    """Whether a leaf has torch's layout; torch stores other matrices (in, out) as [out, in]."""
    return path[-1] in ("embedding", *paths.EXPERTS)


def skipped_in_some_layers(params: Any, config: QuantConfig) -> tuple[frozenset[str], ...]:
    """Per layer: the leaves that ``llm_int8_skip_modules`` names there, but not in every layer.

    () if there are none. Layers that differ must not be stacked together: quantized and dense
    matrices are not one array. ``params`` are stacked in one run, or in runs that agree.
    """
    found: dict[int, set[str]] = {}
    layers: set[int] = set()
    whole: dict[str, set[int]] = {}
    for leaf in paths.leaves(params):
        if leaf.stack is not None:
            first = paths.first_layer(leaf.stack)
            layers |= {*range(first, first + (leaf.layers or 0))}
            name = ".".join(leaf.path[len(leaf.stack) :])
            for i, module in enumerate(leaf.modules()):
                whole.setdefault(name, set()).add(first + i)
                if any(_names(skip, module) for skip in config.llm_int8_skip_modules):
                    found.setdefault(first + i, set()).add(name)
    everywhere = {n for n, has in whole.items() if all(n in found.get(i, ()) for i in has)}
    apart = tuple(frozenset(found.get(i, set()) - everywhere) for i in sorted(layers))
    return apart if any(apart) else ()


def _is_selected(leaf: paths.Leaf, config: QuantConfig) -> bool:
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
        fix = "name the module without its layer number"
        if key == "llm_int8_skip_modules":
            fix += ", or name the layers in the quantization with which the model is loaded"
        cause = f"names only some layers of {leaf.module()}, which are one array"
        raise ConfigError(cause, where=f"quantization.{key}", fix=fix)
    return any(hit)


def _names(name: str, module: str) -> bool:
    """Whether ``name`` is the module, one that contains it, or the end of its name at a dot."""
    return f".{module}.".startswith(f".{name}.") or f".{module}".endswith(f".{name}")


def _check_names(leaves: Sequence[paths.Leaf], config: QuantConfig) -> None:
    modules = [module for leaf in leaves for module in leaf.modules()]
    for key in ("llm_int8_skip_modules", "include_modules"):
        for name in getattr(config, key):
            # Configurations name lm_head also for models whose head is tied; heads are skipped
            # anyway.
            harmless = key == "llm_int8_skip_modules" and name in paths.OUTPUT_HEADS
            if harmless or any(_names(name, m) for m in modules):
                continue
            last = [part for m in modules for part in (m.rsplit(".", 1)[-1], m)]
            raise ConfigError(
                f"no module is called {name!r}",
                where=f"quantization.{key}",
                fix=did_you_mean(name, last) or "name a module of the model",
            )


def _quantize_leaf(leaf: paths.Leaf, config: QuantConfig) -> QuantizedArray:
    def one_layer(w: Array) -> QuantizedArray:
        if stored_as_in_torch(leaf.path):
            return quantize_matrix(w, config)
        return quantize_matrix(w.mT, config).mT

    # Layer by layer, so that only one is in float32 at a time.
    return one_layer(leaf.value) if leaf.stack is None else jax.lax.map(one_layer, leaf.value)
