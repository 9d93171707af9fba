"""Training on data 8, fsdp 8 and 2 × 2 × 2 gives the losses and the adapter of one device."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_runs import DENSE

from jlora import lora
from jlora.config import LoraConfig, MeshConfig, QuantConfig
from jlora.distributed import sharding
from jlora.models import Model, init_params
from jlora.quant.params import quantize_params
from jlora.training.state import init_state
from jlora.training.step import make_train_step

MESHES = [{"data": 8}, {"data": 1, "fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}]
STEPS = 3

# 256 inputs are eight blocks of 32: every axis of every mesh divides them.
LLAMA = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 64,
    "n_embd": 256,
    "n_head": 4,
    "n_layer": 2,
    "n_positions": 32,
}


MOE = {
    **LLAMA,
    "model_type": "qwen3_moe",
    "head_dim": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
}
ALL_LINEAR = {"target_modules": "all-linear", "lora_dropout": 0.1}
ARCHITECTURES = {
    "llama": (LLAMA, ALL_LINEAR, []),
    "gpt2": (GPT2, ALL_LINEAR, []),
    # One module whose outputs are split over `tensor`, and one whose inputs are.
    "DoRA, embeddings": (
        LLAMA,
        {"target_modules": ".*(q|down)_proj|.*embed_tokens", "use_dora": True, "lora_dropout": 0.1},
        DENSE,
    ),
    "experts, tokens": (
        MOE,
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
            "trainable_token_indices": [3, 60, 17],
        },
        ["k_proj", "v_proj", "o_proj"],
    ),
}
"""Model, adapter, and what stays dense where the base is quantized: quick to compile."""


def batches():
    """(accumulation 2, B 8, T 16) with two documents a row, padding, and uneven target counts."""
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        ids = rng.integers(1, 64, (2, 8, 16), dtype=np.int32)
        labels = np.where(rng.random(ids.shape) < 0.4, -100, np.roll(ids, -1, -1)).astype(np.int32)
        ends = rng.integers(9, 17, (2, 8, 1))
        place = np.broadcast_to(np.arange(16), ids.shape)
        segments = np.where(place < 7, 1, 2) * (place < ends)
        labels[segments == 0] = -100
        positions = np.where(place < 7, place, place - 7).astype(np.int32)
        yield {
            "input_ids": ids,
            "labels": labels,
            "positions": positions,
            "segment_ids": segments.astype(np.int32),
        }


@functools.cache
def start(architecture: str, quantized: bool):
    hf, fields, dense = ARCHITECTURES[architecture]
    model = Model.from_config(hf, "float32")
    params = init_params(jax.random.key(0), model)
    if quantized:
        config = QuantConfig(
            block_size=32, bnb_4bit_compute_dtype="float32", llm_int8_skip_modules=dense
        )
        params = quantize_params(params, config)
    return model, params, lora.init_adapter(jax.random.key(1), params, LoraConfig(r=4, **fields))


def adamw():
    """optax's own arithmetic promotes int32 counters, which the tests forbid everywhere else."""
    inner = optax.adamw(1e-3)

    def update(*arguments):
        with jax.numpy_dtype_promotion("standard"):
            return inner.update(*arguments)

    return optax.GradientTransformation(inner.init, update)


def train(architecture: str, quantized: bool, mesh: jax.sharding.Mesh):
    """The losses, gradient norms and final adapter of a few steps on ``mesh``."""
    model, params, adapter = start(architecture, quantized)
    optimizer = adamw()
    state = jax.eval_shape(functools.partial(init_state, optimizer=optimizer), adapter)
    layouts = sharding.shardings(state, mesh)
    with jax.set_mesh(mesh):
        params = sharding.place(params, sharding.shardings(params, mesh))
        state = sharding.place(init_state(jax.tree.map(jnp.copy, adapter), optimizer), layouts)
        step = make_train_step(
            model,
            lambda frozen, trainable, key: lora.attach(frozen, trainable, dropout_key=key),
            optimizer,
            state_shardings=layouts,
        )
        curve = []
        for batch in batches():
            target = sharding.batch_sharding(mesh)
            state, metrics = step(
                state, params, {k: sharding.place(v, target) for k, v in batch.items()}
            )
            curve.append([float(metrics["loss"]), float(metrics["grad_norm"])])
        assert step._cache_size() == 1
    for leaf, layout in zip(jax.tree.leaves(state), jax.tree.leaves(layouts), strict=True):
        assert leaf.sharding.is_equivalent_to(layout, leaf.ndim)
    return np.array(curve), jax.device_get(state.trainable)


def layer_collectives(text):
    """(kind, type, number of values) of what one layer sends, forwards and backwards."""
    found = set()
    for line in text.splitlines():
        kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
        match = re.search(rf"= \(?(\w+)\[([\d,]*)\].* ({kinds})\(", line)
        if match and "/while/body/" in line:
            sizes = [int(size) for size in match[2].split(",") if size]
            found.add((match[3], match[1], int(np.prod(sizes))))
    return found


@functools.cache
def alone(architecture: str, quantized: bool):
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    return train(architecture, quantized, mesh)


SHORT = [("llama", False, MESHES[1])]
CASES = [("llama", quantized, sizes) for quantized in (False, True) for sizes in MESHES]
CASES += [(name, True, MESHES[2]) for name in list(ARCHITECTURES)[1:]]
CASES = [c if c in SHORT else pytest.param(*c, marks=pytest.mark.slow) for c in CASES]


@pytest.mark.parametrize(("architecture", "quantized", "sizes"), CASES)
def test_training_on_a_mesh_is_training_on_one_device(architecture, quantized, sizes):
    expected, adapter = alone(architecture, quantized)
    got, trained = train(architecture, quantized, sharding.make_mesh(MeshConfig(**sizes)))
    moved = jax.tree.map(
        lambda a, b: np.abs(a - b).max(), adapter, start(architecture, quantized)[2]
    )
    assert min(jax.tree.leaves(moved)) > 1e-3
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    # AdamW divides by the gradient's size: where that is nearly zero, the order of sums decides.
    # With SGD, whose steps are the gradient, the same runs differ by 3e-8 of 0.05.
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=3e-4), trained, adapter)


@pytest.mark.parametrize(
    ("architecture", "quantized", "sizes"),
    [
        ("llama", True, MESHES[1]),
        ("llama", True, MESHES[2]),
        pytest.param("llama", False, MESHES[1], marks=pytest.mark.slow),
        pytest.param("gpt2", True, MESHES[1], marks=pytest.mark.slow),
    ],
)
def test_a_layer_gathers_its_codes_and_no_activations(architecture, quantized, sizes, capfd):
    """What FSDP is: rows of the batch stay where they are, a layer's weights come to them."""
    model, params, adapter = start(architecture, quantized)
    mesh, tensor = sharding.make_mesh(MeshConfig(**sizes)), sizes.get("tensor", 1)

    def loss(adapter, params, ids):
        return jnp.sum(jnp.sin(model.features(lora.attach(params, adapter), ids)))

    with jax.set_mesh(mesh):
        placed = [sharding.place(t, sharding.shardings(t, mesh)) for t in (adapter, params)]
        ids = sharding.place(jnp.ones((1, 8, 24), jnp.int32), sharding.batch_sharding(mesh))[0]
        sent = layer_collectives(jax.jit(jax.grad(loss)).lower(*placed, ids).compile().as_text())
    assert "Involuntary full rematerialization" not in capfd.readouterr().err
    gathered = {(dtype, size) for kind, dtype, size in sent if kind == "all-gather"}
    if quantized:
        assert ("u8", 256 * 256 // 2 // tensor) in gathered
        assert all(dtype == "u8" or size < 256 * 256 // tensor for dtype, size in gathered)
    else:
        assert ("f32", 256 * 256) in gathered
    if tensor == 1:
        widest = 4 * 1024  # elements of an adapter's matrix, whose gradients are summed
        assert all(kind == "all-gather" or size <= widest for kind, _, size in sent)
        assert 8 * 24 * 256 not in {size for _, _, size in sent}


@pytest.mark.parametrize("sizes", MESHES[1:], ids=["fsdp", "cube"])
def test_no_device_holds_a_whole_packed_kernel(sizes):
    """What the meshes of this file split: eight devices share the kernels four or eight ways."""
    _, params, _ = start("llama", True)
    mesh = sharding.make_mesh(MeshConfig(**sizes))
    rows = [row for row in sharding.describe(params, mesh) if row.kind == "kernel (NF4)"]
    shares = mesh.shape["fsdp"] * mesh.shape["tensor"]
    assert sum(row.leaves for row in rows) == 7
    for row in rows:
        assert row.total_bytes / shares <= row.device_bytes < row.total_bytes / shares * 1.1
