"""Tiny configurations of every family, and random parameters in which every part matters."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest

from jlora.models import Model
from jlora.tree import paths

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
GEMMA = {
    **LLAMA,
    "head_dim": 16,
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 5,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
OPT = {
    "model_type": "opt",
    "vocab_size": 61,
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 32,
    "pad_token_id": 1,
}
QWEN_MOE = {**QWEN, "moe_intermediate_size": 20, "num_experts": 5, "num_experts_per_tok": 3}
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
    "gemma": {**GEMMA, "model_type": "gemma", "hidden_act": "gelu"},
    "gemma2": {
        **GEMMA,
        "model_type": "gemma2",
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3": {
        **GEMMA,
        "model_type": "gemma3_text",
        "num_hidden_layers": 3,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 24,
        "rope_local_base_freq": 100.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "phi": {
        **LLAMA,
        "model_type": "phi",
        "hidden_act": "gelu_new",
        "partial_rotary_factor": 0.5,
        "qk_layernorm": True,
    },
    "phi3": {**LLAMA, "model_type": "phi3", "sliding_window": 5, "pad_token_id": 0},
    "phi3-long": {
        **LLAMA,
        "model_type": "phi3",
        "pad_token_id": 0,
        "original_max_position_embeddings": 12,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.1, 1.2, 1.5],
            "long_factor": [1.0, 2.0, 4.0, 8.0],
        },
    },
    "gpt_neox": {
        **LLAMA,
        "model_type": "gpt_neox",
        "hidden_act": "gelu",
        "rotary_pct": 0.5,
        "rotary_emb_base": 100.0,
    },
    "gpt_neox-in-turn": {
        **LLAMA,
        "model_type": "gpt_neox",
        "hidden_act": "gelu",
        "use_parallel_residual": False,
        "attention_bias": False,
    },
    "opt": OPT,
    "opt-350m": {
        **OPT,
        "do_layer_norm_before": False,
        "word_embed_proj_dim": 16,
        "enable_bias": False,
    },
    "starcoder2": {
        **LLAMA,
        "model_type": "starcoder2",
        "hidden_act": "gelu_pytorch_tanh",
        "sliding_window": 5,
    },
    "olmo2": {**LLAMA, "model_type": "olmo2", "pad_token_id": 0},
    "smollm3": {
        **LLAMA,
        "model_type": "smollm3",
        "no_rope_layer_interval": 2,
        "use_sliding_window": True,
        "sliding_window": 5,
        "pad_token_id": 0,
    },
    "stablelm": {**LLAMA, "model_type": "stablelm", "use_qkv_bias": True},
    "stablelm-parallel": {
        **LLAMA,
        "model_type": "stablelm",
        "use_parallel_residual": True,
        "qk_layernorm": True,
        "partial_rotary_factor": 0.5,
    },
    "granite": {
        **LLAMA,
        "model_type": "granite",
        "attention_multiplier": 0.5,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.7,
        "logits_scaling": 0.25,
    },
    "cohere": {**LLAMA, "model_type": "cohere", "logit_scale": 0.5, "pad_token_id": 0},
    "cohere-qk-norm": {
        **LLAMA,
        "model_type": "cohere",
        "head_dim": 16,
        "logit_scale": 0.75,
        "use_qk_norm": True,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
    },
    "cohere2": {
        **LLAMA,
        "model_type": "cohere2",
        "num_hidden_layers": 3,
        "sliding_window": 5,
        "sliding_window_pattern": 3,
        "logit_scale": 0.5,
        "pad_token_id": 0,
    },
    "mixtral": {
        **LLAMA,
        "model_type": "mixtral",
        "sliding_window": 5,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "qwen2_moe": {**QWEN_MOE, "model_type": "qwen2_moe", "shared_expert_intermediate_size": 24},
    "qwen2_moe-mlp-first": {
        **QWEN_MOE,
        "model_type": "qwen2_moe",
        "num_hidden_layers": 3,
        "shared_expert_intermediate_size": 24,
        "mlp_only_layers": [0],
    },
    "qwen3_moe-every-second": {
        **QWEN_MOE,
        "model_type": "qwen3_moe",
        "num_hidden_layers": 4,
        "head_dim": 16,
        "decoder_sparse_step": 2,
    },
    "qwen3_moe": {
        **QWEN_MOE,
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "norm_topk_prob": True,
        "attention_bias": True,
    },
    "gpt_oss": {
        **LLAMA,
        "model_type": "gpt_oss",
        "head_dim": 16,
        "intermediate_size": 32,
        "sliding_window": 5,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "swiglu_limit": 1.0,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 4.0,
            "truncate": False,
            "original_max_position_embeddings": 16,
        },
    },
}


REPRESENTATIVES = ("llama", "gpt2", "gemma3", "opt-350m", "cohere2", "gpt_oss")
"""The families that differ most in the decoder; the others, such as Phi's and OLMo 2's, are run by
``.ci/run`` only."""


def each_family(*, but: str = ""):
    """Parametrizes a test by ``name``: every configuration ``but`` one."""
    slow = pytest.mark.slow
    names = [name for name in CONFIGS if name != but]
    values = [n if n in REPRESENTATIVES else pytest.param(n, marks=slow) for n in names]
    return pytest.mark.parametrize("name", values)


@functools.cache
def build(name: str, dtype: str = "float32", **options):
    """A model and random parameters whose norms and biases differ from their initial values.

    Drawn by NumPy: ``init_params`` would be compiled for each family, which took half of the time
    of a test that computes logits once.
    """
    model = Model.from_config(CONFIGS[name], dtype)
    model = dataclasses.replace(model, **options)
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        normal = rng.standard_normal(leaf.shape)
        if path[-1] == "scale":
            return jnp.asarray(1 + 0.3 * normal, leaf.dtype)
        spread = 0.3 if path[-1] == "sinks" or path[-1].endswith("bias") else 0.15
        return jnp.asarray(spread * normal, leaf.dtype)

    return model, paths.map_leaves(draw, model.shapes)


LENGTH = 24
"""Longer than the sliding windows of 5."""


def run(model, params, ids, positions=None, segment_ids=None):
    """Logits of (2, LENGTH) or fewer tokens, always computed by the same compiled program."""
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
