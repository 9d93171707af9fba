"""Tiny configurations of every family, and random parameters that make their parts matter."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jlora import paths
from jlora.models import Model, init_params

LLAMA = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
QWEN = {**LLAMA, "bos_token_id": None, "sliding_window": 5, "use_sliding_window": True}
CONFIGS = {
    "llama": LLAMA,
    "llama-rope": {**LLAMA, "rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True},
    "llama-linear": {
        **LLAMA,
        "rope_theta": 500000.0,
        "rope_scaling": {"type": "linear", "factor": 4.0},
        "attention_bias": True,
        "mlp_bias": True,
        "head_dim": 16,
    },
    "mistral": {**LLAMA, "model_type": "mistral", "sliding_window": 5},
    "qwen2": {**QWEN, "model_type": "qwen2", "max_window_layers": 1},
    "qwen3": {**QWEN, "model_type": "qwen3", "head_dim": 16, "max_window_layers": 0},
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 61,
        "n_embd": 32,
        "n_head": 4,
        "n_layer": 2,
        "n_positions": 64,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "scale_attn_by_inverse_layer_idx": True,
    },
}


@functools.cache
def build(name: str, dtype: str = "float32", **options):
    """A model and random parameters whose norms and biases differ from their initial values."""
    model = Model.from_config({**CONFIGS[name], "initializer_range": 0.15}, dtype)
    model = dataclasses.replace(model, **options)
    params = jax.jit(init_params, static_argnums=1)(jax.random.key(0), model)
    rng = np.random.default_rng(1)

    def stir(path, leaf):
        if path[-1] in ("scale", "bias"):
            return leaf + jnp.asarray(0.3 * rng.standard_normal(leaf.shape), leaf.dtype)
        return leaf

    return model, paths.map_leaves(stir, params)


LENGTH = 24
"""Beyond the sliding windows, which are 5."""


def run(model, params, ids, positions=None, segment_ids=None):
    """Logits of (2, LENGTH) or fewer tokens, always by the same compiled program."""
    ids = np.asarray(ids)
    B, T = ids.shape
    if positions is None:
        positions = np.broadcast_to(np.arange(T), (B, T))
    if segment_ids is None:
        segment_ids = np.ones((B, T), np.int32)
    room = ((0, 2 - B), (0, LENGTH - T))
    padded = [np.pad(x, room).astype(np.int32) for x in (ids, positions, segment_ids)]
    return np.asarray(model(params, *padded))[:B, :T]


def decode(model, params, ids):
    """Logits of two rows, token by token through a cache of LENGTH slots."""
    cache, steps = model.init_cache(2, LENGTH), []
    for t in range(ids.shape[1]):
        logits, cache = model.decode(params, ids[:, t : t + 1], None, cache)
        steps.append(logits)
    return np.concatenate(steps, 1)


def tokens(model, batch: int, length: int, seed: int = 0) -> np.ndarray:
    shape = (batch, length)
    return np.random.default_rng(seed).integers(3, model.config.vocab_size, shape, dtype=np.int32)
