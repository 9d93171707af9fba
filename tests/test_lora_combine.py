"""Combining, truncating and extracting adapters, compared with NumPy; and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.config import FrozenMap, LoraConfig
from jlora.errors import ConfigError, DataError
from jlora.lora import Adapter
from jlora.lora.combine.factors import adapter_factors
from jlora.lora.combine.pruning import magnitude_mask
from jlora.tree import paths

L, D, F, V = 3, 8, 16, 11


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def make_params(seed=0):
    def kernel(i, *shape):
        return jnp.asarray(normal(100 * seed + i, *shape))

    attention = {
        name: {"kernel": kernel(i, L, D, D), "bias": kernel(10 + i, L, D)}
        for i, name in enumerate(("q_proj", "v_proj"))
    }
    return {
        "model": {
            "embed_tokens": {"embedding": kernel(2, V, D)},
            "layers": {
                "self_attn": attention,
                "mlp": {"down_proj": {"kernel": kernel(3, L, F, D)}},
                "input_layernorm": {"scale": kernel(4, L, D)},
            },
        },
        "lm_head": {"kernel": kernel(5, D, V)},
    }


PARAMS = make_params()


def make_adapter(seed=0, params=PARAMS, **fields):
    """An adapter with random A and B, and zeros where a layer uses fewer columns."""
    config = LoraConfig(**{"target_modules": ["q_proj"], **fields}, init_lora_weights=False)
    return jlora.init_adapter(jax.random.key(seed), params, config)


def deltas(adapter):
    """scale · A @ B of every adapted module, in float64."""
    found = {}
    for f in adapter_factors(adapter).values():
        for i, name in enumerate(f.leaf.modules()):
            if r := f.ranks[i]:
                a, b = np.asarray(f.a[i], np.float64), np.asarray(f.b[i], np.float64)
                assert not a[:, r:].any() and not b[r:].any(), "unused columns are zero"
                found[name] = f.scales[i] * a @ b
    return found


def nearest(matrix, r):
    """By NumPy: the nearest matrix of rank r, and the dropped singular values."""
    u, s, vh = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
    return u[:, :r] * s[:r] @ vh[:r], s[r:]


def close(got, want, bound=3e-6):
    np.testing.assert_allclose(got, want, rtol=0, atol=bound * np.abs(want).max())


MIXED = {
    "r": 4,
    "lora_alpha": 6,
    "target_modules": ["q_proj", "down_proj", "lm_head"],
    "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 2, "lm_head": 5},
    "alpha_pattern": {"down_proj": 3},
}


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("r", [1, 3, 9])
def test_reduced_rank_is_the_nearest_matrix(r, rslora):
    adapter = make_adapter(**MIXED, use_rslora=rslora, bias="all")
    reduced = jlora.reduce_rank(adapter, r)
    before, after = deltas(adapter), deltas(reduced)
    assert set(before) == set(after)
    lost = 0.0
    for name, delta in before.items():
        want, dropped = nearest(delta, r)
        close(after[name], want)
        error = np.linalg.norm(after[name] - delta)
        np.testing.assert_allclose(error, np.linalg.norm(dropped), rtol=1e-4, atol=1e-5)
        lost = max(lost, error)
    assert (lost > 0.1) == (r < 5)
    bias = reduced.weights["model"]["layers"]["self_attn"]["v_proj"]["bias"]
    np.testing.assert_array_equal(bias, PARAMS["model"]["layers"]["self_attn"]["v_proj"]["bias"])


def test_truncating_works_under_jit_and_of_tall_and_flat_factors():
    adapter = make_adapter(r=12, target_modules=["q_proj"])  # more columns than the matrix has
    reduced = jax.jit(lambda a: jlora.reduce_rank(a, 3))(adapter)
    for name, delta in deltas(adapter).items():
        close(deltas(reduced)[name], nearest(delta, 3)[0])
    assert jlora.reduce_rank(adapter, 12).config.r == D


def test_layers_of_either_adapter_are_in_the_sum():
    some = make_adapter(1, r=2, layers_to_transform=[0, 1], target_modules=["q_proj", "v_proj"])
    other = make_adapter(2, r=3, target_modules=r".*(q_proj|lm_head)", lora_alpha=5)
    result = jlora.add_weighted_adapter([some, other], [2.0, -0.5], "cat")
    want = {name: 2.0 * delta for name, delta in deltas(some).items()}
    for name, delta in deltas(other).items():
        want[name] = want.get(name, 0) - 0.5 * delta
    got = deltas(result)
    assert set(got) == set(want) and len(want) == L + 2 + 1
    for name, delta in want.items():
        close(got[name], delta)
    merged = jlora.merge(PARAMS, result)
    change = merged["lm_head"]["kernel"] - PARAMS["lm_head"]["kernel"]
    np.testing.assert_allclose(change, want["lm_head"], atol=1e-6)
    cut = jlora.add_weighted_adapter([some, other], [2.0, -0.5], "svd", svd_rank=2)
    for name, delta in deltas(cut).items():
        close(delta, nearest(want[name], 2)[0])


FIRST = ["model.layers.0.self_attn.q_proj"]


@pytest.mark.parametrize(
    ("fields", "joined"),
    [
        (
            [{"target_modules": ["q_proj"]}, {"target_modules": ["v_proj", "q_proj"]}],
            ("q_proj", "v_proj"),
        ),
        ([{"target_modules": ".*q_proj"}, {"target_modules": ".*v_proj"}], "(.*q_proj)|(.*v_proj)"),
        ([{"target_modules": ".*q_proj"}, {"target_modules": ["v_proj"]}], None),
        (
            [
                {"target_modules": ["q_proj", "v_proj"], "exclude_modules": FIRST},
                {"target_modules": ["v_proj"], "layers_to_transform": 1},
            ],
            None,
        ),
        (
            [
                {"target_modules": ".*v_proj", "exclude_modules": r".*0.*"},
                {"target_modules": ".*[qv]_proj"},
            ],
            None,
        ),
    ],
)
def test_the_result_resolves_to_the_union_of_targets(fields, joined):
    adapters = [make_adapter(i, **options) for i, options in enumerate(fields)]
    result = jlora.add_weighted_adapter(adapters, [1, 1], "linear")
    union = {name for adapter in adapters for name in deltas(adapter)}
    assert set(deltas(result)) == union
    if joined:
        assert result.config.target_modules == joined
    again = jlora.init_adapter(jax.random.key(0), PARAMS, result.config)
    assert jax.tree.structure(again) == jax.tree.structure(result), (
        "the result's config resolves to the same targets"
    )


def test_embeddings_are_combined():
    config = LoraConfig(r=2, lora_alpha=3, target_modules=("embed_tokens",))
    adapters = []
    for seed in (0, 1):
        pair = {"lora_embedding_A": normal(seed, V, 2), "lora_embedding_B": normal(seed + 5, 2, D)}
        weights = {"model": {"embed_tokens": jax.tree.map(jnp.asarray, pair)}}
        adapters.append(Adapter(weights, config))
    name, (first, second) = "model.embed_tokens", map(deltas, adapters)
    exact = 0.5 * first[name] - 2 * second[name]
    close(deltas(jlora.add_weighted_adapter(adapters, [0.5, -2], "cat"))[name], exact)
    result = jlora.add_weighted_adapter(adapters, [0.5, -2])
    close(deltas(result)[name], nearest(exact, 2)[0])
    assert set(result.weights["model"]["embed_tokens"]) == {"lora_embedding_A", "lora_embedding_B"}


def test_a_single_adapter_is_scaled_and_truncated():
    adapter = make_adapter(r=4, lora_alpha=6, use_rslora=True)
    cut = jlora.add_weighted_adapter([adapter], [-3], svd_rank=1)
    assert (cut.config.r, cut.config.lora_alpha, cut.config.use_rslora) == (1, 1, False)
    for name, delta in deltas(adapter).items():
        close(deltas(cut)[name], nearest(-3 * delta, 1)[0])


def test_the_magnitude_mask_keeps_the_exact_count_with_ties():
    tensor = jnp.asarray([[1.0, -2.0, 2.0], [2.0, 0.0, -2.0]])
    mask = magnitude_mask(tensor, jnp.asarray(3))
    np.testing.assert_array_equal(mask, [[False, True, True], [True, False, False]])


def test_unused_columns_of_a_layer_are_not_counted():
    adapter = make_adapter(r=4, rank_pattern={"layers.1.self_attn.q_proj": 1})
    result = jlora.add_weighted_adapter([adapter], [1.0], "magnitude_prune", density=0.5)
    a = np.asarray(result.weights["model"]["layers"]["self_attn"]["q_proj"]["lora_A"])
    assert (a != 0).sum((1, 2)).tolist() == [D * 4 // 2, D // 2, D * 4 // 2]


def test_clamping_clips_at_the_quantile():
    adapters = [make_adapter(i, r=3) for i in range(2)]
    free = jlora.add_weighted_adapter(adapters, [1, 1], "svd")
    clipped = jlora.add_weighted_adapter(adapters, [1, 1], "svd", svd_clamp=0.8)
    before, after = (x.weights["model"]["layers"]["self_attn"]["q_proj"] for x in (free, clipped))
    for i in range(L):
        a, b = (np.asarray(before[name][i]) for name in ("lora_A", "lora_B"))
        high = np.quantile(np.concatenate([a.ravel(), b.ravel()]), 0.8)
        np.testing.assert_allclose(after["lora_A"][i], a.clip(-high, high), atol=1e-6)
        np.testing.assert_allclose(after["lora_B"][i], b.clip(-high, high), atol=1e-6)
        assert np.abs(b).max() > high


@pytest.fixture(scope="module")
def all_ones():
    """Two adapters in which every value is one."""
    layers = {name: {"kernel": jnp.zeros((2, 64, 96))} for name in ("q_proj", "v_proj")}
    config = LoraConfig(r=32, lora_alpha=32, target_modules=["q_proj", "v_proj"])
    params = {"model": {"layers": layers}}
    adapter = jlora.init_adapter(jax.random.key(0), params, config)
    return [jax.tree.map(jnp.ones_like, adapter)] * 2


def test_dare_keeps_a_fraction_and_the_expectation(all_ones):
    def drawn(key, weights=(1.0, 4.0)):
        result = jlora.add_weighted_adapter(
            all_ones, weights, "dare_linear", density=0.3, key=jax.random.key(key)
        )
        nodes = result.weights["model"]["layers"]
        q, v = nodes["q_proj"], nodes["v_proj"]
        return [np.asarray(x) for x in (q["lora_A"], q["lora_B"], v["lora_A"])]

    # √1·first + √4·second, each where its mask keeps it
    values = np.concatenate([x.ravel() for x in drawn(0)]) * 0.3
    n = values.size
    parts = [np.isclose(values, v).mean() for v in range(4)]
    want = [0.7 * 0.7, 0.3 * 0.7, 0.7 * 0.3, 0.3 * 0.3]
    assert np.isclose(sum(parts), 1)
    np.testing.assert_allclose(parts, want, atol=5 * np.sqrt(0.25 / n))
    np.testing.assert_allclose(values.mean() / 0.3, 3, atol=5 * np.sqrt(5 * 0.7 / 0.3 / n))

    (a, b, elsewhere), again, other = drawn(0, (1, 0)), drawn(0, (1, 0)), drawn(1, (1, 0))
    np.testing.assert_array_equal(a, again[0])
    expected = 0.3**2 + 0.7**2  # the two masks are independent
    size = a.shape[1] * a.shape[2]
    for second in (a[1], other[0][0], elsewhere[0], b[0].ravel()[:size].reshape(a[0].shape)):
        same = ((a[0] != 0) == (second != 0)).mean()
        np.testing.assert_allclose(same, expected, atol=5 * np.sqrt(0.25 / size))


REFUSED = [
    ("tis", {}, "'tis' is unknown; did you mean 'ties'"),
    ("ties", {}, "ties needs a density"),
    ("cat", {"density": 0.5}, "cat does not prune"),
    ("ties", {"density": 0.0}, r"0.0 is not in \(0, 1\]"),
    ("dare_ties", {"density": 0.5}, "give a key"),
    ("linear", {"svd_rank": 3}, "linear has no SVD"),
    ("svd", {"svd_rank": 0, "svd_clamp": 0.4}, "svd_rank: 0 .*; svd_clamp: 0.4 is not in"),
    ("ties", {"density": 0.5, "majority_sign_method": "all"}, "'all' .total or frequency."),
]


@pytest.mark.parametrize(("kind", "options", "message"), REFUSED)
def test_invalid_and_meaningless_settings_are_refused(kind, options, message):
    with pytest.raises(ConfigError, match=message):
        jlora.add_weighted_adapter([make_adapter()], [1], kind, **options)


def test_all_faults_are_reported_together():
    adapters = [
        make_adapter(r=2, bias="all"),
        make_adapter(r=3, target_modules=["q_proj", "v_proj"]),
        make_adapter(modules_to_save=["lm_head"]),
    ]
    with pytest.raises(ConfigError) as error:
        jlora.add_weighted_adapter(adapters, [1, 2], "linear")
    for part in (
        "3 adapters and 2 weights",
        "adapter 0 has leaves besides A and B: model.layers.self_attn.q_proj.bias",
        "adapter 2 has leaves besides A and B: lm_head.kernel",
        "q_proj has ranks (2, 3, 8): use cat or an svd type, or reduce_rank",
    ):
        assert part in str(error.value)


def gpt2(layers=L):
    kernel = jnp.asarray(normal(9, layers, D, 3 * D))
    return {"transformer": {"h": {"attn": {"c_attn": {"kernel": kernel}}}}}


def unstacked(tree):
    """The tree with numbered layers instead of stacked ones."""
    layers = tree["model"]["layers"]
    numbered = {str(i): jax.tree.map(lambda x, i=i: x[i], layers) for i in range(L)}
    return {"model": {"layers": numbered}}


@pytest.mark.parametrize(
    ("one", "two", "message"),
    [
        (
            make_adapter(params={"q_proj": {"kernel": jnp.zeros((4, 5))}}),
            make_adapter(params={"q_proj": {"kernel": jnp.zeros((4, 6))}}),
            r"q_proj is \(4, 5\) in 1 layers \(adapter 0\) and \(4, 6\)",
        ),
        (
            make_adapter(),
            make_adapter(params=unstacked(PARAMS)),
            "stacked in one adapter and not in",
        ),
        (
            make_adapter(params=gpt2(), target_modules=["c_attn"]),
            make_adapter(params=gpt2(), target_modules=["v_proj"]),
            "both c_attn and its part v_proj are adapted",
        ),
        (
            make_adapter(params=gpt2(), target_modules=["q_proj"]),
            make_adapter(params=gpt2(2), target_modules=["v_proj"]),
            "transformer.h has 3 layers, or 2",
        ),
    ],
)
def test_adapters_of_different_trees_are_refused(one, two, message):
    with pytest.raises(ConfigError, match=message):
        jlora.add_weighted_adapter([one, two], [1, 1], "cat")


def test_adapters_on_experts_are_not_combined():
    pair = {"lora_A": jnp.ones((L, 4, D, 2)), "lora_B": jnp.ones((L, 4, 2, F))}
    weights = {"model": {"layers": {"experts": {"gate_up_proj": pair}}}}
    adapter = Adapter(weights, LoraConfig(target_modules=("gate_up_proj",)))
    for combine in (
        lambda: jlora.reduce_rank(adapter, 1),
        lambda: jlora.add_weighted_adapter([adapter], [1]),
    ):
        with pytest.raises(ConfigError, match=r"adapts experts \(model.layers.\*.experts.gate_up"):
            combine()


def test_adapters_with_initial_values_are_not_combined():
    adapter = make_adapter()
    adapter = dataclasses.replace(adapter, initial=adapter.weights)
    for combine in (
        lambda: jlora.reduce_rank(adapter, 1),
        lambda: jlora.add_weighted_adapter([adapter], [1]),
    ):
        with pytest.raises(ConfigError, match="has initial values"):
            combine()


def tuned_on(*paths):
    """The parameters, replaced by another seed's at these leaves or below these nodes."""
    other = make_params(1)

    def pick(path, original, tuned):
        name = ".".join(str(key.key) for key in path)
        return tuned if any(p in name for p in paths) else original

    return jax.tree_util.tree_map_with_path(pick, PARAMS, other)


def test_extraction_gives_the_nearest_delta_of_every_target():
    tuned = tuned_on("q_proj", "down_proj.kernel", "lm_head", "v_proj.bias")
    fields = {**MIXED, "bias": "all"}
    adapter = jlora.extract_adapter(PARAMS, tuned, LoraConfig(**fields))
    before, after = make_adapter(**fields), deltas(adapter)
    assert set(after) == set(deltas(before))
    assert adapter.config.target_modules == before.config.target_modules
    assert jax.tree.map(jnp.shape, adapter.weights) == jax.tree.map(jnp.shape, before.weights)
    for f in adapter_factors(adapter).values():
        was, now = (paths.get(tree, f.leaf.path[:-1]) for tree in (PARAMS, tuned))
        change = np.asarray(now["kernel"]) - np.asarray(was["kernel"])
        for i, name in enumerate(f.leaf.modules()):
            close(after[name], nearest(change[i] if f.leaf.stack else change, f.ranks[i])[0])
    merged = jlora.merge(PARAMS, adapter)["model"]["layers"]["self_attn"]["v_proj"]
    np.testing.assert_array_equal(
        merged["bias"], tuned["model"]["layers"]["self_attn"]["v_proj"]["bias"]
    )


def test_extraction_at_full_rank_reproduces_the_tuned_model():
    tuned = tuned_on("q_proj.kernel", "scale")
    config = LoraConfig(
        r=D, lora_alpha=3, target_modules=["q_proj"], modules_to_save=["input_layernorm"]
    )
    adapter = jlora.extract_adapter(PARAMS, tuned, config)
    for got, want in zip(
        jax.tree.leaves(jlora.merge(PARAMS, adapter)), jax.tree.leaves(tuned), strict=True
    ):
        np.testing.assert_allclose(got, want, atol=2e-5)


def test_extraction_of_parts_of_a_fused_projection():
    base = gpt2()
    change = np.zeros((L, D, 3 * D), np.float32)
    change[:, :, 2 * D :] = normal(4, L, D, D)
    kernel = base["transformer"]["h"]["attn"]["c_attn"]["kernel"] + change
    tuned = {"transformer": {"h": {"attn": {"c_attn": {"kernel": kernel}}}}}
    adapter = jlora.extract_adapter(base, tuned, LoraConfig(r=3, target_modules=["v_proj"]))
    for i, (name, delta) in enumerate(sorted(deltas(adapter).items())):
        assert name == f"transformer.h.{i}.attn.v_proj"
        close(delta, nearest(change[i, :, 2 * D :], 3)[0])
    with pytest.raises(ConfigError, match=r"does not cover: transformer.h.\*.attn.v_proj.kernel"):
        jlora.extract_adapter(base, tuned, LoraConfig(r=3, target_modules=["q_proj"]))


def phi3(seed=0):
    """A fused projection with unequal parts: D columns for queries, two for keys and for values."""
    kernels = {"qkv_proj": (L, D, D + 4), "o_proj": (L, D, D)}
    nodes = {name: {"kernel": jnp.asarray(normal(seed, *s))} for name, s in kernels.items()}
    return {"model": {"layers": {"self_attn": nodes}}}


def test_parts_of_unequal_widths():
    base, tuned = phi3(), phi3(1)
    tuned["model"]["layers"]["self_attn"]["o_proj"] = base["model"]["layers"]["self_attn"]["o_proj"]
    config = LoraConfig(r=D, target_modules=["q_proj", "k_proj", "v_proj"])
    found = jlora.extract_adapter(base, tuned, config)
    result = jlora.add_weighted_adapter([found, found], [0.25, 0.5], "cat")
    was, now, merged, summed = (
        tree["model"]["layers"]["self_attn"]["qkv_proj"]["kernel"]
        for tree in (base, tuned, jlora.merge(base, found), jlora.merge(base, result))
    )
    np.testing.assert_allclose(merged, now, atol=1e-5)
    np.testing.assert_allclose(summed, was + 0.75 * (now - was), atol=1e-5)
    with pytest.raises(ConfigError, match=r"cover: model.layers.\*.self_attn.v_proj.kernel\n"):
        some = LoraConfig(target_modules=["q_proj", "k_proj"])
        jlora.extract_adapter(base, tuned, some)
    other = dataclasses.replace(found, parts=FrozenMap({"qkv_proj": (4, 4, 4)}))
    with pytest.raises(ConfigError, match=r"parts of \(4, 4, 4\) and \(8, 2, 2\) columns"):
        jlora.add_weighted_adapter([found, other], [1, 1], "cat")


def test_extraction_of_an_embedding():
    tuned = tuned_on("embedding")
    adapter = jlora.extract_adapter(PARAMS, tuned, LoraConfig(r=3, target_modules=["embed_tokens"]))
    was, now = (np.asarray(t["model"]["embed_tokens"]["embedding"]) for t in (PARAMS, tuned))
    close(deltas(adapter)["model.embed_tokens"], nearest(now - was, 3)[0])
    assert set(adapter.weights["model"]["embed_tokens"]) == {"lora_embedding_A", "lora_embedding_B"}


def test_extraction_names_what_would_be_lost():
    tuned = tuned_on("q_proj", "scale", "embedding")
    with pytest.raises(ConfigError) as error:
        config = LoraConfig(target_modules=["q_proj"], layers_to_transform=[0, 2])
        jlora.extract_adapter(PARAMS, tuned, config)
    lost = str(error.value).splitlines()[0].rpartition(": ")[2].split(", ")
    assert sorted(lost) == [
        "model.embed_tokens.embedding",
        "model.layers.*.input_layernorm.scale",
        "model.layers.*.self_attn.q_proj.bias",
        "model.layers.*.self_attn.q_proj.kernel",
    ]


def test_a_changed_bias_is_not_covered_by_its_kernel():
    tuned = tuned_on("q_proj.bias", "lm_head")
    config = LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights="gaussian")
    with pytest.raises(ConfigError, match=r"cover: model.layers.\*.self_attn.q_proj.bias\n"):
        jlora.extract_adapter(PARAMS, tuned, config)
    found = jlora.extract_adapter(PARAMS, tuned, dataclasses.replace(config, bias="lora_only"))
    assert found.config.init_lora_weights is True, "an extracted adapter has no initial values"


def test_extraction_refuses_trees_of_another_structure():
    tuned = make_params()
    del tuned["lm_head"]
    tuned["model"]["embed_tokens"]["embedding"] = jnp.zeros((V + 1, D))
    tuned["model"]["norm"] = {"scale": jnp.ones(D)}
    with pytest.raises(DataError) as error:
        jlora.extract_adapter(PARAMS, tuned, LoraConfig(target_modules=["q_proj"]))
    for part in (
        "lm_head.kernel is only in the base",
        "model.norm.scale is only in the tuned model",
        f"model.embed_tokens.embedding is ({V}, {D}) and ({V + 1}, {D})",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("fields", "leaf"),
    [
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"lora_bias": True}, "lora_bias"),
        ({"trainable_token_indices": [1, 2]}, "trainable_tokens_delta"),
    ],
)
def test_combining_and_extraction_refuse_other_leaves(fields, leaf):
    with pytest.raises(ConfigError, match=rf"cannot hold model\.\w+\..*{leaf}"):
        jlora.extract_adapter(PARAMS, PARAMS, LoraConfig(target_modules=["q_proj"], **fields))
    with pytest.raises(ConfigError, match=rf"has leaves besides A and B: model\.\w+\..*{leaf}"):
        jlora.add_weighted_adapter([make_adapter(**fields)], [1], "cat")


def test_extraction_from_a_quantized_base_uses_its_dequantized_values():
    params = {"layer": {"kernel": jnp.asarray(normal(3, 64, 64))}}
    quantized = jlora.quantize(params, jlora.QuantConfig(bnb_4bit_compute_dtype="float32"))
    adapter = jlora.extract_adapter(quantized, params, LoraConfig(r=64, target_modules=["layer"]))
    merged = jlora.merge(quantized, adapter)["layer"]["kernel"].astype(jnp.float32)
    error = np.abs(
        quantized["layer"]["kernel"].dequantize().astype(jnp.float32) - normal(3, 64, 64)
    )
    assert error.max() > 0.1
    dtype = quantized["layer"]["kernel"].dtype
    np.testing.assert_allclose(
        merged, normal(3, 64, 64), atol=float(jnp.finfo(dtype).eps) * 4 + 1e-5
    )
