"""Linen modules with adapted and quantized weights, by ``flax.linen.intercept_methods``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from flax.core import meta

from jlora.interop.kernel import (
    Kernel,
    Layout,
    contract_axes,
    einsum,
    einsum_bias_shape,
    einsum_layout,
    embedding_logits,
)
from jlora.interop.view import View, view
from jlora.ops.dot import embed

LEAF = {nn.Dense: "kernel", nn.DenseGeneral: "kernel", nn.Einsum: "kernel", nn.Embed: "embedding"}
"""Layers that can be factored, and the name of their weight."""

METHODS = ("__call__", "attend")


@dataclasses.dataclass(frozen=True)
class LinenModel:
    """A Linen module as a function of jlora's weights; see ``jlora.interop``.

    ``collections`` are the variables other than ``params`` (batch statistics), unchanged.
    """

    module: nn.Module
    view: View
    collections: dict[str, Any]

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> Any:
        """``module.apply`` with the same arguments; adapted products are factored."""
        variables = self._variables(self.view.factored(params))
        with nn.intercept_methods(_factor):
            return self.module.apply(variables, *args, **kwargs)

    def native(self, params: Any) -> dict[str, Any]:
        """The module's variables: every parameter dense, in its original place and shape."""
        return self._variables(self.view.dense(params))

    def _variables(self, leaves: dict) -> dict[str, Any]:
        return {**self.collections, "params": traverse_util.unflatten_dict(leaves)}


def from_linen(
    module: nn.Module, variables: Any, *args: Any, as_matrices: Sequence[str] = (), **kwargs: Any
) -> tuple[LinenModel, dict]:
    """The module as a function of jlora's weights, and those weights.

    The module is traced once (``jax.eval_shape``) to find which axes of its kernels are inputs.
    Parameters that it does not use with these arguments are not converted.

    Args:
      module: any Linen module.
      variables: its variables, with ``params``; boxes (``nn.Partitioned``) are removed.
      args: arguments of ``module.apply`` after the variables; abstract arrays are enough.
      as_matrices: modules with other kernels (convolutions) to read as matrices (all axes but the
        last, last axis). Their product is not factored: adapters are merged in every step.
      kwargs: further arguments of ``module.apply``.

    Returns:
      ``(model, params)``: ``model(params, *args)`` is ``module.apply(variables, *args)``.

    Raises:
      ConfigError: ``as_matrices`` names no such module.
    """
    variables = dict(meta.unbox(variables))
    leaves = traverse_util.flatten_dict(_plain(variables.pop("params")))
    shapes: dict[tuple, tuple[int, ...]] = {}
    layouts: dict[tuple, Layout | None] = {}

    def record(next_fun: Callable, args: Any, kwargs: Any, context: Any) -> Any:
        layer, path = context.module, context.module.scope.path
        for name, value in layer.variables.get("params", {}).items():
            if hasattr(value, "shape"):
                shapes[(*path, name)] = value.shape
        kind = _layer(layer)
        key = (*path, LEAF[kind]) if kind else ()
        if key in shapes and context.method_name in METHODS:
            layout = _layout(layer, shapes[key], args, kwargs)
            # A layer that is called with different axes has no matrix of its own.
            layouts[key] = layout if layouts.get(key, layout) == layout else None
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(record):
        all_variables = {**variables, "params": traverse_util.unflatten_dict(leaves)}
        jax.eval_shape(lambda v, a: module.apply(v, *a, **kwargs), all_variables, args)
    known = {key: layout for key, layout in layouts.items() if layout}
    correspondence = view(leaves, shapes, known, as_matrices)
    model = LinenModel(module, correspondence, variables)
    return model, correspondence.to_weights(leaves)


def _plain(tree: Any) -> Any:
    return {k: _plain(v) for k, v in tree.items()} if hasattr(tree, "items") else tree


def _layer(module: nn.Module) -> type[nn.Module] | None:
    """The class in ``LEAF`` whose methods the module uses unchanged, if any."""
    if getattr(module, "dot_general", None) or getattr(module, "dot_general_cls", None):
        return None
    of = type(module)
    for kind in LEAF:
        # A subclass with its own methods computes something else, which dot would not.
        same = (getattr(of, method, None) is getattr(kind, method, None) for method in METHODS)
        if issubclass(of, kind) and all(same):
            return kind
    return None


def _layout(module: Any, shape: tuple[int, ...], args: Any, kwargs: Any) -> Layout | None:
    if isinstance(module, nn.Einsum):
        return einsum_layout(_equation(module, args, kwargs), shape)
    if not isinstance(module, nn.DenseGeneral):
        return Layout(shape, (0,), (1,))
    inputs = 1 if isinstance(module.axis, int) else len(module.axis)
    axes = tuple(range(len(shape)))
    return None if module.batch_dims else Layout(shape, axes[:inputs], axes[inputs:])


def _equation(module: nn.Einsum, args: Any, kwargs: Any) -> str:
    given = args[1] if len(args) > 1 else kwargs.get("einsum_str")
    return given or module.einsum_str or ""


def _factor(next_fun: Callable, args: Any, kwargs: Any, context: Any) -> Any:
    """Computes a layer whose weight is a ``Kernel`` as Flax does, with the product by ``dot``."""
    module, method = context.module, context.method_name
    kind = _layer(module)
    # Not by the layer's self.param, which compares the first array of what is stored with the
    # kernel's shape: a quantized weight cannot pass through it.
    weight = module.get_variable("params", LEAF[kind]) if kind else None
    if not isinstance(weight, Kernel):
        return next_fun(*args, **kwargs)
    if kind is nn.Embed and method == "setup":
        return None  # Flax's setup would compare the kernel's shape with an array's
    if method not in METHODS:
        return next_fun(*args, **kwargs)
    (x, *more) = (*args, *kwargs.values())
    if kind is nn.Embed:
        return _attend(module, weight, x) if method == "attend" else _embed(module, weight, x)
    bias = module.get_variable("params", "bias") if module.use_bias else None
    # Flax promotes arrays only: a scalar of the kernel's dtype takes part in its place.
    stand_in = jnp.zeros((), weight.dtype)
    x, _, bias = module.promote_dtype(x, stand_in, bias, dtype=module.dtype)
    if kind is nn.Einsum:
        equation = _equation(module, (x, *more), {})
        y = einsum(equation, x, weight, module.preferred_element_type)
        shape = einsum_bias_shape(equation, x.ndim, weight.shape)
        return y if bias is None else y + bias.reshape(shape)
    axes = getattr(module, "axis", -1)
    axes = sorted(i % x.ndim for i in ((axes,) if isinstance(axes, int) else axes))
    y = contract_axes(x, weight, tuple(axes))
    return y if bias is None else y + bias


def _embed(module: nn.Embed, weight: Kernel, ids: Any) -> Any:
    ids = jnp.asarray(ids)
    if module.num_embeddings == 1:  # Flax returns the only row for every id
        ids = jnp.zeros_like(ids)
    (rows,) = module.promote_dtype(embed(ids, weight.weight), dtype=module.dtype, inexact=False)
    return rows


def _attend(module: nn.Embed, weight: Kernel, query: Any) -> Any:
    stand_in = jnp.zeros((), weight.dtype)
    query, _ = module.promote_dtype(query, stand_in, dtype=module.dtype)
    return embedding_logits(query, weight)
