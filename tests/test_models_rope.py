"""RoPE compared with complex numbers, packed documents with separate ones; malformed settings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.errors import ConfigError
from jlora.models.config_reader import ConfigReader
from jlora.models.rope import Rope, parse_rope, rotate

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.5,
    "attention_factor": 1.0,
    "truncate": True,
    "original_max_position_embeddings": 16,
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "factor": 4.0,
    "attention_factor": 1.5,
    "original_max_position_embeddings": 8,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0}


def rope_of(head_dim=8, max_positions=8, more=None, **settings) -> Rope:
    json = {**(more or {}), **({"rope_parameters": settings} if settings else {})}
    return parse_rope(ConfigReader(json, "config.json"), head_dim, max_positions)


def values(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_rotates_pairs_as_complex_numbers(interleaved):
    """The last two of ten dimensions are not rotary."""
    x = values(1, 5, 2, 10)
    positions = np.array([[0, 1, 2, 700, 9000]])
    rope = parse_rope(ConfigReader({"rope_theta": 100}, "config.json"), 10, 8, partial=0.8)
    got = np.asarray(rotate(jnp.asarray(x), rope.table(jnp.asarray(positions)), interleaved))
    real, imaginary = (
        (slice(0, 8, 2), slice(1, 8, 2)) if interleaved else (slice(0, 4), slice(4, 8))
    )
    angles = positions[..., None] * 100.0 ** (-np.arange(0, 8, 2) / 8)
    turned = (x[..., real] + 1j * x[..., imaginary]) * np.exp(1j * angles)[:, :, None]
    # an angle of 9000 radians is rounded to 5e-4
    np.testing.assert_allclose(got[..., real], turned.real, atol=2e-3)
    np.testing.assert_allclose(got[..., imaginary], turned.imag, atol=2e-3)
    np.testing.assert_array_equal(got[..., 8:], x[..., 8:])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_a_zero_angle_changes_no_bit(dtype, interleaved):
    x = jnp.asarray(values(2, 3, 2, 12)).astype(dtype)
    nothing = jnp.ones((2, 3, 4)), jnp.zeros((2, 3, 4))
    got = rotate(x, nothing, interleaved)
    assert got.dtype == x.dtype
    np.testing.assert_array_equal(got, x)


def test_attention_scaling_is_on_rotary_dimensions_only():
    x = values(1, 3, 1, 8)
    table = Rope((0.0, 0.0), attention_scaling=1.5).table(jnp.zeros((1, 3), int))
    got = rotate(jnp.asarray(x), table)
    np.testing.assert_array_equal(got, np.concatenate([1.5 * x[..., :4], x[..., 4:]], -1))


def test_llama3_keeps_high_and_divides_low_frequencies():
    plain = np.array(rope_of(64, more={"rope_theta": 5e5}).frequencies)
    llama3 = np.array(rope_of(64, more={"rope_theta": 5e5}, **LLAMA3).frequencies)
    np.testing.assert_array_equal(llama3[:10], plain[:10])
    np.testing.assert_array_equal(llama3[-5:], plain[-5:] / 8)
    assert np.all((llama3 <= plain) & (llama3 >= plain / 8))


@pytest.mark.parametrize("settings", [DYNAMIC, LONGROPE], ids=["dynamic", "longrope"])
def test_packed_documents_are_rotated_like_separate_ones(settings):
    """Documents shorter, as long as, and longer than the context of 8, and padding between."""
    rope = rope_of(**settings)
    rows = [[(7, 12), (0, 1), (3, 8)], [(90001, 8), (0, 1), (3, 12)]]
    ids = jnp.asarray([[n for n, length in row for _ in range(length)] for row in rows])
    positions = jnp.asarray([[p for _, length in row for p in range(length)] for row in rows])
    packed = rope.table(positions, ids)
    for row, documents in enumerate(rows):
        start = 0
        for _, length in documents:
            alone = rope.table(jnp.arange(length)[None])
            for actual, expected in zip(packed, alone, strict=True):
                np.testing.assert_allclose(
                    actual[row, start : start + length], expected[0], atol=3e-6
                )
            start += length
    short, long = (np.asarray(rope.table(jnp.arange(n)[None])[1])[0, 7] for n in (8, 9))
    assert np.abs(short - long)[1:].min() > 1e-3  # the length matters


@pytest.mark.parametrize(
    "settings", [LLAMA3, YARN, DYNAMIC, LONGROPE], ids=lambda s: s["rope_type"]
)
def test_only_what_depends_on_length_computes_it(settings):
    rope, ids = rope_of(**settings), jnp.ones((1, 4), int)
    jaxpr = jax.make_jaxpr(rope.table)(ids, ids)
    names = {equation.primitive.name for equation in jaxpr.eqns}
    static = {"broadcast_in_dim", "convert_element_type", "mul", "cos", "sin"}
    assert (names <= static) == (settings in (LLAMA3, YARN))


def test_is_a_static_argument():
    table = jax.jit(Rope.table, static_argnums=0)
    for settings in (DYNAMIC, LONGROPE):
        again = rope_of(**settings)
        assert {rope_of(**settings): 1}[again] == 1
        table(again, jnp.arange(3)[None])


BAD = ("x", [], {}, -1, True, ["x"], [[]], [1.0], [1.0, 1.0, 1.0, -1.0], {"a": {}}, float("nan"))


@pytest.mark.parametrize(
    "settings", [LLAMA3, YARN, DYNAMIC, LONGROPE], ids=lambda s: s["rope_type"]
)
def test_malformed_settings_are_named(settings):
    for key in (*settings, "rope_theta", "partial_rotary_factor"):
        for bad in BAD:
            if key == "truncate" and bad is True:
                continue
            per_type = "per layer type" if isinstance(bad, dict) else key
            with pytest.raises(ConfigError, match=f"config.json: rope_parameters.*{per_type}"):
                rope_of(**{**settings, key: bad})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rope_type": "axial"}, "rope_parameters: rope_type: 'axial' is not supported"),
        ({"rope_type": None}, "rope_type: None"),
        ({"rope_type": "linear"}, "rope_parameters: linear needs factor"),
        ({"rope_type": "linear", "factor": None}, "factor: must be float"),
        ({"rope_type": "yarn"}, "yarn needs factor"),
        ({"rope_type": "longrope", "short_factor": []}, "longrope needs long_factor"),
        ({"type": "su", "factor": 2}, "su needs short_factor, long_factor"),
        ({"rope_type": "llama3", "factor": 8}, "llama3 needs low_freq_factor, high_freq_factor"),
        ({**LLAMA3, "high_freq_factor": 1.0}, "high_freq_factor: 1.0 must be more than"),
        ({**LONGROPE, "long_factor": [1.0] * 3}, "long_factor: must be a list of 4 numbers"),
        ({**LONGROPE, "long_factor": [1.0, 1.0, 1.0, None]}, "long_factor: must be float"),
        ({**LONGROPE, "original_max_position_embeddings": 1}, "must be at least 2"),
        ({"rope_type": "default", "rope_theta": 1}, "rope_theta: must be more than 1"),
        ({"full_attention": {"rope_type": "default"}}, "per layer type"),
        ({"rope_type": "proportional", "partial_rotary_factor": 1.5}, "must be at most 1"),
    ],
)
def test_what_is_not_supported_is_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        rope_of(**settings)


def read_rope(json, head_dim=8, **more):
    return parse_rope(ConfigReader(json, "config.json"), head_dim, 8, **more)


@pytest.mark.parametrize(
    ("json", "more", "message"),
    [
        ({}, {"head_dim": 7}, "config.json: head_dim: 7 of 7 dimensions"),
        ({"rope_scaling": "linear"}, {}, "rope_scaling: must be an object"),
        ({"rope_theta": "x"}, {}, "config.json: rope_theta: must be float"),
        (
            {"partial_rotary_factor": 0.5, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {},
            "this family rotates whole heads",
        ),
        ({"partial_rotary_factor": 0.4}, {"partial": 1.0}, "partial_rotary_factor: 3 of 8"),
        ({"partial_rotary_factor": 0.1}, {"partial": 1.0}, "partial_rotary_factor: 0 of 8"),
        ({"rope_scaling": DYNAMIC}, {"partial": 0.25}, "more than one pair"),
        ({"rope_parameters": {"b": "x"}}, {"layer_type": "b"}, "rope_parameters: b: must be"),
        (
            {"rope_local_base_freq": -1},
            {"layer_type": "sliding_attention"},
            "rope_local_base_freq: must be positive",
        ),
        (
            {"rope_scaling": {"full_attention": {}}},
            {"layer_type": "full_attention"},
            "rope_scaling: rope settings per layer type",
        ),
    ],
)
def test_what_a_family_cannot_have_is_named(json, more, message):
    with pytest.raises(ConfigError, match=message):
        read_rope(json, **more)


def test_common_settings_hold_for_every_layer_type():
    json = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e5}}
    assert read_rope(json, layer_type="sliding_attention") == read_rope(json) != read_rope({})
