"""Several tensors into one: TIES (arXiv 2306.01708), DARE (arXiv 2311.03099), plain sums.

The tensors of adapters that are merged are stacked along a first axis n. Zeros take no part: they
are never elected and never counted, so tensors may be padded with them.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key


class Rule(NamedTuple):
    """What is kept of the tensors and how the rest is merged."""

    prune: str | None  # by "magnitude", at "random"
    elect: str | None  # the sign of the "total" or of greater "frequency"
    density: float


def merge_tensors(
    tensors: Float[Array, "n in out"],
    weights: Float[Array, " n"],
    sizes: Int[Array, " n"],
    key: Key[Array, ""] | None,
    rule: Rule,
) -> Float[Array, "in out"]:
    """The weighted sum of what the rule keeps, or the mean over those of the elected sign.

    Args:
      tensors: one an adapter.
      weights: theirs.
      sizes: how many values of each tensor ``magnitude`` keeps.
      key: draws what ``random`` keeps; the rest is divided by the density.
      rule: see ``Rule``. Signs are elected before weights are applied.
    """
    if rule.prune == "magnitude":
        tensors = jnp.where(jax.vmap(largest)(tensors, sizes), tensors, 0.0)
    elif rule.prune == "random":
        assert key is not None
        kept = random_mask(key, tensors.shape, rule.density)
        tensors = jnp.where(kept, tensors / rule.density, 0.0)
    weighted = weights[:, None, None] * tensors
    if rule.elect is None:
        return weighted.sum(0)
    signs = jnp.sign(tensors)
    votes = (tensors if rule.elect == "total" else signs).sum(0)
    agree = signs == jnp.where(votes >= 0, 1.0, -1.0)
    return jnp.where(agree, weighted, 0.0).sum(0) / jnp.maximum(agree.sum(0), 1).astype(jnp.float32)


def largest(tensor: Float[Array, "in out"], size: Int[Array, ""]) -> Bool[Array, "in out"]:
    """Where the ``size`` values of largest magnitude are; of equal ones the first."""
    order = jnp.argsort(jnp.abs(tensor).ravel(), descending=True, stable=True)
    kept = jnp.zeros(tensor.size, bool).at[order].set(jnp.arange(tensor.size) < size)
    return kept.reshape(tensor.shape)


def random_mask(
    key: Key[Array, ""], shape: tuple[int, ...], density: float
) -> Bool[Array, "n in out"]:
    """True with the probability ``density``, each value by itself."""
    return jax.random.bernoulli(key, density, shape)
