"""``dot``, compared with NumPy in float64, and what its gradients save and compute."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jaxprs import equations

from jlora.lora import LoraWeight
from jlora.ops import matmul
from jlora.ops.dot import columns, dot, dots, embed, grouped_dot
from jlora.quant import int8, nf4

I, O, R = 64, 128, 4


def weights(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(I, O)) / 8, dtype)
    a = jnp.asarray(rng.normal(size=(I, R)) / 8, jnp.float32)
    b = jnp.asarray(rng.normal(size=(R, O)), jnp.float32)
    x = jnp.asarray(rng.normal(size=(2, 5, I)), dtype)
    return x, w, a, b


def wrap(kind, w, a, b):
    base = nf4.quantize(w.T).mT if kind == "nf4" else w
    return LoraWeight(base, a, b, jnp.float32(0.5)), nf4.dequantize(base) if kind == "nf4" else w


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_values_and_gradients_equal_the_dense_formula(kind):
    x, w, a, b = weights()
    leaf, dense = wrap(kind, w, a, b)

    def f(x, a, b):
        return jnp.sum(jnp.sin(dot(x, LoraWeight(leaf.base, a, b, leaf.scale))))

    def oracle(x, a, b):
        return jnp.sum(jnp.sin(jnp.matmul(x, dense + 0.5 * a @ b, precision="highest")))

    value, grads = jax.jit(jax.value_and_grad(f, (0, 1, 2)))(x, a, b)
    expected, expected_grads = jax.value_and_grad(oracle, (0, 1, 2))(x, a, b)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for got, want in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(dot(x, leaf.base), jnp.matmul(x, dense))


def test_low_precision_products_accumulate_in_float32():
    x, w, a, b = weights(jnp.bfloat16)
    out = dot(x, LoraWeight(w, a, b, jnp.float32(1.0)))
    assert out.dtype == jnp.bfloat16
    exact = np.asarray(x, np.float64) @ (np.asarray(w, np.float64) + np.asarray(a) @ np.asarray(b))
    np.testing.assert_allclose(np.asarray(out, np.float64), exact, atol=0.06, rtol=0.02)
    grad = jax.grad(
        lambda a: dot(x, LoraWeight(w, a, b, jnp.float32(1.0))).astype(jnp.float32).sum()
    )(a)
    assert grad.dtype == jnp.float32
    upstream = np.ones((10, O)) @ np.asarray(b, np.float64).T
    want = np.asarray(x, np.float64).reshape(10, I).T @ upstream
    np.testing.assert_allclose(grad, want, rtol=0.02, atol=0.1)


QUANTIZERS = {
    "nf4": nf4.quantize,
    "fp4": functools.partial(nf4.quantize, block_size=32, double_quant=False, quant_type="fp4"),
    "straddling": functools.partial(nf4.quantize, block_size=128),
    "int8": int8.quantize,
}


@pytest.mark.parametrize("quantizer", QUANTIZERS.values(), ids=QUANTIZERS.keys())
def test_under_jit_vmap_scan_and_remat(quantizer):
    x, w, a, b = weights()
    stacked = jax.vmap(lambda s: quantizer(w.T * s).mT)(jnp.arange(1.0, 4.0))
    leaf = LoraWeight(stacked, jnp.stack([a] * 3), jnp.stack([b] * 3), jnp.ones(3))
    square = jnp.asarray(np.random.default_rng(1).normal(size=(O, I)) / 16, jnp.float32)

    def run(x, leaf, remat):
        def body(h, w):
            return jnp.tanh(dot(h, w) @ square), None

        return jax.lax.scan(jax.checkpoint(body) if remat else body, x, leaf)[0].sum()

    def oracle(x):
        for i in range(3):
            layer = jax.tree.map(lambda leaf, i=i: leaf[i], leaf)
            x = jnp.tanh(x @ layer.dequantize() @ square)
        return x.sum()

    want, want_grad = jax.value_and_grad(oracle)(x)
    for remat in (False, True):
        got, grad = jax.jit(jax.value_and_grad(run), static_argnums=2)(x, leaf, remat)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(grad, want_grad, atol=1e-4)
    mapped = jax.vmap(dot, in_axes=(None, 0))(x, stacked)
    np.testing.assert_allclose(
        mapped[2], x @ jax.tree.map(lambda c: c[2], stacked).dequantize(), atol=1e-5
    )


def saved_shapes(f, *args):
    """Shapes of the arrays that the forward pass of ``f`` saves for the backward pass."""
    _, pullback = jax.vjp(f, *args)
    return [(leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(pullback)]


@pytest.mark.parametrize("name", QUANTIZERS)
def test_quantized_weights_save_their_codes_and_no_dequantized_matrix(name):
    x, w, _, _ = weights()
    leaf = QUANTIZERS[name](w.T).mT
    saved = saved_shapes(lambda x: dot(x, leaf), x)
    codes = ((O, I), "int8") if name == "int8" else ((O, I // 2), "uint8")
    assert codes in saved
    saved.remove(codes)
    assert not {(I, O), (O, I)} & {shape for shape, _ in saved}


def test_a_frozen_weight_saves_no_activations_and_computes_no_gradient():
    x, w, a, b = weights()
    saved = saved_shapes(lambda x: dot(x, w), x)
    assert x.shape not in {shape for shape, _ in saved}

    def grad_of(a):
        return jax.grad(lambda a: dot(x, LoraWeight(w, a, b, jnp.float32(1.0))).sum())(a)

    assert _products_of_shape(jax.make_jaxpr(grad_of)(a), (I, O)) == 0
    dense = jax.make_jaxpr(jax.grad(lambda w: dot(x, w).sum()))(w)
    assert _products_of_shape(dense, (I, O)) == 1, "the search must find a weight gradient"


def _products_of_shape(jaxpr, shape):
    """The number of dot_generals with this output shape in a jaxpr and its inner jaxprs."""
    count = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general" and eqn.outvars[0].aval.shape == shape:
            count += 1
        for sub in jaxprs_in_params(eqn.params):
            count += _products_of_shape(sub, shape)
    return count


KEYS = jax.random.split(jax.random.key(5), 3)


def projections(dtype=jnp.float32, **fields):
    """Three adapted weights of one input, of different widths and ranks, like q, k and v."""
    rng = np.random.default_rng(3)

    def one(rank, out, key):
        base, a, b = (rng.normal(size=s) / 8 for s in ((I, out), (I, rank), (rank, out)))
        a, b = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
        scale = jnp.float32(rank / 4)
        return LoraWeight(jnp.asarray(base, dtype), a, b, scale, dropout_key=key, **fields)

    return [
        one(rank, out, key) for rank, out, key in zip((4, 2, 7), (O, 32, 32), KEYS, strict=True)
    ]


def mixed_projections(dropout):
    """Weights that no single product has all of: the kinds of ``dot``, and settings that differ."""
    rng = np.random.default_rng(4)
    q, k, v = projections(dropout=dropout)
    gain = jnp.asarray(1 + rng.random(O) / 4, jnp.float32)
    stack = dataclasses.replace(
        q,
        lora_A=jnp.stack([q.lora_A, -q.lora_A]),
        lora_B=jnp.stack([q.lora_B, q.lora_B]),
        scale=jnp.asarray([0.5, 2.0]),
        adapter_ids=jnp.asarray([1, -1]),
        dropout_key=None,
    )
    return {
        "plain": q,
        "array": q.base,
        "quantized": nf4.quantize(q.base.T).mT,
        "on quantized": dataclasses.replace(q, base=nf4.quantize(q.base.T).mT),
        "DoRA": dataclasses.replace(q, gain=gain),
        "lora_bias": dataclasses.replace(k, bias=jnp.asarray(rng.normal(size=32), jnp.float32)),
        "without dropout": dataclasses.replace(v, dropout_key=None),
        "other dropout": dataclasses.replace(v, dropout=0.7),
        "bfloat16 A": dataclasses.replace(v, lora_A=v.lora_A.astype(jnp.bfloat16)),
        "stack": stack,
    }


def with_key_of(w, first):
    key = first.dropout_key
    return (
        dataclasses.replace(w, dropout_key=key)
        if getattr(w, "dropout_key", None) is not None
        else w
    )


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_products_of_one_input_equal_those_of_each_weight(dropout):
    """Values and gradients, of all kinds of weights together; they have the first one's mask."""
    x, _, _, _ = weights()
    leaves = mixed_projections(dropout)
    own_key = ("other dropout", "bfloat16 A")  # the first of their kind

    def separate(x, w, name):
        first = leaves[name] if name in own_key else leaves["plain"]
        return dot(x, with_key_of(w, first))

    def total(x, trained, together):
        ws = [
            dataclasses.replace(leaves[n], lora_A=trained[n][0], lora_B=trained[n][1])
            if n in trained
            else leaves[n]
            for n in leaves
        ]
        ys = (
            dots(x, ws)
            if together
            else [separate(x, w, n) for n, w in zip(leaves, ws, strict=True)]
        )
        return sum(jnp.sum(jnp.sin(y)) for y in ys), ys

    trained = {n: (w.lora_A, w.lora_B) for n, w in leaves.items() if isinstance(w, LoraWeight)}
    with_gradients = jax.jit(jax.grad(total, (0, 1), has_aux=True), static_argnums=2)
    got, want = (with_gradients(x, trained, together) for together in (True, False))
    for name, one, other in zip(leaves, got[1], want[1], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5, err_msg=name)
        assert one.dtype == other.dtype
    for one, other in zip(jax.tree.leaves(got[0]), jax.tree.leaves(want[0]), strict=True):
        np.testing.assert_allclose(np.float32(one), np.float32(other), rtol=1e-4, atol=1e-4)


def test_products_of_one_input_are_the_base_models_bitwise_while_b_is_zero():
    x, _, _, _ = weights(jnp.bfloat16)
    fresh = [
        dataclasses.replace(w, lora_B=jnp.zeros_like(w.lora_B)) for w in projections(jnp.bfloat16)
    ]
    for y, w in zip(dots(x, fresh), fresh, strict=True):
        np.testing.assert_array_equal(y, dot(x, w.base))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_weights_of_one_input_share_the_products_with_a(dropout):
    """Of x, of its gradient and of A's: one each instead of three; ranks 4, 2 and 7 make 13."""
    x, _, _, _ = weights()
    ws = projections(dropout=dropout)

    def shapes(together):
        def f(x, ab):
            leaves = [
                dataclasses.replace(w, lora_A=a, lora_B=b) for w, (a, b) in zip(ws, ab, strict=True)
            ]
            ys = dots(x, leaves) if together else [dot(x, w) for w in leaves]
            return sum(jnp.sum(y * y) for y in ys)

        ab = [(w.lora_A, w.lora_B) for w in ws]
        program = jax.make_jaxpr(jax.grad(f, (0, 1)))(x, ab)
        products = [e for e in equations(program) if e.primitive.name == "dot_general"]
        return [e.outvars[0].aval.shape for e in products]

    # Of each weight: base, its gradient of x, two of B. Of A: forward, gradient of x and of A.
    assert len(shapes(together=False)) == 3 * (2 + 2 + 1 + 3)
    assert len(shapes(together=True)) == 3 * (2 + 2 + 1) + 3
    assert (2, 5, 13) in shapes(together=True)


def test_weights_of_one_input_share_one_mask():
    """PEFT draws one for each module; the sharing changes no module's own distribution."""
    q, _, _ = projections(dropout=0.4)
    twin = dataclasses.replace(q, dropout_key=KEYS[1])
    x, _, _, _ = weights()
    one, other = dots(x, [q, twin])
    np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)
    assert np.abs(dot(x, q) - dot(x, twin)).max() > 0.01, "their keys differ"


def test_embed_reads_rows_of_any_weight():
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(I, O)), jnp.float32)
    ids = jnp.array([[0, 5], [63, 5]])
    np.testing.assert_array_equal(embed(ids, table), np.asarray(table)[np.asarray(ids)])
    q = nf4.quantize(table)
    np.testing.assert_array_equal(embed(ids, q), np.asarray(nf4.dequantize(q))[np.asarray(ids)])
    _, _, a, b = weights()
    got = embed(ids, LoraWeight(table, a, b, jnp.float32(2.0)))
    np.testing.assert_allclose(got, (table + 2 * a @ b)[ids], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("transpose", [False, True])
def test_even_odd_matmul_equals_the_product(dtype, transposed, transpose):
    """Exact up to the order of the float32 sum, for both axes and both orientations."""
    rng = np.random.default_rng(0)
    q = nf4.quantize(jnp.asarray(rng.normal(size=(128, 192)), dtype))
    q = q.mT if transposed else q
    w = np.asarray(q.dequantize(), np.float64)
    w = w.T if transpose else w
    x = jnp.asarray(rng.normal(size=(2, 5, len(w))), dtype)
    got = matmul.even_odd_matmul(x, q, transpose, jnp.float32)
    want = np.asarray(x, np.float64) @ w
    assert got.dtype == jnp.float32 and matmul.even_odd_matmul(x, q, transpose).dtype == dtype
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_columns_of_any_weight_match_the_full_product():
    x, w, a, b = weights()
    from_96 = jax.jit(lambda x, w: dot(x, columns(w, jnp.int32(96), 24)))
    for leaf in (w, nf4.quantize(w.T).mT, nf4.quantize(w.T[:, :40]).mT, int8.quantize(w.T).mT):
        rows = leaf.shape[0]
        for weight in (leaf, LoraWeight(leaf, a[:rows], b, jnp.float32(0.5))):
            full, part = dot(x[..., :rows], weight), from_96(x[..., :rows], weight)
            np.testing.assert_allclose(part, full[..., 96:120], rtol=1e-5, atol=1e-5)


def test_quantized_weights_give_float32_results_unrounded():
    x, w, _, _ = weights(jnp.bfloat16)
    q = nf4.quantize(w.T).mT
    exact = np.asarray(x, np.float64) @ np.asarray(q.dequantize(), np.float64)
    in_float32 = dot(x, q, jnp.float32)
    np.testing.assert_allclose(in_float32, exact, rtol=1e-5, atol=1e-5)
    assert np.abs(np.asarray(dot(x, q), np.float64) - exact).max() > 1e-3  # bfloat16's rounding
    gradient = jax.grad(lambda x: jnp.sum(dot(x, q, jnp.float32)))(x)
    expected = np.ones((10, O)) @ np.asarray(q.dequantize(), np.float64).T
    np.testing.assert_allclose(
        np.asarray(gradient, np.float64).reshape(10, I), expected, rtol=1e-2, atol=1e-2
    )


def test_float32_results_do_not_widen_the_weight():
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.standard_normal(s), jnp.bfloat16) for s in ((4, I), (I, O)))
    x64, w64 = (np.asarray(a, np.float64) for a in (x, w))
    product = dot(x, w, jnp.float32)
    assert product.dtype == jnp.float32
    np.testing.assert_allclose(product, x64 @ w64, rtol=1e-5, atol=1e-5)

    def loss(x, w):
        return jnp.sum(jnp.sin(dot(x, w, jnp.float32)))

    dx, dw = (np.asarray(g, np.float64) for g in jax.grad(loss, argnums=(0, 1))(x, w))
    g = np.asarray(jnp.cos(product).astype(jnp.bfloat16), np.float64)
    np.testing.assert_allclose(dx, g @ w64.T, rtol=1e-2)
    np.testing.assert_allclose(dw, x64.T @ g, rtol=1e-2)
    assert f"f32[{I},{O}]" not in str(jax.make_jaxpr(jax.grad(loss))(x, w))


def test_one_traced_program_serves_different_gradients():
    """JAX caches a traced scan and differentiates it again, by other arguments."""
    x, _, a, b = weights()

    @jax.jit
    def f(x, a, b):
        return jax.lax.scan(lambda h, pair: (dot(dot(h, pair[0]), pair[1]), None), x, (a, b))[0]

    stacked = (jnp.stack([a, a]), jnp.stack([b[:, :I], b[:, :I]]))
    for argument in (0, 1, 2, (0, 1), (1, 2), 0):
        got = jax.grad(lambda *args: jnp.sum(f(*args)), argument)(x, *stacked)
        want = jax.grad(lambda x, a, b: jnp.sum(x @ a[0] @ b[0] @ a[1] @ b[1]), argument)(
            x, *stacked
        )
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


SIZES = np.array([3, 0, 5, 2], np.int32)


def grouped(x, w):
    return grouped_dot(x, w, jnp.asarray(SIZES))


@pytest.mark.parametrize("quantizer", [None, *QUANTIZERS.values()], ids=["dense", *QUANTIZERS])
def test_rows_are_multiplied_by_the_matrix_of_their_group(quantizer):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(10, I)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(4, O, I)) / 8, jnp.float32)
    leaf = w.mT if quantizer is None else jax.vmap(quantizer)(w).mT
    dense = np.asarray(leaf if quantizer is None else leaf.dequantize(), np.float64)
    group, g = np.repeat(np.arange(4), SIZES), jnp.asarray(rng.normal(size=(10, O)), jnp.float32)
    want = np.einsum("ni,nio->no", np.asarray(x, np.float64), dense[group])
    np.testing.assert_allclose(grouped(x, leaf), want, atol=1e-5)

    of_x = jax.jit(lambda x, w: jax.vjp(lambda x: grouped(x, w), x)[1](g)[0])
    np.testing.assert_allclose(of_x(x, leaf), np.einsum("no,nio->ni", g, dense[group]), atol=1e-4)
    if quantizer is None:
        (of_w,) = jax.vjp(lambda w: grouped(x, w), leaf)[1](g)
        want_w = np.zeros(dense.shape)
        for row, e in enumerate(group):
            want_w[e] += np.outer(x[row], g[row])
        np.testing.assert_allclose(of_w, want_w, atol=1e-4)


def test_a_quantized_group_saves_its_codes_and_a_frozen_one_no_rows():
    """A quantized weight saves nothing dense; a frozen dense one saves only itself."""
    x = jnp.ones((10, I))
    w = jax.random.normal(jax.random.key(0), (4, O, I))
    for leaf, dense in ((jax.vmap(nf4.quantize)(w).mT, False), (w.mT, True)):
        saved = jax.tree.leaves(jax.vjp(lambda x, w=leaf: grouped(x, w), x)[1])
        shapes = [leaf.shape for leaf in saved]
        assert (10, I) not in shapes
        assert ((4, I, O) in shapes) is dense


def test_groups_in_low_precision_accumulate_in_float32():
    x = jnp.full((10, 4096), 0.1, jnp.bfloat16)
    w = jnp.full((4, 4096, 2), 0.1, jnp.bfloat16)
    out = grouped(x, w)
    assert out.dtype == jnp.bfloat16
    exact = 4096 * float(x[0, 0]) ** 2
    np.testing.assert_allclose(np.asarray(out, np.float64), exact, rtol=2**-8)
