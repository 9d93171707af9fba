"""Models: packing, padding, decoding, rematerialisation and configuration."""

import dataclasses
import json
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxprs import equations
from tiny_models import (
    CONFIGS,
    LENGTH,
    LLAMA,
    LLAMA3_ROPE,
    build,
    decode,
    each_family,
    run,
    tokens,
)

from jlora import lora
from jlora.config import LoraConfig, QuantConfig
from jlora.errors import ConfigError
from jlora.models import Model, attention_context, init_params, layer_scan
from jlora.models.other_types import what_is
from jlora.models.registry import FAMILIES, parse_config
from jlora.ops.dropout import drop
from jlora.quant.params import quantize_params
from jlora.tree import paths


def assert_same(got, want):
    """Equal up to the order of float32 sums."""
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


@each_family()
def test_packed_documents_match_separate_documents(name):
    model, params = build(name)
    lengths = (9, 4, 7)
    rows = tokens(model, 3, 9)
    ids = np.concatenate([*(row[:n] for row, n in zip(rows, lengths, strict=True)), [0, 0]])[None]
    segments = np.repeat([1, 2, 3, 0], [*lengths, 2])[None]
    positions = np.concatenate([np.arange(n) for n in (*lengths, 2)])[None]
    packed = run(model, params, ids, positions, segments)
    assert np.isfinite(packed).all()
    for row, (n, start) in enumerate(zip(lengths, (0, 9, 13), strict=True)):
        alone = run(model, params, rows[row : row + 1, :n])
        assert_same(packed[0, start : start + n], alone[0])


def test_documents_leak_without_segment_ids():
    model, params = build("llama")
    ids = tokens(model, 1, 13)
    positions = np.concatenate([np.arange(9), np.arange(4)])[None]
    segments = np.repeat([1, 2], [9, 4])[None]
    leaked, packed = model(params, ids, positions), model(params, ids, positions, segments)
    assert np.abs(leaked - packed)[:, 9:].max() > 1e-2


@each_family()
def test_padding_on_either_side_changes_nothing(name):
    model, params = build(name)
    ids = tokens(model, 1, 8)
    alone = run(model, params, ids)
    for before, after in ((3, 0), (0, 3)):
        width = ((0, 0), (before, after))
        row = (np.pad(x, width) for x in (ids, np.arange(8)[None], np.ones_like(ids)))
        assert_same(run(model, params, *row)[:, before : before + 8], alone)


@each_family(but="phi3-long")  # whose rope depends on the length of the document
def test_decoding_token_by_token_gives_the_whole_rows_logits(name):
    model, params = build(name)
    ids = tokens(model, 2, LENGTH)
    assert_same(decode(model, params, ids), run(model, params, ids))


@pytest.mark.parametrize("name", ["llama", pytest.param("qwen2", marks=pytest.mark.slow), "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_of_different_lengths_share_a_batch(name, side):
    model, params = build(name)
    prompts = [tokens(model, 1, n, seed=n)[0] for n in (7, 3)]
    after = tokens(model, 2, 4, seed=9)
    ids, positions = np.zeros((2, 8), np.int32), np.full((2, 8), -1, np.int32)
    for row, prompt in enumerate(prompts):
        place = slice(0, len(prompt)) if side == "right" else slice(8 - len(prompt), 8)
        ids[row, place], positions[row, place] = prompt, np.arange(len(prompt))
    cache = model.init_cache(2, 16)
    every, _ = model.decode(params, ids, positions, cache)
    logits, cache = model.decode(params, ids, positions, cache, last_only=True)
    np.testing.assert_array_equal(cache.length, [7, 3])
    steps = [logits]
    for t in range(4):
        logits, cache = model.decode(params, after[:, t : t + 1], None, cache)
        steps.append(logits[:, 0])
    got = np.stack(steps, 1)
    for row, prompt in enumerate(prompts):
        expected = model(params, np.concatenate([prompt, after[row]])[None])[0]
        np.testing.assert_allclose(got[row], expected[len(prompt) - 1 :], atol=2e-5)
        valid = positions[row] >= 0
        np.testing.assert_allclose(every[row][valid], expected[: len(prompt)], atol=2e-5)


def test_tokens_beyond_the_cache_are_dropped():
    model, params = build("llama")
    ids = tokens(model, 1, 6)
    _, cache = model.decode(params, ids[:, :4], None, model.init_cache(1, 4))
    logits, after = model.decode(params, ids[:, 4:], None, cache)
    np.testing.assert_array_equal(after.k, cache.k)
    assert np.isfinite(logits).all()


@pytest.mark.parametrize(
    ("policy", "quantized"),
    [
        pytest.param(True, True, marks=pytest.mark.slow),
        ("dots_with_no_batch_dims_saveable", False),
    ],
)
def test_rematerialised_gradients_are_the_same(policy, quantized):
    model, params = build("llama-rope")
    if quantized:
        dense = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")  # quick to compile
        config = QuantConfig(bnb_4bit_compute_dtype="float32", llm_int8_skip_modules=dense)
        params = quantize_params(params, config)
    ids = tokens(model, 2, 8)
    x = params["model"]["embed_tokens"]["embedding"]

    def loss(x, model):
        tree = {**params, "model": {**params["model"], "embed_tokens": {"embedding": x}}}
        return jnp.sum(jnp.sin(model(tree, ids)))

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    with mock.patch("jlora.ops.remat.policy", jax.checkpoint_policies.everything_saveable):
        plain = gradient(x, model)
    jax.clear_caches()  # or JAX would reuse the trace
    remat = dataclasses.replace(model, gradient_checkpointing=policy)
    for variant in (remat, model):
        np.testing.assert_allclose(gradient(x, variant), plain, rtol=1e-4, atol=1e-5)
        assert policies(jax.make_jaxpr(variant)(params, ids)) == {
            layer_scan.checkpoint_policy(variant.gradient_checkpointing)
        }


def policies(jaxpr):
    """The policies of a program's rematerialised parts."""
    found = [e for e in equations(jaxpr) if e.primitive.name.startswith("remat")]
    return {equation.params["policy"] for equation in found}


@pytest.mark.parametrize("name", ["llama", "gemma3", "cohere2", "qwen2", "mixtral"])
def test_code_does_not_grow_with_depth(name):
    def lines(layers):
        hf = {**CONFIGS[name], "num_hidden_layers": layers}
        model = Model.from_config(hf, "float32", gradient_checkpointing=True)
        gradient = jax.jit(jax.grad(lambda params, ids: jnp.sum(model(params, ids))))
        return gradient.lower(model.shapes, np.zeros((1, 8), np.int32)).as_text().count("\n")

    assert lines(4) == lines(32)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_logits_are_float32_in_every_dtype(name):
    exact, params = build(name)
    ids = tokens(exact, 1, 8)
    want = np.asarray(exact(params, ids))
    for dtype, bound in (("bfloat16", 0.1), ("float16", 0.02)):
        model = dataclasses.replace(exact, dtype=dtype)
        cast = jax.tree.map(lambda x, d=dtype: x.astype(d), params)
        got = model(cast, ids)
        assert got.dtype == jnp.float32
        assert model.features(cast, ids).dtype == jnp.dtype(dtype)
        assert np.abs(got - want).max() < bound * np.abs(want).max()


def test_models_are_hashable_and_compare_by_value():
    a, b = (Model.from_config(LLAMA, "float32") for _ in range(2))
    assert a == b and hash(a) == hash(b)
    assert a != dataclasses.replace(a, gradient_checkpointing=True)
    assert json.loads(a.config.hf_json) == LLAMA == a.config.hf


def test_trees_are_named_as_in_transformers():
    names = {".".join(p) for p, _ in paths.walk(build("llama")[1])}
    assert "model.layers.self_attn.q_proj.kernel" in names and "lm_head.kernel" in names
    names = {".".join(p) for p, _ in paths.walk(build("gpt2")[1])}
    assert "transformer.h.attn.c_attn.kernel" in names and "lm_head.kernel" not in names


def test_init_params_uses_the_configured_standard_deviation():
    model = Model.from_config({**LLAMA, "hidden_size": 128, "initializer_range": 0.05}, "float32")
    params = init_params(jax.random.key(0), model)
    for path, leaf in paths.walk(params):
        if path[-1] == "scale":
            np.testing.assert_array_equal(leaf, 1)
        else:
            assert np.std(leaf) == pytest.approx(0.05, rel=0.05)
    again = init_params(jax.random.key(0), model)
    jax.tree.map(np.testing.assert_array_equal, params, again)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llamma"}, r"model_type: model_type 'llamma'[\s\S]*'llama'"),
        ({"model_type": "custom", "auto_map": {"AutoModel": "x.M"}}, "never runs"),
        ({"rope_scaling": {"rope_type": "mrope"}}, r"rope_scaling: rope_type: 'mrope'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters: linear needs factor"),
        (
            {"rope_parameters": {**LLAMA3_ROPE, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
        ({"rope_parameters": {"full_attention": {}}}, "per layer type"),
        ({"hidden_act": "siluu"}, r"hidden_act: 'siluu'[\s\S]*'silu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: .*already quantized"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: 3 does not divide 4"),
        ({"hidden_size": 33}, "hidden_size: 33"),
        ({"hidden_size": "x"}, "hidden_size: must be int"),
        ({"vocab_size": 0}, "vocab_size: must be positive"),
        ({"mlp_bias": 1}, "mlp_bias: must be true or false"),
        ({"model_type": "gpt2", "add_cross_attention": True}, "add_cross_attention"),
        ({"model_type": "gpt2", "activation_function": "tanh"}, "activation_function"),
        ({"model_type": "gpt2", "n_embd": 30}, "n_embd: 30"),
        ({"model_type": "mistral", "layer_types": ["full_attention"] * 2}, "layer_types"),
        (
            {"model_type": "qwen2", "layer_types": ["full_attention"]},
            "layer_types: must be a list with 2",
        ),
        ({"model_type": "qwen3", "layer_types": ["linear_attention"] * 2}, "'linear_attention'"),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 2}, "use_sliding_window"),
        (
            {"model_type": "gemma", "use_bidirectional_attention": True},
            "use_bidirectional_attention",
        ),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional_attent"),
        ({"model_type": "phi", "tie_word_embeddings": True}, "tie_word_embeddings: true is not"),
        (
            {"model_type": "phi3", "rope_scaling": {"type": "yarn", "factor": 2.0}},
            "rope_scaling: rope_type 'yarn'",
        ),
        (
            {"model_type": "opt", "layer_norm_elementwise_affine": False},
            "layer_norm_elementwise_affine",
        ),
        ({"model_type": "mixtral", "router_jitter_noise": 0.1}, "router_jitter_noise"),
        ({"model_type": "cohere2", "layer_types": ["chunked_attention"] * 2}, "chunked_attention"),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, "no_rope_layers: must be a list of 2"),
        ({"model_type": "gpt_oss", "hidden_act": "no"}, "hidden_act"),
    ],
)
def test_unsupported_switches_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        parse_config({**LLAMA, **change})


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        ({"model_type": "foo"}, "'foo' is not supported\n  fix: supported: llama, "),
        ({"model_type": "llama4"}, "of a type that is not implemented\n  fix: supported: llama, "),
        ({"model_type": "t5"}, "it is an encoder-decoder model\n  fix: supported"),
        ({"model_type": "qwen3_next"}, "it is a state-space or recurrent model"),
        ({"model_type": "qwen9"}, "'qwen9' is not supported\n  fix: supported"),
        ({"model_type": "new", "vision_config": {}}, "it is a multimodal model of a type that"),
        ({"model_type": "qwen2vl", "vision_config": {}}, "did you mean 'qwen2_vl'?"),
        ({"model_type": "new", "is_encoder_decoder": True}, "it is an encoder-decoder model"),
        ({"model_type": "mixtrl"}, "'mixtrl' is not supported\n  fix: did you mean 'mixtral'?"),
        ({"model_type": "qwen3moe"}, "did you mean 'qwen3_moe'?"),
    ],
)
def test_a_model_type_is_named_for_what_it_is(hf, message):
    """Types whose names differ by a number are different models, and none is a misspelling."""
    with pytest.raises(ConfigError, match=re.escape(message)):
        Model.from_config(hf)


def test_no_supported_type_is_listed_as_another():
    assert not [name for name in FAMILIES if what_is({"model_type": name})]


@each_family()
def test_malformed_values_are_config_errors(name):
    more = {"layer_types": None, "max_window_layers": 1, "pad_token_id": 0, "rope_theta": 1e4}
    hf, understood = {**CONFIGS[name], **more}, 0
    for key in hf:
        for bad in ("x", [], {}, -1, True, 1.5, ["x"], {"a": {}}, float("nan"), [[]]):
            try:
                parse_config({**hf, key: bad})
                understood += 1
            except ConfigError as error:
                assert key in str(error)
    assert understood < 8 * len(hf)


@pytest.mark.parametrize(
    "options",
    [{"attention": "flsh"}, {"dtype": "int8"}, {"gradient_checkpointing": "everything"}],
)
def test_unknown_options_are_refused(options):
    with pytest.raises(ConfigError):
        Model(parse_config(LLAMA), **options)


@pytest.mark.parametrize("name", ["gemma3", "qwen2"])
def test_a_branch_for_each_window_computes_the_same(name, monkeypatch):
    model, params = build(name)
    ids = tokens(model, 2, LENGTH)
    want = run(model, params, ids)
    monkeypatch.setattr(attention_context, "needs_static_window", lambda backend: True)
    branching = dataclasses.replace(model, attention="reference")
    assert_same(run(branching, params, ids), want)
    assert "cond" in str(jax.make_jaxpr(branching)(params, ids))


def test_layers_may_differ_in_their_window():
    assert parse_config(CONFIGS["qwen2"]).windows == (None, 5)
    assert parse_config({**CONFIGS["qwen2"], "use_sliding_window": False}).windows == (None, None)
    assert parse_config(CONFIGS["mistral"]).windows == (5, 5)
    assert parse_config({**CONFIGS["mistral"], "sliding_window": None}).windows == (None, None)
    types = {"layer_types": ["sliding_attention", "full_attention"]}
    assert parse_config({**CONFIGS["qwen3"], **types}).windows == (5, None)


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_projections_of_one_input_share_a_dropout_mask(name, monkeypatch):
    """Four inputs in a layer, four masks: of q, k and v; o; gate and up; down."""
    model, params = build(name)
    config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5)
    adapter = lora.init_adapter(jax.random.key(1), params, config)
    attached = lora.attach(params, adapter, dropout_key=jax.random.key(2))
    drawn = []
    monkeypatch.setattr(
        "jlora.ops.dot.drop", lambda x, key, p: drawn.append(x.shape) or drop(x, key, p)
    )
    jax.clear_caches()  # of a trace that was made without the patch
    jax.eval_shape(model.features, attached, tokens(model, 2, LENGTH))
    assert len(drawn) == 4
