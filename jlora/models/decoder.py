"""The decoder: blocks of attention and MLP on a residual stream, configured by DecoderConfig.

Modules have Llama's names; ``Family.names`` maps them to a family's names in the parameter tree. A
block has up to four norms, which are None in families without them::

    input_layernorm → self_attn → attention_out_norm       (+ stream)
    post_attention_layernorm → mlp → mlp_out_norm          (+ stream)
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jlora.models.attention_context import AttentionContext
from jlora.models.config import DecoderConfig
from jlora.models.experts import MixtureOfExperts
from jlora.models.kv_cache import KV
from jlora.models.layer_scan import scan_layers, stack_layers
from jlora.models.layers import (
    Embedding,
    HeadColumns,
    Linear,
    Norm,
    activation,
    make_norm,
    output_logits,
    project,
)
from jlora.ops.remat import saveable
from jlora.ops.weights import Weight, output_embedding
from jlora.tree.paths import run_key


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

    def __call__(self, x: Array, context: AttentionContext, index: Array, kv: KV | None):
        """The attention output (B, T, D) of layer ``index``, and the updated cache."""
        q, k, v = self._project(x, context.config)
        q = self._normalise(self.q_norm, q, context.config)
        k = self._normalise(self.k_norm, k, context.config)
        q, k = context.rotate(q, index), context.rotate(k, index)
        if self.q_norm is None and not context.config.fused_qkv:
            # Save them rotated: the gradient of a rotation needs neither its input nor its output,
            # so the backward pass does not rotate again (5.4 ms a layer of a 63M model on a CPU).
            # A norm needs its unrotated output too.
            q, k = saveable(q), saveable(k)
        v = v.reshape(*k.shape)
        sinks = None if self.sinks is None else self.sinks.get_value()
        out, kv = context.attend(q, k, v, index, kv, sinks)
        return self.o_proj(out.reshape(*x.shape[:2], -1)), kv

    def _project(self, x: Array, c: DecoderConfig) -> list[Array]:
        """Queries, keys and values (B, T, heads · dim)."""
        if not c.fused_qkv:
            return project(x, self.q_proj, self.k_proj, self.v_proj)
        qkv, dim = self.qkv_proj(x), c.head_dim
        if c.fused_qkv == "heads":
            qkv = qkv.reshape(*x.shape[:2], c.num_attention_heads, 3 * dim)
            return [part.reshape(*x.shape[:2], -1) for part in jnp.split(qkv, 3, axis=-1)]
        queries, keys = c.num_attention_heads * dim, c.num_key_value_heads * dim
        return jnp.split(qkv, [queries, queries + keys], axis=-1)

    def _normalise(self, norm: Norm | None, x: Array, c: DecoderConfig) -> Array:
        """Normalised queries or keys (B, T, heads, dim)."""
        heads = (*x.shape[:2], -1, c.head_dim)
        if c.qk_norm == "all":
            return _apply_norm(norm, x).reshape(heads)
        return _apply_norm(norm, x.reshape(heads))


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
        """The MLP's output (…, D) for ``x`` (…, D)."""
        act = activation(self.act)
        if self.kind == "plain":
            return self.down_proj(act(self.up_proj(x)))
        if self.kind == "fused":
            gate, up = jnp.split(self.gate_up_proj(x), 2, axis=-1)
            return self.down_proj(act(gate) * up)
        gate, up = project(x, self.gate_proj, self.up_proj)
        return self.down_proj(act(gate) * up)


def _mlp(c: DecoderConfig, dtype: jnp.dtype, sparse: bool) -> MLP | MixtureOfExperts:
    """A block's MLP, or, if ``sparse``, the mixture of experts in its place."""
    if c.experts is None or not sparse:
        return MLP(c, dtype)
    inner = c.experts.shared_size
    return MixtureOfExperts(c, c.experts, MLP(c, dtype, inner) if inner else None, dtype)


class Block(nnx.Module):
    """Attention and MLP, each added to the residual stream."""

    def __init__(self, c: DecoderConfig, dtype: jnp.dtype, sparse: bool = True):
        def norm(place: str) -> Norm | None:
            if place not in c.norms:
                return None
            return make_norm(c.norm, c.hidden_size, eps=c.norm_eps, dtype=dtype)

        self.self_attn = Attention(c, dtype)
        self.mlp = _mlp(c, dtype, sparse)
        self.input_layernorm = norm("before_attention")
        self.attention_out_norm = norm("after_attention")
        self.post_attention_layernorm = norm("before_mlp")
        self.mlp_out_norm = norm("after_mlp")

    def __call__(self, x: Array, context: AttentionContext, index: Array, kv: KV | None):
        """The residual stream after layer ``index``, and the updated cache."""
        c, before_mlp = context.config, self.post_attention_layernorm
        if c.norm_after_sum:
            mixed, kv = self.self_attn(x, context, index, kv)
            x = _apply_norm(self.input_layernorm, x + mixed)
            return _apply_norm(before_mlp, x + self.mlp(x)), kv
        normed = _apply_norm(self.input_layernorm, x)
        mixed, kv = self.self_attn(normed, context, index, kv)
        mixed = _scaled(_apply_norm(self.attention_out_norm, mixed), c.residual_scale)
        if c.parallel:
            normed = normed if before_mlp is None else before_mlp(x)
            return x + mixed + self.mlp(normed), kv
        x = x + mixed
        out = _apply_norm(self.mlp_out_norm, self.mlp(_apply_norm(before_mlp, x)))
        return x + _scaled(out, c.residual_scale), kv


def _stacks(c: DecoderConfig, dtype: jnp.dtype) -> Any:
    """All blocks, stacked; or a stack for each run of blocks with the same kinds of weights."""

    def stack(run: range) -> nnx.Module:
        sparse = run[0] not in c.mlp_only_layers
        return stack_layers(lambda: Block(c, dtype, sparse), len(run))

    first, *others = c.runs
    return nnx.Dict({run_key(run): stack(run) for run in c.runs}) if others else stack(first)


class Backbone(nnx.Module):
    """Embeddings, stacked blocks and final norm; transformers' base model, without the head."""

    def __init__(self, c: DecoderConfig, dtype: jnp.dtype):
        width, hidden = c.feature_size, c.hidden_size
        narrow = width != hidden
        rows = 0 if c.learned_positions is None else c.learned_positions + c.max_position_embeddings
        self.embed_tokens = Embedding(c.vocab_size, width, dtype=dtype)
        self.embed_positions = Embedding(rows, hidden, dtype=dtype) if rows else None
        self.project_in = Linear(width, hidden, bias=False, dtype=dtype) if narrow else None
        self.layers = _stacks(c, dtype)
        norm = make_norm(c.norm, hidden, eps=c.norm_eps, dtype=dtype)
        self.norm = norm if c.final_norm else None
        self.project_out = Linear(hidden, width, bias=False, dtype=dtype) if narrow else None

    def __call__(
        self,
        ids: Array,
        positions: Array,
        context: AttentionContext,
        kv: KV | None,
        checkpointing: bool | str,
    ) -> tuple[Array, KV | None]:
        """The head's input (B, T, D), and the updated cache."""
        c = context.config
        x = _scaled(self.embed_tokens(ids), c.embedding_scale)
        if self.project_in is not None:
            x = self.project_in(x)
        if self.embed_positions is not None:
            x = x + self.embed_positions(positions + (c.learned_positions or 0))
        # Before the scan, which would compute all cosines anew in every layer and in its backward
        # pass.
        context = context.at_positions(positions)
        for run in c.runs:
            layers = self.layers if len(c.runs) == 1 else self.layers[run_key(run)]
            x, kv = scan_layers(layers, run, x, context, kv, checkpointing)
        x = _apply_norm(self.norm, x)
        return (x if self.project_out is None else self.project_out(x)), kv


class Decoder(nnx.Module):
    """Backbone and head. ``lm_head`` is None in tied models and in classifiers (``score``)."""

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
        context: AttentionContext,
        kv: KV | None,
        checkpointing: bool | str,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """The head's input, and the updated cache (None without one)."""
        return self.model(ids, positions, context, kv, checkpointing)

    def head(
        self, x: Float[Array, "*B D"], columns: HeadColumns | None = None
    ) -> Float[Array, "*B V"]:
        """Logits in float32, of the whole vocabulary or a range of its columns."""
        head = self.lm_head if self.score is None else self.score
        bias = None if head is None or head.bias is None else head.bias.get_value()
        logits = output_logits(x, self.head_weight(), bias, columns, tied=head is None)
        logits = _scaled(logits, self.scale)
        if self.softcap is None:
            return logits
        return self.softcap * jnp.tanh(logits / self.softcap)

    def head_weight(self) -> Weight:
        """The head's kernel (dim, vocabulary), or the embedding (vocabulary, dim) it is tied to.

        LoRA on a tied embedding does not change the head: see ``output_embedding``.
        """
        head = self.lm_head if self.score is None else self.score
        if head is not None:
            return head.kernel.get_value()
        table = self.model.embed_tokens.embedding.get_value()
        return output_embedding(table)


def _apply_norm(norm: Norm | None, x: Array) -> Array:
    return x if norm is None else norm(x)


def _scaled(x: Array, factor: float) -> Array:
    """``x`` times ``factor`` rounded to its dtype, as in torch; nothing is computed for 1."""
    return x if factor == 1.0 else x * jnp.asarray(factor, x.dtype)
