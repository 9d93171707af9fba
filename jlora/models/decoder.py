"""The decoder: blocks of attention and MLP on one stream, with what families differ in as settings.

Module names are Llama's; a family's own names are given to parameters by ``registry.Family.names``.
A block has up to four norms, which are None where a family has none::

    input_layernorm → self_attn → attention_out_norm       (+ stream)
    post_attention_layernorm → mlp → mlp_out_norm          (+ stream)
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jlora.models.config import DecoderConfig
from jlora.models.experts import MixtureOfExperts
from jlora.models.layer_scan import KV, Call, scan_layers, stack
from jlora.models.layers import Embedding, Linear, Norm, Part, activation, make_norm, project
from jlora.ops.remat import saveable
from jlora.ops.weights import Weight, output_embedding


class Attention(nnx.Module):
    """Grouped-query attention, with separate projections or a fused one."""

    def __init__(self, c: DecoderConfig, dtype: jnp.dtype):
        queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim

        def linear(width: int) -> Linear:
            return Linear(c.hidden_size, width, bias=c.qkv_bias, dtype=dtype)

        def norm(heads: int) -> Norm | None:
            if c.qk_norm is None:
                return None
            shape = {
                "head": (c.head_dim,),
                "each_head": (heads, c.head_dim),
                "all": (heads * c.head_dim,),
            }[c.qk_norm]
            return make_norm(c.qk_norm_kind, *shape, eps=c.norm_eps, dtype=dtype)

        if c.fused_qkv:
            self.qkv_proj = linear(queries + 2 * keys)
        else:
            self.q_proj, self.k_proj, self.v_proj = linear(queries), linear(keys), linear(keys)
        self.q_norm, self.k_norm = norm(c.num_attention_heads), norm(c.num_key_value_heads)
        self.o_proj = Linear(queries, c.hidden_size, bias=c.out_bias, dtype=dtype)
        heads = jnp.zeros((c.num_attention_heads,), dtype)
        self.sinks = nnx.Param(heads) if c.sinks else None

    def __call__(self, x: Array, call: Call, index: Array, kv: KV | None):
        """(B, T, D) results of layer ``index``, and the cache with its new tokens."""
        q, k, v = self._project(x, call.config)
        q, k = self._normed(self.q_norm, q, call.config), self._normed(self.k_norm, k, call.config)
        q, k = call.rotate(q, index), call.rotate(k, index)
        if self.q_norm is None and not call.config.fused_qkv:
            # Then nothing needs what they were before, and nothing is rotated again.
            q, k = saveable(q), saveable(k)
        v = v.reshape(*k.shape)
        sinks = None if self.sinks is None else self.sinks.get_value()
        out, kv = call.attend(q, k, v, index, kv, sinks)
        return self.o_proj(out.reshape(*x.shape[:2], -1)), kv

    def _project(self, x: Array, c: DecoderConfig) -> list[Array]:
        """Queries, keys and values (B, T, heads · dim)."""
        if not c.fused_qkv:
            return [p(x) for p in (self.q_proj, self.k_proj, self.v_proj)]
        qkv, dim = self.qkv_proj(x), c.head_dim
        if c.fused_qkv == "heads":
            qkv = qkv.reshape(*x.shape[:2], c.num_attention_heads, 3 * dim)
            return [part.reshape(*x.shape[:2], -1) for part in jnp.split(qkv, 3, axis=-1)]
        queries, keys = c.num_attention_heads * dim, c.num_key_value_heads * dim
        return jnp.split(qkv, [queries, queries + keys], axis=-1)

    def _normed(self, norm: Norm | None, x: Array, c: DecoderConfig) -> Array:
        """Queries or keys (B, T, heads, dim), normed."""
        heads = (*x.shape[:2], -1, c.head_dim)
        return (
            _norm(norm, x).reshape(heads) if c.qk_norm == "all" else _norm(norm, x.reshape(heads))
        )


class MLP(nnx.Module):
    """``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))`` without a gate."""

    def __init__(self, c: DecoderConfig, dtype: jnp.dtype, inner: int | None = None):
        inner = inner or c.intermediate_size

        def linear(n_in: int, n_out: int) -> Linear:
            return Linear(n_in, n_out, bias=c.mlp_bias, dtype=dtype)

        if c.mlp == "gated":
            self.gate_proj = linear(c.hidden_size, inner)
        if c.mlp == "fused":
            self.gate_up_proj = linear(c.hidden_size, 2 * inner)
        else:
            self.up_proj = linear(c.hidden_size, inner)
        self.down_proj = linear(inner, c.hidden_size)
        self.kind, self.act = c.mlp, c.hidden_act

    def __call__(self, x: Array) -> Array:
        """(…, D) to (…, D)."""
        act = activation(self.act)
        if self.kind == "plain":
            return self.down_proj(act(self.up_proj(x)))
        if self.kind == "fused":
            gate, up = jnp.split(self.gate_up_proj(x), 2, axis=-1)
            return self.down_proj(act(gate) * up)
        return self.down_proj(act(self.gate_proj(x)) * self.up_proj(x))


def _mlp(c: DecoderConfig, dtype: jnp.dtype) -> MLP | MixtureOfExperts:
    """A block's MLP, or the mixture in its place."""
    if c.experts is None:
        return MLP(c, dtype)
    inner = c.experts.shared_size
    return MixtureOfExperts(c, c.experts, MLP(c, dtype, inner) if inner else None, dtype)


class Block(nnx.Module):
    """Attention and MLP, added to the stream."""

    def __init__(self, c: DecoderConfig, dtype: jnp.dtype):
        def norm(place: str) -> Norm | None:
            if place not in c.norms:
                return None
            return make_norm(c.norm, c.hidden_size, eps=c.norm_eps, dtype=dtype)

        self.self_attn = Attention(c, dtype)
        self.mlp = _mlp(c, dtype)
        self.input_layernorm = norm("before_attention")
        self.attention_out_norm = norm("after_attention")
        self.post_attention_layernorm = norm("before_mlp")
        self.mlp_out_norm = norm("after_mlp")

    def __call__(self, x: Array, call: Call, index: Array, kv: KV | None):
        """The stream after layer ``index``, and the cache with its new tokens."""
        c, before_mlp = call.config, self.post_attention_layernorm
        if c.norm_after_sum:
            mixed, kv = self.self_attn(x, call, index, kv)
            x = _norm(self.input_layernorm, x + mixed)
            return _norm(before_mlp, x + self.mlp(x)), kv
        normed = _norm(self.input_layernorm, x)
        mixed, kv = self.self_attn(normed, call, index, kv)
        mixed = _scaled(_norm(self.attention_out_norm, mixed), c.residual_scale)
        if c.parallel:
            normed = normed if before_mlp is None else before_mlp(x)
            return x + mixed + self.mlp(normed), kv
        x = x + mixed
        out = _norm(self.mlp_out_norm, self.mlp(_norm(before_mlp, x)))
        return x + _scaled(out, c.residual_scale), kv


class Backbone(nnx.Module):
    """Embeddings, stacked blocks and the last norm: what transformers calls the base model."""

    def __init__(self, c: DecoderConfig, dtype: jnp.dtype):
        width, hidden = c.feature_size, c.hidden_size
        narrow = width != hidden
        rows = 0 if c.learned_positions is None else c.learned_positions + c.max_position_embeddings
        self.embed_tokens = Embedding(c.vocab_size, width, dtype=dtype)
        self.embed_positions = Embedding(rows, hidden, dtype=dtype) if rows else None
        self.project_in = Linear(width, hidden, bias=False, dtype=dtype) if narrow else None
        self.layers = stack(lambda: Block(c, dtype), c.num_hidden_layers)
        norm = make_norm(c.norm, hidden, eps=c.norm_eps, dtype=dtype)
        self.norm = norm if c.final_norm else None
        self.project_out = Linear(hidden, width, bias=False, dtype=dtype) if narrow else None

    def __call__(
        self, ids: Array, positions: Array, call: Call, kv: KV | None, checkpointing: bool | str
    ) -> tuple[Array, KV | None]:
        """What the head reads, and the cache with the new tokens."""
        c = call.config
        x = _scaled(self.embed_tokens(ids), c.embedding_scale)
        if self.project_in is not None:
            x = self.project_in(x)
        if self.embed_positions is not None:
            x = x + self.embed_positions(positions + (c.learned_positions or 0))
        x, kv = scan_layers(self.layers, x, call.at_positions(positions), kv, checkpointing)
        x = _norm(self.norm, x)
        return (x if self.project_out is None else self.project_out(x)), kv


class Decoder(nnx.Module):
    """The whole model; ``lm_head`` is absent in tied models, and where there is a score head."""

    def __init__(self, c: DecoderConfig, dtype: jnp.dtype):
        self.model = Backbone(c, dtype)
        scores = c.num_labels is not None

        tied = scores or c.tie_word_embeddings
        head = functools.partial(Linear, c.feature_size, dtype=dtype)
        self.score = head(c.num_labels, bias=False) if c.num_labels else None
        self.lm_head = None if tied else head(c.vocab_size, bias=c.head_bias)
        self.scale = 1.0 if scores else c.logit_scale
        self.softcap = None if scores else c.logit_softcap

    def features(
        self,
        ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        call: Call,
        kv: KV | None,
        checkpointing: bool | str,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """What the head reads, and the cache with the new tokens; None without one."""
        return self.model(ids, positions, call, kv, checkpointing)

    def head(self, x: Float[Array, "*B D"], part: Part | None = None) -> Float[Array, "*B V"]:
        """Logits in float32, of all tokens or a part of them."""
        own = self.lm_head if self.score is None else self.score
        bias = None if own is None or own.bias is None else own.bias.get_value()
        logits = project(x, self.head_weight(), bias, part, tied=own is None)
        logits = _scaled(logits, self.scale)
        if self.softcap is None:
            return logits
        return self.softcap * jnp.tanh(logits / self.softcap)

    def head_weight(self) -> Weight:
        """The head's kernel (dim, vocabulary); in tied models the embedding (vocabulary, dim).

        LoRA on a tied embedding does not change it: see ``output_embedding``.
        """
        own = self.lm_head if self.score is None else self.score
        if own is not None:
            return own.kernel.get_value()
        table = self.model.embed_tokens.embedding.get_value()
        return output_embedding(table)


def _norm(norm: Norm | None, x: Array) -> Array:
    return x if norm is None else norm(x)


def _scaled(x: Array, factor: float) -> Array:
    """``x`` times a factor of its own dtype, as torch has it; 1 is free."""
    return x if factor == 1.0 else x * jnp.asarray(factor, x.dtype)
