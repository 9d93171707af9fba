"""Llama-like decoders: llama, mistral, qwen2 and qwen3 (arXiv 2302.13971, 2310.06825, 2505.09388).

Pre-norm blocks of rotary grouped-query attention and a gated MLP. The families differ in biases,
query-key norms, windows and rope settings, all of which the config carries.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jlora.dot import Weight
from jlora.models.config import LlamaConfig
from jlora.models.decoder import KV, Call, scan_layers, stack
from jlora.models.layers import Embedding, Linear, Part, RMSNorm, activation, project
from jlora.models.rope import rotate


class Attention(nnx.Module):
    """Rotary attention, grouped queries; optional biases and per-head query and key norms."""

    def __init__(self, c: LlamaConfig, dtype: jnp.dtype):
        queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = Linear(c.hidden_size, queries, bias=c.qkv_bias, dtype=dtype)
        self.k_proj = Linear(c.hidden_size, keys, bias=c.qkv_bias, dtype=dtype)
        self.v_proj = Linear(c.hidden_size, keys, bias=c.qkv_bias, dtype=dtype)
        self.o_proj = Linear(queries, c.hidden_size, bias=c.out_bias, dtype=dtype)
        self.q_norm = RMSNorm(c.head_dim, eps=c.norm_eps, dtype=dtype) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, eps=c.norm_eps, dtype=dtype) if c.qk_norm else None
        self.head_dim = c.head_dim

    def __call__(self, x: Array, call: Call, index: Array, kv: KV | None):
        """(B, T, D) results of layer ``index``, and the cache with its new tokens."""
        heads = (*x.shape[:2], -1, self.head_dim)
        q, k, v = (p(x).reshape(heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, call.rope_table), rotate(k, call.rope_table)
        out, kv = call.attend(q, k, v, index, kv)
        return self.o_proj(out.reshape(*x.shape[:2], -1)), kv


class MLP(nnx.Module):
    """``down(act(gate(x)) * up(x))``."""

    def __init__(self, c: LlamaConfig, dtype: jnp.dtype):
        inner = c.intermediate_size
        self.gate_proj = Linear(c.hidden_size, inner, bias=c.mlp_bias, dtype=dtype)
        self.up_proj = Linear(c.hidden_size, inner, bias=c.mlp_bias, dtype=dtype)
        self.down_proj = Linear(inner, c.hidden_size, bias=c.mlp_bias, dtype=dtype)
        self.act = c.hidden_act

    def __call__(self, x: Array) -> Array:
        """(…, D) to (…, D)."""
        return self.down_proj(activation(self.act)(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
    """Attention and MLP, each behind a norm and added to the stream."""

    def __init__(self, c: LlamaConfig, dtype: jnp.dtype):
        self.self_attn = Attention(c, dtype)
        self.mlp = MLP(c, dtype)
        self.input_layernorm = RMSNorm(c.hidden_size, eps=c.norm_eps, dtype=dtype)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, eps=c.norm_eps, dtype=dtype)

    def __call__(self, x: Array, call: Call, index: Array, kv: KV | None):
        """The stream after layer ``index``, and the cache with its new tokens."""
        mixed, kv = self.self_attn(self.input_layernorm(x), call, index, kv)
        x = x + mixed
        return x + self.mlp(self.post_attention_layernorm(x)), kv


class Trunk(nnx.Module):
    """Embedding, stacked blocks and the last norm: transformers' ``model`` node."""

    def __init__(self, c: LlamaConfig, dtype: jnp.dtype):
        self.embed_tokens = Embedding(c.vocab_size, c.hidden_size, dtype=dtype)
        self.layers = stack(lambda: Block(c, dtype), c.num_hidden_layers)
        self.norm = RMSNorm(c.hidden_size, eps=c.norm_eps, dtype=dtype)


class Llama(nnx.Module):
    """The whole decoder; ``lm_head`` is absent in tied models."""

    def __init__(self, c: LlamaConfig, dtype: jnp.dtype):
        self.model = Trunk(c, dtype)
        head = functools.partial(Linear, c.hidden_size, c.vocab_size, bias=False, dtype=dtype)
        self.lm_head = None if c.tie_word_embeddings else head()
        self.rope = c.rope

    def features(
        self,
        ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        call: Call,
        kv: KV | None,
        remat: bool | str,
    ) -> tuple[Float[Array, "B T D"], KV | None]:
        """What the head reads, and the cache with the new tokens."""
        call = call.at(rope_table=self.rope.table(positions))
        x, kv = scan_layers(self.model.layers, self.model.embed_tokens(ids), call, kv, remat)
        return self.model.norm(x), kv

    def head(self, x: Float[Array, "*B D"], part: Part | None = None) -> Float[Array, "*B V"]:
        """Logits in float32, of all tokens or a part of them."""
        return project(x, self.head_weight(), part, tied=self.lm_head is None)

    def head_weight(self) -> Weight:
        """The head's kernel (dim, vocabulary); in tied models the embedding (vocabulary, dim)."""
        tied = self.model.embed_tokens.embedding
        return tied.get_value() if self.lm_head is None else self.lm_head.kernel.get_value()
