"""NNX modules with adapted and quantized weights, compared with modules on the dense sums."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jlora
from jlora.errors import ConfigError, DataError
from jlora.interop.view import MergedWarning

KEY = jax.random.key(0)
CONFIG = jlora.LoraConfig(r=3, lora_alpha=6, init_lora_weights=False, target_modules="all-linear")
SCALE = 2.0


def normal(*shape):
    rng = np.random.default_rng(sum(shape))
    return jnp.asarray(rng.standard_normal(shape, np.float32))


class Layer(nnx.Module):
    """One layer with a name, so that it can be a target; its bias is not zero."""

    def __init__(self, layer):
        self.layer = layer
        layer.bias.set_value(normal(*layer.bias.get_value().shape))

    def __call__(self, x):
        return self.layer(x)


RNGS = nnx.Rngs(0)

# The layer, its input's shape, and the einsum of its delta from A and B with unflattened axes.
LAYERS = {
    "linear": (nnx.Linear(8, 5, rngs=RNGS), (2, 3, 8), "ir,ro->io", (8,), (5,)),
    "to heads": (nnx.LinearGeneral(8, (2, 3), rngs=RNGS), (2, 4, 8), "ir,rhk->ihk", (8,), (2, 3)),
    "from heads": (
        nnx.LinearGeneral((2, 3), 5, axis=(-2, -1), rngs=RNGS),
        (4, 2, 3),
        "hkr,ro->hko",
        (2, 3),
        (5,),
    ),
    "einsum": (
        nnx.Einsum("btd,hdk->bhtk", (2, 8, 3), (2, 1, 3), rngs=RNGS),
        (2, 4, 8),
        "dr,rhk->hdk",
        (8,),
        (2, 3),
    ),
}
CASES = [(name, False) for name in LAYERS] + [("linear", True), ("from heads", True)]
SHORT = [("linear", False), ("from heads", False), ("linear", True)]
CASES = [c if c in SHORT else pytest.param(*c, marks=pytest.mark.slow) for c in CASES]


IDS = np.arange(10).reshape(2, 5)


def close(got, want, tolerance=1e-5):
    """Equal up to ``tolerance`` of the largest value."""
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * np.abs(other).max())


@pytest.mark.parametrize(("name", "quantized"), CASES)
def test_layers_match_the_dense_sum(name, quantized):
    layer, shape, spec, sizes_in, sizes_out = LAYERS[name]
    module, x = Layer(layer), normal(*shape)
    promote = layer.promote_dtype
    model, params = jlora.from_nnx(module)
    close(model(params, x), module(x), 0)
    assert layer.promote_dtype is promote, "the module was modified"
    if quantized:
        params = jlora.quantize(params, jlora.QuantConfig())
        assert isinstance(params["layer"]["kernel"], jlora.nf4.NF4Array)
    graph, base = nnx.split(model.native(params))
    adapter = jlora.init_adapter(KEY, params, CONFIG)
    probe = normal(*module(x).shape)

    def factored(weights, x):
        adapted = jlora.attach(params, dataclasses.replace(adapter, weights=weights))
        out = model(adapted, x)
        return (out * probe).sum(), out

    def dense(weights, x):
        a, b = weights["layer"]["lora_A"], weights["layer"]["lora_B"]
        delta = jnp.einsum(spec, a.reshape(*sizes_in, 3), b.reshape(3, *sizes_out))
        pure = nnx.to_pure_dict(base)
        pure["layer"]["kernel"] += SCALE * delta
        out = nnx.merge(graph, nnx.State(pure))(x)
        return (out * probe).sum(), out

    # Outputs and gradients; the sum over a random probe may cancel to less than its rounding.
    got, want = (
        jax.jit(jax.grad(f, (0, 1), has_aux=True))(adapter.weights, x) for f in (factored, dense)
    )
    close(got, want)


def test_the_layers_dtype_is_respected():
    layers = nnx.Linear(8, 5, dtype=jnp.bfloat16, rngs=RNGS), nnx.Linear(8, 5, rngs=RNGS)
    x = normal(4, 8)
    got, want = [], []
    for layer in layers:
        model, params = jlora.from_nnx(Layer(layer))
        adapter = jlora.init_adapter(KEY, params, CONFIG)
        got.append(model(jlora.attach(params, adapter), x))
        want.append(model.native(jlora.merge(params, adapter))(x))
    assert [y.dtype for y in got] == [y.dtype for y in want] == [jnp.bfloat16, jnp.float32]
    for one, other in zip(got, want, strict=True):
        close(one.astype(jnp.float32), other.astype(jnp.float32), 2**-7)


class Tied(nnx.Module):
    def __init__(self, rngs):
        self.wte = nnx.Embed(11, 8, rngs=rngs)

    def __call__(self, ids):
        return self.wte(ids), self.wte.attend(self.wte(ids))


def test_tied_embeddings_with_lora_and_with_trained_rows():
    model, params = jlora.from_nnx(Tied(nnx.Rngs(0)))
    adapter = jlora.init_adapter(KEY, params, dataclasses.replace(CONFIG, target_modules=["wte"]))
    pair = adapter.weights["wte"]
    table = np.asarray(params["wte"]["embedding"])
    moved = table + SCALE * np.asarray(pair["lora_embedding_A"] @ pair["lora_embedding_B"])
    close(model(jlora.attach(params, adapter), IDS), (moved[IDS], moved[IDS] @ table.T))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.attn = nnx.MultiHeadAttention(2, 8, rngs=rngs, decode=False)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.up = nnx.Linear(8, 12, rngs=rngs)
        self.down = nnx.Linear(12, 8, rngs=rngs)

    def __call__(self, x):
        x = x + self.attn(self.norm(x))
        return x + self.down(nnx.gelu(self.up(x)))


class Transformer(nnx.Module):
    """Scanned and rematerialised blocks, and one more block in a list."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make(rngs):
            return Block(rngs)

        self.wte = nnx.Embed(11, 8, rngs=rngs)
        self.stack = make(rngs)
        self.more = nnx.List([Block(rngs)])

    def __call__(self, ids):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        @nnx.remat
        def run(block, x):
            return block(x)

        return self.wte.attend(self.more[0](run(self.stack, self.wte(ids))))


@pytest.fixture(scope="module")
def transformer():
    module = Transformer(nnx.Rngs(0))
    return module, *jlora.from_nnx(module)


def test_the_view_names_scanned_layers_and_converts_back(transformer):
    module, model, params = transformer
    out = params["stack"]["layers"]["attn"]["out"]["kernel"]
    np.testing.assert_array_equal(out, module.stack.attn.out.kernel.get_value().reshape(3, 8, 8))
    original, back = (
        nnx.to_pure_dict(nnx.state(m, nnx.Param)) for m in (module, model.native(params))
    )
    jax.tree.map(np.testing.assert_array_equal, back, original)
    assert list(original["more"]) == list(back["more"]) == [0]


@pytest.mark.slow
def test_scan_remat_jit_and_grad_on_quantized_and_dense_weights(transformer):
    _, model, params = transformer
    settings = jlora.QuantConfig(include_modules=("wte",), llm_int8_skip_modules=("out", "down"))
    params = jlora.quantize(params, settings)
    assert isinstance(params["wte"]["embedding"], jlora.nf4.NF4Array)
    config = dataclasses.replace(
        CONFIG, target_modules=["query", "out", "up"], rank_pattern={"layers.1.up": 1}
    )
    adapter = jlora.init_adapter(KEY, params, config)

    def loss(logits):
        return jnp.square(logits).mean()

    def factored(adapter):
        return loss(model(jlora.attach(params, adapter), IDS))

    def merged(adapter):
        return loss(model.native(jlora.merge(params, adapter))(IDS))

    got, want = (jax.jit(jax.value_and_grad(f))(adapter) for f in (factored, merged))
    close(got, want)


class Head(nnx.Linear):
    """A subclass of Linear that computes something else."""

    def __call__(self, x):
        return 2 * x @ self.kernel[...]


class Vision(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 6, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.dense = nnx.Linear(6, 4, rngs=rngs)
        self.head = Head(4, 2, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        return self.head(self.dense(x.mean((1, 2))))


def test_what_cannot_be_factored_is_merged_and_named():
    module, x = Vision(nnx.Rngs(0)), normal(2, 5, 5, 3)
    model, params = jlora.from_nnx(module)
    adapter = jlora.init_adapter(
        KEY, params, dataclasses.replace(CONFIG, target_modules=["dense", "head"])
    )
    with pytest.warns(MergedWarning, match="weights are merged: head.kernel$"):
        got = model(jlora.attach(params, adapter), x)
    close(got, model.native(jlora.merge(params, adapter))(x))
    with pytest.raises(ConfigError, match="as_matrices"):
        jlora.init_adapter(KEY, params, dataclasses.replace(CONFIG, target_modules=["conv"]))
    model, params = jlora.from_nnx(module, as_matrices=["conv"])
    adapter = jlora.init_adapter(KEY, params, dataclasses.replace(CONFIG, target_modules=["conv"]))
    pair = adapter.weights["conv"]
    delta = np.einsum("hwir,ro->hwio", pair["lora_A"].reshape(3, 3, 3, 3), pair["lora_B"])
    changed = nnx.clone(module)
    changed.conv.kernel.set_value(changed.conv.kernel.get_value() + SCALE * delta)
    close(model(jlora.attach(params, adapter), x), nnx.clone(changed)(x))


def test_a_module_with_adapted_weights_keeps_its_state():
    module, x = Vision(nnx.Rngs(0)), normal(2, 5, 5, 3)
    model, params = jlora.from_nnx(module)
    adapter = jlora.init_adapter(KEY, params, dataclasses.replace(CONFIG, target_modules=["dense"]))
    adapted = model.module(jlora.attach(params, adapter))
    dense = model.native(jlora.merge(params, adapter))
    for _ in range(2):
        close(adapted(x), dense(x))
    mean = adapted.norm.mean.get_value()
    np.testing.assert_array_equal(mean, dense.norm.mean.get_value())
    assert np.any(mean != module.norm.mean.get_value())


def test_adapters_of_a_scanned_module_save_and_load(transformer, tmp_path):
    params = transformer[-1]
    config = dataclasses.replace(CONFIG, target_modules=["query", "up"], rank_pattern={"1.up": 1})
    adapter = jlora.init_adapter(KEY, params, config)
    jlora.save_adapter(tmp_path, adapter)
    loaded = jlora.load_adapter(tmp_path, params)
    jax.tree.map(np.testing.assert_array_equal, loaded.weights, adapter.weights)
    wrong = jax.tree.map(lambda a: a, params)
    wrong["stack"]["layers"]["up"]["kernel"] = normal(3, 8, 13)
    wrong["more"]["0"]["up"]["kernel"] = normal(9, 12)
    with pytest.raises(DataError) as caught:
        jlora.load_adapter(tmp_path, wrong)
    for name in ("stack.layers.0.up.lora_B", "stack.layers.1.up.lora_B", "more.0.up.lora_A"):
        assert f"{name}.weight has shape" in str(caught.value)
