"""Linen modules with adapted and quantized weights, compared with modules on the dense sums."""

import dataclasses

import flax.linen as nn
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.errors import ConfigError, DataError
from jlora.interop.view import MergedWarning
from jlora.tree import paths

KEY = jax.random.key(0)
CONFIG = jlora.LoraConfig(r=3, lora_alpha=6, init_lora_weights=False, target_modules="all-linear")
SCALE = 2.0


def normal(*shape):
    rng = np.random.default_rng(sum(shape))
    return jnp.asarray(rng.standard_normal(shape, np.float32))


class Layer(nn.Module):
    """One layer with a name, so that it can be a target."""

    layer: nn.Module

    def __call__(self, x):
        return self.layer(x)


# The layer, its input's shape, and the einsum of its delta from A and B with unflattened axes.
LAYERS = {
    "dense": (nn.Dense(5), (2, 3, 8), "ir,ro->io", (8,), (5,)),
    "to heads": (nn.DenseGeneral((2, 3)), (2, 4, 8), "ir,rhk->ihk", (8,), (2, 3)),
    "from heads": (nn.DenseGeneral(5, axis=(-2, -1)), (4, 2, 3), "hkr,ro->hko", (2, 3), (5,)),
    "no last axis": (nn.DenseGeneral(5, axis=(1,)), (2, 4, 3), "ir,ro->io", (4,), (5,)),
    "two axes": (
        nn.DenseGeneral((2, 3), axis=(-1, 1)),
        (2, 4, 6, 8),
        "ijr,rhk->ijhk",
        (4, 8),
        (2, 3),
    ),
    "einsum": (nn.Einsum((2, 8, 3), "btd,hdk->bkth"), (2, 4, 8), "dr,rkh->hdk", (8,), (3, 2)),
    "einsum back": (
        nn.Einsum((2, 3, 8), "...hk,hkd->...d"),
        (4, 2, 3),
        "hkr,rd->hkd",
        (2, 3),
        (8,),
    ),
    "einsum [out, in]": (nn.Einsum((5, 8), "...i,oi->o..."), (2, 4, 8), "ir,ro->oi", (8,), (5,)),
}


IDS = np.arange(10).reshape(2, 5)


def with_biases(variables):
    """Makes Flax's zero biases random: a bias that was lost would not be noticed at zero."""

    def noisy(leaf):
        return jnp.asarray(np.asarray(leaf) + 0.1 * np.asarray(normal(*leaf.shape)))

    return jax.tree.map(noisy, variables)


def close(got, want, tolerance=1e-5):
    """Equal up to ``tolerance`` of the largest value."""
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * np.abs(other).max())


QUANTIZED = ["dense", "to heads", "einsum back"]
CASES = [(name, False) for name in LAYERS] + [(name, True) for name in QUANTIZED]
SHORT = [("dense", False), ("dense", True), ("two axes", False), ("einsum", False)]
CASES = [c if c in SHORT else pytest.param(*c, marks=pytest.mark.slow) for c in CASES]


@pytest.mark.parametrize(("name", "quantized"), CASES)
def test_layers_match_the_dense_sum(name, quantized):
    layer, shape, spec, sizes_in, sizes_out = LAYERS[name]
    module, x = Layer(layer), normal(*shape)
    variables = with_biases(module.init(KEY, x))
    model, params = jlora.from_linen(module, variables, x)
    close(model(params, x), module.apply(variables, x), 0)
    if quantized:
        params = jlora.quantize(params, jlora.QuantConfig())
        assert isinstance(params["layer"]["kernel"], jlora.nf4.NF4Array)
    base = model.native(params)["params"]["layer"]
    adapter = jlora.init_adapter(KEY, params, CONFIG)
    probe = normal(*module.apply(variables, x).shape)

    def factored(weights, x):
        adapted = jlora.attach(params, dataclasses.replace(adapter, weights=weights))
        return (model(adapted, x) * probe).sum()

    def dense(weights, x):
        a, b = weights["layer"]["lora_A"], weights["layer"]["lora_B"]
        delta = jnp.einsum(spec, a.reshape(*sizes_in, 3), b.reshape(3, *sizes_out))
        changed = {**base, "kernel": base["kernel"] + SCALE * delta}
        return (module.apply({"params": {"layer": changed}}, x) * probe).sum()

    got, want = (
        jax.jit(jax.value_and_grad(f, (0, 1)))(adapter.weights, x) for f in (factored, dense)
    )
    close(got, want)
    products = shapes_of_products(jax.make_jaxpr(factored)(adapter.weights, x).jaxpr)
    assert (np.prod(sizes_in), np.prod(sizes_out)) not in products, "the dense delta was computed"


def shapes_of_products(jaxpr):
    found = set()
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found |= {v.aval.shape for v in equation.outvars}
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            found |= shapes_of_products(inner)
    return found


def test_the_layers_dtype_is_respected():
    module, x = Layer(nn.DenseGeneral((2, 3), dtype=jnp.bfloat16)), normal(4, 8)
    model, params = jlora.from_linen(module, with_biases(module.init(KEY, x)), x)
    adapter = jlora.init_adapter(KEY, params, CONFIG)
    got = model(jlora.attach(params, adapter), x)
    want = module.apply(model.native(jlora.merge(params, adapter)), x)
    assert got.dtype == want.dtype == jnp.bfloat16
    close(got.astype(jnp.float32), want.astype(jnp.float32), 2**-7)


class Ensemble(nn.Module):
    """A vmapped layer: the layer itself is the stacked node."""

    @nn.compact
    def __call__(self, x):
        members = nn.vmap(
            nn.Dense, in_axes=0, variable_axes={"params": 0}, split_rngs={"params": True}
        )
        return members(5, name="ensemble")(x)


def test_vmapped_layers_are_stacked():
    module, x = Ensemble(), normal(3, 4, 8)
    variables = module.init(KEY, x)
    model, params = jlora.from_linen(module, variables, x)
    adapter = jlora.init_adapter(KEY, params, CONFIG)
    assert adapter.config.target_modules == ("0", "1", "2")
    pair = adapter.weights["ensemble"]["layers"]
    kernel = variables["params"]["ensemble"]["kernel"] + SCALE * pair["lora_A"] @ pair["lora_B"]
    close(model(jlora.attach(params, adapter), x), jnp.einsum("nbi,nio->nbo", x, kernel))


class Tied(nn.Module):
    @nn.compact
    def __call__(self, ids):
        table = nn.Embed(11, 8, name="wte")
        return table(ids), table.attend(table(ids))


def test_tied_embeddings_with_lora_and_with_trained_rows():
    module = Tied()
    variables = module.init(KEY, IDS)
    model, params = jlora.from_linen(module, variables, IDS)
    config = dataclasses.replace(CONFIG, target_modules=["wte"])
    adapter = jlora.init_adapter(KEY, params, config)
    pair = adapter.weights["wte"]
    table = np.asarray(params["wte"]["embedding"])
    moved = table + SCALE * np.asarray(pair["lora_embedding_A"] @ pair["lora_embedding_B"])
    close(model(jlora.attach(params, adapter), IDS), (moved[IDS], moved[IDS] @ table.T))
    config = dataclasses.replace(CONFIG, target_modules=[], trainable_token_indices={"wte": [3, 7]})
    adapter = jlora.init_adapter(KEY, params, config)
    weights = jax.tree.map(lambda a: -2 * a, adapter.weights)
    rows = table.copy()
    rows[[3, 7]] *= -2
    attached = jlora.attach(params, dataclasses.replace(adapter, weights=weights))
    close(model(attached, IDS), (rows[IDS], rows[IDS] @ rows.T))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attn")(x, x)
        x = nn.LayerNorm(name="norm")(x)
        return x + nn.Dense(8, name="down")(nn.gelu(nn.Dense(12, name="up")(x))), None


class Transformer(nn.Module):
    """Scanned and rematerialised blocks, below a node that Linen names."""

    @nn.compact
    def __call__(self, ids):
        wte = nn.Embed(11, 8, name="wte")
        stack = nn.scan(
            nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        x, _ = stack()(wte(ids), None)
        return wte.attend(nn.Dense(8, name="last")(x))


@pytest.fixture(scope="module")
def transformer():
    module = Transformer()
    variables = with_biases(module.init(KEY, IDS))
    return module, variables, *jlora.from_linen(module, variables, IDS)


STACK = "ScanCheckpointBlock_0"


def test_the_view_names_scanned_layers_and_converts_back(transformer):
    module, variables, model, params = transformer
    query = params[STACK]["layers"]["attn"]["query"]["kernel"]
    original = variables["params"][STACK]["attn"]["query"]["kernel"]
    np.testing.assert_array_equal(query, original.reshape(3, 8, 8))
    back = model.native(params)
    jax.tree.map(np.testing.assert_array_equal, back, variables)
    close(model(params, IDS), module.apply(variables, IDS), 0)


def test_scan_remat_jit_and_grad_on_quantized_and_dense_weights(transformer):
    module, _, model, params = transformer
    settings = jlora.QuantConfig(include_modules=("wte",), llm_int8_skip_modules=("last", "out"))
    params = jlora.quantize(params, settings)
    kinds = {path[-2:]: type(leaf) for path, leaf in paths.walk(params)}
    assert kinds["query", "kernel"] is kinds["wte", "embedding"] is jlora.nf4.NF4Array
    config = dataclasses.replace(
        CONFIG, target_modules=["query", "out", "up", "last"], rank_pattern={"layers.1.up": 1}
    )
    adapter = jlora.init_adapter(KEY, params, config)

    def loss(logits):
        return jnp.square(logits).mean()

    def factored(adapter):
        return loss(model(jlora.attach(params, adapter), IDS))

    def merged(adapter):
        return loss(module.apply(model.native(jlora.merge(params, adapter)), IDS))

    got, want = (jax.jit(jax.value_and_grad(f))(adapter) for f in (factored, merged))
    close(got, want)
    grads = got[1].weights[STACK]["layers"]
    assert np.all(np.any(np.asarray(grads["attn"]["out"]["lora_A"]) != 0, axis=(1, 2)))


class Twice(nn.Module):
    """Applies each of two scanned layers to the same input."""

    @nn.compact
    def __call__(self, x):
        class Body(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return x, nn.Dense(5, name="up")(x)

        split = {"params": True}
        return nn.scan(Body, variable_axes={"params": 0}, split_rngs=split, length=2)()(x, None)[1]


def test_dropout_differs_between_scanned_layers():
    module, x = Twice(), normal(3, 8)
    same = jax.tree.map(lambda a: a.at[1].set(a[0]), module.init(KEY, x))
    model, params = jlora.from_linen(module, same, x)
    config = dataclasses.replace(CONFIG, lora_dropout=0.5)
    adapter = jlora.init_adapter(KEY, params, config)
    weights = jax.tree.map(lambda a: a.at[1].set(a[0]), adapter.weights)
    adapter = dataclasses.replace(adapter, weights=weights)
    plain = model(jlora.attach(params, adapter), x)
    np.testing.assert_array_equal(plain[0], plain[1])
    keys = jax.random.split(KEY, 1024)
    draws = jax.vmap(lambda k: model(jlora.attach(params, adapter, dropout_key=k), x))(keys)
    error = draws.std(axis=0) / np.sqrt(len(keys))
    assert np.all(np.abs(draws.mean(axis=0) - plain) < 5 * error)
    assert np.all(np.abs(draws[:, 0] - draws[:, 1]).max(axis=(1, 2)) > 0)


class Own(nn.Module):
    """A layer type unknown to jlora."""

    @nn.compact
    def __call__(self, x):
        return x @ self.param("kernel", nn.initializers.normal(), (x.shape[-1], 4))


class Doubled(nn.Dense):
    """A subclass of Dense that computes something else."""

    @nn.compact
    def __call__(self, x):
        return 2 * x @ self.param("kernel", nn.initializers.normal(), (x.shape[-1], 4))


class Vision(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3), name="conv")(x))
        return Doubled(4, name="doubled")(Own(name="own")(x.mean((1, 2)))), nn.Dense(2)(x)


def test_what_cannot_be_factored_is_merged_and_named():
    module, x = Vision(), normal(2, 5, 5, 3)
    variables = with_biases(module.init(KEY, x))
    model, params = jlora.from_linen(module, variables, x)
    config = dataclasses.replace(CONFIG, target_modules=["own", "doubled", "Dense_0"])
    adapter = jlora.init_adapter(KEY, params, config)
    with pytest.warns(
        MergedWarning, match="weights are merged: doubled.kernel, own.kernel"
    ) as caught:
        got = model(jlora.attach(params, adapter), x)
    assert "Dense_0" not in str(caught[0].message)
    close(got, module.apply(model.native(jlora.merge(params, adapter)), x))
    with pytest.raises(ConfigError, match=r"kernel \(3, 3, 3, 6\).*as_matrices"):
        jlora.init_adapter(KEY, params, dataclasses.replace(config, target_modules=["conv"]))


def test_lora_bias_is_kept_where_the_kernel_is_merged():
    module, x = Vision(), normal(2, 5, 5, 3)
    model, params = jlora.from_linen(module, module.init(KEY, x), x)
    config = dataclasses.replace(CONFIG, target_modules=["own"], lora_bias=True)
    with pytest.raises(ConfigError, match=r"own\.kernel: this layer's product"):
        model(jlora.attach(params, jlora.init_adapter(KEY, params, config)), x)


@pytest.mark.parametrize("variant", ["use_dora", "lora_bias"])
def test_dora_and_lora_bias_are_factored(transformer, variant):
    module, _, model, params = transformer
    fields = {"target_modules": ["query", "up"], variant: True}
    adapter = jlora.init_adapter(KEY, params, dataclasses.replace(CONFIG, **fields))
    weights = jax.tree.map(lambda a: a * 1.3, adapter.weights)
    adapter = dataclasses.replace(adapter, weights=weights)
    want = module.apply(model.native(jlora.merge(params, adapter)), IDS)
    close(model(jlora.attach(params, adapter), IDS), want)


def test_convolutions_are_matrices_when_asked():
    module, x = Vision(), normal(2, 5, 5, 3)
    variables = with_biases(module.init(KEY, x))
    model, params = jlora.from_linen(module, variables, x, as_matrices=["conv"])
    adapter = jlora.init_adapter(KEY, params, dataclasses.replace(CONFIG, target_modules=["conv"]))
    pair = adapter.weights["conv"]
    delta = np.einsum("hwir,ro->hwio", pair["lora_A"].reshape(3, 3, 3, 3), pair["lora_B"])
    changed = jax.tree.map(lambda a: a, variables)
    changed["params"]["conv"]["kernel"] += SCALE * delta
    close(model(jlora.attach(params, adapter), x), module.apply(changed, x))
    with pytest.raises(ConfigError, match="did you mean 'conv'"):
        jlora.from_linen(module, variables, x, as_matrices=["convv"])


def test_a_kernel_of_many_axes_needs_from_linen(transformer):
    tree = transformer[1]["params"]
    with pytest.raises(ConfigError, match=r"attn.out has a kernel \(3, 2, 4, 8\).*from_linen"):
        jlora.init_adapter(KEY, tree, dataclasses.replace(CONFIG, target_modules=["out"]))


class Batched(nn.Module):
    """Kernels with a batch axis, which is neither input nor output: several matrices."""

    @nn.compact
    def __call__(self, x):
        x = nn.Einsum((3, 4, 5), "hbi,hio->hbo", name="expert")(x)
        return nn.DenseGeneral(2, batch_dims=(0,), name="general")(x)


def test_kernels_of_several_matrices_are_left_unchanged():
    module, x = Batched(), normal(3, 2, 4)
    variables = module.init(KEY, x)
    model, params = jlora.from_linen(module, variables, x)
    jax.tree.map(np.testing.assert_array_equal, params, variables["params"])
    for name in ("expert", "general"):
        with pytest.raises(ConfigError, match="does not say which axes are inputs"):
            jlora.init_adapter(KEY, params, dataclasses.replace(CONFIG, target_modules=[name]))
    close(model(params, x), module.apply(variables, x), 0)


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4, name="dense")(x))
        return nn.Dropout(0.5, deterministic=not train)(x)


def test_collections_rngs_and_mutable_pass_through():
    module, x = Normed(), normal(8, 3)
    variables = module.init(KEY, x, train=False)
    variables["batch_stats"] = jax.tree.map(lambda a: a + 3.0, variables["batch_stats"])
    model, params = jlora.from_linen(module, variables, x, train=False)
    adapter = jlora.init_adapter(KEY, params, CONFIG)
    merged = model.native(jlora.merge(params, adapter))["params"]
    training = {"train": True, "rngs": {"dropout": KEY}, "mutable": ["batch_stats"]}
    for settings in ({"train": False}, training):
        got = model(jlora.attach(params, adapter), x, **settings)
        want = module.apply({**variables, "params": merged}, x, **settings)
        close(got, want)
    assert np.any(got[1]["batch_stats"]["BatchNorm_0"]["mean"] != 3.0)


def test_adapters_of_a_scanned_module_save_and_load(transformer, tmp_path):
    _, _, model, params = transformer
    config = dataclasses.replace(
        CONFIG,
        target_modules=["query", "out", "last"],
        rank_pattern={"layers.1.attn.out": 2},
        bias="lora_only",
    )
    adapter = jlora.init_adapter(KEY, params, config)
    jlora.save_adapter(tmp_path, adapter)
    loaded = jlora.load_adapter(tmp_path, params)
    jax.tree.map(np.testing.assert_array_equal, loaded.weights, adapter.weights)
    attached = (jlora.attach(params, a) for a in (adapter, loaded))
    np.testing.assert_array_equal(*(model(a, IDS) for a in attached))
    wrong = jax.tree.map(lambda a: a, params)
    del wrong["last"]["bias"]
    wrong[STACK]["layers"]["attn"]["out"]["kernel"] = normal(3, 8, 9)
    with pytest.raises(DataError) as caught:
        jlora.load_adapter(tmp_path, wrong)
    text = str(caught.value)
    assert "unknown base_model.model.last.base_layer.bias" in text
    for i in range(3):
        assert f"{STACK}.layers.{i}.attn.out.lora_B.weight has shape" in text
