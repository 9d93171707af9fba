"""What the compiled step holds at once: one layer, and nothing that layers could share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import Var, jaxprs_in_params
from jaxprs import equations

import jlora
from jlora import lora
from jlora.config import LoraConfig, QuantConfig, TrainConfig
from jlora.models import Model, init_params
from jlora.ops.dot import dot
from jlora.quant import params as quantization
from jlora.quant.params import is_quantized
from jlora.training import step
from jlora.training.state import init_state
from jlora.training.step import make_train_step


def llama(layers, tied=False):
    return {
        "model_type": "llama",
        "vocab_size": 61,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": tied,
    }


def attach(frozen, adapter, key):
    return lora.attach(frozen, adapter, dropout_key=key)


def shapes_of(layers, quantized, tied=False, dropout=0.1):
    """A llama's step, its state, its base and a batch (1, 1, 40), as shapes."""
    model = Model.from_config(llama(layers, tied), "bfloat16", gradient_checkpointing=True)

    def init(key):
        params = init_params(key, model)
        return quantization.quantize_params(params, QuantConfig()) if quantized else params

    frozen = jax.eval_shape(init, jax.random.key(0))
    adapter_config = LoraConfig(r=4, lora_dropout=dropout, target_modules="all-linear")
    adapter = jax.eval_shape(
        functools.partial(lora.init_adapter, config=adapter_config), jax.random.key(1), frozen
    )
    optimizer = optax.sgd(0.1, momentum=0.9)
    state = jax.eval_shape(functools.partial(init_state, optimizer=optimizer), adapter)
    tokens = jax.ShapeDtypeStruct((1, 1, 40), jnp.int32)
    names = "input_ids", "labels", "positions", "segment_ids"

    run = make_train_step(model, attach, optimizer)
    return run, (state, frozen, dict.fromkeys(names, tokens))


@functools.cache
def compiled(layers, quantized):
    """(peak, temporaries) in bytes of the step compiled for the CPU."""
    run, arguments = shapes_of(layers, quantized, dropout=0.0)
    memory = run.lower(*arguments).compile().memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes
    peak = held + memory.temp_size_in_bytes - memory.alias_size_in_bytes
    return peak, memory.temp_size_in_bytes


def constants(scan):
    """Those inputs of a scan that are neither carried nor sliced, in any version of JAX.

    Inputs are constants, carries, stacks, in that order; a stack has an axis more than its slice,
    and a carry comes out as it is, where results are stacked.
    """
    body = scan.params["jaxpr"].jaxpr
    stacked = [o.aval.shape != i.aval.shape for o, i in zip(scan.invars, body.invars, strict=True)]
    carried = [
        o.aval.shape == i.aval.shape for o, i in zip(scan.outvars, body.outvars, strict=True)
    ]
    return scan.invars[: len(scan.invars) - sum(stacked) - sum(carried)]


def kept(jaxpr):
    """(shape, dtype) of what a scan is given once for all its steps, in all scans."""
    found = set()
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            found |= {(v.aval.shape, str(v.aval.dtype)) for v in constants(equation)}
        for inner in jaxprs_in_params(equation.params):
            found |= kept(inner)
    return found


def size(shape):
    return int(np.prod(shape))


@pytest.mark.parametrize("layers", [2, 6])
def test_qlora_needs_less_than_lora(layers):
    assert compiled(layers, True)[0] < compiled(layers, False)[0]


def test_a_layer_more_costs_its_input_and_its_gradient():
    """No dequantized matrix, and nothing else of a layer's own, is held for all layers."""
    (_, few), (_, many) = compiled(2, True), compiled(6, True)
    adapter = [shapes_of(n, True)[1][0].trainable for n in (2, 6)]
    gradient = [sum(4 * x.size for x in jax.tree.leaves(a)) for a in adapter]
    carry = 40 * 128 * 2
    smallest = 64 * 128 * 2  # k_proj's matrix
    assert many - few <= gradient[1] - gradient[0] + 4 * (2 * carry) + smallest


@pytest.mark.parametrize("quantized", [False, True])
def test_layers_share_nothing_as_large_as_scores_or_features(quantized):
    """JAX keeps what no layer changes: masks for every head, zeros, table values of every code."""
    run, arguments = shapes_of(3, quantized)
    for shape, dtype in kept(jax.make_jaxpr(run)(*arguments).jaxpr):
        assert size(shape) <= 40 * 40, (shape, dtype)  # the mask itself


def test_parts_of_the_sequence_share_no_logits_and_no_transposed_embedding(monkeypatch):
    monkeypatch.setattr(step, "CHUNK_ELEMENTS", 61 * 10)
    run, arguments = shapes_of(1, False, tied=True)
    shapes = {shape for shape, _ in kept(jax.make_jaxpr(run)(*arguments).jaxpr)}
    assert (61, 128) in shapes  # the embedding is there, as it is
    assert not {(1, 10, 61), (128, 61)} & shapes


def made_before(jaxpr, late):
    """Shapes of all results that do not depend on the inputs of these numbers."""
    waits, found = {jaxpr.invars[i] for i in late}, set()
    for equation in jaxpr.eqns:
        numbers = [i for i, v in enumerate(equation.invars) if isinstance(v, Var) and v in waits]
        for inner in jaxprs_in_params(equation.params):
            first = int(equation.primitive.name == "cond")  # the branches are not given which
            assert len(inner.invars) == len(equation.invars) - first
            found |= made_before(inner, [i - first for i in numbers])
        if numbers:
            waits |= set(equation.outvars)
        else:
            found |= {v.aval.shape for v in equation.outvars}
    return found


def test_a_weight_is_dequantized_when_its_input_is_there():
    """Nothing else keeps the compiler from dequantizing all weights of a layer at its start."""
    weight = jax.eval_shape(lambda w: jlora.nf4.quantize(w).mT, jnp.zeros((128, 64)))
    x, g = jnp.zeros((5, 64)), jnp.zeros((5, 128))

    def gradient(g, x, weight):
        return jax.vjp(lambda x: dot(x, weight), x)[1](g)[0]

    for function, inputs in ((dot, (x,)), (gradient, (g, x))):
        jaxpr = jax.make_jaxpr(function)(*inputs, weight).jaxpr
        matrix = {(128, 64), (64, 128)}
        assert matrix & made_before(jaxpr, ()), "the search itself finds a dequantized matrix"
        assert not matrix & made_before(jaxpr, range(len(inputs)))


# What ``prepare_model_for_kbit_training`` is for, without its float32 copies.


def test_norms_and_softmax_are_float32_over_weights_that_stay_narrow():
    run, arguments = shapes_of(2, True)
    frozen = arguments[1]
    dense = [x for x in jax.tree.leaves(frozen, is_leaf=is_quantized) if not is_quantized(x)]
    packed = [x for x in jax.tree.leaves(frozen, is_leaf=is_quantized) if is_quantized(x)]
    assert {str(x.dtype) for x in dense} == {str(x.dtype) for x in packed} == {"bfloat16"}
    assert {x.shape for x in dense} == {(61, 128), (128, 61), (2, 128), (128,)}
    found = list(equations(jax.make_jaxpr(run)(*arguments).jaxpr))
    for name in ("rsqrt", "exp", "reduce_max"):
        inputs = {str(e.invars[0].aval.dtype) for e in found if e.primitive.name == name}
        assert inputs == {"float32"}, name
    widened = {
        e.invars[0].aval.shape
        for e in found
        if e.primitive.name == "convert_element_type" and e.outvars[0].aval.dtype == jnp.float32
    }
    assert not {x.shape for x in dense} & widened


def test_checkpointing_is_on_and_every_part_of_the_adapter_learns():
    remat = TrainConfig(output_dir="unused").gradient_checkpointing
    model = Model.from_config(llama(2), "bfloat16", gradient_checkpointing=remat)
    params = jax.jit(init_params, static_argnums=1)(jax.random.key(0), model)
    params = quantization.quantize_params(params, QuantConfig())
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    adapter = lora.init_adapter(jax.random.key(1), params, config)
    optimizer = optax.sgd(0.1)
    run = make_train_step(model, attach, optimizer)
    ids = np.random.default_rng(0).integers(0, 61, (1, 2, 16), dtype=np.int32)
    places = np.broadcast_to(np.arange(16, dtype=np.int32), ids.shape)
    rows = {"input_ids": ids, "labels": ids, "positions": places, "segment_ids": 0 * ids + 1}
    arguments = init_state(adapter, optimizer), params, rows
    names = {e.primitive.name for e in equations(jax.make_jaxpr(run)(*arguments).jaxpr)}
    assert {"checkpoint", "remat2", "remat"} & names
    metrics = run(*arguments)[1]
    assert metrics["finite"] and metrics["has_gradient"].tolist() == [True] * 14
