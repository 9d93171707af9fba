"""Several adapters in one batch: each row compared with its adapter alone, and with the base."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from tiny_runs import DENSE

import jlora
from jlora.config import LoraConfig
from jlora.errors import DataError
from jlora.inference import decoding
from jlora.lora import LoraWeight
from jlora.ops.dot import columns, dot

FIELDS = [
    {"r": 4, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"], "lora_bias": True,
     "layers_to_transform": [1]},
    {"r": 3, "use_rslora": True, "target_modules": ["embed_tokens", "q_proj", "lm_head"],
     "rank_pattern": {"q_proj": 1}},
]  # fmt: skip
NAMES = ("a", "b")
ROWS = np.array([1, -1, 0, 1])


def make(params, fields, seed):
    config = LoraConfig(**fields, init_lora_weights=False)
    return jlora.init_adapter(jax.random.key(seed), params, config)


@pytest.fixture(scope="module")
def case():
    """(model, base, adapters, token ids); a quantized base, layers rematerialised."""
    model, params = tiny_models.build("llama", gradient_checkpointing=True)
    config = jlora.QuantConfig(block_size=32, llm_int8_skip_modules=DENSE)
    params = jlora.quantize(params, config)
    adapters = [make(params, f, i) for i, f in enumerate(FIELDS)]
    return model, params, adapters, tiny_models.tokens(model, len(ROWS), 12)


def loss(logits):
    """A loss for each row."""
    return jnp.sum(jnp.sin(logits), axis=(1, 2))


@pytest.fixture(scope="module")
def alone(case):
    """Logits of the base; each adapter's logits, and its gradient from its own rows."""
    model, params, adapters, ids = case

    def f(adapter, i):
        logits = model(jlora.attach(params, adapter), ids)
        return jnp.sum(loss(logits)[i == ROWS]), logits

    grad = jax.value_and_grad(f, has_aux=True)
    results = [jax.jit(grad, static_argnums=1)(adapter, i) for i, adapter in enumerate(adapters)]
    return (
        np.asarray(model(params, ids)),
        [np.asarray(e[0][1]) for e in results],
        [e[1] for e in results],
    )


@pytest.fixture(scope="module")
def mixed(case):
    """The stack, its logits, its gradient from all rows, and the jitted function."""
    model, params, adapters, ids = case
    stack = jlora.stack_adapters(dict(zip(NAMES, adapters, strict=True)))

    @jax.jit
    def f(stack, rows):
        def total(stack):
            logits = model(jlora.attach(params, stack, adapter_ids=rows), ids)
            return jnp.sum(loss(logits)), logits

        return jax.value_and_grad(total, has_aux=True)(stack)

    (_, logits), grads = f(stack, jnp.asarray(ROWS))
    return stack, np.asarray(logits), grads, f


def close(got, want, bound):
    np.testing.assert_allclose(got, want, rtol=0, atol=bound * np.abs(want).max() + 1e-12)


def test_each_row_matches_its_adapter_and_rows_without_one_the_base_bitwise(alone, mixed):
    base, logits = alone[0], mixed[1]
    for b, i in enumerate(ROWS):
        if i < 0:
            np.testing.assert_array_equal(logits[b].view(np.int32), base[b].view(np.int32))
        else:
            close(logits[b], alone[1][i][b], 1e-6)
            assert np.abs(logits[b] - base[b]).max() > 0.05 * np.abs(base).max()


def test_each_adapters_gradient_is_that_of_its_rows(case, alone, mixed):
    stack, _, grads, f = mixed
    assert stack.names == NAMES
    assert not any(np.any(scale) for scale in jax.tree.leaves(grads.scales))
    for i, adapter in enumerate(case[2]):
        got = grads.adapter(NAMES[i], adapter).weights
        jax.tree.map(lambda g, w: close(g, w, 2e-5), got, alone[2][i].weights)
    # Leaves that an adapter lacks have no gradient: the adapters' gradients add up to the total.
    total = sum(float(jnp.sum(jnp.abs(g))) for g in jax.tree.leaves(grads.weights))
    expected = sum(float(jnp.sum(jnp.abs(g))) for e in alone[2] for g in jax.tree.leaves(e.weights))
    np.testing.assert_allclose(total, expected, rtol=1e-4)
    _, first = f(stack, jnp.array([0, -1, 0, -1]))
    assert not any(np.any(g) for g in jax.tree.leaves(first.adapter("b", case[2][1]).weights))


def test_replacing_adapters_does_not_recompile(case):
    model, params, adapters, ids = case
    traces = []

    @jax.jit
    def logits(stack, rows):
        traces.append(1)
        return model(jlora.attach(params, stack, adapter_ids=rows), ids)

    stack = jlora.stack_adapters(adapters, r=6)
    first = logits(stack, stack.ids(["0", None, "1", "1"]))
    swapped = stack.replace(1, adapters[0]).replace("0", adapters[1])
    again = logits(swapped, stack.ids(["1", None, "0", "0"]))
    np.testing.assert_array_equal(first, again)
    assert len(traces) == 1
    back = swapped.adapter(1, adapters[0])
    jax.tree.map(np.testing.assert_array_equal, back.weights, adapters[0].weights)


def test_generation_with_a_cache_keeps_rows_apart(case):
    model, params = tiny_models.build("llama")
    first, second = case[2]
    stack = jlora.stack_adapters([first, second])
    prompts, ids = [[5, 9, 11], [7], [5, 9, 11], [7, 8]], jnp.array([1, 0, -1, 0])
    how = {"max_new_tokens": 6, "eos_ids": (), "batch_size": 4}
    got = decoding.generate(model, jlora.attach(params, stack, adapter_ids=ids), prompts, **how)
    plain = decoding.generate(model, params, prompts, **how)
    one = decoding.generate(model, jlora.attach(params, first), prompts, **how)
    assert [got[2], got[1], got[3]] == [plain[2], one[1], one[3]]
    assert got[0] != got[2]


def test_a_fused_projection_in_one_adapter_and_its_parts_in_another():
    kernel = jax.random.normal(jax.random.key(0), (8, 24))
    params = {"attn": {"c_attn": {"kernel": kernel}}}
    fused = make(params, {"r": 2, "target_modules": ["c_attn"]}, 0)
    parts = make(params, {"r": 3, "target_modules": ["q_proj", "v_proj"]}, 1)
    ids = jnp.array([1, 0])
    attached = jlora.attach(params, jlora.stack_adapters([fused, parts]), adapter_ids=ids)
    x = jax.random.normal(jax.random.key(1), (2, 5, 8))
    got = dot(x, attached["attn"]["c_attn"]["kernel"])
    for row, adapter in enumerate([parts, fused]):
        merged = jlora.merge(params, adapter)["attn"]["c_attn"]["kernel"]
        close(got[row], np.asarray(x[row]) @ merged, 1e-5)


def test_adapters_that_cannot_be_stacked_are_refused_with_all_reasons():
    _, params = tiny_models.build("llama")
    plain = make(params, {"target_modules": ["q_proj"]}, 0)
    odd = make(params, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"],
                        "use_dora": True, "trainable_token_indices": [3]}, 1)  # fmt: skip
    with pytest.raises(DataError) as error:
        jlora.stack_adapters({"plain": plain, "odd": odd})
    text = str(error.value)
    for part in ("odd: lm_head.kernel", "lora_magnitude_vector", "trainable_tokens_delta"):
        assert part in text
    assert "plain:" not in text

    stack = jlora.stack_adapters([plain])
    with pytest.raises(DataError) as error:
        stack.replace(0, make(params, {"r": 9, "target_modules": ["q_proj", "v_proj"]}, 1))
    assert "v_proj.lora_A is of a module" in str(error.value)
    assert "q_proj.lora_A has rank 9, above 8" in str(error.value)
    wider_base = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf], -2), plain)
    with pytest.raises(DataError, match="another base"):
        jlora.stack_adapters([plain, wider_base])
    for call in (
        lambda: jlora.stack_adapters([]),
        lambda: jlora.attach(params, stack),
        lambda: jlora.attach(params, plain, adapter_ids=jnp.array([0])),
        lambda: jlora.attach(params, stack, adapter_ids=jnp.array([0, 1])),
        lambda: stack.ids(["1"]),
        lambda: stack.replace("q", plain),
        lambda: jlora.stack_adapters([plain], r=4),
    ):
        with pytest.raises(DataError):
            call()


def test_initial_values_are_subtracted():
    """PiSSA's adapters add A@B - A0@B0 to the base, also in a stack."""
    _, params = tiny_models.build("llama")
    one, first = (make(params, {"r": 3, "target_modules": ["o_proj"]}, seed) for seed in (0, 1))
    moved = jlora.Adapter(one.weights, one.config, initial=first.weights)
    plain = make(params, {"r": 2, "target_modules": ["o_proj", "q_proj"]}, 2)
    stack = jlora.stack_adapters([plain, moved])
    x = jax.random.normal(jax.random.key(0), (2, 4, 32))

    def product(tree):
        w = tree["model"]["layers"]["self_attn"]["o_proj"]["kernel"]
        return dot(x, jax.tree.map(lambda leaf: leaf[1], w))

    got = product(jlora.attach(params, stack, adapter_ids=jnp.array([1, 0])))
    close(got[0], product(jlora.attach(params, moved))[0], 1e-6)
    close(got[1], product(jlora.attach(params, plain))[1], 1e-6)


def test_columns_rows_without_tokens_and_low_precision():
    """Columns of a head, an input of shape (rows, dim), and bfloat16 with float32 gradients."""
    rng = np.random.default_rng(0)
    w, a, b = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((8, 6), (2, 8, 3), (2, 3, 6)))
    ids, scale = jnp.array([1, 0, -1]), jnp.array([0.5, 2.0])
    leaf = LoraWeight(w.astype(jnp.bfloat16), a, b, scale, adapter_ids=ids)
    x = jnp.asarray(rng.normal(size=(3, 8)), jnp.bfloat16)
    x64 = np.asarray(x, np.float64)
    dense = np.asarray(leaf.base, np.float64) + np.stack(
        [2.0 * np.asarray(a[1]) @ b[1], 0.5 * np.asarray(a[0]) @ b[0], np.zeros((8, 6))]
    )
    want = np.einsum("bi,bio->bo", x64, dense)
    np.testing.assert_allclose(np.asarray(dot(x, leaf), np.float64), want, rtol=0.03, atol=0.15)
    part = dot(x, columns(leaf, jnp.int32(2), 3))
    np.testing.assert_array_equal(part, dot(x, leaf)[:, 2:5])
    grad = jax.grad(lambda a: jnp.sum(dot(x, LoraWeight(w, a, b, scale, adapter_ids=ids)).astype(
        jnp.float32)))(a)  # fmt: skip
    assert grad.dtype == jnp.float32
    want = 2.0 * x64[0][:, None] * np.asarray(b[1]).sum(1)
    np.testing.assert_allclose(np.asarray(grad[1]), want, rtol=0.03, atol=0.1)
    with pytest.raises(DataError, match="3 ids for a batch of 2"):
        dot(x[:2], leaf)
