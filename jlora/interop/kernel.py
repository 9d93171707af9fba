"""Kernels of many axes as matrices (in, out), and their products by ``jlora.dot``."""

from __future__ import annotations

import dataclasses
import math
from types import EllipsisType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jlora.ops.dot import dot
from jlora.ops.weights import output_embedding


class Layout(NamedTuple):
    """How a kernel is read as a matrix: ``axes_in`` are contracted, ``axes_out`` are the output's.

    A projection to heads (D, H, hd) is Layout((D, H, hd), (0,), (1, 2)), a matrix (D, H·hd); one
    from heads (H, hd, D) is Layout((H, hd, D), (0, 1), (2,)).
    """

    shape: tuple[int, ...]
    axes_in: tuple[int, ...]
    axes_out: tuple[int, ...]

    @property
    def sizes_in(self) -> tuple[int, ...]:
        """The lengths of ``axes_in``."""
        return tuple(self.shape[i] for i in self.axes_in)

    @property
    def sizes_out(self) -> tuple[int, ...]:
        """The lengths of ``axes_out``."""
        return tuple(self.shape[i] for i in self.axes_out)

    def to_matrix(self, kernel: Float[Array, "..."]) -> Float[Array, "*layers in out"]:
        """The kernel as a matrix; a stacked kernel has a leading layer axis."""
        lead = kernel.ndim - len(self.shape)
        axes = (*range(lead), *(lead + i for i in (*self.axes_in, *self.axes_out)))
        sizes = math.prod(self.sizes_in), math.prod(self.sizes_out)
        return kernel.transpose(axes).reshape(*kernel.shape[:lead], *sizes)

    def from_matrix(self, matrix: Float[Array, "*layers in out"]) -> Float[Array, "..."]:
        """The inverse of ``to_matrix``."""
        lead, order = matrix.ndim - 2, (*self.axes_in, *self.axes_out)
        apart = matrix.reshape(*matrix.shape[:lead], *(self.shape[i] for i in order))
        back = (lead + order.index(i) for i in range(len(order)))
        return apart.transpose(*range(lead), *back)


class BiasLayout(NamedTuple):
    """How a bias of many axes is read as a vector (out,)."""

    shape: tuple[int, ...]

    def to_matrix(self, bias: Float[Array, "..."]) -> Float[Array, "*layers out"]:
        """The bias as a vector; a stacked bias has a leading layer axis."""
        return bias.reshape(*bias.shape[: bias.ndim - len(self.shape)], -1)

    def from_matrix(self, vector: Float[Array, "*layers out"]) -> Float[Array, "..."]:
        """The inverse of ``to_matrix``."""
        return vector.reshape(*vector.shape[:-1], *self.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Kernel:
    """A weight (in, out) in place of a layer's kernel array.

    The weight may have a leading layer axis, which ``lax.scan`` slices off; ``layout`` and
    ``shape`` are those of one layer.
    """

    weight: Any
    layout: Layout = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the layer's kernel, without the layer axis."""
        return self.layout.shape

    @property
    def dtype(self):
        """The base weight's dtype."""
        return self.weight.dtype

    def __getitem__(self, index: EllipsisType) -> Kernel:
        """``kernel[...]``, by which NNX's layers read their parameters."""
        if index is not Ellipsis:
            raise TypeError("an adapted or quantized kernel cannot be indexed")
        return self


def contract_axes(
    x: Float[Array, "..."], kernel: Kernel, axes: tuple[int, ...], dtype: Any = None
) -> Float[Array, "..."]:
    """Contracts ``axes`` of ``x`` with the kernel's ``axes_in``, in this order.

    Returns:
      The other axes of ``x``, then the kernel's ``axes_out``, in ``dtype`` (default: ``x.dtype``).
    """
    rest = [i for i in range(x.ndim) if i not in axes]
    rows = x.transpose(*rest, *axes).reshape(*(x.shape[i] for i in rest), -1)
    out = dot(rows, kernel.weight, dtype)
    return out.reshape(*rows.shape[:-1], *kernel.layout.sizes_out)


def dot_general(
    x: Any, kernel: Any, dimension_numbers: Any, preferred_element_type: Any = None, **settings: Any
) -> Array:
    """``lax.dot_general`` whose second operand may be a ``Kernel``.

    The settings ``precision`` and ``out_sharding`` apply to arrays only: ``jlora.dot`` accumulates
    in float32 and leaves the sharding of the result to XLA.
    """
    if not isinstance(kernel, Kernel):
        settings["preferred_element_type"] = preferred_element_type
        return jax.lax.dot_general(x, kernel, dimension_numbers, **settings)
    (x_axes, kernel_axes), _ = dimension_numbers
    pairs = dict(zip(kernel_axes, x_axes, strict=True))
    axes = tuple(pairs[i] for i in kernel.layout.axes_in)
    return contract_axes(x, kernel, axes, preferred_element_type)


def einsum(
    equation: str, x: Any, kernel: Any, preferred_element_type: Any = None, **settings: Any
) -> Array:
    """``jnp.einsum`` of two operands, the second of which may be a ``Kernel``."""
    if not isinstance(kernel, Kernel):
        settings["preferred_element_type"] = preferred_element_type
        return jnp.einsum(equation, x, kernel, **settings)
    x_axes, kernel_axes, out_axes = axis_letters(equation, x.ndim)
    axes = tuple(x_axes.index(kernel_axes[i]) for i in kernel.layout.axes_in)
    out = contract_axes(x, kernel, axes, preferred_element_type)
    order = [c for i, c in enumerate(x_axes) if i not in axes]
    order += [kernel_axes[i] for i in kernel.layout.axes_out]
    return out.transpose([order.index(c) for c in out_axes])


def einsum_layout(equation: str, shape: tuple[int, ...]) -> Layout | None:
    """The layout of an einsum's second operand; None if the einsum is not a matrix product.

    It is one if every axis of the kernel is either contracted with the input or new in the output.
    """
    x_axes, kernel_axes, out_axes = axis_letters(equation, None)
    # A letter twice takes a diagonal, which is no matrix product.
    if len(set(x_axes.replace(".", ""))) != len(x_axes.replace(".", "")):
        return None
    if any((c in x_axes) == (c in out_axes) for c in kernel_axes):
        return None
    if len(set(kernel_axes)) != len(shape):
        return None
    if any(c not in out_axes and c not in kernel_axes for c in x_axes):
        return None
    axes_in = tuple(i for i, c in enumerate(kernel_axes) if c in x_axes)
    axes_out = tuple(kernel_axes.index(c) for c in out_axes if c in kernel_axes)
    return Layout(tuple(shape), axes_in, axes_out)


def einsum_bias_shape(equation: str, x_ndim: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of an einsum layer's bias for broadcasting: 1 for the axes of the input."""
    _, kernel_axes, out_axes = axis_letters(equation, x_ndim)
    sizes = dict(zip(kernel_axes, shape, strict=True))
    return tuple(sizes.get(c, 1) for c in out_axes)


def embedding_logits(x: Float[Array, "... dim"], embedding: Kernel) -> Float[Array, "... vocab"]:
    """``x @ embedding.mT``, for logits from an embedding.

    LoRA on the embedding does not change these logits: see ``output_embedding``.
    """
    return dot(x, output_embedding(embedding.weight).mT)


def axis_letters(equation: str, x_ndim: int | None) -> tuple[str, str, str]:
    """The axes of input, kernel and output; an ellipsis becomes capitals, given ``x_ndim``."""
    operands, out = equation.replace(" ", "").split("->")
    x_axes, kernel_axes = operands.split(",")
    hidden = 0 if x_ndim is None else x_ndim - len(x_axes.replace("...", ""))
    taken = set(equation)
    fresh = "".join(c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in taken)[:hidden]
    return (
        x_axes.replace("...", fresh),
        kernel_axes.replace("...", ""),
        out.replace("...", fresh),
    )
