"""Adapter files with other names than PEFT's: recognised, or explained in a few lines."""

import json

import chex
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_lora import make_params, trained

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
