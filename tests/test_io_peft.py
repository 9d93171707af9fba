"""PEFT folders: round trips by value, all faults listed, and only safetensors read."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_lora import L, make_gpt2, make_params, node, trained

import jlora
from jlora import lora
from jlora.config import LoraConfig
from jlora.errors import ConfigError, DataError
from jlora.io import peft as adapter_io
from jlora.tree import paths

CONFIGS = [
    LoraConfig(r=4, target_modules="all-linear"),
    LoraConfig(r=4, target_modules=r".*\.[qv]_proj", use_rslora=True),
    LoraConfig(r=4, target_modules=["q_proj"], layers_to_transform=[0, 2], bias="all"),
    LoraConfig(r=4, target_modules=["q_proj"], rank_pattern={r"1\.self_attn\.q_proj": 2}),
    LoraConfig(r=4, target_modules=["v_proj"], bias="lora_only", modules_to_save=["lm_head"]),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_round_trip(tmp_path, config):
    params = make_params()
    adapter = lora.init_adapter(jax.random.key(0), params, config)
    adapter = jax.tree.map(lambda a: a * 1.5 + (a != 0).astype(a.dtype), adapter)
    size = adapter_io.save_adapter(tmp_path, adapter)
    assert size == (tmp_path / "adapter_model.safetensors").stat().st_size
    loaded = adapter_io.load_adapter(tmp_path, params)
    chex.assert_trees_all_equal(loaded.weights, adapter.weights)
    chex.assert_trees_all_equal(lora.merge(params, loaded), lora.merge(params, adapter))
    text = (tmp_path / "adapter_config.json").read_text()
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True)


def test_tensors_are_in_torchs_orientation(tmp_path):
    params = make_params()
    adapter = trained(
        params, LoraConfig(r=4, target_modules=["down_proj"], modules_to_save=["lm_head"])
    )
    adapter_io.save_adapter(tmp_path, adapter)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    pair = node(adapter.weights, "model.layers.mlp.down_proj")
    name = "base_model.model.model.layers.1.mlp.down_proj"
    np.testing.assert_array_equal(tensors[f"{name}.lora_A.weight"], pair["lora_A"][1].T)
    np.testing.assert_array_equal(tensors[f"{name}.lora_B.weight"], pair["lora_B"][1].T)
    head = tensors["base_model.model.lm_head.weight"]
    np.testing.assert_array_equal(head, adapter.weights["lm_head"]["kernel"].T)
    assert len(tensors) == 2 * L + 1


def whole_names(layers):
    return [f"transformer.h.{i}.attn.c_attn" for i in layers]


@pytest.mark.parametrize("layers", [None, [0, 2]])
def test_parts_of_c_attn_are_saved_as_one_lora_pair(tmp_path, layers):
    params = make_gpt2()
    config = LoraConfig(
        r=2, lora_alpha=6, target_modules=["q_proj", "v_proj"], init_lora_weights=False,
        rank_pattern={"v_proj": 3}, layers_to_transform=layers,
    )  # fmt: skip
    adapter = lora.init_adapter(jax.random.key(0), params, config)
    adapter_io.save_adapter(tmp_path, adapter)
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    assert raw["fan_in_fan_out"] and (raw["r"], raw["lora_alpha"], raw["rank_pattern"]) == (
        5,
        5,
        {},
    )
    assert raw["target_modules"] == (["c_attn"] if layers is None else whole_names(layers))
    loaded = adapter_io.load_adapter(tmp_path, params)
    assert set(loaded.weights["transformer"]["h"]["attn"]["c_attn"]) == {"lora_A", "lora_B"}
    chex.assert_trees_all_close(lora.merge(params, loaded), lora.merge(params, adapter), atol=1e-6)


def saved(tmp_path, **fields):
    params = make_params()
    config = LoraConfig(**({"r": 4, "target_modules": ["q_proj"]} | fields))
    adapter_io.save_adapter(tmp_path, trained(params, config))
    return params


def test_missing_unknown_and_misshapen_tensors_are_listed_together(tmp_path):
    params = saved(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    first, second, *_ = sorted(tensors)
    tensors[second] = tensors[second][:1]
    tensors["base_model.model.other"] = tensors.pop(first)
    save_file(tensors, file)
    with pytest.raises(DataError) as caught:
        adapter_io.load_adapter(tmp_path, params)
    message = str(caught.value)
    assert f"missing {first}" in message and "unknown base_model.model.other" in message
    assert f"{second} has shape" in message


def test_damaged_and_foreign_folders_are_refused(tmp_path):
    params = saved(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(DataError, match="damaged"):
        adapter_io.load_adapter(tmp_path, params)
    file.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(DataError, match="pickle"):
        adapter_io.load_adapter(tmp_path, params)
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(raw | {"use_qalora": True}))
    with pytest.raises(ConfigError, match="use_qalora"):
        adapter_io.load_adapter(tmp_path, params)
    (tmp_path / "adapter_config.json").write_text(json.dumps(raw | {"peft_type": "IA3"}))
    with pytest.raises(DataError, match="IA3"):
        adapter_io.load_adapter(tmp_path, params)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(DataError, match="JSON"):
        adapter_io.load_adapter(tmp_path, params)
    with pytest.raises(DataError, match="adapter_config"):
        adapter_io.load_adapter(tmp_path / "nowhere", params)


def test_a_minimal_peft_config_is_read(tmp_path):
    params = saved(tmp_path, lora_alpha=8)
    least = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    before = adapter_io.load_adapter(tmp_path, params)
    (tmp_path / "adapter_config.json").write_text(json.dumps(least))
    after = adapter_io.load_adapter(tmp_path, params)
    chex.assert_trees_all_equal(lora.merge(params, after), lora.merge(params, before))


def test_nothing_is_written_for_a_broken_adapter(tmp_path):
    params = make_params()
    adapter = lora.init_adapter(jax.random.key(0), params, LoraConfig(target_modules=["q_proj"]))
    broken = jax.tree.map(lambda a: a * np.nan, adapter)
    with pytest.raises(DataError, match="not finite"):
        adapter_io.save_adapter(tmp_path, broken)
    with pytest.raises(DataError, match="nothing to save"):
        adapter_io.save_adapter(tmp_path, lora.Adapter({}, adapter.config))
    assert not list(tmp_path.iterdir())


def test_an_adapter_recognises_its_base(tmp_path):
    """By all weights where they are stored equally, else by leaves that are never quantized."""
    params, fields = make_params(), {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    adapter = lora.init_adapter(jax.random.key(0), params, LoraConfig(**fields))
    jlora.save_adapter(tmp_path, adapter, adapter_io.base_record(params, adapter.config))
    other_head = {**params, "lm_head": {"kernel": params["lm_head"]["kernel"] + 1}}
    quantized = jlora.quantize(params, jlora.QuantConfig(block_size=32))
    for same in (params, other_head, quantized, jax.eval_shape(lambda: params)):
        adapter_io.load_adapter(tmp_path, same)

    def move(kind):
        def change(path, leaf):
            first = path[-1] == kind and "layers" in path
            return leaf.at[1].add(0.5) if first else leaf

        return paths.map_leaves(change, params)

    for kind in ("kernel", "scale", "bias"):
        with pytest.raises(DataError, match=r"other weights(.|\n)*base_model.json"):
            adapter_io.load_adapter(tmp_path, move(kind))
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    adapter_io.load_adapter(tmp_path, narrow)
    moved = jax.tree.map(lambda x: x.astype(jnp.bfloat16), move("scale"))
    with pytest.raises(DataError, match="other weights"):
        adapter_io.load_adapter(tmp_path, moved)
    (tmp_path / adapter_io.BASE_FILE).unlink()
    adapter_io.load_adapter(tmp_path, moved)
