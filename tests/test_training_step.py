"""The training step: its loss, accumulation, dropout, loss scaling, and what it never computes."""

import dataclasses
import functools
from collections import Counter
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_models
from absent_gpu import traced_for_a_gpu
from jaxprs import equations

from jlora import lora
from jlora.config import LoraConfig, MeshConfig, QuantConfig
from jlora.distributed import sharding
from jlora.distributed.mesh import BATCH_AXES
from jlora.models import Model, init_params
from jlora.ops.matmul import array_matmul
from jlora.ops.weights import has_quantized_base
from jlora.plan import hlo
from jlora.quant import nf4
from jlora.quant.params import is_quantized, quantize_params
from jlora.training import step
from jlora.training.state import LossScale, init_state
from jlora.training.step import (
    IGNORE,
    class_counts,
    cross_entropy,
    loss_and_count,
    make_eval_step,
    make_train_step,
)

B, T, V = 4, 12, 61


def attach(frozen, adapter, key):
    return lora.attach(frozen, adapter, dropout_key=key)


@functools.cache
def parts(dropout=0.0):
    """A tiny llama and an adapter that changes it."""
    model, params = tiny_models.build("llama")
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    init = jax.jit(lora.init_adapter, static_argnums=2)
    adapter = init(jax.random.key(3), params, config)
    config = dataclasses.replace(adapter.config, lora_dropout=dropout)
    return model, params, lora.Adapter(adapter.weights, config)


def batch(seed=0, rows=B, length=T, vocab=V):
    """Two documents a row, padding behind them, and uneven numbers of targets: (rows, length)."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, vocab, (rows, length), dtype=np.int32)
    place = np.broadcast_to(np.arange(length), ids.shape)
    segments = np.where(place < 5, 1, 2) * (place < rng.integers(7, length + 1, (rows, 1)))
    wanted = rng.random(ids.shape) < np.linspace(0.2, 0.9, rows)[:, None]
    labels = np.where(wanted & (segments > 0), np.roll(ids, -1, -1), IGNORE)
    arrays = ids, labels, np.where(place < 5, place, place - 5), segments
    names = "input_ids", "labels", "positions", "segment_ids"
    return {k: v.astype(np.int32) for k, v in zip(names, arrays, strict=True)}


def stacked(rows, accumulation):
    """The same rows as (accumulation, rows / accumulation, T)."""
    return {k: v.reshape(accumulation, -1, v.shape[-1]) for k, v in rows.items()}


def negative_log_likelihood(logits, labels):
    logits = np.asarray(logits, np.float64)
    highest = logits.max(-1, keepdims=True)
    log_sum = np.log(np.exp(logits - highest).sum(-1)) + highest[..., 0]
    picked = np.take_along_axis(logits, np.maximum(labels, 0)[..., None], -1)[..., 0]
    return (log_sum - picked)[labels != IGNORE].sum()


def mean_loss(model, params, rows):
    """The oracle's loss: logits of the whole model, log-likelihoods in float64."""
    logits = model(
        params, rows["input_ids"], positions=rows["positions"], segment_ids=rows["segment_ids"]
    )
    return negative_log_likelihood(logits, rows["labels"]) / (rows["labels"] != IGNORE).sum()


@functools.cache
def sgd_step(seed=0):
    """A step with SGD at rate one: the update is the (negative) gradient."""
    return make_train_step(parts()[0], attach, optax.sgd(1.0), seed=seed)


def one_step(rows, *, dropout=0.0, seed=0, number=0, adapter=None):
    """(gradient, metrics) of one step, the gradient read off the adapter's change."""
    _, params, whole = parts(dropout)
    adapter = adapter or whole
    state = init_state(jax.tree.map(jnp.copy, adapter), optax.sgd(1.0))
    state = dataclasses.replace(state, step=jnp.int32(number))
    after, metrics = sgd_step(seed)(state, params, rows)
    gradient = jax.tree.map(lambda old, new: np.asarray(old - new), adapter, after.trainable)
    return gradient, jax.device_get(metrics)


def assert_close(got, expected, atol):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=atol), got, expected)


# Loss


def test_cross_entropy_is_the_negative_log_likelihood():
    logits = 30 * np.random.default_rng(0).standard_normal((B, T, V)).astype(np.float32)
    labels = batch()["labels"]
    got = float(cross_entropy(jnp.asarray(logits), jnp.asarray(labels)))
    np.testing.assert_allclose(got, negative_log_likelihood(logits, labels), rtol=1e-6)
    nothing = jnp.full((B, T), IGNORE, jnp.int32)
    loss, gradient = jax.value_and_grad(cross_entropy)(jnp.asarray(logits), nothing)
    assert float(loss) == 0 and not gradient.any()


def test_chunks_of_logits_change_neither_loss_nor_gradients():
    model, params, adapter = parts()
    rows = jax.tree.map(jnp.asarray, batch())

    def compute():
        def loss(adapter):
            return loss_and_count(model, attach(params, adapter, None), rows)[0]

        traced = jax.jit(jax.value_and_grad(loss)).trace(adapter)
        return traced.lower().compile()(adapter), _sizes(traced.jaxpr)

    (whole, gradient), sizes = compute()
    assert B * T * V in sizes
    with mock.patch.object(step, "CHUNK_ELEMENTS", B * V * 5):  # of 12, 5 is no divisor
        (chunked, chunked_gradient), sizes = compute()
    assert B * T * V not in sizes and B * 4 * V in sizes
    np.testing.assert_allclose(chunked, whole, rtol=1e-6)
    assert_close(chunked_gradient, gradient, 1e-5 * float(whole))


def test_a_chunk_counts_the_rows_of_one_device():
    """A head that is split over devices is gathered for every chunk."""
    model, params, adapter = parts()
    rows = jax.tree.map(jnp.asarray, batch())

    def compute(mesh):
        with jax.set_mesh(mesh), mock.patch.object(step, "CHUNK_ELEMENTS", V * B):
            # A function of its own, or JAX would find the other mesh's.
            traced = jax.jit(lambda: loss_and_count(model, attach(params, adapter, None), rows)[0])
            traced = traced.trace()
            return float(traced.lower().compile()()), _sizes(traced.jaxpr)

    devices = jax.devices()[:4]
    (one, alone), (four, spread) = (
        compute(sharding.make_mesh(MeshConfig(), devices[:count])) for count in (1, 4)
    )
    assert B * V in alone and B * 4 * V not in alone
    assert B * 4 * V in spread and B * V not in spread
    np.testing.assert_allclose(four, one, rtol=1e-6)


def test_a_split_head_is_gathered_once_for_all_chunks():
    model, params, adapter = parts()
    rows = jax.tree.map(jnp.asarray, batch())
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=4), jax.devices()[:4])
    given = sharding.abstract_arrays((params, adapter), mesh)
    gathered = []
    for tokens in (T, T // 4):  # of a chunk

        def loss(params, adapter):
            return loss_and_count(model, attach(params, adapter, None), rows)[0]

        with jax.set_mesh(mesh), mock.patch.object(step, "CHUNK_ELEMENTS", V * tokens):
            compiled = jax.jit(jax.grad(loss, 1)).lower(*given).compile()
        work = hlo.work_of(compiled.as_text())
        gathered.append(work.collectives["all-gather", 4])
    assert gathered[0] == gathered[1]


def test_chunks_on_gpus_are_larger():
    """The head is read for each: of 512 tokens instead of 128 for the vocabulary of Llama 3."""
    assert step._chunk_length(1, 4096, 128_256) == 128
    with traced_for_a_gpu():
        assert step._chunk_length(1, 4096, 128_256) == 512


def test_a_vocab_chunk_is_sized_by_the_rows_of_one_device():
    sizes = []

    def head(start, size):
        sizes.append(size)
        return jnp.zeros((B, T, size))

    labels = jnp.zeros((B, T), jnp.int32)
    for count in (1, 4):
        mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:count])
        with jax.set_mesh(mesh), mock.patch.object(step, "CHUNK_ELEMENTS", B * T * 5):
            loss = jax.jit(lambda: step.cross_entropy_in_vocab_chunks(head, labels, V))()
        np.testing.assert_allclose(loss, B * T * np.log(V), rtol=1e-6)
    assert set(sizes) == {5, 20} and sizes[0] == 5


def test_chunks_divide_the_length():
    assert step._chunk_length(1, 4096, 128_256) == 128
    assert step._chunk_length(1, 100, 1000) == 100
    assert step._chunk_length(2**20, 7, 2**20) == 1


# Accumulation


def test_the_loss_is_the_mean_over_all_targets_and_the_gradient_its_own():
    model, params, adapter = parts()
    rows = batch()
    gradient, metrics = one_step(stacked(rows, 1))
    expected = mean_loss(model, attach(params, adapter, None), rows)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-6)

    @jax.jit
    def loss(adapter, rows):
        total, count = loss_and_count(model, attach(params, adapter, None), rows)
        return total / count.astype(jnp.float32)

    direct = jax.grad(loss)(adapter, rows)
    assert_close(gradient, direct, 1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(direct), rtol=1e-5)
    assert metrics["target_tokens"] == (rows["labels"] != IGNORE).sum()
    assert metrics["tokens"] == (rows["segment_ids"] != 0).sum()
    assert metrics["finite"]


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulation_changes_nothing(accumulation):
    rows = batch()
    counts = (rows["labels"] != IGNORE).sum(-1)
    assert len(set(counts.tolist())) > 2  # means of means would differ
    gradient, metrics = one_step(stacked(rows, 1))
    got, other = one_step(stacked(rows, accumulation))
    np.testing.assert_allclose(other["loss"], metrics["loss"], rtol=1e-6)
    np.testing.assert_allclose(other["grad_norm"], metrics["grad_norm"], rtol=1e-5)
    assert other["tokens"] == metrics["tokens"]
    assert_close(got, gradient, 1e-6)


def test_a_batch_without_targets_moves_nothing():
    rows = batch()
    rows["labels"] = np.full_like(rows["labels"], IGNORE)
    gradient, metrics = one_step(stacked(rows, 2))
    assert metrics["loss"] == 0 and metrics["grad_norm"] == 0 and metrics["target_tokens"] == 0
    assert metrics["finite"] and not metrics["has_gradient"].any()
    assert_close(gradient, jax.tree.map(np.zeros_like, gradient), 0)


def test_alive_says_which_leaves_have_a_gradient():
    """With B zero, as in a fresh adapter, no gradient reaches A."""
    adapter = parts()[2]
    leaves = jax.tree_util.tree_leaves_with_path(adapter)
    names = [path[-1].key for path, _ in leaves]
    fresh = [
        0 * leaf if name == "lora_B" else leaf
        for name, (_, leaf) in zip(names, leaves, strict=True)
    ]
    fresh = jax.tree.unflatten(jax.tree.structure(adapter), fresh)
    _, metrics = one_step(stacked(batch(), 1), adapter=fresh)
    assert metrics["has_gradient"].tolist() == [name == "lora_B" for name in names]


# Dropout


def test_dropout_is_a_function_of_seed_and_step():
    rows = stacked(batch(), 2)
    loss = functools.partial(one_step, rows, dropout=0.5)
    same, again = loss(number=3)[1]["loss"], loss(number=3)[1]["loss"]
    assert same == again
    later, seeded = loss(number=4)[1]["loss"], loss(number=3, seed=1)[1]["loss"]
    assert len({float(x) for x in (same, later, seeded)}) == 3


def test_every_micro_batch_draws_its_own_dropout():
    """Swapping two micro-batches swaps their masks; without dropout it changes nothing."""
    rows = stacked(batch(), 2)
    swapped = {k: v[::-1] for k, v in rows.items()}
    first, other = (one_step(r, dropout=0.5)[1]["loss"] for r in (rows, swapped))
    assert abs(first - other) > 1e-3
    first, other = (one_step(r)[1]["loss"] for r in (rows, swapped))
    np.testing.assert_allclose(first, other, rtol=1e-6)


def test_evaluation_has_no_dropout():
    model, params, adapter = parts(0.5)
    rows = batch()
    total, count, classes = make_eval_step(model, attach)(adapter, params, rows)
    assert classes is None, "there are none in a language model"
    expected = mean_loss(model, attach(params, parts()[2], None), rows)
    np.testing.assert_allclose(float(total) / int(count), expected, rtol=1e-6)


# Loss scaling


@functools.cache
def half():
    """The step in float16 under AdamW, whose state must not see an overflow."""
    model, params, adapter = parts()
    model = dataclasses.replace(model, dtype="float16")
    inner = optax.adamw(1e-3)

    def update(*arguments):
        with jax.numpy_dtype_promotion("standard"):  # optax does not promote strictly
            return inner.update(*arguments)

    optimizer = optax.GradientTransformation(inner.init, update)
    state = init_state(adapter, optimizer, fp16=True)
    return make_train_step(model, attach, optimizer), state, params


def scaled(scale, good_steps=7):
    """(state before, state after, metrics) of one float16 step at this scale."""
    run, state, params = half()
    before = dataclasses.replace(state, loss_scale=LossScale(jnp.float32(scale), good_steps))
    before = jax.tree.map(jnp.asarray, before)
    after, metrics = run(jax.tree.map(jnp.copy, before), params, stacked(batch(), 2))
    return before, after, jax.device_get(metrics)


def test_classes_are_counted_over_all_devices():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((8, 6, 5)).astype(np.float32)
    labels = np.where(rng.random((8, 6)) < 0.4, rng.integers(0, 4, (8, 6)), IGNORE)
    want = np.zeros((3, 5), int)
    for row, label in zip(logits.reshape(-1, 5), labels.reshape(-1), strict=True):
        if label != IGNORE:
            predicted = row.argmax()
            want[0, label] += predicted == label
            want[1, predicted] += 1
            want[2, label] += 1
    assert want[0].any() and (want[1] > want[0]).any()
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    rows = jax.NamedSharding(mesh, jax.sharding.PartitionSpec(BATCH_AXES))
    for place in (jnp.asarray, functools.partial(jax.device_put, device=rows)):
        with jax.set_mesh(mesh):
            got = jax.jit(class_counts)(place(logits), place(labels.astype(np.int32)))
        np.testing.assert_array_equal(got, want)
        assert got.is_fully_replicated or len(got.devices()) == 1


def test_a_step_that_overflows_is_skipped_and_halves_the_scale():
    before, after, metrics = scaled(2.0**40)
    assert not metrics["finite"] and not np.isfinite(metrics["grad_norm"])
    assert np.isfinite(metrics["loss"])
    for name in ("trainable", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(before, name))
    assert float(after.loss_scale.scale) == 2.0**39 and int(after.loss_scale.good_steps) == 0
    assert int(after.step) == 1


def test_the_scale_is_taken_out_of_loss_and_gradients():
    before, after, metrics = scaled(2.0**12)
    _, _, other = scaled(2.0**8)
    assert metrics["finite"] and int(after.loss_scale.good_steps) == 8
    assert float(after.loss_scale.scale) == 2.0**12
    np.testing.assert_allclose(metrics["loss"], other["loss"], rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], other["grad_norm"], rtol=1e-2)
    exact = one_step(stacked(batch(), 2))[1]
    np.testing.assert_allclose(metrics["loss"], exact["loss"], rtol=1e-2)
    np.testing.assert_allclose(metrics["grad_norm"], exact["grad_norm"], rtol=2e-2)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before.trainable, after.trainable)
    assert all(jax.tree.leaves(moved))


# Compilation


def test_many_steps_compile_once_and_donate_their_state():
    _, params, adapter = parts()
    run = sgd_step(seed=2)
    state = init_state(jax.tree.map(jnp.copy, adapter), optax.sgd(1.0))
    for seed in range(3):
        given = state
        state, metrics = run(given, params, stacked(batch(seed), 2))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given.trainable))
    assert run._cache_size() == 1 and int(state.step) == 3 and metrics["finite"]


def quantized_model(name):
    """A tiny model whose embedding and head are quantized, and an adapter on it."""
    model, params = tiny_models.build(name)
    heads = ["lm_head"] if "lm_head" in params else []
    table, dense = {
        "llama": ("embed_tokens", ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]),
        "gpt2": ("wte", ["c_attn", "c_fc"]),
    }[name]  # the other layers stay dense, which is quick to compile
    config = QuantConfig(
        block_size=32, include_modules=[table, *heads], llm_int8_skip_modules=dense
    )
    quantized = quantize_params(params, config)
    assert has_quantized_base(model.head_weight(quantized))
    assert not has_quantized_base(model.head_weight(params))
    adapter = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return model, quantized, lora.init_adapter(jax.random.key(3), quantized, adapter)


@pytest.mark.parametrize(
    ("name", "elements"),
    [
        pytest.param("llama", B * T * 17, marks=pytest.mark.slow),
        pytest.param("llama", 2**24, marks=pytest.mark.slow),
        ("gpt2", B * T * 17),
        pytest.param("gpt2", 2**24, marks=pytest.mark.slow),
    ],
)
def test_a_quantized_head_in_vocab_chunks_gives_the_same_loss(name, elements):
    """A vocabulary of 61 in overlapping chunks of 17, against the dequantized head."""
    model, quantized, adapter = quantized_model(name)
    dense = jax.tree.map(
        lambda leaf: leaf.dequantize() if is_quantized(leaf) else leaf,
        quantized,
        is_leaf=is_quantized,
    )
    rows = jax.tree.map(jnp.asarray, batch())

    def loss(params, adapter):
        return loss_and_count(model, attach(params, adapter, None), rows)[0]

    run = jax.value_and_grad(loss, argnums=1)
    expected, gradient = jax.jit(run)(dense, adapter)
    with mock.patch.object(step, "CHUNK_ELEMENTS", elements):
        got, quantized_gradient = jax.jit(run)(quantized, adapter)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert_close(quantized_gradient, gradient, atol=2e-4 * _largest(gradient))
    logits = model(attach(quantized, adapter, None), rows["input_ids"])
    plain = model(attach(dense, adapter, None), rows["input_ids"])
    np.testing.assert_allclose(logits, plain, rtol=1e-5, atol=1e-5)


def _largest(tree):
    return max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree))


def test_the_loss_of_a_quantized_head_never_dequantizes_all_of_it():
    vocab, width = 32768, 64
    model = Model.from_config(NARROW | {"vocab_size": vocab}, "float32")
    config = QuantConfig(block_size=32, include_modules=["embed_tokens", "lm_head"])

    def init(key):
        return quantize_params(init_params(key, model), config)

    params = jax.eval_shape(init, jax.random.key(0))
    rows = jax.tree.map(jnp.asarray, batch(rows=2, length=9))

    def loss(features, params):
        with mock.patch.object(Model, "features", lambda *_, **__: features):
            return loss_and_count(model, params, rows)[0]

    features = jax.ShapeDtypeStruct((2, 9, width), jnp.float32)
    with mock.patch.object(step, "CHUNK_ELEMENTS", 2 * 9 * 512):
        compiled = jax.jit(jax.grad(loss)).lower(features, params).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < vocab * width * 4 / 4


# What the compiled step never computes or keeps. Every size below stands for one thing only.

NARROW = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 64,
}
KERNELS = {(64, 96), (64, 48), (96, 64), (64, 128), (128, 64)}
TRANSPOSED = {shape[::-1] for shape in KERNELS}
R = 4


@functools.cache
def narrow(quantized):
    model = Model.from_config(NARROW, "float32")
    config = QuantConfig(block_size=32, bnb_4bit_compute_dtype="float32")

    def init(key):
        params = init_params(key, model)
        return quantize_params(params, config) if quantized else params

    return model, jax.eval_shape(init, jax.random.key(0))


def step_jaxpr(bind, frozen, trainable, length, remat):
    """The whole step as a jaxpr; lengths differ between tests, so that no trace is reused."""
    model, _ = narrow(False)
    model = dataclasses.replace(model, gradient_checkpointing=remat)
    run = make_train_step(model, bind, optax.sgd(0.1))
    rows = stacked(batch(rows=6, length=length), 2)
    state = jax.eval_shape(functools.partial(init_state, optimizer=optax.sgd(0.1)), trainable)
    return jax.make_jaxpr(run)(state, frozen, rows)


def _floats(jaxpr, *, of=None):
    """Shapes of all floating results of the equations (of one primitive)."""
    for equation in equations(jaxpr):
        if of is None or equation.primitive.name == of:
            for result in equation.outvars:
                if jnp.issubdtype(result.aval.dtype, jnp.floating):
                    yield result.aval.shape


def _sizes(jaxpr):
    return {int(np.prod(shape)) for shape in _floats(jaxpr)}


def weight_gradients(jaxpr):
    """Products whose result has a base kernel's shape: gradients of base kernels."""
    return {shape for shape in _floats(jaxpr, of="dot_general") if shape[-2:] in KERNELS}


def kept_dense(jaxpr):
    """Kernel-sized floating arrays for all layers at once: saved for the backward pass."""
    stacks = {(2, *shape) for shape in KERNELS | TRANSPOSED}
    return {shape for shape in _floats(jaxpr) if shape in stacks}


def qlora_jaxpr(length, remat):
    _, params = narrow(True)
    config = LoraConfig(r=R, lora_dropout=0.1, target_modules="all-linear")
    adapter = jax.eval_shape(
        functools.partial(lora.init_adapter, config=config), jax.random.key(1), params
    )
    return step_jaxpr(attach, params, adapter, length, remat)


everything = mock.patch("jlora.ops.remat.policy", jax.checkpoint_policies.everything_saveable)


@pytest.mark.parametrize("remat", [False, True, "everything that could be kept is"])
def test_the_qlora_step_has_no_base_gradient_and_keeps_no_dense_weight(remat):
    if isinstance(remat, bool):
        jaxpr = qlora_jaxpr(10, remat)
    else:
        with everything:
            jaxpr = qlora_jaxpr(14, False)
    # Of B: q k v o gate up down. Of A: q, k and v in one product; o, gate and up, down transposed.
    of_b = [(R, n) for n in (96, 48, 48, 64, 128, 128, 64)]
    of_a = [(64, 3 * R), (R, 96), (2 * R, 64), (R, 128)]
    products = _floats(jaxpr, of="dot_general")
    gradients = Counter(shape for shape in products if shape in of_b + of_a)
    assert gradients == Counter(of_b + of_a)
    assert not weight_gradients(jaxpr)
    assert not kept_dense(jaxpr)
    made = set(_floats(jaxpr))
    assert made >= TRANSPOSED  # each is dequantized, one layer at a time


def test_full_fine_tuning_has_what_the_qlora_step_has_not():
    jaxpr = step_jaxpr(lambda frozen, params, key: params, {}, narrow(False)[1], 11, False)
    assert weight_gradients(jaxpr) == KERNELS
    assert kept_dense(jaxpr) == {(2, *shape) for shape in KERNELS}


@pytest.mark.slow
def test_a_product_that_forgets_the_codes_would_be_seen():
    """Without its own rule the product keeps the dequantized weight of every layer."""

    def careless(x, w, dtype):
        return array_matmul(x, nf4.dequantize(w), 0, dtype)

    with everything, mock.patch("jlora.ops.dot.quantized_product", careless):
        assert kept_dense(qlora_jaxpr(13, False))
