"""What a layer saves for the backward pass, and how XLA compiles it on a CPU."""

import dataclasses
import functools
from collections import Counter

import jax
import jax.numpy as jnp
import optax
import pytest
from jaxprs import equations

from jlora import lora
from jlora.config import LoraConfig, MeshConfig
from jlora.distributed import sharding
from jlora.distributed.mesh import compiler_options
from jlora.inference import decoding
from jlora.models import Model, init_params
from jlora.run.job import bind_adapter
from jlora.training.state import init_state
from jlora.training.step import make_train_step

LLAMA = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 256,
}
LAYERS, ROWS, R = 3, 2, 4
MODEL = Model.from_config(LLAMA, "bfloat16")
BASE = jax.eval_shape(functools.partial(init_params, model=MODEL), jax.random.key(0))


def adapter_of(**fields):
    config = LoraConfig(r=R, lora_dropout=0.1, target_modules="all-linear", **fields)
    fresh = functools.partial(lora.init_adapter, config=config)
    return jax.eval_shape(fresh, jax.random.key(1), BASE)


ADAPTER = adapter_of()


def saved_shapes(length, remat, key, adapter=ADAPTER):
    """Counts shapes, after (layers, rows), and dtypes of the arrays of ``saved_arrays``."""
    saved = saved_arrays(length, remat, key, adapter)
    return Counter((a.shape[2:], a.dtype.name) for a in saved)


def saved_arrays(length, remat, key, adapter=ADAPTER):
    """The arrays that the forward scan saves for the backward scan."""
    model = dataclasses.replace(MODEL, gradient_checkpointing=remat)
    ids = jax.ShapeDtypeStruct((ROWS, length), jnp.int32)

    def total(adapter, base, ids, key):
        return jnp.sum(model.features(bind_adapter((base, None), adapter, key), ids))

    jaxpr = jax.make_jaxpr(jax.grad(total))(adapter, BASE, ids, key)
    scans = [e for e in equations(jaxpr) if e.primitive.name == "scan"]
    loops = [
        e for e in scans if e.params["length"] == LAYERS
    ]  # the scan of DoRA's norms is included
    stacked = [[v.aval for v in e.outvars] for e in loops]
    saved = [[a for a in results if a.shape[:2] == (LAYERS, ROWS)] for results in stacked]
    return next(filter(None, saved))


@pytest.mark.parametrize("length", [16, 80], ids=["reference", "chunked"])
def test_a_layer_saves_its_products_and_nothing_else(length):
    # x @ A: one product for q, k and v, one for gate and up, and those of o and down
    expected = Counter(((length, modules * R), "bfloat16") for modules in (3, 2, 1, 1))
    expected.update(((length, n), "bfloat16") for n in (48, 64, 128, 128))  # v, o, gate and up
    expected.update(((length, n, 24), "bfloat16") for n in (4, 2))  # q and k, rotated
    expected.update([((length, 64), "bfloat16")])  # the residual stream
    expected.update([((length, 4, 24), "bfloat16")])  # the attention's result
    if length == 80:
        expected.update([((length, 4), "float32")])  # each softmax's denominator
    assert saved_shapes(length, False, None) == expected


def test_dropout_saves_nothing():
    """Its masks are drawn again: a hash costs less than writing and reading a boolean."""
    plain, dropped = (saved_shapes(16, False, key) for key in (None, jax.random.key(2)))
    assert dropped == plain


def test_dora_saves_the_products_that_its_gain_multiplies():
    """The base's product of each of the seven, or the gain's gradient would recompute it."""
    plain, dora = (
        saved_shapes(16, False, None, adapter) for adapter in (ADAPTER, adapter_of(use_dora=True))
    )
    products = Counter(((16, n), "bfloat16") for n in (96, 48, 48, 64, 128, 128, 64))
    assert dora == plain + products


def test_checkpointing_saves_only_the_residual_stream():
    assert saved_shapes(16, True, jax.random.key(2)) == {((16, 64), "bfloat16"): 1}


def test_offloading_saves_the_residual_stream_on_the_host():
    (host,) = saved_arrays(16, "offload", jax.random.key(2))
    (device,) = saved_arrays(16, True, jax.random.key(2))
    assert (host.shape, host.dtype) == (device.shape, device.dtype)
    assert (host.memory_space, device.memory_space) == (
        jax.memory.Space.Host,
        jax.memory.Space.Device,
    )


def widened_in(text):
    """The stacked arrays that a compiled program holds in float32."""
    stacks = ("64,96", "64,128", "128,64", f"{ROWS},80,128")
    # Only results in memory count: inside a fusion only slices are computed, whatever the shape.
    written = [line for line in text.splitlines() if "fusion(" in line or "tuple(" in line]
    return [s for s in stacks if any(f"f32[{LAYERS},{s}]" in line for line in written)]


def test_no_stack_of_layers_is_widened_on_a_cpu():
    """Neither bfloat16 weights nor arrays that layers save: see ``mesh.COMPILER_OPTIONS``."""
    optimizer = optax.sgd(0.1)
    state = jax.eval_shape(functools.partial(init_state, optimizer=optimizer), ADAPTER)
    tokens = jax.ShapeDtypeStruct((1, ROWS, 80), jnp.int32)
    rows = dict.fromkeys(("input_ids", "labels", "positions", "segment_ids"), tokens)

    def widened(options):
        step = make_train_step(MODEL, bind_adapter, optimizer, compiler_options=options)
        return widened_in(step.lower(state, (BASE, None), rows).compile().as_text())

    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    assert not widened(compiler_options(mesh))
    if jax.version.__version_info__ < (0, 11):  # where XLA still widens them by default
        assert widened(None)


def test_no_stack_of_layers_is_widened_during_generation(monkeypatch):
    """Otherwise reading the weights would move twice as many bytes for every token."""
    ids, numbers = jnp.zeros((1, 16), jnp.int32), jnp.zeros(1, jnp.int32)

    def widened():
        decoding._compiled.cache_clear()
        run = decoding._compiled(MODEL, 1, 16, 4, (), decoding.Sampling())
        return widened_in(run.lower(BASE, ids, ids, jax.random.key(0), numbers).compile().as_text())

    assert not widened()
    monkeypatch.setattr(decoding, "COMPILER_OPTIONS", {})
    if jax.version.__version_info__ < (0, 11):
        assert widened()
    decoding._compiled.cache_clear()
