"""Truncated singular value decompositions: best approximations of a rank (Eckart–Young)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jlora.lora import Adapter
from jlora.lora.combine.factors import adapter_factors, adapter_from_factors, other_leaves
from jlora.lora.combine.refusals import low_rank_faults, refuse


def reduce_rank(adapter: Adapter, r: int) -> Adapter:
    """The adapter with every delta replaced by its best approximation of rank ``r`` or less.

    A module's error in the Frobenius norm is the root of the sum of squares of the dropped singular
    values. Scales, leaves other than A and B, and modules of rank ``r`` or less do not change.

    Raises:
      ConfigError: ``r`` is not positive, or a matrix has more than one ``scale · A @ B``.
    """
    faults = [] if r > 0 else [f"a rank of {r}: it must be positive"]
    refuse([*faults, *low_rank_faults(adapter)], "reduce_rank")
    reduced = {}
    for path, f in adapter_factors(adapter).items():
        a, b = truncate_product(f.a, f.b, r)
        reduced[path] = f._replace(a=a, b=b, ranks=np.minimum(f.ranks, a.shape[-1]))
    return adapter_from_factors(reduced, other_leaves(adapter), adapter.config, adapter.parts)


@functools.partial(jax.jit, static_argnames="rank")
def truncate_product(
    a: Float[Array, "*layers in r"], b: Float[Array, "*layers r out"], rank: int
) -> tuple[Float[Array, "*layers in k"], Float[Array, "*layers k out"]]:
    """``truncate(a @ b, rank)`` without computing the product: QR of both, SVD of (r, r)."""
    # Accelerators compute float32 products in TF32 or bfloat16 by default, with errors larger than
    # the singular values that decide what is dropped.
    with jax.default_matmul_precision("highest"):
        left, core_a = jnp.linalg.qr(a)
        right, core_b = jnp.linalg.qr(b.mT)
        a, b = truncate(core_a @ core_b.mT, rank)
        return left @ a, b @ right.mT


def truncate(
    matrix: Float[Array, "*layers in out"], rank: int
) -> tuple[Float[Array, "*layers in k"], Float[Array, "*layers k out"]]:
    """A with orthonormal columns, and B with the singular values, as in PEFT.

    There are fewer than ``rank`` columns if the matrix has fewer rows or columns.
    """
    u, s, vh = jnp.linalg.svd(matrix, full_matrices=False)
    return u[..., :rank], (s[..., None] * vh)[..., :rank, :]
