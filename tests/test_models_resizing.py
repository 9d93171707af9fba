"""Embeddings and heads of another size: in memory and while loading, which give the same."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_models import CONFIGS, build, run, tokens

import jlora
from jlora.errors import ConfigError
from jlora.io.hf import load_pretrained, save_pretrained
from jlora.models import Model, vocabulary_leaves, with_vocab_size
from jlora.tree import paths

FAMILIES = ("llama", "llama-rope", "gpt2", "phi", "opt-350m", "gpt_neox", "qwen2_moe-mlp-first")
"""Untied; tied; tied and stored otherwise; a head with a bias; a projected embedding; other names;
a mixture."""


def rows(leaf, value):
    """A leaf as [tokens, …]."""
    return np.asarray(value).T if leaf.kind == "kernel" else np.asarray(value)


@pytest.mark.parametrize("name", FAMILIES)
def test_new_rows_are_the_mean_of_the_others(name, tmp_path):
    model, params = build(name)
    size = model.config.vocab_size
    more, grown = jlora.resize_token_embeddings(model, params, size + 3)
    assert more.config.vocab_size == more.config.hf["vocab_size"] == size + 3
    before, after = dict(paths.walk(params)), dict(paths.walk(grown))
    changed = [leaf.path for leaf in vocabulary_leaves(model)]
    heads = 0 if model.config.tie_word_embeddings else 1 + model.config.head_bias
    assert len(changed) == 1 + heads
    for leaf in vocabulary_leaves(model):
        old, new = (rows(leaf, x[leaf.path]) for x in (before, after))
        np.testing.assert_array_equal(new[:size], old)
        want = np.broadcast_to(old.astype(np.float64).mean(0), new[size:].shape)
        np.testing.assert_allclose(new[size:], want, rtol=1e-6, atol=1e-7)
    assert all(after[p] is before[p] for p in before if p not in changed)
    assert {p: x.shape for p, x in after.items()} == {
        p: x.shape for p, x in paths.walk(more.shapes)
    }
    save_pretrained(tmp_path / "base", model, params)
    loaded, read = load_pretrained(tmp_path / "base", dtype="float32", vocab_size=size + 3)
    assert loaded.config.vocab_size_in_files == size
    assert loaded.shapes == more.shapes
    jax.tree.map(np.testing.assert_array_equal, read, grown)
    save_pretrained(tmp_path / "more", loaded, read)
    again, back = load_pretrained(tmp_path / "more", dtype="float32")
    assert again.config.vocab_size == size + 3 and again.config.vocab_size_in_files is None
    jax.tree.map(np.testing.assert_array_equal, back, grown)


def test_known_tokens_have_the_same_logits(tmp_path):
    model, params = build("phi")
    save_pretrained(tmp_path, model, params)
    more, grown = load_pretrained(tmp_path, dtype="float32", vocab_size=64)
    ids = tokens(model, 2, 8)
    want = run(model, params, ids)
    np.testing.assert_allclose(run(more, grown, ids)[..., :61], want, atol=1e-5)


def test_a_vocabulary_becomes_smaller(tmp_path):
    model, params = build("phi")
    save_pretrained(tmp_path, model, params)
    less, cut = jlora.resize_token_embeddings(model, params, 50)
    loaded, read = load_pretrained(tmp_path, dtype="float32", vocab_size=50)
    assert loaded.shapes == less.shapes
    jax.tree.map(np.testing.assert_array_equal, read, cut)
    ids = tokens(less, 2, 8)
    want = run(model, params, ids)[..., :50]
    np.testing.assert_allclose(run(less, cut, ids), want, atol=1e-5)


def test_the_same_size_changes_nothing():
    model, params = build("llama")
    same, leaves = jlora.resize_token_embeddings(model, params, model.config.vocab_size)
    assert same == model
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (leaves, params)), strict=True))
    back = with_vocab_size(with_vocab_size(model, 99), model.config.vocab_size)
    assert back.config.vocab_size_in_files is None


@pytest.mark.parametrize("chunk", [64, 2**24])
def test_the_mean_has_the_type_of_the_file_whatever_the_model_is_loaded_in(
    chunk, tmp_path, monkeypatch
):
    """So that merging into the file's own type, as it does, has the rows of the run."""
    monkeypatch.setattr("jlora.io.hf.folder.CHUNK_BYTES", chunk)
    monkeypatch.setattr("jlora.io.hf.read.CHUNK_BYTES", chunk)
    model, params = build("llama")
    save_pretrained(tmp_path, model, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
    read = {d: load_pretrained(tmp_path, d, vocab_size=63)[1] for d in ("float32", "bfloat16")}
    table, wide = (read[d]["model"]["embed_tokens"]["embedding"] for d in ("bfloat16", "float32"))
    np.testing.assert_array_equal(np.asarray(table, np.float32), wide)
    stored = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    mean = stored.astype(np.float64).mean(0).astype(stored.dtype)
    np.testing.assert_array_equal(table[61:], [mean, mean])


def test_a_text_towers_config_has_the_size_where_it_is_read(tmp_path):
    text = {**CONFIGS["llama"], "model_type": "mistral"}
    hf = {"model_type": "mistral3", "text_config": text, "vision_config": {}, "vocab_size": 61}
    model = with_vocab_size(Model.from_config(hf), 70)
    written = json.loads(model.config.hf_json)
    assert written["vocab_size"] == written["text_config"]["vocab_size"] == 70


def test_a_quantized_head_is_resized_before_or_not_at_all(tmp_path):
    model, params = build("llama")
    save_pretrained(tmp_path / "base", model, params)
    settings = jlora.QuantConfig(include_modules=("lm_head",), block_size=32)
    more, wanted = jlora.resize_token_embeddings(model, params, 64)
    wanted = jlora.quantize(wanted, settings)
    _, read = load_pretrained(tmp_path / "base", "float32", settings, vocab_size=64)
    jax.tree.map(np.testing.assert_array_equal, read, wanted)
    with pytest.raises(ConfigError, match=r"lm_head\.kernel is quantized(.|\n)*vocab_size="):
        jlora.resize_token_embeddings(more, wanted, 65)
    save_pretrained(tmp_path / "quantized", more, wanted, quantized=True)
    jlora.load_pretrained(tmp_path / "quantized", "float32")
    with pytest.raises(ConfigError, match=r"lm_head\.weight is quantized in the files"):
        jlora.load_pretrained(tmp_path / "quantized", "float32", vocab_size=66)
    body = jlora.QuantConfig(block_size=32)
    save_pretrained(tmp_path / "body", model, jlora.quantize(params, body), quantized=True)
    _, read = load_pretrained(tmp_path / "body", "float32", vocab_size=64)
    _, table = jlora.resize_token_embeddings(model, params, 64)
    np.testing.assert_array_equal(read["lm_head"]["kernel"], table["lm_head"]["kernel"])
