"""Adapter files with other names than PEFT's: recognised, or explained in a few lines."""

import dataclasses
import json
import re

import chex
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_lora import make_params, trained
from tiny_models import build

import jlora
from jlora.config import LoraConfig
from jlora.errors import ConfigError, DataError
from jlora.io.peft.other_tools import AdapterNamesWarning

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FIELDS = {
    "r": 4,
    "target_modules": ["q_proj", "v_proj"],
    "use_dora": True,
    "modules_to_save": ["lm_head"],
}


@pytest.fixture
def saved(tmp_path):
    """Parameters, an adapter, and a function that renames the tensors of its folder."""
    params = make_params()
    adapter = trained(params, LoraConfig(**FIELDS))
    jlora.save_adapter(tmp_path, adapter)
    tensors = load_file(tmp_path / FILE)

    def rename(change):
        save_file({change(name): value for name, value in tensors.items()}, tmp_path / FILE)

    return params, adapter, rename


def with_adapter_name(name, adapter="default"):
    for end in ("lora_A", "lora_B", "lora_magnitude_vector"):
        name = name.replace(end, f"{end}.{adapter}")
    name = name.replace("lm_head.weight", f"lm_head.modules_to_save.{adapter}.weight")
    return name + ".weight" if name.endswith(f"vector.{adapter}") else name


RENAMED = {
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "a compiled layer": lambda name: name.replace("self_attn.", "self_attn._orig_mod."),
    "DistributedDataParallel": lambda name: f"module.{name}",
    "the adapter's name": with_adapter_name,
    "model. once more": lambda name: name.replace("base_model.model.", "base_model.model.model."),
    "no prefix": lambda name: name.removeprefix("base_model.model."),
    "an adapter's name with a hyphen": lambda name: with_adapter_name(name, "my-adapter"),
    "several": lambda name: with_adapter_name(f"module._orig_mod.{name}"),
}


@pytest.mark.parametrize("kind", RENAMED)
def test_known_prefixes_are_stripped_with_a_warning(saved, tmp_path, kind):
    params, adapter, rename = saved
    rename(RENAMED[kind])
    with pytest.warns(AdapterNamesWarning, match=r"tensors have names of another tool: .* is read"):
        loaded = jlora.load_adapter(tmp_path, params)
    chex.assert_trees_all_equal(loaded.weights, adapter.weights)


@pytest.mark.parametrize("kind", RENAMED)
def test_known_prefixes_are_stripped_from_weights_of_the_base_too(tmp_path, kind):
    """PEFT saves the embedding and the head beside an adapter of theirs, here of the head's."""
    params = make_params()
    adapter = trained(params, LoraConfig(target_modules=["q_proj", "lm_head"]))
    jlora.save_adapter(tmp_path, adapter)
    prefix = "base_model.model."
    table, head = params["model"]["embed_tokens"]["embedding"], params["lm_head"]["kernel"].T
    tensors = load_file(tmp_path / FILE) | {
        f"{prefix}model.embed_tokens.weight": np.ascontiguousarray(table),
        f"{prefix}lm_head.base_layer.weight": np.ascontiguousarray(head),
    }

    save_file({RENAMED[kind](name): value for name, value in tensors.items()}, tmp_path / FILE)
    with pytest.warns(AdapterNamesWarning):
        loaded = jlora.load_adapter(tmp_path, params)
    chex.assert_trees_all_equal(loaded.weights, adapter.weights)


def test_the_adapters_name_is_stripped_from_trained_rows(tmp_path):
    params = make_params()
    config = LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 4])
    adapter = trained(params, config)
    jlora.save_adapter(tmp_path, adapter)
    rows = "trainable_tokens_delta"
    tensors = load_file(tmp_path / FILE)
    assert any(name.endswith(rows) for name in tensors)
    renamed = {name.replace(rows, f"{rows}.default"): value for name, value in tensors.items()}
    save_file(renamed, tmp_path / FILE)
    with pytest.warns(AdapterNamesWarning, match=f"{rows}.default is read as"):
        loaded = jlora.load_adapter(tmp_path, params)
    chex.assert_trees_all_equal(loaded.weights, adapter.weights)


def test_two_names_for_one_tensor_are_refused(saved, tmp_path):
    params, _, rename = saved
    rename(str)
    tensors = load_file(tmp_path / FILE)
    first = next(iter(tensors))
    save_file({**tensors, f"module.{first}": tensors[first]}, tmp_path / FILE)
    with pytest.raises(DataError, match="two names"):
        jlora.load_adapter(tmp_path, params)


def test_unknown_names_are_grouped_and_the_base_is_not_blamed(saved, tmp_path):
    params, _, rename = saved
    rename(lambda name: name.replace("self_attn", "attention"))
    with pytest.raises(DataError) as caught:
        jlora.load_adapter(tmp_path, params)
    message = str(caught.value)
    assert len(message.splitlines()) <= 15
    assert "other names" in message and "base model" not in message
    name = "base_model.model.model.layers.{}.{}.q_proj.lora_A.weight"
    for kind, node in (("missing", "self_attn"), ("unknown", "attention")):
        assert f"{kind} {name.format('*', node)} (3, such as {name.format(0, node)})" in message


def test_another_base_is_named_where_shapes_differ(saved, tmp_path):
    _, _, rename = saved
    rename(str)
    wide = make_params()
    wide["lm_head"]["kernel"] = np.zeros((8, 13), np.float32)
    shapes = r"has shape \(11, 8\), expected \(13, 8\)"
    with pytest.raises(DataError, match=rf"{shapes}(.|\n)*base model"):
        jlora.load_adapter(tmp_path, wide)


def write_mlx(folder, adapter, **settings):
    """The adapter as mlx-lm writes it: (in, r), (r, out), and the scale itself."""
    tensors = {}
    for name in ("q_proj", "v_proj"):
        node = adapter.weights["model"]["layers"]["self_attn"][name]
        for i in range(3):
            module = f"model.layers.{i}.self_attn.{name}"
            tensors[f"{module}.lora_a"] = np.asarray(node["lora_A"][i])
            tensors[f"{module}.lora_b"] = np.asarray(node["lora_B"][i])
    save_file(tensors, folder / "adapters.safetensors")
    raw = {
        "fine_tune_type": "lora",
        "num_layers": 16,
        "model": "org/base",
        "lora_parameters": {"rank": 4, "scale": 2.5, "dropout": 0.0},
    }
    (folder / CONFIG).write_text(json.dumps(raw | settings))


def test_a_folder_of_mlx_lm_loads(tmp_path):
    params = make_params()
    config = LoraConfig(r=4, lora_alpha=10, target_modules=["q_proj", "v_proj"])
    adapter = trained(params, config)
    write_mlx(tmp_path, adapter)
    loaded = jlora.load_adapter(tmp_path, params)
    chex.assert_trees_all_close(jlora.merge(params, loaded), jlora.merge(params, adapter))
    write_mlx(tmp_path, adapter, fine_tune_type="full")
    with pytest.raises(ConfigError, match="fine_tune_type: full"):
        jlora.load_adapter(tmp_path, params)
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    with pytest.raises(DataError, match="lora_parameters is missing"):
        jlora.load_adapter(tmp_path, params)


TUNE = {
    "q_proj": "attn.q_proj", "k_proj": "attn.k_proj", "v_proj": "attn.v_proj",
    "o_proj": "attn.output_proj", "gate_proj": "mlp.w1", "up_proj": "mlp.w3", "down_proj": "mlp.w2",
}  # fmt: skip
"""PEFT's modules → torchtune's (``torchtune/models/convert_weights.py``)."""


def in_tune_order(rows, head_dim):
    """Rows of queries or keys as torchtune has them: pairs that are rotated are neighbours."""
    return rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_as_torchtune(tensors, folder, heads, kv_heads, head_dim, targets):
    """An imitation of ``tune_to_peft_adapter_weights``, ``tune_to_peft_adapter_config`` and the
    checkpointer, from PEFT's tensors in torchtune's form, as its model has them.
    """
    own = {}
    for name, value in tensors.items():
        _, layer, module, end = re.fullmatch(
            r"base_model\.model\.model\.(layers)\.(\d+)\.\w+\.(\w+)\.(.*)", name
        ).groups()
        if module in ("q_proj", "k_proj") and "lora_B" in end:
            value = in_tune_order(value, head_dim)
        own[f"layers.{layer}.{TUNE[module]}.{end.lower()}"] = value
    back = {tune: module for module, tune in TUNE.items()}
    written = {}
    for name, value in own.items():
        _, layer, tune, end = re.fullmatch(r"(layers)\.(\d+)\.(\w+\.\w+)\.(.*)", name).groups()
        node = "self_attn" if tune.startswith("attn") else "mlp"
        end = end.replace("lora_a", "lora_A").replace("lora_b", "lora_B")
        if back[tune] in ("q_proj", "k_proj") and "lora_B" in end:
            n = heads if back[tune] == "q_proj" else kv_heads
            value = value.reshape(n, head_dim // 2, 2, value.shape[-1]).swapaxes(1, 2)
            value = value.reshape(n * head_dim, -1)
        path = f"model.layers.{layer}.{node}.{back[tune]}.{end}"
        written[f"base_model.model.{path}"] = value.astype(ml_dtypes.bfloat16)
    (folder / "adapter_model").mkdir(parents=True)  # its checkpointer makes this empty folder, too
    (folder / "adapter_model.pt").write_bytes(b"a pickle")
    save_file(written, folder / FILE, metadata={"format": "pt"})
    config = {"r": 4, "lora_alpha": 8, "target_modules": targets, "peft_type": "LORA"}
    (folder / CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": "org/base"}))
    return own


@pytest.fixture
def torchtunes(tmp_path):
    """Parameters, the adapter, the folder for PEFT, and the tensors by torchtune's own names."""
    model, params = build("llama")
    targets = [*TUNE]
    adapter = trained(params, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    half = jax.tree.map(lambda x: x.astype("bfloat16").astype("float32"), adapter.weights)
    adapter = dataclasses.replace(adapter, weights=half)
    jlora.save_adapter(tmp_path / "own", adapter)
    c = model.config
    sizes = (c.num_attention_heads, c.num_key_value_heads, c.head_dim)
    tensors = load_file(tmp_path / "own" / FILE)
    own = write_as_torchtune(tensors, tmp_path / "tune", *sizes, targets)
    return params, adapter, tmp_path / "tune", own


def test_torchtunes_folder_for_peft_is_read(torchtunes):
    params, adapter, folder, _ = torchtunes
    loaded = jlora.load_adapter(folder, params)
    chex.assert_trees_all_equal(loaded.weights, adapter.weights)
    assert (loaded.config.r, loaded.config.lora_alpha) == (4, 8)
    assert loaded.config.task_type == "CAUSAL_LM"


def test_torchtunes_own_tensors_are_refused_with_what_to_take(torchtunes):
    params, _, folder, own = torchtunes
    (folder / FILE).unlink()
    with pytest.raises(DataError, match=r"adapter_model\.pt is a pickle") as caught:
        jlora.load_adapter(folder, params)
    assert "adapter_model.safetensors beside it" in caught.value.fix
    save_file({name: np.ascontiguousarray(value) for name, value in own.items()}, folder / FILE)
    with pytest.raises(DataError, match=r"torchtune's own names, such as layers\.0") as caught:
        jlora.load_adapter(folder, params)
    assert "that torchtune writes for PEFT" in caught.value.fix


def test_magnitudes_without_use_dora_are_an_error(torchtunes):
    """torchtune's config does not say that it trained DoRA; PEFT leaves the magnitudes out."""
    params, _, folder, _ = torchtunes
    tensors = load_file(folder / FILE)
    name = "base_model.model.model.layers.0.mlp.down_proj.lora_magnitude_vector"
    save_file({**tensors, name: np.ones(32, np.float32)}, folder / FILE)
    with pytest.raises(DataError, match=r"magnitudes of DoRA .* does not say use_dora") as caught:
        jlora.load_adapter(folder, params)
    assert '"use_dora": true' in caught.value.fix
