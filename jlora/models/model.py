"""``Model``: a decoder as a pure function of its parameters.

A Model holds only static values (configuration, dtype, attention backend) and no array, so it is
hashable and ``jax.jit`` may close over it; its methods are jitted. Parameters are a nested dict
whose leaves are arrays or weight pytrees (quantized arrays, weights with an adapter)::

    model, params = load_pretrained(folder)
    logits = model(params, input_ids)                    # (B, T) → (B, T, V) float32

    cache = model.init_cache(batch=2, length=64)         # two prompts, the second one shorter
    logits, cache = model.decode(params, ids, positions, cache)      # positions -1: padding
    logits, cache = model.decode(params, next_ids, None, cache)      # (2, 1): the next tokens
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Integer

from jlora.errors import ConfigError
from jlora.models import kv_cache
from jlora.models.attention_context import AttentionContext
from jlora.models.config import DecoderConfig
from jlora.models.decoder import Decoder
from jlora.models.layer_scan import checkpoint_policy
from jlora.models.registry import family_of, parse_config
from jlora.ops.attention import check_backend
from jlora.ops.weights import Weight
from jlora.tree import paths

DTYPES = ("float32", "bfloat16", "float16")
Path = paths.Path
Params = Mapping[str, Any]
Ids = Int[Array | np.ndarray, "B T"]
SegmentIds = Integer[Array | np.ndarray, "B T"] | Bool[Array | np.ndarray, "B T"]


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder-only language model; see the module's header."""

    config: DecoderConfig
    dtype: str = "bfloat16"
    """The compute dtype; norms, softmax, rope and logits are always float32."""
    attention: str = "auto"
    """The attention backend, one of ``ops.attention.BACKENDS``."""
    gpu_capability: tuple[int, int] | None = None
    """The compute capability of an absent GPU that programs are compiled for, which decides whether
    attention uses cuDNN; None: that of this process's GPU, if it has one."""
    gradient_checkpointing: bool | str = False
    """What the backward pass recomputes of each layer: True all of it, False what lies between its
    matrix products, or ``layer_scan.OFFLOAD`` or the name of a policy (``layer_scan.REMAT``)."""

    # Not compared: jit compiles for a Model, and the folder does not change the program.
    source: str | None = dataclasses.field(default=None, compare=False)
    """The folder that the model was read from; ``save_pretrained`` copies from it what belongs to
    the model's file but is no part of the model (a vision tower)."""

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ConfigError(f"{self.dtype!r} is none of {', '.join(DTYPES)}", where="model.dtype")
        check_backend(self.attention)
        checkpoint_policy(self.gradient_checkpointing)

    @classmethod
    def from_config(cls, hf: Mapping[str, Any], dtype: str = "bfloat16", **options: Any) -> Model:
        """The model for the contents of a ``config.json``; ConfigError if it is not supported."""
        return cls(parse_config(hf), dtype, **options)

    @property
    def shapes(self) -> dict[str, Any]:
        """The parameter tree with ``jax.ShapeDtypeStruct`` leaves in the model's dtype."""
        leaves = _structure(self.config, self.dtype)[1]
        return paths.nest({tree_path: leaf for _, tree_path, leaf in leaves})

    @functools.partial(jax.jit, static_argnums=0)
    def __call__(
        self,
        params: Params,
        input_ids: Ids,
        positions: Ids | None = None,
        segment_ids: SegmentIds | None = None,
    ) -> Float[Array, "B T V"]:
        """Float32 logits of the next token, or of a classifier's classes, at each token.

        Args:
          params: the parameter tree.
          input_ids: token ids.
          positions: each token's position in its document; None counts from 0 along the row.
          segment_ids: each token's document, counted from 1, and 0 for padding; None means one
            document per row, and booleans one document and padding after it (False). A token
            attends only within its document.
        """
        return self.head(params, self.features(params, input_ids, positions, segment_ids))

    @functools.partial(jax.jit, static_argnums=0)
    def features(
        self,
        params: Params,
        input_ids: Ids,
        positions: Ids | None = None,
        segment_ids: SegmentIds | None = None,
    ) -> Float[Array, "B T D"]:
        """The output head's input, after the final norm; arguments as for ``__call__``."""
        ids = jnp.asarray(input_ids)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        if segment_ids is not None:
            segment_ids = jnp.asarray(segment_ids)
        context = AttentionContext(
            self.config, self.attention, self.gpu_capability, segment_ids=segment_ids
        )
        module = self._module(params)
        x, _ = module.features(
            ids, jnp.asarray(positions), context, None, self.gradient_checkpointing
        )
        return x

    @functools.partial(jax.jit, static_argnums=0, static_argnames="size")
    def head(
        self,
        params: Params,
        features: Float[Array, "*B D"],
        start: Int[Array, ""] | int = 0,
        size: int | None = None,
    ) -> Float[Array, "*B V"]:
        """Float32 logits: ``model(params, ids)`` is ``head(params, features(params, ids))``.

        With ``size`` only the vocabulary's columns start … start + size - 1 are computed, and only
        they are dequantized if the head is quantized.
        """
        columns = None if size is None else (jnp.asarray(start), size)
        return self._module(params).head(features, columns)

    def head_weight(self, params: Params) -> Weight:
        """The output head's weight; see ``Decoder.head_weight``."""
        return self._module(params).head_weight()

    def init_cache(self, batch: int, length: int) -> kv_cache.KVCache:
        """An empty cache with room for ``length`` tokens in each of ``batch`` rows."""
        return kv_cache.init_cache(self.config, batch, length, jnp.dtype(self.dtype))

    @functools.partial(jax.jit, static_argnums=0, static_argnames="last_only")
    def decode(
        self,
        params: Params,
        ids: Int[Array | np.ndarray, "B t"],
        positions: Int[Array | np.ndarray, "B t"] | None,
        cache: kv_cache.KVCache,
        last_only: bool = False,
    ) -> tuple[Float[Array, "B t V"] | Float[Array, "B V"], kv_cache.KVCache]:
        """Appends tokens to the cache and returns their logits.

        Rows are independent: each appends its valid tokens after the ``cache.length`` tokens it
        has, so prompts of different lengths, padded on either side, share a batch. Tokens beyond
        the cache's capacity are not stored, and later tokens do not attend to them.

        Args:
          params: the parameter tree.
          ids: the next tokens of each row: a prompt's, or one token.
          positions: each token's position in its row; -1 for padding, which is not stored and whose
            logits are meaningless. None continues every row with valid tokens only.
          cache: the keys and values of the rows' earlier tokens.
          last_only: return only the logits (B, V) at each row's last valid token in this call;
            the logits of a prompt's other tokens are not computed.
        """
        ids = jnp.asarray(ids)
        if positions is None:
            positions = cache.length[:, None] + jnp.arange(ids.shape[1])
        positions = jnp.asarray(positions)
        slots, length = kv_cache.cache_slots(cache, positions >= 0)
        context = AttentionContext(self.config, self.attention, slots=slots)
        module, kv = self._module(params), kv_cache.KV(cache.k, cache.v)
        # Padding's -1 would read a learned table of positions from its end.
        x, kv = module.features(ids, jnp.maximum(positions, 0), context, kv, False)
        if last_only:
            steps = jnp.arange(ids.shape[1])
            last = jnp.max(jnp.where(positions >= 0, steps, 0), axis=1)
            x = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
        return module.head(x), kv_cache.KVCache(kv.k, kv.v, length)

    def _module(self, params: Params) -> Decoder:
        """The NNX module with these parameters."""
        # Merged in every trace: outside of a model parameters are plain trees, so that jit, grad,
        # scan and vmap are JAX's own. nnx.grad and nnx.jit are losing their filter arguments.
        graph, leaves = _structure(self.config, self.dtype)
        values = {path: paths.get(params, tree_path) for path, tree_path, _ in leaves}
        return nnx.merge(graph, paths.nest(values))


def init_params(key: Array, model: Model) -> dict[str, Any]:
    """Random parameters in the model's dtype, to train from scratch.

    Kernels and embeddings are normal with the config's ``initializer_range``; norm scales are one,
    biases zero. The values of a leaf depend only on ``key`` and the leaf's place in the tree.
    """
    deviation = model.config.initializer_range
    leaves = list(paths.walk(model.shapes))
    keys = jax.random.split(key, len(leaves))

    def draw(key: Array, path: paths.Path, leaf: jax.ShapeDtypeStruct) -> Array:
        if path[-1] == "scale":
            return jnp.ones(leaf.shape, leaf.dtype)
        if path[-1].endswith("bias"):
            return jnp.zeros(leaf.shape, leaf.dtype)
        return (deviation * jax.random.normal(key, leaf.shape)).astype(leaf.dtype)

    return paths.nest({p: draw(k, p, leaf) for k, (p, leaf) in zip(keys, leaves, strict=True)})


# Every trace of every method asks for it.
@functools.lru_cache(maxsize=32)
def _structure(config: DecoderConfig, dtype: str) -> tuple[Any, list[tuple[Path, Path, Any]]]:
    """The NNX graph of a model, and of each leaf: path in the module, in the tree, shape."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, jnp.dtype(dtype))))
    rename = family_of(config).rename
    return graph, [(p, rename(p), leaf) for p, leaf in paths.walk(nnx.to_pure_dict(state))]
