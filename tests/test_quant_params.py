"""Which leaves of a tree are quantized, and in which format."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.config import QuantConfig
from jlora.errors import ConfigError
from jlora.quant import int8, nf4
from jlora.quant.params import is_quantized, quantize_matrix, quantize_params


def normal(*shape, seed=0, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32), dtype)


def small_tree():
    return {
        "model": {
            "embed_tokens": {"embedding": normal(10, 64)},
            "layers": {
                "q_proj": {"kernel": normal(3, 64, 32, dtype=jnp.bfloat16), "bias": normal(3, 32)},
                "norm": {"scale": normal(3, 64)},
            },
            "out": {"kernel": normal(64, 32)},
        },
        "lm_head": {"kernel": normal(64, 10)},
    }


def test_quantize_params_quantizes_the_kernels_that_bitsandbytes_does():
    params = small_tree()
    quantized = quantize_params(params, QuantConfig())
    q = quantized["model"]["layers"]["q_proj"]["kernel"]
    assert q.shape == (3, 64, 32) and q.dtype == jnp.bfloat16
    kernel = params["model"]["layers"]["q_proj"]["kernel"]
    for layer in range(3):
        alone = nf4.quantize(kernel[layer].T)
        np.testing.assert_array_equal(np.asarray(q.codes[layer]), np.asarray(alone.codes))
    assert isinstance(quantized["model"]["out"]["kernel"], nf4.NF4Array)
    same = [("lm_head", "kernel"), ("model", "embed_tokens"), ("model", "layers", "norm")]
    for path in same:
        a, b = params, quantized
        for key in path:
            a, b = a[key], b[key]
        assert jax.tree.all(jax.tree.map(lambda x, y: x is y, a, b))
    again = quantize_params(quantized, QuantConfig())
    assert again["model"]["layers"]["q_proj"]["kernel"] is q


def test_embeddings_and_the_head_are_quantized_on_request():
    params = small_tree()
    quantized = quantize_params(params, QuantConfig(include_modules=["embed_tokens", "lm_head"]))
    table, head = quantized["model"]["embed_tokens"]["embedding"], quantized["lm_head"]["kernel"]
    plain = params["model"]["embed_tokens"]["embedding"], params["lm_head"]["kernel"]
    assert not table.transposed and head.transposed  # both as in torch, [vocabulary, dim]
    chex.assert_trees_all_equal(table, nf4.quantize(plain[0]))
    chex.assert_trees_all_equal(head, nf4.quantize(plain[1].T).mT)
    assert isinstance(quantized["model"]["layers"]["norm"]["scale"], jax.Array)


@pytest.mark.parametrize(
    ("settings", "oracle"),
    [
        ({"load_in_8bit": True}, int8.quantize),
        ({"bnb_4bit_quant_type": "fp4"}, lambda w: nf4.quantize(w, quant_type="fp4")),
        (
            {"block_size": 32, "bnb_4bit_use_double_quant": False},
            lambda w: nf4.quantize(w, 32, double_quant=False),
        ),
    ],
)
def test_the_settings_choose_the_format(settings, oracle):
    kernel = small_tree()["model"]["layers"]["q_proj"]["kernel"]
    tree = {"layers": {"q_proj": {"kernel": kernel}}}
    got = quantize_params(tree, QuantConfig(**settings))["layers"]["q_proj"]["kernel"]
    layers = [oracle(layer.T).mT for layer in kernel]
    chex.assert_trees_all_equal(got, jax.tree.map(lambda *x: jnp.stack(x), *layers))


def test_quantize_params_skips_excluded_modules():
    skip = QuantConfig(llm_int8_skip_modules=["out", "lm_head"])
    quantized = quantize_params(small_tree(), skip)
    assert isinstance(quantized["model"]["out"]["kernel"], jax.Array)
    assert isinstance(quantized["model"]["layers"]["q_proj"]["kernel"], nf4.NF4Array)
    skip = QuantConfig(llm_int8_skip_modules=["model.layers"])
    quantized = quantize_params(small_tree(), skip)
    assert isinstance(quantized["model"]["layers"]["q_proj"]["kernel"], jax.Array)


@pytest.mark.parametrize("key", ["llm_int8_skip_modules", "include_modules"])
@pytest.mark.parametrize(
    ("name", "message"), [("q_porj", "q_proj"), ("model.layers.1.q_proj", "layer number")]
)
def test_quantize_params_explains_a_bad_name(name, message, key):
    with pytest.raises(ConfigError, match=message) as caught:
        quantize_params(small_tree(), QuantConfig(**{key: [name]}))
    assert key in str(caught.value)


@pytest.mark.parametrize("settings", [{}, {"load_in_8bit": True}], ids=["nf4", "int8"])
def test_each_experts_matrix_is_quantized_separately(settings):
    experts = {"gate_up_proj": normal(2, 3, 32, 64), "down_proj_bias": normal(2, 3, 64)}
    tree = {"layers": {"gate": {"weight": normal(2, 3, 64)}, "experts": experts}}
    config = QuantConfig(**settings)
    quantized = quantize_params(tree, config)["layers"]
    q = quantized["experts"]["gate_up_proj"]
    assert q.shape == (2, 3, 32, 64) and not q.transposed
    one = jax.jit(lambda w: quantize_matrix(w, config))
    for at in np.ndindex(2, 3):
        alone = one(experts["gate_up_proj"][at])
        jax.tree.map(lambda a, b, at=at: np.testing.assert_array_equal(a[at], b), q, alone)
    assert quantized["gate"]["weight"].dtype == quantized["experts"]["down_proj_bias"].dtype
    assert not is_quantized(quantized["gate"]["weight"])
    skip = QuantConfig(**settings, llm_int8_skip_modules=("experts",))
    assert not is_quantized(quantize_params(tree, skip)["layers"]["experts"]["gate_up_proj"])
