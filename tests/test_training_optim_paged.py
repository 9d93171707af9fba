"""Moments in host memory: the same numbers, where they lie, and that they stay there."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.config import MeshConfig, TrainConfig
from jlora.distributed import sharding
from jlora.io import checkpoint
from jlora.training import optim, step
from jlora.training.state import init_state

MESHES = {"one": ({}, 1), "data": ({"data": 2, "fsdp": 4}, 8)}
PAIRS = [
    ("adamw", "paged_adamw_32bit"),
    ("adamw_8bit", "paged_adamw_8bit"),
    ("lion", "paged_lion_32bit"),
    ("lion_8bit", "paged_lion_8bit"),
]


def draw(seed):
    rng = np.random.default_rng(seed)
    shapes = {"lora_A": (2, 256, 16), "lora_B": (2, 16, 512), "bias": (2, 16)}
    arrays = {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}
    return {"q_proj": jax.tree.map(jnp.asarray, arrays)}


def mesh_of(name):
    sizes, count = MESHES[name]
    return sharding.make_mesh(MeshConfig(**sizes), devices=jax.devices()[:count])


def run(name, mesh, fp16=False, state=None, steps=(1, 2, 3)):
    """The state after some steps, and its places; with loss scaling the last one overflows."""
    settings = TrainConfig(output_dir="o", optim=name, learning_rate=1e-2, weight_decay=0.1)
    params = draw(0)
    optimizer = optim.make_optimizer(settings, 10, params)
    start = functools.partial(init_state, optimizer=optimizer, fp16=fp16)
    with jax.set_mesh(mesh), jax.numpy_dtype_promotion("standard"):
        places = sharding.shardings(sharding.output_types(start, params), mesh)
        if state is None:
            state = jax.jit(start, out_shardings=places)(params)
        moments = kinds(state)

        def update(state, grads, finite):
            return step._apply_update(state, grads, optimizer, finite)

        jitted = jax.jit(update, donate_argnums=0, out_shardings=places)
        for i in steps:
            state = jitted(state, draw(i), jnp.asarray(not fp16 or i != steps[-1]))
        assert kinds(state) == moments
    return state


def kinds(state):
    """The memory of every leaf of the optimizer's state."""
    return [leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.opt_state)]


@pytest.mark.parametrize(("plain", "paged"), PAIRS)
@pytest.mark.parametrize("mesh", MESHES)
def test_paging_changes_no_bit_and_keeps_the_moments_on_the_host(plain, paged, mesh):
    mesh = mesh_of(mesh)
    actual, wanted = run(paged, mesh), run(plain, mesh)
    chex.assert_trees_all_equal(sharding.gather(actual), sharding.gather(wanted))
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, wanted)
    expected = [
        "pinned_host" if leaf.ndim else "device" for leaf in jax.tree.leaves(actual.opt_state)
    ]
    assert kinds(actual) == expected and set(expected) == {"pinned_host", "device"}
    assert set(kinds(wanted)) == {"device"}
    assert all(x.sharding.memory_kind == "device" for x in jax.tree.leaves(actual.trainable))
    layouts = [[leaf.sharding.spec for leaf in jax.tree.leaves(s)] for s in (actual, wanted)]
    assert layouts[0] == layouts[1]


def test_a_step_that_overflows_leaves_paged_moments_as_they_were():
    mesh = mesh_of("data")
    actual, before = (
        run("paged_adamw_8bit", mesh, True),
        run("adamw_8bit", mesh, False, steps=(1, 2)),
    )
    chex.assert_trees_all_equal(
        sharding.gather((actual.trainable, actual.opt_state)),
        sharding.gather((before.trainable, before.opt_state)),
    )
    assert "pinned_host" in kinds(actual) and actual.loss_scale.scale == 2.0**15


def test_a_checkpoint_gives_paged_moments_back_to_the_host(tmp_path):
    mesh = mesh_of("data")
    half, whole = run("paged_adamw_8bit", mesh, steps=(1, 2)), run("paged_adamw_8bit", mesh)
    run_of = {"identity": {}, "base_fingerprint": "none"}
    checkpoint.save(tmp_path, 2, half, {}, **run_of)
    restored, _ = checkpoint.restore(tmp_path, 2, half, **run_of)
    assert [x.sharding for x in jax.tree.leaves(restored)] == [
        x.sharding for x in jax.tree.leaves(half)
    ]
    again = run("paged_adamw_8bit", mesh, state=restored, steps=(3,))
    chex.assert_trees_all_equal(sharding.gather(again), sharding.gather(whole))


def test_the_copies_are_in_the_step_on_every_platform():
    """What is lowered for GPU and TPU moves six arrays: from the host, to the device and back."""
    params = draw(0)
    config = TrainConfig(output_dir="o", optim="paged_adamw_32bit")
    optimizer = optim.make_optimizer(config, 10, params)
    with jax.numpy_dtype_promotion("standard"):
        state = jax.jit(optimizer.init)(params)
        traced = jax.jit(optimizer.update).trace(params, state, params)
    for platform in ("cuda", "tpu"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        for kind, times in (("device", 6), ("pinned_host", 12)):
            assert text.count(f'_xla_buffer_placement = "{kind}"') == times, (platform, kind)
