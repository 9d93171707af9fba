"""Sparse mixtures of experts: a router picks a few MLPs for every token (arXiv 2101.03961).

Parameters that transformers keeps as bare tensors have its names, and lie [out, in] for all::

    gate.weight (E, D)   experts.gate_up_proj (E, 2 · inner, D)   experts.down_proj (E, D, inner)

Copies of the tokens, one for each of a token's experts, are sorted by expert, so that every expert
multiplies a run of rows: no expert computes what it was not asked for.
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
    """Which experts a token goes to, and with what weights; float32 whatever ``x`` is in."""

    def __init__(self, width: int, experts: ExpertsConfig, dtype: jnp.dtype):
        self.weight = nnx.Param(jnp.zeros((experts.number, width), dtype))
        bias = jnp.zeros((experts.number,), dtype)
        self.bias = nnx.Param(bias) if experts.clamped_swiglu else None
        self.number, self.per_token = experts.number, experts.per_token
        self.normalized = experts.normalized

    def __call__(
        self, x: Float[Array, "tokens D"]
    ) -> tuple[Float[Array, "tokens k"], Int[Array, "tokens k"]]:
        """Weights and numbers of each token's experts, the best ones first.

        A weight is the expert's share in the softmax over all, or over the chosen where
        ``normalized``: the same as shares over all, divided by their sum over the chosen.
        """
        logits = dot(x, self.weight.get_value().mT, jnp.float32)
        if self.bias is not None:
            logits = logits + self.bias.get_value().astype(jnp.float32)
        best, chosen = jax.lax.top_k(logits, self.per_token)
        among = best if self.normalized else logits
        return jnp.exp(best - jax.nn.logsumexp(among, axis=-1, keepdims=True)), chosen


class GatedExperts(nnx.Module):
    """``down(act(gate) * up)`` for each expert; gate lies before up in one matrix."""

    def __init__(self, c: DecoderConfig, experts: ExpertsConfig, dtype: jnp.dtype):
        number, width, inner = experts.number, c.hidden_size, experts.intermediate_size
        self.gate_up_proj = nnx.Param(jnp.zeros((number, 2 * inner, width), dtype))
        self.down_proj = nnx.Param(jnp.zeros((number, width, inner), dtype))
        self.act = c.hidden_act

    def __call__(
        self, x: Float[Array, "rows D"], sizes: Int[Array, " experts"]
    ) -> Float[Array, "rows D"]:
        """Each row through its expert; rows are sorted by expert, ``sizes`` rows to each."""
        gate_up = saveable(grouped_dot(x, self.gate_up_proj.get_value().mT, sizes))
        gate, up = jnp.split(gate_up, 2, axis=-1)
        inner = activation(self.act)(gate) * up
        return saveable(grouped_dot(inner, self.down_proj.get_value().mT, sizes))


class ClampedExperts(nnx.Module):
    """gpt-oss's: ``down((up + 1) * gate * sigmoid(alpha * gate))``, gate and up clamped before.

    Gate and up alternate in one matrix. Both matrices have biases (E, out).
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
        """Each row through its expert; rows are sorted by expert, ``sizes`` rows to each."""
        gate_up = grouped_dot(x, self.gate_up_proj.get_value().mT, sizes)
        gate_up = saveable(gate_up + _bias_per_row(self.gate_up_proj_bias, gate_up, sizes))
        gate = jnp.minimum(gate_up[..., ::2], self.limit)
        up = jnp.clip(gate_up[..., 1::2], -self.limit, self.limit)
        inner = (up + 1) * gate * jax.nn.sigmoid(self.alpha * gate)
        out = grouped_dot(inner, self.down_proj.get_value().mT, sizes)
        return saveable(out + _bias_per_row(self.down_proj_bias, out, sizes))


def _bias_per_row(bias: nnx.Param, like: Array, sizes: Array) -> Array:
    """The bias of each row's expert, for rows ``like``."""
    each = bias.get_value().astype(like.dtype)
    return jnp.repeat(each, sizes, axis=0, total_repeat_length=like.shape[0])


class MixtureOfExperts(nnx.Module):
    """The weighted sum of each token's experts, and a gated expert that all tokens share if any."""

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
        """The mixture of every token, padding like others."""
        graph, weights = nnx.split((self.gate, self.experts))

        def mix(x: Array, weights: Any) -> Array:
            return _mixture(x, *nnx.merge(graph, weights))

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
    """Rows ``order`` of ``x``, all of them; ``back`` undoes it.

    The gradient is a look-up too: JAX's own adds into rows, which GPUs do in no fixed order.
    """
    del back
    return x.at[order].get(mode="promise_in_bounds", unique_indices=True)


def _permute_fwd(x, order, back):
    return _permute(x, order, back), (order, back)


def _permute_bwd(saved, g):
    order, back = saved
    return _permute(g, back, order), None, None


_permute.defvjp(_permute_fwd, _permute_bwd)
