"""Folders as written by PEFT releases since 0.5: keys of the config, and names of tensors.

The tables record the output of these releases; the tensors' values are random.
"""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file
from test_lora import D, L, make_params

from jlora.errors import ConfigError, DataError
from jlora.io import peft as adapter_io
from jlora.lora.targets import scaling_of

KEYS = {
    "0.5.0": {
        "auto_mapping": None, "base_model_name_or_path": "", "bias": "none",
        "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True,
        "layers_pattern": None, "layers_to_transform": None, "lora_alpha": 8,
        "lora_dropout": 0.0, "modules_to_save": None, "peft_type": "LORA", "r": 4,
        "revision": None, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM",
    },
    "0.8.2": {
        "alpha_pattern": {}, "loftq_config": {}, "megatron_config": None,
        "megatron_core": "megatron.core", "rank_pattern": {}, "use_rslora": False,
    },
    "0.11.1": {"layer_replication": None, "use_dora": False},
    "0.14.0": {"eva_config": None, "exclude_modules": None, "lora_bias": False},
    "0.17.1": {
        "corda_config": None, "qalora_group_size": 16, "target_parameters": None,
        "trainable_token_indices": None, "use_qalora": False,
    },
    "0.21.2": {
        "alora_invocation_tokens": None, "arrow_config": None, "ensure_weight_tying": False,
        "kasa_config": None, "lora_ga_config": None, "monteclora_config": None,
        "peft_version": "0.21.2", "use_bdlora": None, "velora_config": None,
    },
}  # fmt: skip
"""Release → the keys that it writes and earlier releases did not, with their values."""

RELEASES = list(KEYS)


def config_of(release, **changes):
    """The config that a release writes, with those of ``changes`` that it knows."""
    keys = {}
    for name in RELEASES[: RELEASES.index(release) + 1]:
        keys |= KEYS[name]
    return keys | {key: value for key, value in changes.items() if key in keys}


def write(folder, config, tensors):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def draw(names_and_shapes):
    rng = np.random.default_rng(0)
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in names_and_shapes.items()}


def attention(module, bias=None):
    """Names and shapes of a module's tensors in every layer; ``bias`` ends the bias's name."""
    shapes = {}
    for i in range(L):
        name = f"base_model.model.model.layers.{i}.self_attn.{module}"
        shapes |= {f"{name}.lora_A.weight": (4, D), f"{name}.lora_B.weight": (D, 4)}
        shapes |= {f"{name}.{bias}": (D,)} if bias else {}
    return shapes


def stacked(tensors, end):
    """The stacked leaf of all layers' tensors whose names end in ``end``, as (in, out)."""
    found = [v.T for name, v in sorted(tensors.items()) if name.endswith(end)]
    assert len(found) == L
    return np.stack(found)


@pytest.mark.parametrize("release", RELEASES)
def test_every_release_is_read(release, tmp_path):
    """Keys that a release did not write yet take their defaults."""
    tensors = draw(attention("q_proj") | attention("v_proj"))
    patterns = {"alpha_pattern": {"v_proj": 2}, "use_rslora": True}
    write(tmp_path, config_of(release, **patterns), tensors)
    adapter = adapter_io.load_adapter(tmp_path, make_params())
    for module in ("q_proj", "v_proj"):
        weights = adapter.weights["model"]["layers"]["self_attn"][module]
        for kind in ("lora_A", "lora_B"):
            want = stacked(tensors, f"{module}.{kind}.weight")
            np.testing.assert_array_equal(weights[kind], want)
    scales = [scaling_of(adapter.config, f"model.layers.0.self_attn.{m}_proj") for m in "qv"]
    assert scales == ([2.0, 2.0] if release == "0.5.0" else [4.0, 1.0])


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("name", ["bias", "base_layer.bias"])
def test_biases_are_read_under_both_of_their_names(name, bias, tmp_path):
    tensors = draw(attention("q_proj", name))
    config = config_of("0.5.0", target_modules=["q_proj"], bias=bias)
    if bias == "all":  # v_proj is not adapted: its bias always has the same name
        others = [f"base_model.model.model.layers.{i}.self_attn.v_proj.bias" for i in range(L)]
        tensors |= draw(dict.fromkeys(others, (D,)))
    write(tmp_path, config, tensors)
    adapter = adapter_io.load_adapter(tmp_path, make_params())
    attention_node = adapter.weights["model"]["layers"]["self_attn"]
    want = stacked(tensors, f"q_proj.{name}")
    np.testing.assert_array_equal(attention_node["q_proj"]["bias"], want)
    assert ("v_proj" in attention_node) == (bias == "all")


def test_biases_lost_by_a_release_are_reported(tmp_path):
    tensors = draw(attention("q_proj"))
    config = config_of("0.14.0", target_modules=["q_proj"], bias="lora_only")
    write(tmp_path, config, tensors)
    with pytest.raises(DataError, match=f"not in the file \\({L} tensors.*releases of PEFT") as e:
        adapter_io.load_adapter(tmp_path, make_params())
    assert '"bias": "none"' in e.value.fix
    write(tmp_path, config | {"bias": "none"}, tensors)
    adapter_io.load_adapter(tmp_path, make_params())
    # A file that lacks other tensors too belongs to another model.
    tensors.pop("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight")
    write(tmp_path, config, tensors)
    with pytest.raises(DataError, match="does not fit the model"):
        adapter_io.load_adapter(tmp_path, make_params())


def test_keys_of_future_releases_are_refused_where_they_may_matter(tmp_path):
    tensors = draw(attention("q_proj"))
    config = config_of("0.21.2", target_modules=["q_proj"])
    off = {
        "use_next": False,
        "next_config": None,
        "next_pattern": {},
        "next_layers": [],
        "next_p": 0.0,
    }
    write(tmp_path, config | off | {"eva_config": {"rho": 2.0}}, tensors)
    adapter_io.load_adapter(tmp_path, make_params())
    write(tmp_path, config | off | {"use_next": True, "next_size": 3, "next_mode": "x"}, tensors)
    with pytest.raises(ConfigError, match="use_next, next_size, next_mode"):
        adapter_io.load_adapter(tmp_path, make_params())
