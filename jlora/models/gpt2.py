"""GPT-2: learned positions, LayerNorm with bias, a fused query-key-value projection, GELU MLP."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jlora.dot import Weight
from jlora.models.config import GPT2Config
from jlora.models.decoder import KV, Call, scan_layers, stack
from jlora.models.layers import Embedding, LayerNorm, Linear, Part, activation, project


class Attention(nnx.Module):
    """``c_attn`` yields queries, keys and values side by side, in that order."""

    def __init__(self, c: GPT2Config, dtype: jnp.dtype):
        self.c_attn = Linear(c.hidden_size, 3 * c.hidden_size, bias=True, dtype=dtype)
        self.c_proj = Linear(c.hidden_size, c.hidden_size, bias=True, dtype=dtype)
        self.head_dim = c.head_dim

    def __call__(self, x: Array, call: Call, index: Array, kv: KV | None):
        """(B, T, D) results of layer ``index``, and the cache with its new tokens."""
        heads = (*x.shape[:2], -1, self.head_dim)
        q, k, v = (part.reshape(heads) for part in jnp.split(self.c_attn(x), 3, axis=-1))
        out, kv = call.attend(q, k, v, index, kv)
        return self.c_proj(out.reshape(x.shape)), kv


class MLP(nnx.Module):
    """``c_proj(act(c_fc(x)))``."""

    def __init__(self, c: GPT2Config, dtype: jnp.dtype):
        self.c_fc = Linear(c.hidden_size, c.intermediate_size, bias=True, dtype=dtype)
        self.c_proj = Linear(c.intermediate_size, c.hidden_size, bias=True, dtype=dtype)
        self.act = c.hidden_act

    def __call__(self, x: Array) -> Array:
        """(…, D) to (…, D)."""
        return self.c_proj(activation(self.act)(self.c_fc(x)))


class Block(nnx.Module):
    """Attention and MLP, each behind a LayerNorm and added to the stream."""

    def __init__(self, c: GPT2Config, dtype: jnp.dtype):
        self.ln_1 = LayerNorm(c.hidden_size, eps=c.norm_eps, dtype=dtype)
        self.attn = Attention(c, dtype)
        self.ln_2 = LayerNorm(c.hidden_size, eps=c.norm_eps, dtype=dtype)
        self.mlp = MLP(c, dtype)

    def __call__(self, x: Array, call: Call, index: Array, kv: KV | None):
        """The stream after layer ``index``, and the cache with its new tokens."""
        mixed, kv = self.attn(self.ln_1(x), call, index, kv)
        x = x + mixed
        return x + self.mlp(self.ln_2(x)), kv


class Trunk(nnx.Module):
    """Token and position embeddings, stacked blocks, last norm: the ``transformer`` node."""

    def __init__(self, c: GPT2Config, dtype: jnp.dtype):
        self.wte = Embedding(c.vocab_size, c.hidden_size, dtype=dtype)
        self.wpe = Embedding(c.max_position_embeddings, c.hidden_size, dtype=dtype)
        self.h = stack(lambda: Block(c, dtype), c.num_hidden_layers)
        self.ln_f = LayerNorm(c.hidden_size, eps=c.norm_eps, dtype=dtype)


class GPT2(nnx.Module):
    """The whole decoder; ``lm_head`` is absent in tied models (the usual case)."""

    def __init__(self, c: GPT2Config, dtype: jnp.dtype):
        self.transformer = Trunk(c, dtype)
        head = functools.partial(Linear, c.hidden_size, c.vocab_size, bias=False, dtype=dtype)
        self.lm_head = None if c.tie_word_embeddings else head()

    def features(
        self,
        ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        call: Call,
        kv: KV | None,
        remat: bool | str,
    ) -> tuple[Float[Array, "B T D"], KV | None]:
        """What the head reads, and the cache with the new tokens."""
        x = self.transformer.wte(ids) + self.transformer.wpe(positions)
        x, kv = scan_layers(self.transformer.h, x, call, kv, remat)
        return self.transformer.ln_f(x), kv

    def head(self, x: Float[Array, "*B D"], part: Part | None = None) -> Float[Array, "*B V"]:
        """Logits in float32, of all tokens or a part of them."""
        return project(x, self.head_weight(), part, tied=self.lm_head is None)

    def head_weight(self) -> Weight:
        """The head's kernel (dim, vocabulary); in tied models the embedding (vocabulary, dim)."""
        tied = self.transformer.wte.embedding
        return tied.get_value() if self.lm_head is None else self.lm_head.kernel.get_value()
