"""Loss scaling by GradScaler's rules; what a fresh state holds."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jlora.training.state import GROWTH_INTERVAL, MAX_SCALE, LossScale, init_state


@jax.jit
def scales(start, finite):
    """The scale and the good steps after each of many steps."""

    def one(scale, finite):
        scale = scale.updated(finite)
        return scale, (scale.scale, scale.good_steps)

    return jax.lax.scan(one, LossScale(start, jnp.int32(0)), finite)[1]


def flags():
    """Long good stretches with overflows in them, single and in a row."""
    finite = np.ones(3 * GROWTH_INTERVAL + 100, bool)
    finite[[5, 6, 7, 1500, 1500 + GROWTH_INTERVAL]] = False  # the last one: just before it grows
    return finite


def test_the_scale_doubles_after_2000_good_steps_and_halves_on_an_overflow():
    scale, good, expected = 2.0**16, 0, []
    for finite in flags():
        if not finite:
            scale, good = scale / 2, 0
        elif good + 1 == 2000:
            scale, good = scale * 2, 0
        else:
            good += 1
        expected.append((scale, good))
    got = scales(jnp.float32(2**16), flags())
    np.testing.assert_array_equal(np.stack(got, 1), expected)
    assert expected[-1][0] == 2.0**12  # five halvings, one doubling


def test_the_scale_is_that_of_torch():
    torch = pytest.importorskip("torch")
    scale, tracker, expected = torch.full((), 2.0**16), torch.zeros((), dtype=torch.int32), []
    for finite in flags():
        overflow = torch.full((), float(not finite))
        torch._amp_update_scale_(scale, tracker, overflow, 2.0, 0.5, 2000)
        expected.append((float(scale), int(tracker)))
    np.testing.assert_array_equal(np.stack(scales(jnp.float32(2**16), flags()), 1), expected)


def test_the_scale_stays_within_its_bounds():
    up, _ = scales(jnp.float32(MAX_SCALE), np.ones(GROWTH_INTERVAL + 1, bool))
    down, _ = scales(jnp.float32(2.0), np.zeros(3, bool))
    assert float(up[-1]) == MAX_SCALE and down.tolist() == [1.0, 1.0, 1.0]


def test_a_fresh_state():
    tree = {"lora_A": jnp.ones((3, 2))}
    state = init_state(tree, optax.adam(1e-3), fp16=True)
    assert int(state.step) == 0 and state.trainable is tree
    assert float(state.loss_scale.scale) == 2**16 and int(state.loss_scale.good_steps) == 0
    assert jax.tree.structure(state.opt_state) == jax.tree.structure(optax.adam(1e-3).init(tree))
    assert init_state(tree, optax.adam(1e-3)).loss_scale is None
