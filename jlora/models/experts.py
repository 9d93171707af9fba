"""Sparse mixtures of experts: a router picks a few MLPs for every token (arXiv 2101.03961).

Parameters have transformers' names. Matrices are [out, in] in all families (in gpt-oss's layout,
[in, out], sharding by name gave wrong logits on a 2 × 2 × 2 mesh)::

    gate.weight (E, D)   experts.gate_up_proj (E, 2 · inner, D)   experts.down_proj (E, D, inner)

Each token is copied once per chosen expert and the copies are sorted by expert, so that every
expert multiplies one contiguous group of rows and computes only its own tokens.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jlora.distributed.constraints import shard_map_rows
from jlora.models.config import DecoderConfig, ExpertsConfig
from jlora.models.layers import Linear, activation
from jlora.ops.dot import dot, grouped_dot
from jlora.ops.remat import saveable


class Router(nnx.Module):
    """Chooses each token's experts and their weights, in float32 whatever the dtype of ``x``."""

    def __init__(self, width: int, experts: ExpertsConfig, dtype: jnp.dtype):
        self.weight = nnx.Param(jnp.zeros((experts.number, width), dtype))
        bias = jnp.zeros((experts.number,), dtype)
        self.bias = nnx.Param(bias) if experts.clamped_swiglu else None
        self.number, self.per_token = experts.number, experts.per_token
        self.normalized = experts.normalized

    def __call__(
        self, x: Float[Array, "tokens D"]
    ) -> tuple[Float[Array, "tokens k"], Int[Array, "tokens k"]]:
        """Weights and indices of each token's experts, largest weight first.

        Weights are the softmax over all experts, or, if ``normalized``, over the chosen ones (equal
        to the softmax over all, divided by its sum over the chosen).
        """
        # Rounded to bfloat16, close logits become equal, and another expert would be chosen.
        logits = dot(x, self.weight.get_value().mT, jnp.float32)
        if self.bias is not None:
            logits = logits + self.bias.get_value().astype(jnp.float32)
        best, chosen = jax.lax.top_k(logits, self.per_token)
        candidates = best if self.normalized else logits
        return jnp.exp(best - jax.nn.logsumexp(candidates, axis=-1, keepdims=True)), chosen


class GatedExperts(nnx.Module):
    """``down(act(gate) * up)`` per expert; gate and up are fused, gate's rows first."""

    def __init__(self, c: DecoderConfig, experts: ExpertsConfig, dtype: jnp.dtype):
        number, width, inner = experts.number, c.hidden_size, experts.intermediate_size
        self.gate_up_proj = nnx.Param(jnp.zeros((number, 2 * inner, width), dtype))
        self.down_proj = nnx.Param(jnp.zeros((number, width, inner), dtype))
        self.act = c.hidden_act

    def __call__(
        self, x: Float[Array, "rows D"], sizes: Int[Array, " experts"]
    ) -> Float[Array, "rows D"]:
        """Each row's expert applied to it; rows are sorted by expert, ``sizes`` of them each."""
        gate_up = saveable(grouped_dot(x, self.gate_up_proj.get_value().mT, sizes))
        gate, up = jnp.split(gate_up, 2, axis=-1)
        inner = activation(self.act)(gate) * up
        return saveable(grouped_dot(inner, self.down_proj.get_value().mT, sizes))


class ClampedExperts(nnx.Module):
    """gpt-oss: ``down((up + 1) * gate * sigmoid(alpha * gate))`` of clamped gate and up.

    Rows of gate and up alternate in the fused matrix. Both matrices have biases (E, out).
    """

    def __init__(self, c: DecoderConfig, experts: ExpertsConfig, dtype: jnp.dtype):
        number, width, inner = experts.number, c.hidden_size, experts.intermediate_size
        self.gate_up_proj = nnx.Param(jnp.zeros((number, 2 * inner, width), dtype))
        self.gate_up_proj_bias = nnx.Param(jnp.zeros((number, 2 * inner), dtype))
        self.down_proj = nnx.Param(jnp.zeros((number, width, inner), dtype))
        self.down_proj_bias = nnx.Param(jnp.zeros((number, width), dtype))
        self.alpha, self.limit = experts.clamped_swiglu or (1.0, jnp.inf)

    def __call__(
        self, x: Float[Array, "rows D"], sizes: Int[Array, " experts"]
    ) -> Float[Array, "rows D"]:
        """Each row's expert applied to it; rows are sorted by expert, ``sizes`` of them each."""
        gate_up = grouped_dot(x, self.gate_up_proj.get_value().mT, sizes)
        gate_up = saveable(gate_up + _bias_per_row(self.gate_up_proj_bias, gate_up, sizes))
        gate = jnp.minimum(gate_up[..., ::2], self.limit)
        up = jnp.clip(gate_up[..., 1::2], -self.limit, self.limit)
        inner = (up + 1) * gate * jax.nn.sigmoid(self.alpha * gate)
        out = grouped_dot(inner, self.down_proj.get_value().mT, sizes)
        return saveable(out + _bias_per_row(self.down_proj_bias, out, sizes))


def _bias_per_row(bias: nnx.Param, like: Array, sizes: Array) -> Array:
    """The bias of each row's expert, in the dtype and for the rows of ``like``."""
    values = bias.get_value().astype(like.dtype)
    # Under jit the length of the result cannot depend on the values of `sizes`.
    return jnp.repeat(values, sizes, axis=0, total_repeat_length=like.shape[0])


class MixtureOfExperts(nnx.Module):
    """The weighted sum of each token's experts, plus a gated shared expert if there is one."""

    def __init__(
        self, c: DecoderConfig, experts: ExpertsConfig, shared: nnx.Module | None, dtype: jnp.dtype
    ):
        kind = ClampedExperts if experts.clamped_swiglu else GatedExperts
        self.gate = Router(c.hidden_size, experts, dtype)
        self.experts = kind(c, experts, dtype)
        self.shared_expert = shared
        gate = functools.partial(Linear, c.hidden_size, 1, bias=False, dtype=dtype)
        self.shared_expert_gate = None if shared is None else gate()

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The mixture of every token, padding included."""
        graph, weights = nnx.split((self.gate, self.experts))

        def mix(x: Array, weights: Any) -> Array:
            return _mixture(x, *nnx.merge(graph, weights))

        # Each device sorts its own tokens: XLA would gather all activations to sort them together.
        mixed = shard_map_rows(mix, x, weights)
        if self.shared_expert is None or self.shared_expert_gate is None:
            return mixed
        return mixed + jax.nn.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)


def _mixture(x: Array, router: Router, experts: GatedExperts | ClampedExperts) -> Array:
    """The weighted sums (B, T, D) of each token's experts."""
    rows = x.reshape(-1, x.shape[-1])
    weights, chosen = router(rows)
    order = jnp.argsort(chosen.reshape(-1))
    back = jnp.argsort(order)
    sizes = jnp.bincount(chosen.reshape(-1), length=router.number)
    copies = jnp.repeat(rows, router.per_token, axis=0)
    out = experts(_permute(copies, order, back), sizes)
    out = _permute(out, back, order).reshape(*chosen.shape, -1)
    mixed = jnp.sum(out.astype(jnp.float32) * weights[..., None], axis=1)
    return mixed.astype(x.dtype).reshape(x.shape)


@jax.custom_vjp
def _permute(x: Array, order: Array, back: Array) -> Array:
    """``x[order]`` for a permutation ``order`` with inverse ``back``.

    Its gradient is a gather, too: JAX's own is a scatter-add, whose order on GPUs is not fixed.
    """
    del back
    return x.at[order].get(mode="promise_in_bounds", unique_indices=True)


def _permute_fwd(x, order, back):
    return _permute(x, order, back), (order, back)


def _permute_bwd(saved, g):
    order, back = saved
    return _permute(g, back, order), None, None


_permute.defvjp(_permute_fwd, _permute_bwd)
