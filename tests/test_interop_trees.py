"""Parameters of other codebases: Linen's, NNX's and Equinox's trees, and nested lists."""

import dataclasses
from collections.abc import Callable

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze

import jlora
from jlora.errors import ConfigError, DataError

L, D = 3, 64
X = np.random.default_rng(0).normal(size=(2, D)).astype(np.float32)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(D, name="up")(x)), None


class Scanned(nn.Module):
    """Linen's scan stacks the parameters of ``layers``: (L, in, out)."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(D, name="inp")(x)
        layers = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=L)
        x, _ = layers(name="layers")(x, None)
        return nn.Dense(5, name="head")(x)


class Listed(nnx.Module):
    """NNX numbers the blocks of a list: their keys are integers."""

    def __init__(self, rngs):
        self.inp = nnx.Linear(D, D, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(D, D, rngs=rngs) for _ in range(L)])
        self.conv = nnx.Conv(D, D, (3,), rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        x = self.inp(x)
        for block in self.blocks:
            x = jnp.tanh(block(x))
        return x


def adapt(params, **fields):
    config = jlora.LoraConfig(**{"r": 2, "lora_alpha": 4, "init_lora_weights": False, **fields})
    return jlora.init_adapter(jax.random.key(1), params, config)


def dense_sum(kernel, pair):
    """kernel + 2·A@B in NumPy, for alpha/r = 2."""
    a, b = np.asarray(pair["lora_A"], np.float64), np.asarray(pair["lora_B"], np.float64)
    return np.asarray(kernel, np.float64) + 2 * a @ b


@pytest.mark.parametrize("kind", [dict, freeze])
def test_linen(kind):
    model = Scanned()
    params = kind(model.init(jax.random.key(0), X))
    adapter = adapt(params, target_modules=["inp", "up"], layers_to_transform=[0, 2])
    assert list(adapter.weights["params"]) == ["layers"], "inp has no layer number"
    merged = jlora.merge(params, adapter)
    kernel, pair = (
        params["params"]["layers"]["up"]["kernel"],
        adapter.weights["params"]["layers"]["up"],
    )
    want = dense_sum(kernel, pair)
    np.testing.assert_allclose(merged["params"]["layers"]["up"]["kernel"], want, atol=1e-6)
    np.testing.assert_array_equal(want[1], kernel[1])

    def numpy_forward(x):
        inp, up, head = (params["params"][k] for k in ("inp", "layers", "head"))
        x = x @ np.asarray(inp["kernel"]) + np.asarray(inp["bias"])
        for i in range(L):
            x = np.tanh(x @ want[i] + np.asarray(up["up"]["bias"])[i])
        return x @ np.asarray(head["kernel"]) + np.asarray(head["bias"])

    np.testing.assert_allclose(model.apply(merged, X), numpy_forward(X), atol=1e-4)
    plain = jlora.unmerge(merged, adapter)
    np.testing.assert_allclose(model.apply(plain, X), model.apply(params, X), atol=1e-5)


def test_dot_multiplies_attached_and_quantized_linen_kernels():
    params = Scanned().init(jax.random.key(0), X)
    quantized = jlora.quantize(params, jlora.QuantConfig(llm_int8_skip_modules=["head"]))
    layers = quantized["params"]["layers"]["up"]
    assert isinstance(layers["kernel"], jlora.nf4.NF4Array)
    assert quantized["params"]["head"]["kernel"] is params["params"]["head"]["kernel"]
    adapter = adapt(quantized, target_modules=["up"])

    def run(weights, tree):
        attached = jlora.attach(tree, jlora.Adapter(weights, adapter.config))

        def body(x, layer):
            return jnp.tanh(jlora.dot(x, layer["up"]["kernel"]) + layer["up"]["bias"]), None

        return jax.lax.scan(body, jnp.asarray(X), attached["params"]["layers"])[0].sum()

    def oracle(weights):
        kernel = layers["kernel"].dequantize()
        up, x = weights["params"]["layers"]["up"], jnp.asarray(X)
        for i in range(L):
            dense = kernel[i] + 2 * up["lora_A"][i] @ up["lora_B"][i]
            x = jnp.tanh(x @ dense + layers["bias"][i])
        return x.sum()

    got, want = (
        jax.value_and_grad(f)(adapter.weights) for f in (lambda w: run(w, quantized), oracle)
    )
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["state", "pure dict"])
def test_nnx(kind):
    model = Listed(nnx.Rngs(0))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    tree = params if kind == "state" else nnx.to_pure_dict(params)
    before = np.asarray(model(X))
    adapter = adapt(tree, target_modules=["inp", "blocks.1"])
    assert set(adapter.weights["blocks"]) == {"1"}
    merged = jlora.merge(tree, adapter)
    assert set(merged["blocks"]) == {0, 1, 2}, "keys stay integers"
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(merged))
    kernel = model.blocks[1].kernel.get_value()
    want = dense_sum(kernel, adapter.weights["blocks"]["1"])
    np.testing.assert_allclose(merged["blocks"][1]["kernel"], want, atol=1e-6)
    moved = nnx.merge(graph, nnx.State(merged), rest)(X)
    x = X @ dense_sum(model.inp.kernel.get_value(), adapter.weights["inp"])
    for i in range(L):
        x = np.tanh(x @ (want if i == 1 else np.asarray(model.blocks[i].kernel.get_value())))
    np.testing.assert_allclose(moved, x, atol=1e-4)  # NNX's biases are initially zero
    np.testing.assert_array_equal(model(X), before)
    quantized = jlora.quantize(tree, jlora.QuantConfig())
    assert isinstance(quantized["blocks"][2]["kernel"], jlora.nf4.NF4Array)
    conv = quantized["conv"]["kernel"]
    np.testing.assert_array_equal(conv, model.conv.kernel.get_value())
    dense = jlora.merge(quantized, adapt(quantized, target_modules=["blocks.0"]))
    assert dense["blocks"][2]["kernel"].shape == (D, D)


def test_lists_of_layers_and_none_leaves():
    def layer(i):
        return {"dense": {"kernel": jnp.full((D, D), float(i)), "bias": None}}

    params = {"net": {"layers": [layer(i) for i in range(L)], "extra": (layer(9),)}}
    adapter = adapt(params, target_modules="all-linear", layers_to_transform=[2])
    merged = jlora.merge(params, adapter)
    assert [type(merged["net"][k]) for k in ("layers", "extra")] == [list, tuple]
    pair = adapter.weights["net"]["layers"]["2"]["dense"]
    want = dense_sum(params["net"]["layers"][2]["dense"]["kernel"], pair)
    np.testing.assert_allclose(merged["net"]["layers"][2]["dense"]["kernel"], want, atol=1e-5)
    assert (
        merged["net"]["layers"][1]["dense"]["kernel"]
        is params["net"]["layers"][1]["dense"]["kernel"]
    )
    assert merged["net"]["extra"][0]["dense"]["bias"] is None
    with pytest.raises(ConfigError, match="there is: dense"):
        adapt(params, target_modules=["dens"])


class Tower(eqx.Module):
    """Equinox: an embedding, a list, layers stacked by vmap, a function, a number and None."""

    table: eqx.nn.Embedding
    inp: eqx.nn.Linear
    layers: eqx.nn.MLP
    blocks: list
    act: Callable
    rate: float
    nothing: None

    def __init__(self, key):
        keys = jax.random.split(key, 4)
        self.table = eqx.nn.Embedding(7, 8, key=keys[0])
        self.inp = eqx.nn.Linear(8, 6, key=keys[1])
        mlps = jax.random.split(keys[2], L)
        self.layers = eqx.filter_vmap(lambda k: eqx.nn.MLP(6, 6, 9, 1, key=k))(mlps)
        self.act, self.rate, self.nothing = jnp.tanh, 0.5, None
        self.blocks = [eqx.nn.Linear(6, 6, use_bias=False, key=k) for k in mlps[:2]]

    def __call__(self, token):
        x = self.act(self.inp(self.table(token))) * self.rate
        arrays, rest = eqx.partition(self.layers, eqx.is_array)
        x, _ = jax.lax.scan(lambda x, layer: (eqx.combine(layer, rest)(x), None), x, arrays)
        return self.blocks[1](self.blocks[0](x))


TOWER = Tower(jax.random.key(0))


def out_in(weight, pair):
    """weight + 2·(A@B)ᵀ in NumPy: Equinox's matrices are [out, in]."""
    return dense_sum(np.asarray(weight).swapaxes(-1, -2), pair).swapaxes(-1, -2)


def test_equinox_modules_are_adapted_and_merged_as_modules():
    adapter = adapt(TOWER, target_modules=["inp", "layers.0", "blocks.1"], bias="lora_only")
    merged = jlora.merge(TOWER, adapter)
    assert type(merged) is Tower and jax.tree.structure(merged) == jax.tree.structure(TOWER)
    w, stacked = adapter.weights, adapter.weights["layers"]["layers"]["0"]
    assert w["inp"]["lora_A"].shape == (8, 2) and stacked["lora_B"].shape == (L, 2, 9)
    want = eqx.tree_at(
        lambda m: (m.inp.weight, m.layers.layers[0].weight, m.blocks[1].weight),
        TOWER,
        (
            out_in(TOWER.inp.weight, w["inp"]),
            out_in(TOWER.layers.layers[0].weight, stacked),
            out_in(TOWER.blocks[1].weight, w["blocks"]["1"]),
        ),
    )
    arrays = [eqx.filter(m, eqx.is_array) for m in (merged, want)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *arrays)
    want = jax.tree.map(lambda a: a.astype(jnp.float32) if eqx.is_array(a) else a, want)
    np.testing.assert_allclose(merged(3), want(3), atol=1e-5)
    assert np.abs(np.asarray(merged(3) - TOWER(3))).max() > 1e-2


def test_equinox_modules_attach_detach_unmerge_and_quantize():
    adapter = adapt(TOWER, target_modules="all-linear")
    assert "table" not in adapter.config.target_modules
    attached = jlora.attach(TOWER, adapter)
    assert type(attached) is Tower and attached.inp.weight.shape == (6, 8)
    np.testing.assert_array_equal(attached.inp.weight.mT.lora_A, adapter.weights["inp"]["lora_A"])
    np.testing.assert_array_equal(jlora.detach(attached).inp.weight, TOWER.inp.weight)
    table = adapt(TOWER, target_modules=["table"])
    ids = jnp.array([2, 5])
    rows = jlora.embed(ids, jlora.attach(TOWER, table).table.weight)
    pair = table.weights["table"]
    delta = np.asarray(pair["lora_embedding_A"] @ pair["lora_embedding_B"])
    np.testing.assert_allclose(rows, (TOWER.table.weight + 2 * delta)[ids], atol=1e-5)
    again = jlora.unmerge(jlora.merge(TOWER, adapter), adapter)
    arrays = [eqx.filter(m, eqx.is_array) for m in (again, TOWER)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *arrays)
    quantized = jlora.quantize(TOWER, jlora.QuantConfig(bnb_4bit_use_double_quant=False))
    alone = jlora.nf4.quantize(TOWER.inp.weight, double_quant=False)
    np.testing.assert_array_equal(quantized.inp.weight.codes, alone.codes)
    np.testing.assert_array_equal(quantized.table.weight, TOWER.table.weight)
    dense = jlora.merge(quantized, adapter).blocks[0].weight
    want = out_in(quantized.blocks[0].weight.dequantize(), adapter.weights["blocks"]["0"])
    np.testing.assert_allclose(dense, want, atol=1e-6)

    def loss(adapter):
        return jnp.square(jlora.merge(quantized, adapter)(3)).sum()

    grads = jax.jit(jax.grad(loss))(adapter)
    assert all(np.any(np.asarray(g) != 0) for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("variant", ["use_dora", "lora_bias"])
def test_equinox_modules_take_dora_and_lora_bias(variant):
    adapter = adapt(TOWER, target_modules=["inp"], **{variant: True})
    weights = jax.tree.map(lambda a: a * 1.3, adapter.weights)
    attached = jlora.attach(TOWER, jlora.Adapter(weights, adapter.config))
    assert attached.inp.weight.shape == (6, 8)
    np.testing.assert_array_equal(jlora.detach(attached).inp.weight, TOWER.inp.weight)
    merged = jlora.merge(TOWER, jlora.Adapter(weights, adapter.config)).inp
    total, bias = out_in(TOWER.inp.weight, weights["inp"]), TOWER.inp.bias
    if variant == "use_dora":
        magnitude = np.asarray(weights["inp"]["lora_magnitude_vector"])
        total *= (magnitude / np.linalg.norm(total, axis=1))[:, None]
    else:
        bias += 2 * weights["inp"]["lora_bias"]
    np.testing.assert_allclose(merged.weight, total, atol=1e-6)
    np.testing.assert_allclose(attached.inp.weight.dequantize(), total, atol=1e-6)
    np.testing.assert_allclose(merged.bias, bias, atol=1e-6)


def test_equinox_adapters_save_and_load(tmp_path):
    adapter = adapt(TOWER, target_modules=["layers.0", "inp"], modules_to_save=["table"])
    jlora.save_adapter(tmp_path, adapter)
    loaded = jlora.load_adapter(tmp_path, TOWER)
    jax.tree.map(np.testing.assert_array_equal, loaded.weights, adapter.weights)
    wrong = eqx.tree_at(lambda m: (m.inp.weight, m.table.weight), TOWER, (jnp.ones((6, 9)), X))
    with pytest.raises(DataError) as caught:
        jlora.load_adapter(tmp_path, wrong)
    for name in ("inp.lora_A.weight", "table.weight"):
        assert f"{name} has shape" in str(caught.value)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Node:
    """A registered dataclass with Flax's names, such as penzai's or a user's."""

    kernel: jax.Array
    bias: jax.Array


def test_any_registered_pytree_is_a_tree():
    one, other = (Node(jnp.full((4, 3), i), jnp.zeros(3)) for i in (1.0, 2.0))
    params = {"a": [one], "b": other}
    adapter = adapt(params, target_modules=["b"])
    merged = jlora.merge(params, adapter)
    assert type(merged["b"]) is Node and merged["a"][0].kernel is one.kernel
    want = dense_sum(other.kernel, adapter.weights["b"])
    np.testing.assert_allclose(merged["b"].kernel, want, atol=1e-6)
