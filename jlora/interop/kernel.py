"""Kernels of many axes as matrices (in, out), and their products."""

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
    """How a layer's kernel is a matrix: ``axes_in`` are summed over, ``axes_out`` come out so.

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
        """The kernel, or those of stacked layers, as a matrix."""
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


class Flat(NamedTuple):
    """A bias of many axes, which is a vector (out,) in its layer's ``Layout``."""

    shape: tuple[int, ...]

    def to_matrix(self, bias: Float[Array, "..."]) -> Float[Array, "*layers out"]:
        """The bias, or those of stacked layers, as a vector."""
        return bias.reshape(*bias.shape[: bias.ndim - len(self.shape)], -1)

    def from_matrix(self, vector: Float[Array, "*layers out"]) -> Float[Array, "..."]:
        """The inverse of ``to_matrix``."""
        return vector.reshape(*vector.shape[:-1], *self.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Kernel:
    """A weight (in, out) in the place of its layer's kernel.

    The weight may have a leading layer axis, which a scan over the layers takes off; ``layout`` and
    ``shape`` are one layer's.
    """

    weight: Any
    layout: Layout = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The kernel's own shape, of one layer."""
        return self.layout.shape

    @property
    def dtype(self):
        """The base weight's dtype."""
        return self.weight.dtype

    def __getitem__(self, index: EllipsisType) -> Kernel:
        """``kernel[...]``, which is how NNX's layers read their parameters."""
        if index is not Ellipsis:
            raise TypeError("an adapted or packed kernel has no parts")
        return self


def contract(
    x: Float[Array, "..."], kernel: Kernel, axes: tuple[int, ...], dtype: Any = None
) -> Float[Array, "..."]:
    """Sums ``axes`` of ``x`` with the kernel's ``axes_in``, in this order.

    Returns:
      The other axes of ``x``, then the kernel's ``axes_out``; in ``dtype``, by default ``x.dtype``.
    """
    rest = [i for i in range(x.ndim) if i not in axes]
    rows = x.transpose(*rest, *axes).reshape(*(x.shape[i] for i in rest), -1)
    out = dot(rows, kernel.weight, dtype)
    return out.reshape(*rows.shape[:-1], *kernel.layout.sizes_out)


def dot_general(
    x: Any, kernel: Any, dimension_numbers: Any, preferred_element_type: Any = None, **settings: Any
) -> Array:
    """``lax.dot_general`` whose second operand may be a ``Kernel``.

    Of the settings, ``precision`` and ``out_sharding`` hold for arrays only: jlora.dot accumulates
    in float32, and its result lies as XLA finds best.
    """
    if not isinstance(kernel, Kernel):
        settings["preferred_element_type"] = preferred_element_type
        return jax.lax.dot_general(x, kernel, dimension_numbers, **settings)
    (x_axes, kernel_axes), _ = dimension_numbers
    pairs = dict(zip(kernel_axes, x_axes, strict=True))
    axes = tuple(pairs[i] for i in kernel.layout.axes_in)
    return contract(x, kernel, axes, preferred_element_type)


def einsum(
    equation: str, x: Any, kernel: Any, preferred_element_type: Any = None, **settings: Any
) -> Array:
    """``jnp.einsum`` of two operands, the second of which may be a ``Kernel``."""
    if not isinstance(kernel, Kernel):
        settings["preferred_element_type"] = preferred_element_type
        return jnp.einsum(equation, x, kernel, **settings)
    of_x, of_kernel, of_out = letters(equation, x.ndim)
    axes = tuple(of_x.index(of_kernel[i]) for i in kernel.layout.axes_in)
    out = contract(x, kernel, axes, preferred_element_type)
    order = [c for i, c in enumerate(of_x) if i not in axes]
    order += [of_kernel[i] for i in kernel.layout.axes_out]
    return out.transpose([order.index(c) for c in of_out])


def einsum_layout(equation: str, shape: tuple[int, ...]) -> Layout | None:
    """The layout of an einsum's second operand; None where its product is not a matrix's.

    It is one if each of its axes is either summed over with the input or comes out anew.
    """
    of_x, of_kernel, of_out = letters(equation, None)
    if len(set(of_x.replace(".", ""))) != len(of_x.replace(".", "")):
        return None
    if any((c in of_x) == (c in of_out) for c in of_kernel) or len(set(of_kernel)) != len(shape):
        return None
    if any(c not in of_out and c not in of_kernel for c in of_x):
        return None
    axes_in = tuple(i for i, c in enumerate(of_kernel) if c in of_x)
    axes_out = tuple(of_kernel.index(c) for c in of_out if c in of_kernel)
    return Layout(tuple(shape), axes_in, axes_out)


def einsum_bias_shape(equation: str, x_ndim: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in which an einsum layer's bias is added: the kernel's axes, 1 for the input's."""
    _, of_kernel, of_out = letters(equation, x_ndim)
    sizes = dict(zip(of_kernel, shape, strict=True))
    return tuple(sizes.get(c, 1) for c in of_out)


def attend(x: Float[Array, "... dim"], embedding: Kernel) -> Float[Array, "... vocab"]:
    """``x @ embedding.mT``, for logits from an embedding.

    LoRA on the embedding does not change these logits: see ``output_embedding``.
    """
    return dot(x, output_embedding(embedding.weight).mT)


def letters(equation: str, x_ndim: int | None) -> tuple[str, str, str]:
    """The axes of input, kernel and result; an ellipsis in capitals, for ``x_ndim`` axes."""
    operands, out = equation.replace(" ", "").split("->")
    of_x, of_kernel = operands.split(",")
    hidden = 0 if x_ndim is None else x_ndim - len(of_x.replace("...", ""))
    taken = set(equation)
    fresh = "".join(c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in taken)[:hidden]
    return of_x.replace("...", fresh), of_kernel.replace("...", ""), out.replace("...", fresh)
