"""Mixtures of experts: routing and sums compared with NumPy loops, and with a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_models import CONFIGS, build, tokens

from jlora.config import MeshConfig, QuantConfig
from jlora.distributed import sharding
from jlora.errors import ConfigError
from jlora.io.hf import load_pretrained, save_pretrained
from jlora.models.experts import MixtureOfExperts
from jlora.models.registry import parse_config
from jlora.quant.params import is_quantized, quantize_params

MIXTURES = pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"])


def silu(x):
    return x / (1 + np.exp(-x))


def expert_of(layer, e, x, clamped):
    """The output of expert ``e`` for one token, in float64."""
    up, down = (
        np.asarray(layer["experts"][k][e], np.float64) for k in ("gate_up_proj", "down_proj")
    )
    if clamped is None:
        gate, up = np.split(up @ x, 2)
        return down @ (silu(gate) * up)
    alpha, limit = clamped
    both = up @ x + layer["experts"]["gate_up_proj_bias"][e]
    gate, up = np.minimum(both[::2], limit), np.clip(both[1::2], -limit, limit)
    inner = (up + 1) * gate / (1 + np.exp(-alpha * gate))
    return down @ inner + layer["experts"]["down_proj_bias"][e]


@MIXTURES
def test_a_mixture_is_the_weighted_sum_of_its_experts(name):
    model, params = build(name)
    c, mlp = model.config.experts, params["model"]["layers"]["mlp"]
    layer = jax.tree.map(lambda leaf: leaf[1], {k: v for k, v in mlp.items() if "shared" not in k})
    layer = {"gate" if k == "router" else k: v for k, v in layer.items()}
    mixture = nnx.eval_shape(lambda: MixtureOfExperts(model.config, c, None, jnp.dtype("float32")))
    x = np.random.default_rng(0).normal(size=(2, 7, 32)).astype(np.float32)
    got = nnx.merge(nnx.split(mixture)[0], layer)(jnp.asarray(x))
    want = np.zeros(x.shape)
    for at in np.ndindex(x.shape[:2]):
        token = x[at].astype(np.float64)
        logits = np.asarray(layer["gate"]["weight"], np.float64) @ token
        logits = logits + layer["gate"].get("bias", 0)
        chosen = np.argsort(-logits)[: c.per_token]
        shares = np.exp(logits) / np.exp(logits).sum()
        shares = shares / (shares[chosen].sum() if c.normalized else 1)
        for e in chosen:
            want[at] += shares[e] * expert_of(layer, e, token, c.clamped_swiglu)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("name", ["mixtral", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_values_and_gradients_on_a_mesh_match_one_device(name):
    model, params = build(name)
    ids = tokens(model, 8, 6)

    def loss(params, ids):
        logits = model(params, ids)
        return jnp.sum(jnp.sin(logits)), logits

    run = jax.jit(jax.grad(loss, has_aux=True))
    want, want_logits = run(params, ids)
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        placed = sharding.place(params, sharding.shardings(params, mesh))
        leaf = placed["model"]["layers"]["mlp"]["experts"]["gate_up_proj"]
        assert leaf.addressable_shards[0].data.size == leaf.size // 4
        got, logits = run(placed, ids)
    np.testing.assert_allclose(logits, want_logits, atol=1e-5 * np.abs(want_logits).max())
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())


def test_each_device_multiplies_its_own_rows_only():
    model, params = build("mixtral")
    mesh = sharding.make_mesh(MeshConfig(data=8))
    with jax.set_mesh(mesh):
        placed = sharding.place(params, sharding.shardings(params, mesh))
        text = str(jax.make_jaxpr(model)(placed, tokens(model, 8, 6)))
    assert "ragged_dot_general" in text
    assert "f32[12,96]" in text and "f32[96,96]" not in text, "6 tokens, two copies of each"


def test_code_does_not_grow_with_the_number_of_experts():
    def equations(number):
        model, _ = build("mixtral")
        hf = {**model.config.hf, "num_local_experts": number}
        model = type(model).from_config(hf, "float32")
        return str(jax.make_jaxpr(model)(model.shapes, np.zeros((1, 8), np.int32))).count("\n")

    assert equations(4) == equations(64)


def test_layers_without_experts_are_plain():
    for more in ({"mlp_only_layers": [0, 1]}, {"decoder_sparse_step": 3}):
        assert parse_config({**CONFIGS["qwen3_moe"], **more}).experts is None


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise: 0.1 is not supported"),
        ("mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok: 5 is more"),
        ("mixtral", {"num_local_experts": 0}, "num_local_experts: must be positive"),
        ("qwen3_moe", {"mlp_only_layers": 1}, "mlp_only_layers: must be a list"),
        ("qwen2_moe", {"mlp_only_layers": ["1"]}, "mlp_only_layers: must be a list"),
        ("qwen2_moe", {"layer_types": ["sliding_attention"]}, "layer_types: must be a list with 2"),
        ("gpt_oss", {"sliding_window": None, "layer_types": None}, None),
        ("gpt_oss", {"swiglu_limit": -1}, "swiglu_limit: must be positive"),
        ("gpt_oss", {"quantization_config": {"quant_method": "gptq"}}, "by 'gptq'"),
        ("mixtral", {"quantization_config": {"quant_method": "mxfp4"}}, "by 'mxfp4'"),
    ],
)
def test_switches_that_are_not_supported_are_named(name, change, message):
    hf = {**CONFIGS[name], **change}
    if message is None:
        assert parse_config(hf).windows == (128, None)
        return
    with pytest.raises(ConfigError, match=message):
        parse_config(hf)


@pytest.mark.parametrize(
    ("name", "on_mesh"),
    [
        pytest.param("mixtral", False, marks=pytest.mark.short),
        pytest.param("mixtral", True, marks=pytest.mark.slow),
        pytest.param("gpt_oss", True, marks=pytest.mark.slow),
    ],
)
def test_quantized_experts_match_dequantized_ones(name, on_mesh, tmp_path):
    """Loaded from a folder, on one device and on a mesh, with gradients, and written dense."""
    model, params = build(name)
    save_pretrained(tmp_path, model, params)
    settings = QuantConfig(block_size=32, bnb_4bit_compute_dtype="float32")
    _, quantized = load_pretrained(tmp_path, dtype="float32", quantization=settings)
    want = quantize_params(params, settings)
    assert jax.tree.structure(quantized) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, quantized, want)
    experts = quantized["model"]["layers"]["mlp"]["experts"]
    assert all(is_quantized(experts[kind]) for kind in ("gate_up_proj", "down_proj"))
    dense = jax.tree.map(
        lambda q: q.dequantize() if is_quantized(q) else q, want, is_leaf=is_quantized
    )

    @jax.jit
    def run(table, tree, ids):
        def loss(table):
            trunk = {**tree["model"], "embed_tokens": {"embedding": table}}
            logits = model({**tree, "model": trunk}, ids)
            return jnp.sum(jnp.sin(logits)), logits

        return jax.grad(loss, has_aux=True)(table)

    ids, table = tokens(model, 8, 6), params["model"]["embed_tokens"]["embedding"]
    expected = run(table, dense, ids)
    results = [run(table, quantized, ids)]
    if on_mesh:
        mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
        with jax.set_mesh(mesh):
            placed = sharding.place(quantized, sharding.shardings(quantized, mesh))
            results.append(run(table, placed, ids))
    for got in results:
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())
    with pytest.raises(ConfigError, match=r"quantized experts[\s\S]*llm_int8_skip_modules"):
        save_pretrained(tmp_path, model, quantized, quantized=True)
    save_pretrained(tmp_path, model, quantized)
    jax.tree.map(np.testing.assert_array_equal, load_pretrained(tmp_path, "float32")[1], dense)
