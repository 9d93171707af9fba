"""8-bit moments: their table, bytes, layout, and what a step makes of extreme values."""

import hashlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jlora.config import MeshConfig, TrainConfig
from jlora.distributed import sharding
from jlora.training import optim
from jlora.training.optim import eight_bit

# Llama-3.1-8B: the projections of attention and MLP, with two of its layers.
IN_OUT = {
    "q_proj": (4096, 4096),
    "k_proj": (4096, 1024),
    "v_proj": (4096, 1024),
    "o_proj": (4096, 4096),
    "gate_proj": (4096, 14336),
    "up_proj": (4096, 14336),
    "down_proj": (14336, 4096),
}


def adapter_shapes(r, layers=2):
    def shape(*dims):
        return jax.ShapeDtypeStruct((layers, *dims), jnp.float32)

    return {k: {"lora_A": shape(i, r), "lora_B": shape(r, o)} for k, (i, o) in IN_OUT.items()}


def settings(name):
    return TrainConfig(output_dir="out", optim=name, warmup_ratio=0.0)  # pyright: ignore


def test_the_unsigned_map_is_the_published_table():
    digest = hashlib.sha256(eight_bit.UNSIGNED_MAP.astype("<f4").tobytes()).hexdigest()
    assert digest == "305f002cc11278fb769d13b25b9fd0c7c83c8402c40a878fe086f4039fde6398"
    assert eight_bit.UNSIGNED_MAP.shape == (256,) and eight_bit.UNSIGNED_MAP.dtype == np.float32


@pytest.mark.parametrize(
    ("name", "most"), [("adamw_8bit", 2.1), ("paged_adamw_8bit", 2.1), ("lion_8bit", 1.05)]
)
def test_the_state_of_a_real_adapter_stays_within_its_bytes(name, most):
    shapes = adapter_shapes(16)
    state = jax.eval_shape(optim.make_optimizer(settings(name), 10, shapes).init, shapes)
    size = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    stored = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert most - 0.1 < stored / size <= most


@pytest.mark.parametrize(
    ("shape", "absmax"),
    [
        ((2, 64, 16), (2, 4, 1)),
        ((2, 64, 24), (2, 6, 1)),
        ((2, 16, 512), (2, 16, 2)),
        ((3, 5, 7), (1,)),
        ((300,), (2,)),
        ((2, 300), (3,)),
        ((), (1,)),
    ],
)
@pytest.mark.parametrize("signed", [True, False])
def test_every_value_is_within_half_a_step_of_its_block(shape, absmax, signed):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    x = x if signed else np.abs(x)
    q = eight_bit.quantize_blockwise(jnp.asarray(x), signed)
    chex.assert_shape([q.codes, q.absmax], [shape, absmax])
    chex.assert_type([q.codes, q.absmax], [jnp.uint8, jnp.float32])
    flat = np.pad(x.reshape(-1), (0, -x.size % 256)).reshape(-1, 256)
    largest = np.abs(flat).max(axis=1)
    np.testing.assert_array_equal(np.asarray(q.absmax).reshape(-1), largest)
    table = eight_bit.DYNAMIC_MAP if signed else eight_bit.UNSIGNED_MAP
    scaled = flat / largest[:, None]
    best = np.abs(scaled[..., None].astype(np.float64) - table).min(axis=-1) * largest[:, None]
    error = np.abs(np.asarray(eight_bit.dequantize_blockwise(q)).reshape(-1) - x.reshape(-1))
    assert (error <= best.reshape(-1)[: x.size] + 4e-7 * largest.max()).all()


def test_zeros_stay_zero_and_faults_stay_visible():
    x = np.ones((4, 256), np.float32)
    x[0], x[1], x[2, 7], x[3, 7] = 0.0, 1e-39, np.nan, np.inf
    for signed in (True, False):
        q = eight_bit.quantize_blockwise(jnp.asarray(x), signed)
        back = np.asarray(eight_bit.dequantize_blockwise(q))
        assert (back[:2] == 0).all() and not np.isfinite(back[2:]).any()


def test_leaves_below_4096_values_stay_in_32_bits():
    params = {"lora_A": jnp.zeros((2, 128, 16)), "lora_B": jnp.zeros((2, 16, 127))}
    transform = eight_bit.eight_bit(optax.scale_by_adam())
    state = transform.init(params)
    for moments in (state.mu, state.nu):
        assert moments["lora_A"].codes.dtype == jnp.uint8
        chex.assert_trees_all_equal(moments["lora_B"], params["lora_B"])
    with jax.numpy_dtype_promotion("standard"):  # optax does not promote strictly
        _, after = transform.update(params, state, params)
    chex.assert_trees_all_equal_structs(state, after)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, after)


def test_the_step_uses_the_moments_before_they_are_rounded():
    """From zero moments the first step knows nothing of 8 bits."""
    rng = np.random.default_rng(0)
    g = {"kernel": jnp.asarray(rng.standard_normal((64, 128)).astype(np.float32))}
    for inner in (optax.scale_by_adam(), optax.scale_by_lion()):
        in_8_bits = eight_bit.eight_bit(inner)
        with jax.numpy_dtype_promotion("standard"):
            actual, _ = in_8_bits.update(g, in_8_bits.init(g))
            expected, _ = inner.update(g, inner.init(g))
        chex.assert_trees_all_equal(actual, expected)


def test_a_small_second_moment_never_becomes_zero():
    """Beside gradients e**14 times as large a block's small ones would be divided by nothing."""
    rng = np.random.default_rng(0)
    inner = optax.scale_by_adam(0.9, 0.95)
    in_8_bits = eight_bit.eight_bit(inner)
    p = jnp.zeros((32, 256))
    states, sums = [in_8_bits.init(p), inner.init(p)], [p, p]
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(20):
            tails = np.exp(2 * rng.standard_normal(p.shape))
            g = jnp.asarray((rng.standard_normal(p.shape) * tails).astype(np.float32))
            for i, transform in enumerate((in_8_bits, inner)):
                updates, states[i] = jax.jit(transform.update)(g, states[i])
                sums[i] = sums[i] + updates
    assert (np.asarray(states[0].nu.codes) > 0).all()
    assert np.abs(np.asarray(sums[0])).max() < 1.5 * np.abs(np.asarray(sums[1])).max()


def test_blocks_are_split_as_their_parameter():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    rng = np.random.default_rng(0)
    shapes = {"lora_A": (2, 256, 16), "lora_B": (2, 16, 512)}
    grads = {
        "q_proj": {
            k: jnp.asarray(rng.standard_normal(s).astype(np.float32)) for k, s in shapes.items()
        }
    }
    optimizer = optim.make_optimizer(settings("adamw_8bit"), 10, grads)

    def two_steps(grads):
        state, params = optimizer.init(grads), grads
        for _ in range(2):
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    with jax.numpy_dtype_promotion("standard"):
        alone = jax.jit(two_steps)(grads)
        layouts = sharding.shardings(jax.eval_shape(two_steps, grads), mesh)
        placed = sharding.place(grads, sharding.shardings(grads, mesh))
        spread = jax.jit(two_steps, out_shardings=layouts)(placed)
    chex.assert_trees_all_equal_shapes_and_dtypes(spread, alone)
    chex.assert_trees_all_close(sharding.gather(spread[0]), sharding.gather(alone[0]), rtol=1e-6)
    pairs = zip(*(jax.tree.leaves(sharding.gather(x[1])) for x in (spread, alone)), strict=True)
    for actual, wanted in pairs:  # a value at a threshold may take either code
        apart = np.abs(actual.astype(np.float64) - wanted)
        assert (apart > 1e-5).mean() < 1e-3 and apart.max() <= 1
    moments = spread[1][1].inner_states["decay"].inner_state[0].mu["q_proj"]
    for name, axis, parts in (("lora_A", 1, 2), ("lora_B", 2, 2)):
        for leaf in (moments[name].codes, moments[name].absmax):
            shard = leaf.addressable_shards[0].data.shape
            assert shard[axis] * parts == leaf.shape[axis], name
