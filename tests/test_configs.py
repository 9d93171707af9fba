"""Every file in configs/ loads, is explained by comments, and trains by the method in its name."""

import argparse
import functools
from pathlib import Path
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import pytest
from tiny_runs import standard_promotion

from jlora import config, train
from jlora.distributed import sharding
from jlora.lora import init_adapter
from jlora.models import Model, init_params
from jlora.quant.params import is_quantized, quantize_params
from jlora.run.job import bind_adapter
from jlora.training.optim import make_optimizer
from jlora.training.state import init_state
from jlora.training.step import make_train_step
from jlora.tree import paths

FOLDER = Path(__file__).parent.parent / "configs"
FILES = sorted(FOLDER.glob("*.yaml"))


def load(name: str) -> config.Config:
    return config.load(FOLDER / f"{name}.yaml")


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_a_config_loads_and_is_explained(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # from any working directory
    settings = config.load(file)
    assert settings.train.output_dir == f"outputs/{file.stem}"
    text = file.read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert f"python -m jlora.train configs/{file.name}" in text


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_the_file_name_states_the_method(file):
    settings = config.load(file)
    quantized, adapter = settings.quantization is not None, settings.lora is not None
    method = file.stem.rpartition("-")[2]
    expected = {"lora": (False, True), "full": (False, False)}.get(method, (True, True))
    assert (quantized, adapter) == expected


def test_the_documented_configs_exist():
    names = {f.stem for f in FILES}
    assert names >= {"quickstart", "quickstart-lora", "quickstart-full", "qwen3-8b-qlora"}
    assert names >= {"llama-3.1-8b-lora", "llama-3.1-8b-qlora", "dialogpt-medium-lora"}


def test_quickstart_is_qlora_on_every_linear_layer():
    c = load("quickstart")
    assert c.quantization.bnb_4bit_quant_type == "nf4"
    assert c.quantization.bnb_4bit_use_double_quant
    assert c.lora.target_modules == "all-linear"
    assert c.evaluate.exact_match


def test_dialogpt_has_the_settings_of_the_article():
    c = load("dialogpt-medium-lora")
    assert c.model.name_or_path == "microsoft/DialoGPT-medium"
    assert (c.lora.r, c.lora.lora_alpha, c.lora.lora_dropout) == (16, 32, 0.1)
    assert tuple(c.lora.target_modules) == ("q_proj", "v_proj")
    t = c.train
    assert (t.per_device_train_batch_size, t.gradient_accumulation_steps) == (4, 4)
    assert (t.num_train_epochs, t.learning_rate) == (3, 2e-4)
    assert (t.fp16, t.bf16, t.save_steps, t.logging_steps) == (True, False, 500, 100)


def test_the_config_of_the_quickstart_base_loads(tmp_path, monkeypatch):
    """base.yaml names files that make_model writes before it trains."""
    assets = Path(config.__file__).parent.parent / "assets" / "quickstart"
    (tmp_path / "init").mkdir()
    (tmp_path / "corpus").mkdir()
    for name in ("text", "chat"):
        (tmp_path / "corpus" / f"{name}.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    settings = config.load(assets / "base.yaml")
    assert settings.model.name_or_path == str(tmp_path / "init")
    assert (settings.lora, settings.quantization) == (None, None)


QWEN3_8B = {
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 12_288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "rope_theta": 1_000_000.0,
}


@pytest.mark.slow
def test_the_qlora_step_compiles_at_full_width():
    """Qwen3-8B's step of two layers from abstract arrays: its quantized leaves and its memory."""
    settings = load("qwen3-8b-qlora")
    hf = QWEN3_8B | {"num_hidden_layers": 2, "tie_word_embeddings": False}
    remat, dtype = settings.train.gradient_checkpointing, settings.compute_dtype
    model = Model.from_config(hf, dtype, gradient_checkpointing=remat)

    def base(key):
        return quantize_params(init_params(key, model), settings.quantization)

    frozen = jax.eval_shape(base, jax.random.key(0))
    kernels = [leaf for leaf in jax.tree.leaves(frozen, is_leaf=is_quantized) if is_quantized(leaf)]
    assert len(kernels) == 7
    assert 8 * sum(q.nbytes for q in kernels) <= 4.13 * sum(q.size for q in kernels)
    adapter = jax.eval_shape(
        functools.partial(init_adapter, config=settings.lora), jax.random.key(1), frozen
    )
    pairs = dict(paths.walk(adapter.weights))
    chex.assert_tree_shape_suffix(
        [a for path, a in pairs.items() if path[-1] == "lora_A"], (settings.lora.r,)
    )
    assert len(pairs) == 2 * len(kernels)
    optimizer = make_optimizer(settings.train, 1000, adapter)
    state = jax.eval_shape(functools.partial(init_state, optimizer=optimizer), adapter)
    shape = (
        settings.train.gradient_accumulation_steps,
        settings.train.per_device_train_batch_size,
        settings.data.max_length,
    )
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
    rows = dict.fromkeys(("input_ids", "labels", "positions", "segment_ids"), tokens)
    with jax.numpy_dtype_promotion("standard"):  # optax does not promote strictly
        compiled = (
            make_train_step(model, bind_adapter, optimizer)
            .lower(state, (frozen, None), rows)
            .compile()
        )
    memory = compiled.memory_analysis()
    tables = 2 * 2 * hf["vocab_size"] * hf["hidden_size"]  # embedding and head, in bfloat16
    quantized, trained = sum(q.nbytes for q in kernels), 4 * 3 * _size(adapter)
    assert memory.argument_size_in_bytes < 1.01 * (tables + quantized + trained)


def _size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.slow
def test_a_qlora_config_trains_a_tiny_base(place, monkeypatch):
    """With the settings of Llama-3.1-8B's file: one step of 16 micro-batches."""
    monkeypatch.chdir(place.folder)
    settings = config.load(
        FOLDER / "llama-3.1-8b-qlora.yaml",
        [
            f"model.name_or_path={place.base}",
            "train.max_steps=1",
            "train.compilation_cache=false",
            "data.max_length=64",
            "evaluate.samples=0",
        ],
    )
    one = functools.partial(sharding.make_mesh, devices=jax.devices()[:1])
    with mock.patch.object(sharding, "make_mesh", one), standard_promotion():
        train.run(settings, argparse.Namespace(show_batch=False))
    out = place.folder / settings.train.output_dir
    assert (out / "adapter_model.safetensors").stat().st_size > 1000
    assert '"loss"' in (out / "metrics.jsonl").read_text()
