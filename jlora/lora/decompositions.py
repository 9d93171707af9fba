"""Initial A and B by matrix decompositions: PiSSA, LoftQ, OLoRA, and random orthogonal factors.

Matrices are (in, out), so that a delta is A@B.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# The default on accelerators, TF32 or bfloat16, is too coarse: A @ B is subtracted from the weight,
# and has to be its best approximation, not one within 0.4 %.
_matmul = functools.partial(jnp.matmul, precision="highest")


def principal(
    w: Float[Array, "in out"], r: int, scale: Float[Array, ""]
) -> tuple[Float[Array, "in r"], Float[Array, "r out"]]:
    """A and B such that ``scale·A@B`` is the best rank-r approximation of ``w`` (truncated SVD).

    Both get the roots of the singular values. PiSSA (arXiv 2404.02948) approximates a weight, LoftQ
    (arXiv 2310.08659) its quantization error.
    """
    u, s, vt = jnp.linalg.svd(w, full_matrices=False)
    return _split(u, s, vt, r, scale)


def nearly_principal(
    key: Array, w: Float[Array, "in out"], r: int, scale: Float[Array, ""], *, niter: int
) -> tuple[Float[Array, "in r"], Float[Array, "r out"]]:
    """``principal`` by ``niter`` subspace iterations (Halko et al., arXiv 0909.4061, 4.4 and 5.1).

    Equals torch's ``svd_lowrank`` with q = r, which PEFT calls, but for the random start.
    """
    basis, _ = jnp.linalg.qr(_matmul(w.mT, jax.random.normal(key, (w.shape[0], r))))
    for _ in range(niter):
        left, _ = jnp.linalg.qr(_matmul(w, basis))
        basis, _ = jnp.linalg.qr(_matmul(w.mT, left))
    u, s, vt = jnp.linalg.svd(_matmul(w, basis), full_matrices=False)
    return _split(u, s, _matmul(vt, basis.mT), r, scale)


def _split(
    u: Array, s: Array, vt: Array, r: int, scale: Array
) -> tuple[Float[Array, "in r"], Float[Array, "r out"]]:
    root = jnp.sqrt(s[:r] / scale)
    return u[:, :r] * root, root[:, None] * vt[:r]


def triangular(
    w: Float[Array, "in out"], r: int
) -> tuple[Float[Array, "in r"], Float[Array, "r out"]]:
    """The first r columns of Q and rows of R of torch's [out, in] weight (OLoRA, 2406.01775)."""
    q, upper = jnp.linalg.qr(w.mT)
    return upper[:r].mT, q[:, :r].mT


def orthogonal(
    key: Array, r: int, used: Array, fan_in: int, fan_out: int
) -> tuple[Float[Array, "in r"], Float[Array, "r out"]]:
    """Random non-zero A and B whose product is zero (PEFT's ``orthogonal``).

    A's rows are combinations of every other row of an orthogonal (r, r) matrix, and B's columns of
    the rows between, which are orthogonal to those.

    Args:
      key: a JAX random key.
      r: the rank, even.
      used: (r,), the ranks in use; the caller sets the others to zero.
      fan_in: A's rows.
      fan_out: B's columns.
    """
    key_q, key_a, key_b = jax.random.split(key, 3)
    noise = jax.random.normal(key_q, (r, r))
    # The ranks in use and the others are separate blocks, so that Q is orthogonal within those in
    # use, and A @ B stays zero once the others are zeroed.
    q, _ = jnp.linalg.qr(jnp.where(used & used[:, None], noise, jnp.eye(r)))
    a = _matmul(jax.random.normal(key_a, (fan_in, r // 2)), q[0::2])
    b = _matmul(q[1::2].mT, jax.random.normal(key_b, (r // 2, fan_out)))
    # PEFT's constant.
    return a / 10, b / 10
