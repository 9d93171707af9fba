"""Parameters of other codebases: Linen's and NNX's trees, scanned or not, and nested lists."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze

import jlora
from jlora.errors import ConfigError

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
    """NNX numbers the blocks of a list; their keys are integers."""

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


def test_linens_kernels_multiply_by_dot_attached_and_packed():
    params = Scanned().init(jax.random.key(0), X)
    packed = jlora.quantize(params, jlora.QuantConfig(llm_int8_skip_modules=["head"]))
    layers = packed["params"]["layers"]["up"]
    assert isinstance(layers["kernel"], jlora.nf4.NF4Array)
    assert packed["params"]["head"]["kernel"] is params["params"]["head"]["kernel"]
    adapter = adapt(packed, target_modules=["up"])

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

    got, want = (jax.value_and_grad(f)(adapter.weights) for f in (lambda w: run(w, packed), oracle))
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
    assert set(merged["blocks"]) == {0, 1, 2}, "keys stay as they are"
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(merged))
    kernel = model.blocks[1].kernel.get_value()
    want = dense_sum(kernel, adapter.weights["blocks"]["1"])
    np.testing.assert_allclose(merged["blocks"][1]["kernel"], want, atol=1e-6)
    moved = nnx.merge(graph, nnx.State(merged), rest)(X)
    x = X @ dense_sum(model.inp.kernel.get_value(), adapter.weights["inp"])
    for i in range(L):
        x = np.tanh(x @ (want if i == 1 else np.asarray(model.blocks[i].kernel.get_value())))
    np.testing.assert_allclose(moved, x, atol=1e-4)  # NNX's biases start at zero
    np.testing.assert_array_equal(model(X), before)
    packed = jlora.quantize(tree, jlora.QuantConfig())
    assert isinstance(packed["blocks"][2]["kernel"], jlora.nf4.NF4Array)
    conv = packed["conv"]["kernel"]
    np.testing.assert_array_equal(conv, model.conv.kernel.get_value())
    dense = jlora.merge(packed, adapt(packed, target_modules=["blocks.0"]))
    assert dense["blocks"][2]["kernel"].shape == (D, D)


def test_lists_of_layers_and_nothing():
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
