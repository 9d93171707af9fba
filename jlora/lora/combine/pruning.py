"""Merging tensors with pruning: TIES (arXiv 2306.01708), DARE (arXiv 2311.03099), plain sums.

The adapters' tensors are stacked along a first axis n. Zeros have no vote in sign elections and are
not counted in means, so tensors may be padded with them.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key


class Rule(NamedTuple):
    """How tensors are pruned and merged."""

    prune: str | None  # "magnitude" or "random"
    elect: str | None  # majority sign by "total" or "frequency"; None: no election
    density: float  # fraction of values that pruning keeps


def merge_tensors(
    tensors: Float[Array, "n in out"],
    weights: Float[Array, " n"],
    sizes: Int[Array, " n"],
    key: Key[Array, ""] | None,
    rule: Rule,
) -> Float[Array, "in out"]:
    """The weighted sum of the pruned tensors, or the mean of values with the elected sign.

    Args:
      tensors: one for each adapter.
      weights: of the adapters; applied after signs are elected.
      sizes: the number of values of each tensor that ``magnitude`` keeps.
      key: for ``random``, which divides the values that it keeps by the density.
      rule: see ``Rule``.
    """
    if rule.prune == "magnitude":
        tensors = jnp.where(jax.vmap(magnitude_mask)(tensors, sizes), tensors, 0.0)
    elif rule.prune == "random":
        assert key is not None
        mask = random_mask(key, tensors.shape, rule.density)
        tensors = jnp.where(mask, tensors / rule.density, 0.0)
    weighted = weights[:, None, None] * tensors
    if rule.elect is None:
        return weighted.sum(0)
    signs = jnp.sign(tensors)
    votes = (tensors if rule.elect == "total" else signs).sum(0)
    # A tie elects plus, as in PEFT; the sign of a pruned value is 0, which agrees with neither.
    agree = signs == jnp.where(votes >= 0, 1.0, -1.0)
    return jnp.where(agree, weighted, 0.0).sum(0) / jnp.maximum(agree.sum(0), 1).astype(jnp.float32)


def magnitude_mask(tensor: Float[Array, "in out"], size: Int[Array, ""]) -> Bool[Array, "in out"]:
    """True at the ``size`` values of largest magnitude; the first of equal values win."""
    # By rank, not by a threshold, which would keep more than `size` where values are equal.
    order = jnp.argsort(jnp.abs(tensor).ravel(), descending=True, stable=True)
    mask = jnp.zeros(tensor.size, bool).at[order].set(jnp.arange(tensor.size) < size)
    return mask.reshape(tensor.shape)


def random_mask(
    key: Key[Array, ""], shape: tuple[int, ...], density: float
) -> Bool[Array, "n in out"]:
    """Independent values, each True with probability ``density``."""
    return jax.random.bernoulli(key, density, shape)
