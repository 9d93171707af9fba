"""Merging adapters of every kind, compared with NumPy's dense sums; and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from flax import linen as nn
from test_lora import Q, make_params, node, trained

import jlora
from jlora import lora
from jlora.config import LoraConfig
from jlora.errors import ConfigError, DataError


def test_several_adapters_are_summed_and_rounded_once():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), make_params())
    one = trained(params, LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"]))
    two = trained(params, LoraConfig(r=2, target_modules=["q_proj"], bias="lora_only"), seed=5)
    merged = node(jlora.merge(params, one, two), Q)["kernel"]
    want = np.float64(node(params, Q)["kernel"])
    for adapter, scale in ((one, 6 / 4), (two, 8 / 2)):
        pair = node(adapter.weights, Q)
        want = want + scale * np.float64(pair["lora_A"]) @ np.float64(pair["lora_B"])
    np.testing.assert_array_equal(merged, jnp.asarray(want, jnp.float32).astype(jnp.bfloat16))
    in_turn = node(jlora.merge(jlora.merge(params, one), two), Q)["kernel"]
    assert np.any(np.asarray(in_turn != merged)), "rounded twice"


@pytest.mark.parametrize("quantized", [False, True])
def test_dora_starts_as_the_base_and_merges_to_its_magnitudes(quantized):
    params = make_params()
    if quantized:
        params = jlora.quantize(params, jlora.QuantConfig(block_size=32))
    base = lora.merge(params, trained(params, LoraConfig(target_modules=["down_proj"])))
    config = LoraConfig(r=4, target_modules=["q_proj"], use_dora=True)
    fresh = lora.init_adapter(jax.random.key(0), params, config)
    kernel = np.float64(node(base, Q)["kernel"])
    norms = np.linalg.norm(kernel, axis=1)
    np.testing.assert_allclose(node(fresh.weights, Q)["lora_magnitude_vector"], norms, rtol=1e-6)
    np.testing.assert_allclose(node(lora.merge(params, fresh), Q)["kernel"], kernel, atol=1e-6)
    adapter = trained(params, config)
    pair = node(adapter.weights, Q)
    total = kernel + 2 * np.float64(pair["lora_A"]) @ np.float64(pair["lora_B"])
    magnitude = np.float64(pair["lora_magnitude_vector"])[:, None]
    want = magnitude * total / np.linalg.norm(total, axis=1, keepdims=True)
    np.testing.assert_allclose(node(lora.merge(params, adapter), Q)["kernel"], want, atol=1e-5)


def test_lora_biases_are_merged_into_the_modules_bias_and_unmerged():
    params = make_params()
    adapter = trained(params, LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True))
    merged = lora.merge(params, adapter)
    want = node(params, Q)["bias"] + 2 * node(adapter.weights, Q)["lora_bias"]
    np.testing.assert_allclose(node(merged, Q)["bias"], want, atol=1e-6)
    restored = lora.unmerge(merged, adapter)
    np.testing.assert_allclose(node(restored, Q)["bias"], node(params, Q)["bias"], atol=1e-6)
    missing = trained(params, LoraConfig(target_modules=["down_proj"], lora_bias=True))
    with pytest.raises(DataError, match=r"down_proj.*no bias"):
        lora.merge(params, missing)


@pytest.mark.parametrize(
    "fields", [{"use_dora": True}, {"trainable_token_indices": [1]}, {"bias": "all"}]
)
def test_unmerging_cannot_restore_replaced_values(fields):
    params = make_params()
    adapter = trained(params, LoraConfig(target_modules=["q_proj"], **fields))
    with pytest.raises(DataError, match="does not have the values that this leaf replaced"):
        lora.unmerge(lora.merge(params, adapter), adapter)


def test_dora_is_not_added_to_others():
    params = make_params()
    plain, dora = (
        trained(params, LoraConfig(target_modules=["q_proj"], use_dora=use))
        for use in (False, True)
    )
    with pytest.raises(ConfigError, match="cannot be added to others"):
        lora.merge(params, plain, dora)


def test_a_tied_embedding_must_be_untied_before_merging(tmp_path):
    model, params = tiny_models.build("gpt2")
    adapter = trained(params, LoraConfig(r=2, target_modules=["wte", "c_attn"]))
    ids = tiny_models.tokens(model, 2, 24)
    want = tiny_models.run(model, lora.attach(params, adapter), ids)
    with pytest.raises(DataError, match=r"wte.*tied"):
        lora.merge(params, adapter)
    untied_model, untied_params = jlora.untie(model, params)
    merged = lora.merge(untied_params, adapter)
    got = tiny_models.run(untied_model, merged, ids)
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())
    assert np.abs(tiny_models.run(model, params, ids) - want).max() > 1e-2
    jlora.save_pretrained(tmp_path, untied_model, merged)
    again, read = jlora.load_pretrained(tmp_path, dtype="float32")
    assert not again.config.tie_word_embeddings
    np.testing.assert_array_equal(tiny_models.run(again, read, ids), got)
    with pytest.raises(ConfigError, match="not tied"):
        jlora.untie(untied_model, untied_params)
    with pytest.raises(ConfigError, match=r"Module is no model of jlora's(.|\n)*output layer"):
        jlora.untie(nn.Module(), params)


def test_rows_of_a_tied_embedding_are_merged_for_the_head_too():
    model, params = tiny_models.build("gpt2")
    config = LoraConfig(r=2, target_modules=["c_attn"], trainable_token_indices=[5, 3])
    adapter = trained(params, config)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 12, (2, 24)), jnp.int32)
    want = tiny_models.run(model, lora.attach(params, adapter), ids)
    got = tiny_models.run(model, lora.merge(params, adapter), ids)
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())
