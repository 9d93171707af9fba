"""The kind of a weight: dense, quantized, with an adapter attached, or both."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.errors import ConfigError
from jlora.lora.weight import base_of, dense, is_weight_leaf
from jlora.ops.weights import has_adapter, has_quantized_base, output_embedding
from jlora.quant.params import quantize_params

TARGETS = ["q_proj"]


@pytest.fixture(scope="module")
def params():
    key_w, key_e = jax.random.split(jax.random.key(0))
    return {
        "embed_tokens": {"embedding": jax.random.normal(key_e, (8, 64))},
        "q_proj": {"kernel": jax.random.normal(key_w, (64, 64))},
    }


def adapter(params, **settings):
    settings = {"target_modules": TARGETS, "r": 4, "init_lora_weights": False, **settings}
    return jlora.init_adapter(jax.random.key(1), params, jlora.LoraConfig(**settings))


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("quantized", [False, True])
def test_the_base_says_whether_a_weight_is_quantized(params, quantized, attached):
    base = quantize_params(params, jlora.QuantConfig()) if quantized else params
    tree = jlora.attach(base, adapter(base)) if attached else base
    weight = tree["q_proj"]["kernel"]
    assert has_quantized_base(weight) == has_quantized_base(weight.mT) == quantized
    assert has_adapter(weight) == attached
    assert is_weight_leaf(weight) == (quantized or attached)
    assert base_of(weight) is base["q_proj"]["kernel"]
    np.testing.assert_array_equal(dense(base_of(weight.mT)), dense(base["q_proj"]["kernel"]).T)


def test_a_transposed_dora_weight_has_its_base(params):
    weight = jlora.attach(params, adapter(params, use_dora=True))["q_proj"]["kernel"].mT
    assert has_adapter(weight) and not has_quantized_base(weight)
    np.testing.assert_array_equal(base_of(weight), params["q_proj"]["kernel"].T)


def test_an_attached_dense_base_is_not_called_quantized(params):
    """The residual of a base with another adapter attached is that of the merged base."""
    other, pissa = adapter(params), adapter(params, init_lora_weights="pissa")
    got, _ = jlora.residual(jlora.attach(params, other), pissa)
    want, _ = jlora.residual(jlora.merge(params, other), pissa)
    np.testing.assert_allclose(got["q_proj"]["kernel"], want["q_proj"]["kernel"], atol=1e-5)
    with pytest.raises(ConfigError, match="has an adapter attached"):
        config = jlora.LoraConfig(target_modules=TARGETS, init_lora_weights="loftq")
        attached = jlora.attach(params, other)
        jlora.loftq(jax.random.key(0), attached, config, jlora.QuantConfig())


def test_an_output_head_reads_an_embedding_without_its_low_rank_delta(params):
    tree = jlora.attach(params, adapter(params, target_modules=["embed_tokens"]))
    table = tree["embed_tokens"]["embedding"]
    assert output_embedding(table) is params["embed_tokens"]["embedding"]
    rows = adapter(params, trainable_token_indices={"embed_tokens": [3]})
    changed = jlora.attach(params, rows)["embed_tokens"]["embedding"]
    assert output_embedding(changed) is changed
    assert output_embedding(jnp.ones((2, 2))).shape == (2, 2)
