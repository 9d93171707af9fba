"""Rope compared with transformers' rotary modules, built from the same ``config.json``.

Two float32 tables agree to a few 1e-7 where their frequencies do. transformers computes these with
torch's ``pow``, which may differ from jlora's by one or two units in the last place (by four where
the frequency depends on the length), each 1.2e-7 of the frequency and so of the angle: that much
more is allowed per radian.
"""

import copy

import jax.numpy as jnp
import numpy as np
import pytest

from jlora.models.config_reader import ConfigReader
from jlora.models.rope import Rope, parse_rope, rotate

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers.models import (  # noqa: E402
    cohere2,
    gemma3,
    gpt_neox,
    gpt_oss,
    llama,
    phi,
    phi3,
    stablelm,
)

ULP = 1.2e-7
NEAR_POSITIONS = [0, 1, 2, 3, 7, 30, 63, 100]
FAR_POSITIONS = [0, 1, 2, 63, 1000, 4096, 32767, 131071]


def shape(head_dim, max_positions, **more):
    """A config of one head."""
    return {
        "hidden_size": head_dim,
        "head_dim": head_dim,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "num_hidden_layers": 2,
        "max_position_embeddings": max_positions,
        **more,
    }


def factors(pairs, last):
    return np.geomspace(1.05, last, pairs).round(2).tolist()


LLAMA31 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
GPT_OSS = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
DEEPSEEK = {
    "type": "yarn",
    "factor": 40,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 4096,
}
QWEN_YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
PHI3_LONG = {"short_factor": factors(48, 2.83), "long_factor": factors(48, 64.77)}

LLAMA = {
    "default": shape(64, 2048),
    "theta": shape(128, 32768, rope_theta=1e6),
    "theta in rope_parameters": shape(
        96, 2048, rope_theta=3.0, rope_parameters={"rope_type": "default", "rope_theta": 5e5}
    ),
    "linear, old": shape(64, 16384, rope_scaling={"type": "linear", "factor": 4.0}),
    "linear, new": shape(80, 4096, rope_parameters={"rope_type": "linear", "factor": 2.5}),
    "both spellings": shape(
        64,
        4096,
        rope_scaling={"type": "linear", "factor": 4.0},
        rope_parameters={"rope_type": "default", "rope_theta": 7e4},
    ),
    "a factor of partial rotation, which Llama ignores": shape(
        64, 512, rope_theta=500.0, partial_rotary_factor=0.5
    ),
    "the same among the settings": shape(
        64,
        512,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 500.0,
            "partial_rotary_factor": 0.5,
        },
    ),
    "Llama-3.1": shape(128, 131072, rope_theta=500000.0, rope_scaling=LLAMA31),
    "llama3, original at top": shape(
        64, 8192, original_max_position_embeddings=64, rope_scaling=LLAMA31
    ),
    "Qwen2.5 with yarn": shape(128, 131072, rope_theta=1e6, rope_scaling=QWEN_YARN),
    "yarn of max_position_embeddings": shape(
        64, 512, rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
    ),
    "yarn without factor": shape(64, 131072, rope_scaling={**QWEN_YARN, "factor": None}),
    "yarn, attention_factor": shape(
        64, 131072, rope_scaling={**QWEN_YARN, "attention_factor": 0.8, "beta_fast": 16}
    ),
    "yarn, a ramp of no pairs": shape(
        8, 256, rope_scaling={**QWEN_YARN, "original_max_position_embeddings": 6, "beta_fast": 1}
    ),
    "yarn, a ramp beyond the last pair": shape(
        64, 131072, rope_theta=1000.0, rope_scaling=QWEN_YARN
    ),
    "DeepSeek's mscale": shape(64, 163840, rope_scaling=DEEPSEEK),
    "yarn, without truncation": shape(
        64, 131072, rope_parameters={**GPT_OSS, "rope_theta": 150000.0, "beta_slow": 2.5}
    ),
    "mscale alone": shape(64, 163840, rope_scaling={**DEEPSEEK, "mscale_all_dim": 0}),
    "proportional": shape(
        64,
        4096,
        rope_parameters={
            "rope_type": "proportional",
            "rope_theta": 1e6,
            "partial_rotary_factor": 0.3,
            "factor": 8.0,
        },
    ),
}
PHI3 = {
    "Phi-3-mini-128k": shape(
        96,
        131072,
        original_max_position_embeddings=4096,
        rope_scaling={"type": "longrope", **PHI3_LONG},
    ),
    "Phi-4-mini": shape(
        128,
        131072,
        original_max_position_embeddings=4096,
        partial_rotary_factor=0.75,
        rope_scaling={"type": "longrope", **PHI3_LONG},
    ),
    "su, both originals, attention_factor": shape(
        96,
        131072,
        original_max_position_embeddings=64,
        rope_scaling={
            "type": "su",
            "attention_factor": 1.3,
            "original_max_position_embeddings": 9,
            **PHI3_LONG,
        },
    ),
    "longrope with its factor": shape(
        96,
        131072,
        original_max_position_embeddings=1024,
        rope_parameters={
            "rope_type": "longrope",
            "factor": 7.0,
            "rope_theta": 2e4,
            **PHI3_LONG,
        },
    ),
}
PARTIAL = {
    "Phi": (shape(80, 2048, partial_rotary_factor=0.4), 0.5),
    "StableLm": (shape(80, 4096, rope_theta=10000, use_qkv_bias=True), 0.25),
    "GPTNeoX": (shape(96, 2048, rope_parameters={"partial_rotary_factor": 0.5}), 0.25),
    "Phi3": (PHI3["Phi-4-mini"], 1.0),
}
"""A config, and the family's share of rotated dimensions where the config gives none."""

GEMMA3_SHAPE = shape(64, 131072, layer_types=["sliding_attention", "full_attention"])
GEMMA3 = {
    "nothing": {},
    "gemma-3-4b": {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
    "old": {
        "rope_theta": 2e6,
        "rope_local_base_freq": 3e4,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    },
    "new": {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
        }
    },
    "new, without theta": {
        "rope_theta": 2e6,
        "rope_parameters": {
            "full_attention": {"rope_type": "yarn", "factor": 4.0},
            "sliding_attention": None,
        },
    },
    "new and old": {
        "rope_scaling": {"factor": 2.0, "rope_type": "linear"},
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 5e5},
            "sliding_attention": {"rope_type": "linear", "factor": 3.0},
        },
    },
}


FAMILIES = {
    "Llama": (transformers.LlamaConfig, llama.modeling_llama),
    "Phi": (transformers.PhiConfig, phi.modeling_phi),
    "Phi3": (transformers.Phi3Config, phi3.modeling_phi3),
    "StableLm": (transformers.StableLmConfig, stablelm.modeling_stablelm),
    "GPTNeoX": (transformers.GPTNeoXConfig, gpt_neox.modeling_gpt_neox),
    "GptOss": (transformers.GptOssConfig, gpt_oss.modeling_gpt_oss),
    "Gemma3": (transformers.Gemma3TextConfig, gemma3.modeling_gemma3),
    "Cohere2": (transformers.Cohere2Config, cohere2.modeling_cohere2),
}


def pair(family, json, **more):
    """transformers' rotary module and jlora's rope, built from one config."""
    config, module = FAMILIES[family]
    rotary = getattr(module, f"{family}RotaryEmbedding")(config.from_dict(copy.deepcopy(json)))
    sizes = json["head_dim"], json["max_position_embeddings"]
    return rotary, parse_rope(ConfigReader(json, "config.json"), *sizes, **more)


def torch_table(rotary, positions, **more):
    """transformers' cosines and sines of one row of positions."""
    tables = rotary(torch.zeros(1), torch.tensor([positions]), **more)
    return [t.numpy()[0] for t in tables]


def assert_close(rope: Rope, positions, expected, ulps=2):
    """``expected`` contains each angle twice, in two halves, of which the first is compared."""
    cos, sin = (np.asarray(t)[0] for t in rope.table(jnp.asarray([positions])))
    angles = np.asarray(positions)[:, None] * np.asarray(rope.frequencies)
    allowed = rope.attention_scaling * (3e-7 + ulps * ULP * angles)
    for got, want in zip((cos, sin), expected, strict=True):
        worst = (np.abs(got - want[:, : got.shape[1]]) / allowed).max()
        assert worst <= 1


@pytest.mark.parametrize("positions", [NEAR_POSITIONS, FAR_POSITIONS], ids=["near", "far"])
@pytest.mark.parametrize("name", LLAMA)
def test_llama(name, positions):
    rotary, rope = pair("Llama", LLAMA[name])
    assert_close(rope, positions, torch_table(rotary, positions))


@pytest.mark.parametrize("length", [5, 64, 65, 100, 3000])
def test_dynamic(length):
    json = shape(64, 64, rope_scaling={"type": "dynamic", "factor": 3.0})
    rotary, rope = pair("Llama", json)
    positions = [0, 1, length // 2, length - 1]
    assert_close(rope, positions, torch_table(rotary, positions), ulps=4)


def test_dynamic_in_cached_decoding():
    """Token by token, with transformers' module keeping its state, and then for a new prompt."""
    rotary, rope = pair("Llama", shape(16, 8, rope_scaling={"type": "dynamic", "factor": 2.0}))
    for positions in ([0, 1, 2], *([p] for p in range(3, 14)), [0, 1, 2]):
        assert_close(rope, positions, torch_table(rotary, positions), ulps=4)


@pytest.mark.parametrize("beyond", [False, True])
@pytest.mark.parametrize("name", PHI3)
def test_longrope(name, beyond):
    rotary, rope = pair("Phi3", PHI3[name], partial=1.0)
    last = PHI3[name]["original_max_position_embeddings"] - (not beyond)
    positions = [0, 1, 30, last]
    assert_close(rope, positions, torch_table(rotary, positions))


def test_longrope_with_the_original_length_among_its_settings():
    """Uses Llama's config: transformers' Phi3Config has a default for the original length."""
    settings = {"original_max_position_embeddings": 40, "type": "longrope", **PHI3_LONG}
    rotary, rope = pair("Llama", shape(96, 4096, rope_scaling=settings))
    for positions in ([0, 39], [0, 39, 40]):
        assert_close(rope, positions, torch_table(rotary, positions))


@pytest.mark.parametrize("layer_type", ["full_attention", "sliding_attention"])
@pytest.mark.parametrize("name", GEMMA3)
def test_gemma3_has_one_table_for_each_layer_type(name, layer_type):
    family = {"full_attention": 1e6, "sliding_attention": 1e4}[layer_type]
    json = {**GEMMA3_SHAPE, **GEMMA3[name]}
    rotary, rope = pair("Gemma3", json, layer_type=layer_type, theta=family)
    assert_close(rope, FAR_POSITIONS, torch_table(rotary, FAR_POSITIONS, layer_type=layer_type))


def heads(head_dim):
    """One row of four positions and two heads, for torch (heads first) and for jlora."""
    x = np.random.default_rng(0).standard_normal((1, 4, 2, head_dim)).astype(np.float32)
    return torch.from_numpy(x).transpose(1, 2), jnp.asarray(x)


@pytest.mark.parametrize("family", PARTIAL)
def test_partial_rotation(family):
    """Positions are small: the test is of which dimensions are rotated, and by which angles."""
    json, share = PARTIAL[family]
    rotary, rope = pair(family, json, partial=share)
    positions = [0, 1, 5, 30]
    table = rotary(torch.zeros(1), torch.tensor([positions]))
    q, x = heads(json["hidden_size"])
    got = rotate(x, rope.table(jnp.asarray([positions])))
    size = table[0].shape[-1]
    assert size == 2 * len(rope.frequencies) < q.shape[-1]
    rotated, _ = llama.modeling_llama.apply_rotary_pos_emb(q[..., :size], q[..., :size], *table)
    expected = torch.cat([rotated, q[..., size:]], -1).transpose(1, 2)
    np.testing.assert_allclose(got, expected.numpy(), atol=5e-6)


@pytest.mark.parametrize("family", ["Llama", "Cohere2", "GptOss"])
def test_layouts(family):
    """Pairs in two halves, adjacent pairs, and GPT-OSS's halves, whose default rope is yarn."""
    extra = {"rope_parameters": {**GPT_OSS, "rope_theta": 150000.0}} if family == "GptOss" else {}
    json = shape(64, 131072, rope_theta=50000.0, **extra)
    rotary, rope = pair(family, json)
    positions = [0, 1, 5, 30]
    q, x = heads(64)
    table = rotary(torch.zeros(1), torch.tensor([positions]))
    expected, _ = FAMILIES[family][1].apply_rotary_pos_emb(q, q, *table)
    got = rotate(x, rope.table(jnp.asarray([positions])), interleaved=family == "Cohere2")
    np.testing.assert_allclose(got, expected.transpose(1, 2).numpy(), atol=5e-6)
