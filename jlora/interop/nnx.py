"""NNX modules with adapted and quantized weights, by the product functions of their layers.

``Linear`` and ``LinearGeneral`` have a ``dot_general`` attribute, ``Einsum`` an ``einsum_op``, and
all a ``promote_dtype``. ``Embed`` has none for its lookup, so a subclass replaces it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util

from jlora.interop.kernel import (
    Kernel,
    Layout,
    dot_general,
    einsum,
    einsum_layout,
    embedding_logits,
)
from jlora.interop.view import View, view
from jlora.ops.dot import embed


@dataclasses.dataclass(frozen=True)
class NNXModel:
    """An NNX module as a function of jlora's weights; see ``jlora.interop``.

    ``graph`` and ``state`` are the module without its parameters. Every call starts from this
    state; ``module`` returns a module with a state of its own.
    """

    graph: Any
    state: Any
    view: View

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> Any:
        """The module called with the same arguments; adapted products are factored."""
        return self.module(params)(*args, **kwargs)

    def module(self, params: Any) -> Any:
        """The NNX module with these weights; adapted and quantized ones are not merged."""
        return self._merge(self.view.factored(params))

    def native(self, params: Any) -> Any:
        """The NNX module with every parameter dense, in its original shape."""
        return self._merge(self.view.dense(params))

    def _merge(self, leaves: dict) -> Any:
        return nnx.merge(self.graph, nnx.State(traverse_util.unflatten_dict(leaves)), self.state)


def from_nnx(module: nnx.Module, *, as_matrices: Sequence[str] = ()) -> tuple[NNXModel, dict]:
    """The module as a function of jlora's weights, and those weights; ``module`` is not changed.

    Args:
      module: any NNX module; its ``nnx.Param`` can be adapted.
      as_matrices: modules with other kernels (convolutions) to read as matrices (all axes but the
        last, last axis). Their product is not factored: adapters are merged in every step.

    Returns:
      ``(model, params)``: ``model(params, *args)`` is ``module(*args)``.

    Raises:
      ConfigError: ``as_matrices`` names no such module.
    """
    module = nnx.clone(module)
    layouts: dict[tuple, Layout] = {}
    for path, layer in nnx.iter_modules(module):
        layout = _layout(layer)
        if layout:
            name = "embedding" if isinstance(layer, nnx.Embed) else "kernel"
            layouts[(*path, name)] = layout
            _hook(layer)
    graph, params, state = nnx.split(module, nnx.Param, ...)
    leaves = traverse_util.flatten_dict(nnx.to_pure_dict(params))
    layouts = {key: layout for key, layout in layouts.items() if key in leaves}
    shapes = {key: layout.shape for key, layout in layouts.items()}
    correspondence = view(leaves, shapes, layouts, as_matrices)
    return NNXModel(graph, state, correspondence), correspondence.to_weights(leaves)


KINDS = (nnx.Linear, nnx.LinearGeneral, nnx.Einsum, nnx.Embed)


def _layout(layer: Any) -> Layout | None:
    """The layout of a layer's kernel; None for layers whose product cannot be factored."""
    kind = next((k for k in KINDS if isinstance(layer, k)), None)
    # A subclass's own call may use the kernel otherwise than dot would; likewise, below, a
    # dot_general or einsum_op that the user gave.
    if kind is None or type(layer).__call__ is not kind.__call__:
        return None
    match layer:
        case nnx.Linear() if layer.dot_general is jax.lax.dot_general:
            return Layout((layer.in_features, layer.out_features), (0,), (1,))
        case nnx.LinearGeneral() if not (layer.dot_general or layer.dot_general_cls):
            inputs, outputs = tuple(layer.in_features), tuple(layer.out_features)
            axes = tuple(range(len(inputs + outputs)))
            split = axes[: len(inputs)], axes[len(inputs) :]
            return None if layer.batch_axis else Layout(inputs + outputs, *split)
        case nnx.Einsum() if layer.einsum_op is jnp.einsum and layer.einsum_str:
            return einsum_layout(layer.einsum_str, tuple(layer.kernel_shape))
        case nnx.Embed() if type(layer) is nnx.Embed:  # no subclass: its class is replaced
            return Layout((layer.num_embeddings, layer.features), (0,), (1,))
    return None


def _hook(layer: Any) -> None:
    """Makes a layer accept ``Kernel`` weights; arrays are computed as before."""
    if isinstance(layer, nnx.Embed):
        layer.__class__ = Embed  # the layer is a clone
        return
    layer.promote_dtype = functools.partial(_promote, layer.promote_dtype)
    if isinstance(layer, nnx.Einsum):
        layer.einsum_op = einsum
    else:
        layer.dot_general = dot_general


def _promote(promote: Callable, args: tuple, /, **settings: Any) -> tuple:
    """The layer's dtype promotion; a ``Kernel`` counts by its dtype and is returned unchanged."""
    kernels = [isinstance(a, Kernel) for a in args]
    stand_ins = (jnp.zeros((), a.dtype) if k else a for a, k in zip(args, kernels, strict=True))
    promoted = promote(tuple(stand_ins), **settings)
    return tuple(a if k else p for a, k, p in zip(args, kernels, promoted, strict=True))


class Embed(nnx.Embed):
    """``nnx.Embed`` whose embedding may be a ``Kernel``."""

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The rows ``inputs``."""
        weight = self.embedding[...]
        if not isinstance(weight, Kernel):
            return super().__call__(inputs, *args, **kwargs)
        inputs = jnp.asarray(inputs)
        if self.num_embeddings == 1:  # Flax returns the only row for every id
            inputs = jnp.zeros_like(inputs)
        rows = embed(inputs, weight.weight)
        return self.promote_dtype((rows,), dtype=self.dtype, inexact=False)[0]

    def attend(self, query: Any, *args: Any, **kwargs: Any) -> Any:
        """Products of ``query`` with every row."""
        weight = self.embedding[...]
        if not isinstance(weight, Kernel):
            return super().attend(query, *args, **kwargs)
        stand_in = jnp.zeros((), weight.dtype)
        return embedding_logits(self.promote_dtype((query, stand_in), dtype=self.dtype)[0], weight)
