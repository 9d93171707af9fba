"""Dropout's masks: their bits, compared with NumPy's integers, and their statistics.

The keys are fixed, so nothing here fails by chance. A statistic of n independent draws is compared
in units of its standard error, and may be five of them: chance exceeds that once in 1.7 million.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jlora.ops.dropout import drop, keep_levels, keep_mask, keep_scale, random_bits
from jlora.ops.remat import policy

ROWS, WIDTH = 1024, 2048
SIGMAS = 5
KEY = jax.random.key(11)
KEYS = {
    "zero": jax.random.wrap_key_data(jnp.zeros(2, jnp.uint32)),
    "seed": KEY,
    "layer": jax.random.split(KEY, 32)[5],
}
PROBABILITIES = [0.001, 0.05, 0.5, 0.9]


@functools.cache
def bits(name="seed"):
    return np.asarray(jax.jit(random_bits)(jnp.zeros((ROWS, WIDTH)), KEYS[name]))


def centred(key, dropout):
    """1 - kept in units of its standard deviation: mean 0, variance 1."""
    kept = np.asarray(jax.jit(keep_mask, static_argnums=2)(jnp.zeros((ROWS, WIDTH)), key, dropout))
    return (kept - (1 - dropout)) / np.sqrt(dropout * (1 - dropout))


def sigmas(products):
    """A sum of products of independent values of variance 1, in units of its standard error."""
    return products.sum() / np.sqrt(products.size)


def python_bits(row, column, words):
    """The bits of one element, in Python's integers."""

    def xorshift_multiply(x, shift, factor):
        return ((x ^ (x >> shift)) * factor) % 2**32

    def lowbias32(x):
        x = xorshift_multiply(xorshift_multiply(x, 16, 0x7FEB352D), 15, 0x846CA68B)
        return x ^ (x >> 16)

    def of_row(first, second):
        return lowbias32(lowbias32(row ^ first) ^ second)

    x = (of_row(*words) + column) % 2**32
    x = xorshift_multiply(x, 16, 0x7FEB352D)
    return ((x ^ (x >> 15) ^ of_row(*words[::-1])) * 0x846CA68B) % 2**32


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 9)])
def test_bits_are_a_hash_of_key_row_and_column(shape):
    words = [int(word) for word in jax.random.key_data(KEY)]
    got = np.asarray(random_bits(jnp.zeros(shape), KEY)).reshape(-1, shape[-1])
    want = [[python_bits(i, j, words) for j in range(got.shape[1])] for i in range(got.shape[0])]
    np.testing.assert_array_equal(got, np.array(want, np.uint32))


def test_probabilities_are_exact_but_never_all_or_nothing():
    assert keep_levels(0.05) / 2**32 == pytest.approx(0.95, abs=2**-32)
    assert [keep_levels(p) for p in (1e-12, 1 - 1e-12)] == [2**32 - 1, 1]
    for p in (1e-12, *PROBABILITIES):
        assert keep_levels(p) * keep_scale(p) == pytest.approx(2**32, rel=1e-15)


@pytest.mark.parametrize("name", KEYS)
def test_every_bit_and_every_value_of_the_high_byte_is_equally_likely(name):
    drawn = bits(name)
    for bit in range(32):
        assert abs(sigmas(2.0 * ((drawn >> bit) & 1) - 1)) < SIGMAS, bit
    counts, expected = np.bincount(drawn.ravel() >> 24, minlength=256), drawn.size / 256
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_square - 255) < SIGMAS * np.sqrt(2 * 255)


@pytest.mark.parametrize("dropout", PROBABILITIES)
@pytest.mark.parametrize("name", KEYS)
def test_as_many_are_dropped_as_asked_in_every_row_and_column(name, dropout):
    z = centred(KEYS[name], dropout)
    assert abs(sigmas(z)) < SIGMAS
    for axis in (0, 1):
        sums = z.sum(axis) / np.sqrt(z.shape[axis])  # variance 1, and a kurtosis close to 3
        spread = np.sqrt(2 + 1 / (dropout * (1 - dropout) * z.shape[axis]))
        assert abs((sums**2 - 1).sum() / spread / np.sqrt(sums.size)) < SIGMAS


@pytest.mark.parametrize("dropout", PROBABILITIES)
def test_neighbours_are_independent(dropout):
    z = centred(KEY, dropout)
    for apart in (1, 2, 3, 4, 8, 32, 64, 128, 512, 1000, 1024):
        assert abs(sigmas(z[:, apart:] * z[:, :-apart])) < SIGMAS, f"{apart} columns"
    for apart in (1, 2, 4, 8, 64, 512):
        assert abs(sigmas(z[apart:] * z[:-apart])) < SIGMAS, f"{apart} rows"
        assert abs(sigmas(z[apart:, apart:] * z[:-apart, :-apart])) < SIGMAS
    assert abs(sigmas(z[:, 2:] * z[:, 1:-1] * z[:, :-2])) < SIGMAS


def next_to(words):
    """Keys that differ from these words in one bit."""
    low, high = np.eye(2, dtype=np.uint32), np.eye(2, dtype=np.uint32) << 31
    return [jax.random.wrap_key_data(words ^ bit) for bit in (*low, *high)]


@pytest.mark.parametrize("dropout", [0.05, 0.5])
def test_layers_modules_steps_and_similar_keys_are_independent(dropout):
    # Not the first numbers: the keys of split are those that fold_in makes of 0, 1, 2, ….
    layers, steps = jax.random.split(KEY, 3), [jax.random.fold_in(KEY, i) for i in (10, 11, 12)]
    similar = next_to(jax.random.key_data(KEY))
    swapped = jax.random.wrap_key_data(jax.random.key_data(KEY)[::-1])
    keys = (KEY, swapped, *layers, *steps, *similar)
    drawn = [centred(key, dropout)[:512, :1024] for key in keys]
    for i, one in enumerate(drawn):
        for other in drawn[:i]:
            assert abs(sigmas(one * other)) < SIGMAS
            assert abs(sigmas(one[:, 1:] * other[:, :-1])) < SIGMAS
            assert abs(sigmas(one[1:] * other[:-1])) < SIGMAS


def test_mean_and_variance_are_those_of_dropout():
    """E = x and Var = x² p / (1 - p); the mean of n draws errs by √(Var / n)."""
    p, n = 0.1, ROWS * WIDTH
    y = np.float64(drop(jnp.full((ROWS, WIDTH), 3.0), KEY, p)) * keep_scale(p)
    variance = 9 * p / (1 - p)
    assert abs(y.mean() - 3) < SIGMAS * np.sqrt(variance / n)
    fourth = np.mean((y - 3) ** 4) - variance**2
    assert abs(((y - 3) ** 2).mean() - variance) < SIGMAS * np.sqrt(fourth / n)


def test_a_mask_depends_on_shape_by_row_and_column_only():
    x = jnp.zeros((4, 6, 33), jnp.bfloat16)
    whole = np.asarray(keep_mask(x, KEY, 0.3))
    np.testing.assert_array_equal(whole.reshape(24, 33), keep_mask(x.reshape(24, 33), KEY, 0.3))
    np.testing.assert_array_equal(whole[:2], keep_mask(x[:2], KEY, 0.3))
    np.testing.assert_array_equal(
        whole.reshape(24, 33)[:, :9], keep_mask(x[..., :9].reshape(24, 9), KEY, 0.3)
    )
    nan = jnp.full_like(x, jnp.nan)
    np.testing.assert_array_equal(np.isnan(drop(nan, KEY, 0.3)), whole)


@pytest.mark.parametrize(
    "spec", [("a", None, None), (None, "a", None), (None, None, "a"), ("a", None, "b")]
)
def test_a_mask_is_the_same_on_a_mesh(spec):
    x = jnp.arange(8 * 8 * 64.0).reshape(8, 8, 64) + 1
    shape = (4, 2) if "b" in spec else (8, 1)
    mesh = jax.make_mesh(shape, ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    program = jax.jit(lambda x: drop(x, KEY, 0.3), in_shardings=sharding, out_shardings=sharding)
    got = program(jax.device_put(x, sharding))
    assert len({s.device for s in got.addressable_shards}) == 8
    np.testing.assert_array_equal(got, drop(x, KEY, 0.3))


def test_a_mask_is_the_same_under_vmap_and_scan():
    keys, x = jax.random.split(KEY, 3), jnp.ones((3, 4, 5, 16))
    want = [drop(one, key, 0.3) for one, key in zip(x, keys, strict=True)]
    np.testing.assert_array_equal(jax.vmap(drop, (0, 0, None))(x, keys, 0.3), want)
    scanned = jax.lax.scan(lambda _, pair: (None, drop(*pair, 0.3)), None, (x, keys))[1]
    np.testing.assert_array_equal(scanned, want)


def test_the_backward_pass_draws_the_same_mask():
    """The gradient of x is the kept weight, of the forward mask, with any rematerialisation."""
    x, keys = jnp.ones((4, 33)), jax.random.split(KEY, 3)
    kept = np.stack([keep_mask(x, key, 0.4) for key in keys])

    def total(x, weights, checkpoint):
        def body(sum_, layer):
            return sum_ + jnp.sum(drop(x, layer[0], 0.4) * layer[1]), None

        return jax.lax.scan(checkpoint(body), 0.0, (keys, weights))[0]

    policies = (
        lambda f: f,
        jax.checkpoint,
        functools.partial(jax.checkpoint, policy=policy),
        functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.everything_saveable),
    )
    weights = jnp.arange(3.0).reshape(3, 1, 1) + jnp.ones((3, 4, 33))
    for checkpoint in policies:
        grads = jax.jit(jax.grad(total, (0, 1)), static_argnums=2)(x, weights, checkpoint)
        np.testing.assert_array_equal(grads[0], (kept * np.asarray(weights)).sum(0))
        np.testing.assert_array_equal(grads[1], kept)


def test_no_index_of_the_shape_of_x_is_held_by_the_loop_over_layers():
    """XLA moves what does not depend on a layer out of the loop; the layers would all read it."""
    x, keys = jax.ShapeDtypeStruct((4, 96, 160), jnp.bfloat16), jax.random.split(KEY, 3)

    def layers(x, keys):
        return jax.lax.scan(
            lambda x, key: (drop(x, key, 0.1) @ jnp.eye(160, dtype=x.dtype), None), x, keys
        )[0]

    text = jax.jit(layers).lower(x, keys).compile().as_text()
    (loop,) = [line for line in text.splitlines() if " while(" in line]
    assert "u32[4,96,160]" not in loop and "pred[4,96,160]" not in loop
