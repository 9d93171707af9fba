"""LoRA transforms, compared with NumPy's dense sum W + s·A@B and with their inverses."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

import jlora
from jlora import lora
from jlora.config import LoraConfig
from jlora.errors import ConfigError, DataError
from jlora.lora.targets import find_targets, match_table, rank_of
from jlora.ops.dot import dot
from jlora.tree import paths
from jlora.tree.paths import ModuleStack

L, D, F, V = 3, 8, 16, 11


def make_params(seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)

    def kernel(*shape):
        return jnp.asarray(rng.normal(size=shape) * 0.3, dtype)

    return {
        "model": {
            "embed_tokens": {"embedding": kernel(V, D)},
            "layers": {
                "self_attn": {
                    "q_proj": {"kernel": kernel(L, D, D), "bias": kernel(L, D)},
                    "v_proj": {"kernel": kernel(L, D, D), "bias": kernel(L, D)},
                },
                "mlp": {"down_proj": {"kernel": kernel(L, F, D)}},
                "input_layernorm": {"scale": kernel(L, D)},
            },
            "norm": {"scale": kernel(D)},
        },
        "lm_head": {"kernel": kernel(D, V)},
    }


def make_gpt2():
    rng = np.random.default_rng(1)
    kernel = jnp.asarray(rng.normal(size=(L, D, 3 * D)), jnp.float32)
    return {"transformer": {"h": {"attn": {"c_attn": {"kernel": kernel}}}}}


def trained(params, config, seed=0):
    """An adapter whose A and B are both random (where PEFT would train them)."""
    adapter = lora.init_adapter(jax.random.key(seed), params, config)
    rng = np.random.default_rng(seed + 1)

    def noisy(leaf):
        noise = 0.1 * rng.standard_normal(leaf.shape)
        return jnp.asarray(np.asarray(leaf) + noise, leaf.dtype)

    return jax.tree.map(noisy, adapter)


def node(tree, dotted):
    for key in dotted.split("."):
        tree = tree[key]
    return tree


Q = "model.layers.self_attn.q_proj"


def test_fresh_adapter_changes_nothing_bitwise_and_starts_as_peft_does():
    params = make_params()
    adapter = lora.init_adapter(
        jax.random.key(0), params, LoraConfig(r=4, target_modules="all-linear")
    )
    a, b = node(adapter.weights, Q)["lora_A"], node(adapter.weights, Q)["lora_B"]
    bound = 1 / np.sqrt(D)
    assert np.abs(a).max() <= bound and np.abs(a).max() > 0.8 * bound
    np.testing.assert_allclose(np.var(a), bound**2 / 3, rtol=0.35)
    assert not np.any(b)
    chex.assert_tree_all_finite(adapter)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(adapter))
    attached = lora.attach(params, adapter)
    x = jax.random.normal(jax.random.key(1), (5, D))
    w, plain = jax.tree.map(lambda leaf: leaf[0], (node(attached, Q), node(params, Q)))
    np.testing.assert_array_equal(dot(x, w["kernel"]), dot(x, plain["kernel"]))


def test_dot_on_attached_and_merge_equal_the_dense_sum():
    params = make_params()
    adapter = trained(params, LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"]))
    attached, merged = lora.attach(params, adapter), lora.merge(params, adapter)
    x = np.random.default_rng(2).normal(size=(5, D)).astype(np.float32)
    pair = node(adapter.weights, Q)
    for i in range(L):
        dense = np.asarray(node(params, Q)["kernel"][i], np.float64) + (6 / 4) * (
            np.asarray(pair["lora_A"][i], np.float64) @ np.asarray(pair["lora_B"][i], np.float64)
        )
        one = jax.tree.map(lambda leaf, i=i: leaf[i], node(attached, Q)["kernel"])
        np.testing.assert_allclose(dot(jnp.asarray(x), one), x @ dense, rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(node(merged, Q)["kernel"][i], dense, rtol=1e-6, atol=1e-6)
    chex.assert_trees_all_equal(merged["lm_head"], params["lm_head"])


def test_detach_and_unmerge_restore_the_base():
    params = make_params()
    adapter = trained(params, LoraConfig(r=4, target_modules="all-linear"))
    detached = lora.detach(lora.attach(params, adapter))
    chex.assert_trees_all_equal(detached, params)
    restored = lora.unmerge(lora.merge(params, adapter), adapter)
    chex.assert_trees_all_close(restored, params, atol=1e-6)
    moved = np.abs(node(lora.merge(params, adapter), Q)["kernel"] - node(params, Q)["kernel"]).max()
    assert moved > 1e-2


def test_transforms_do_not_modify_their_arguments():
    params = make_params()
    before = jax.tree.map(np.asarray, params)
    adapter = trained(params, LoraConfig(target_modules="all-linear"))
    lora.merge(params, adapter)
    lora.attach(params, adapter)
    chex.assert_trees_all_equal(params, before)


def test_per_layer_ranks_are_zero_columns_that_get_no_gradient():
    params = make_params()
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj"], layers_to_transform=[0, 2],
        rank_pattern={r"layers\.2\.self_attn\.q_proj": 2},
        alpha_pattern={r"layers\.2\.self_attn\.q_proj": 1.0},
        init_lora_weights=False,
    )  # fmt: skip
    adapter = lora.init_adapter(jax.random.key(0), params, config)
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(L)]
    assert [rank_of(adapter.config, name) for name in names] == [4, 0, 2]
    scale = lora.scaling(adapter.config, ModuleStack(tuple(Q.split(".")), ("model", "layers"), L))
    np.testing.assert_allclose(scale[[0, 2]], [8 / 4, 1 / 2])

    def f(adapter):
        w = node(lora.attach(params, adapter), Q)["kernel"]
        return jnp.sum(jax.vmap(lambda w: dot(jnp.ones((2, D)), w))(w) ** 2)

    grads = node(jax.grad(f)(adapter).weights, Q)
    a, b = np.asarray(grads["lora_A"]), np.asarray(grads["lora_B"])
    assert not a[1].any() and not b[1].any() and not a[2, :, 2:].any() and not b[2, 2:].any()
    assert np.all(a[0].any(0)) and np.all(a[2, :, :2].any(0)) and np.all(b[0].any(1))


def test_rslora_scales_by_the_root_of_the_rank():
    config = LoraConfig(r=16, lora_alpha=8, use_rslora=True, target_modules=("q_proj",))
    assert float(lora.scaling(config, ModuleStack(("q_proj",)))) == 2.0


def test_dropout_only_touches_the_delta_and_differs_by_module_and_layer():
    params = make_params()
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.5)
    adapter = trained(params, config)
    keyed = lora.attach(params, adapter, dropout_key=jax.random.key(3))
    q, v = node(keyed, Q)["kernel"], node(keyed, "model.layers.self_attn.v_proj")["kernel"]
    keys = np.concatenate([jax.random.key_data(q.dropout_key), jax.random.key_data(v.dropout_key)])
    assert len({tuple(k) for k in keys}) == 2 * L
    one = jax.tree.map(lambda leaf: leaf[0], q)
    x = jnp.ones((4000, D))
    base = dot(x, one.base)
    delta = np.asarray(dot(x, one) - base)
    full = np.asarray(one.scale * (x @ one.lora_A) @ one.lora_B)
    np.testing.assert_allclose(delta.mean(0), full[0], atol=4 * delta.std(0).max() / 60)
    assert len(np.unique(delta[:, 0].round(5))) > 10
    np.testing.assert_array_equal(dot(x, one), dot(x, one))
    plain = node(lora.attach(params, adapter), Q)["kernel"]
    assert plain.dropout_key is None


def test_bias_and_modules_to_save_replace_leaves():
    params = make_params(dtype=jnp.bfloat16)
    config = LoraConfig(target_modules=["q_proj"], bias="lora_only", modules_to_save=["lm_head"])
    adapter = lora.init_adapter(jax.random.key(0), params, config)
    assert set(node(adapter.weights, Q)) == {"lora_A", "lora_B", "bias"}
    assert "v_proj" not in node(adapter.weights, "model.layers.self_attn")
    chex.assert_trees_all_equal(lora.merge(params, adapter), params)
    changed = jax.tree.map(lambda a: a + 1, adapter)
    attached = lora.attach(params, changed)
    expected = np.asarray(params["lm_head"]["kernel"], np.float32) + 1
    np.testing.assert_array_equal(
        np.asarray(attached["lm_head"]["kernel"]), expected.astype(jnp.bfloat16)
    )
    with pytest.raises(DataError, match="replaced"):
        lora.unmerge(lora.merge(params, changed), changed)
    everything = lora.init_adapter(
        jax.random.key(0), params, LoraConfig(target_modules=["q_proj"], bias="all")
    )
    assert "bias" in node(everything.weights, "model.layers.self_attn.v_proj")


def test_only_the_chosen_layers_of_a_stacked_leaf_are_replaced():
    params = make_params()
    config = LoraConfig(target_modules=["q_proj"], layers_to_transform=[0, 2], bias="lora_only")
    adapter = lora.init_adapter(jax.random.key(0), params, config)
    changed = jax.tree.map(lambda a: a + 1, adapter)
    base, got = (node(t, Q)["bias"] for t in (params, lora.attach(params, changed)))
    np.testing.assert_array_equal(got, np.asarray(base) + np.float32([[1], [0], [1]]))
    grads = jax.grad(lambda a: jnp.sum(node(lora.attach(params, a), Q)["bias"]))(adapter)
    np.testing.assert_array_equal(node(grads.weights, Q)["bias"][:, 0], [1, 0, 1])


def test_parts_of_a_fused_projection_change_only_their_columns():
    params = make_gpt2()
    config = LoraConfig(
        r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False
    )
    adapter = lora.init_adapter(jax.random.key(0), params, config)
    parts = adapter.weights["transformer"]["h"]["attn"]["c_attn"]
    assert set(parts) == {"q_proj", "v_proj"}
    w = np.asarray(params["transformer"]["h"]["attn"]["c_attn"]["kernel"])
    merged = np.asarray(lora.merge(params, adapter)["transformer"]["h"]["attn"]["c_attn"]["kernel"])
    for i, name in enumerate(["q_proj", "k_proj", "v_proj"]):
        columns = slice(i * D, (i + 1) * D)
        delta = merged[..., columns] - w[..., columns]
        if name == "k_proj":
            assert not delta.any()
        else:
            a, b = parts[name]["lora_A"], parts[name]["lora_B"]
            np.testing.assert_allclose(delta, 2.0 * np.einsum("lir,lro->lio", a, b), atol=1e-6)
    with pytest.raises(ConfigError, match="its part"):
        config = LoraConfig(target_modules=["c_attn", "q_proj"])
        lora.init_adapter(jax.random.key(0), params, config)


def test_quantized_base_merges_dense_and_equals_the_attached_product():
    params = jlora.quantize(make_params(), jlora.QuantConfig(block_size=32))
    adapter = trained(params, LoraConfig(r=4, target_modules="all-linear"))
    merged = lora.merge(params, adapter)
    assert all(isinstance(leaf, jax.Array) for _, leaf in paths.walk(merged))
    attached = lora.attach(params, adapter)
    x = jax.random.normal(jax.random.key(1), (5, D))
    one, dense = jax.tree.map(lambda leaf: leaf[1], (node(attached, Q), node(merged, Q)))
    np.testing.assert_allclose(dot(x, one["kernel"]), x @ dense["kernel"], atol=1e-5)
    chex.assert_trees_all_equal(lora.detach(attached), params)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["q_proj", "v_porj"]}, "v_porj.*v_proj"),
        ({"target_modules": ".*nothing"}, "nothing"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1, 7]}, r"\[7\].*0 to 2"),
        ({"target_modules": ["q_proj"], "rank_pattern": {"v_proj": 3}}, "rank_pattern.*v_proj"),
        ({"target_modules": ["q_proj"], "alpha_pattern": {"k": 3}}, "alpha_pattern"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_haed"]}, "lm_haed.*lm_head"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "excluded"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["w"]}, "exclude_modules"),
        ({"target_modules": ["norm"]}, "norm"),
    ],
)
def test_every_pattern_must_match(fields, message):
    with pytest.raises(ConfigError, match=message):
        lora.init_adapter(jax.random.key(0), make_params(), LoraConfig(**fields))


def test_targets_are_resolved_as_peft_resolves_them():
    config, targets = find_targets(make_params(), LoraConfig(target_modules="all-linear"))
    assert set(config.target_modules) == {"q_proj", "v_proj", "down_proj"}
    default, _ = find_targets(make_params(), LoraConfig())
    assert default.target_modules == ("q_proj", "v_proj")
    assert find_targets(make_gpt2(), LoraConfig())[0].target_modules == ("c_attn",)
    rows = match_table(targets)
    assert rows[0] == {
        "module": "model.layers.*.self_attn.q_proj", "layers": L, "shape": (D, D), "r": 8,
        "parameters": L * 8 * 2 * D,
    }  # fmt: skip


def test_an_adapter_of_another_model_is_refused():
    adapter = lora.init_adapter(jax.random.key(0), make_params(), LoraConfig())
    other = make_params()
    other["model"]["layers"]["self_attn"].pop("v_proj")
    with pytest.raises(DataError, match="v_proj"):
        lora.attach(other, adapter)
    wider = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf], -1), make_params())
    with pytest.raises(DataError, match="do not fit"):
        lora.attach(wider, adapter)


def test_a_foreign_unstacked_tree():
    kernel = jnp.ones((D, F))
    params = {"params": {f"layers_{i}": {"Dense_0": {"kernel": kernel}} for i in range(2)}}
    config = LoraConfig(target_modules=["Dense_0"], init_lora_weights=False, r=2, lora_alpha=2)
    adapter = lora.init_adapter(jax.random.key(0), params, config)
    merged = lora.merge(params, adapter)
    pair = adapter.weights["params"]["layers_1"]["Dense_0"]
    np.testing.assert_allclose(
        merged["params"]["layers_1"]["Dense_0"]["kernel"],
        1 + np.asarray(pair["lora_A"]) @ np.asarray(pair["lora_B"]),
        rtol=1e-5,
    )


@pytest.mark.parametrize(("name", "quantized"), [("llama-rope", True), ("gpt2", False)])
def test_on_a_whole_model(name, quantized):
    """A fresh adapter changes no bit; merging equals attaching; unmerging restores the base."""
    model, params = tiny_models.build(name)
    base = jlora.quantize(params, jlora.QuantConfig(block_size=32)) if quantized else params
    ids = tiny_models.tokens(model, 2, 24)
    config = LoraConfig(r=4, target_modules="all-linear")
    fresh = lora.init_adapter(jax.random.key(0), base, config)
    plain = model(base, ids)
    np.testing.assert_array_equal(model(lora.attach(base, fresh), ids), plain)

    adapter = trained(base, config)
    attached = model(lora.attach(base, adapter), ids)
    size = np.abs(attached).max()
    assert np.abs(attached - plain).max() > 0.01 * size
    merged = lora.merge(base, adapter)
    np.testing.assert_allclose(model(merged, ids), attached, atol=1e-5 * size)
    restored = model(lora.unmerge(merged, adapter), ids)
    np.testing.assert_allclose(restored, plain, atol=1e-5 * size)
