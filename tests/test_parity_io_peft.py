"""Adapter folders exchanged with peft: the same bytes both ways, and nothing lost on loading."""

import copy
import dataclasses
import json

import jax
import numpy as np
import pytest
from test_io_peft_linear_experts import NAMES, ends, write_linear_experts
from tiny_peers import (
    CASES,
    NUMBERS,
    PEERS_TALK,
    assert_close,
    both_bases,
    jlora_logits,
    make_peft,
    peft,
    torch,
    torch_files,
    torch_logits,
)

import jlora
from jlora import lora
from jlora.errors import DataError
from jlora.io import peft as adapter_io
from jlora.tree import paths

pytestmark = PEERS_TALK
FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return both_bases(tmp_path_factory)


def load_peft(base, folder):
    """peft's model loaded from a folder; asserts that no tensor was missing or unexpected.

    peft itself only warns of missing tensors and ignores unexpected ones.
    """
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base.module), folder)
    result = peft.set_peft_model_state_dict(model, torch_files.load_file(folder / FILE))
    assert not result.unexpected_keys
    trained = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    assert set(trained) == set(torch_files.load_file(folder / FILE))
    return model.eval()


def random_adapter(params, fields, seed=0):
    """An adapter whose trainable parameters are all random; unused columns of A and B are zero."""
    random = jlora.LoraConfig(**fields, init_lora_weights=False)
    adapter = lora.init_adapter(jax.random.key(seed), params, random)
    rng = np.random.default_rng(seed)

    def add_noise(path, leaf):
        noise = 0.1 * rng.normal(size=leaf.shape).astype(np.float32)
        return leaf if path[-1] in lora.DELTA else leaf + noise

    config = dataclasses.replace(adapter.config, init_lora_weights=True)
    weights = paths.map_leaves(add_noise, adapter.weights)
    return dataclasses.replace(adapter, weights=weights, config=config)


@pytest.mark.parametrize("name", NUMBERS)
def test_a_peft_folder_round_trips_byte_for_byte(bases, name, tmp_path):
    base, fields = bases[CASES[name][0]], CASES[name][1]
    peft_model = make_peft(base, fields)
    peft_model.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    adapter = jlora.load_adapter(tmp_path / "peft", base.params)
    adapter_io.save_adapter(tmp_path / "jlora", adapter)
    assert (tmp_path / "jlora" / FILE).read_bytes() == (tmp_path / "peft" / FILE).read_bytes()

    jlora_config, want = (
        json.loads((tmp_path / d / CONFIG).read_text()) for d in ("jlora", "peft")
    )
    del want["peft_version"]  # jlora writes no version of peft
    if isinstance(want["target_modules"], str):  # the expression may match more modules in torch
        for raw in (jlora_config, want):
            del raw["target_modules"]  # load_peft compares what matches
    for raw in (jlora_config, want):
        for key in ("target_modules", "exclude_modules", "modules_to_save"):
            if isinstance(raw.get(key), list):
                raw[key].sort()
    assert jlora_config == want
    parsed = peft.LoraConfig.from_pretrained(tmp_path / "jlora")
    assert (parsed.r, parsed.lora_alpha) == (want["r"], want["lora_alpha"])
    np.testing.assert_array_equal(
        torch_logits(load_peft(base, tmp_path / "jlora")), torch_logits(peft_model)
    )


@pytest.mark.parametrize("name", ["patterns", "modules to save", "gpt2, all-linear"])
def test_a_jlora_folder_matches_what_peft_writes(bases, name, tmp_path):
    base, fields = bases[CASES[name][0]], CASES[name][1]
    adapter = random_adapter(base.params, fields)
    jlora.save_adapter(tmp_path / "jlora", adapter)
    peft_model = load_peft(base, tmp_path / "jlora")
    assert_close(jlora_logits(base, base.params, adapter), torch_logits(peft_model), 1e-5)
    peft_model.save_pretrained(tmp_path / "peft")
    assert (tmp_path / "jlora" / FILE).read_bytes() == (tmp_path / "peft" / FILE).read_bytes()
    assert all(
        v.dtype == torch.float32 for v in torch_files.load_file(tmp_path / "jlora" / FILE).values()
    )


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("gpt2", {"target_modules": ["q_proj", "v_proj"], "r": 2, "lora_alpha": 6}),
        ("gpt2", {
            "target_modules": ["k_proj", "v_proj", "c_fc"],
            "layers_to_transform": [0, 2],
            "rank_pattern": {"v_proj": 3, r"h\.2\.mlp\.c_fc": 5},
            "alpha_pattern": {"k_proj": 2, "c_fc": 4},
            "use_rslora": True,
            "bias": "lora_only",
        }),
        ("gpt2", {
            "target_modules": ["q_proj", "k_proj", "mlp.c_proj"],
            "rank_pattern": {r"h\.0\..*": 3, "k_proj": 1},
        }),
        ("gpt2", {
            "target_modules": r".*\.(0\.attn\.v_proj|1\.attn\.q_proj|2\.attn\.c_proj)",
            "modules_to_save": ["ln_f"],
        }),
        ("phi3", {
            "target_modules": ["k_proj", "v_proj", "up_proj", "o_proj", "embed_tokens"],
            "rank_pattern": {"v_proj": 3, r"layers\.1\.mlp\.up_proj": 2},
            "alpha_pattern": {"k_proj": 2, "embed_tokens": 3},
        }),
        ("phi3", {"target_modules": ["q_proj", "up_proj"], "lora_bias": True, "r": 2}),
        ("phi3", {
            "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"],
            "use_dora": True,
            "layers_to_transform": [1],
            "alpha_pattern": {"v_proj": 20},
        }),
    ],
    ids=[
        "two parts",
        "ranks, layers and biases",
        "a pattern that also names the fused projection",
        "other parts in other layers",
        "parts of other widths",
        "biases of parts",
        "magnitudes of all parts",
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted:UserWarning")
def test_adapters_on_parts_have_the_same_logits_in_peft(bases, kind, fields, tmp_path):
    base = bases[kind]
    adapter = random_adapter(base.params, fields)
    jlora.save_adapter(tmp_path, adapter)
    want = jlora_logits(base, base.params, adapter)
    assert_close(torch_logits(load_peft(base, tmp_path)), want, 1e-5)
    assert np.abs(want - jlora_logits(base, base.params)).max() > 1e-2 * np.abs(want).max()
    reloaded = jlora.load_adapter(tmp_path, base.params)
    assert_close(jlora_logits(base, base.params, reloaded), want, 1e-5)


def test_expressions_that_match_more_modules_in_torch_load_in_peft(bases, tmp_path):
    """``mlp.act_fn`` is no module in jlora; peft refuses an expression that matches it."""
    base = bases["llama"]
    fields = {"target_modules": r".*\.[02]\.mlp\..*", "rank_pattern": {r".*2\.mlp\.up_proj": 3}}
    with pytest.raises(ValueError, match="not supported"):
        make_peft(base, fields)
    adapter = random_adapter(base.params, fields)
    jlora.save_adapter(tmp_path, adapter)
    want = jlora_logits(base, base.params, adapter)
    assert_close(torch_logits(load_peft(base, tmp_path)), want, 1e-5)


def test_bfloat16_adapters_are_read_exactly(bases, tmp_path):
    base = bases["llama"]
    fields = {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["lm_head"]}
    peft_model = make_peft(base, fields)
    peft_model.save_pretrained(tmp_path)
    bfloat16_tensors = {
        k: (v * 2.0**-40).bfloat16() for k, v in torch_files.load_file(tmp_path / FILE).items()
    }
    torch_files.save_file(bfloat16_tensors, tmp_path / FILE, {"format": "pt"})
    tensors = adapter_io.to_peft_tensors(jlora.load_adapter(tmp_path, base.params))
    assert set(tensors) == set(bfloat16_tensors)
    for key, value in bfloat16_tensors.items():
        np.testing.assert_array_equal(tensors[key], value.float().numpy())


def test_the_base_weight_saved_with_an_adapted_head_must_be_the_models(bases, tmp_path):
    """peft saves the base weight of an adapted head, and overwrites the model's when loading."""
    base = bases["llama"]
    peft_model = make_peft(base, {"target_modules": ["lm_head"]})
    peft_model.save_pretrained(tmp_path)
    key = "base_model.model.lm_head.base_layer.weight"
    tensors = torch_files.load_file(tmp_path / FILE)
    adapter = jlora.load_adapter(tmp_path, base.params)
    assert_close(jlora_logits(base, base.params, adapter), torch_logits(peft_model), 1e-5)
    jlora.save_adapter(tmp_path / "jlora", adapter)
    np.testing.assert_array_equal(
        torch_logits(load_peft(base, tmp_path / "jlora")), torch_logits(peft_model)
    )
    for other in (tensors[key] + 1, tensors[key][:-1].contiguous()):
        torch_files.save_file({**tensors, key: other}, tmp_path / FILE, {"format": "pt"})
        with pytest.raises(DataError, match=r"lm_head.*not the model's weight"):
            jlora.load_adapter(tmp_path, base.params)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_of_transformers_4_are_read_as_peft_reads_them(bases, name, tmp_path):
    """And what is saved again is read by peft, without its conversion."""
    base = bases[name]
    matrices = NAMES[name][1]
    config = {"target_modules": ["q_proj", "gate", *matrices], "lora_dropout": 0.0}
    write_linear_experts(
        tmp_path / "old", name, config, base.params, ends("q_proj", "gate", *matrices)
    )
    adapter = jlora.load_adapter(tmp_path / "old", base.params)
    jlora.save_adapter(tmp_path / "new", adapter)
    got = jlora_logits(base, base.params, adapter)
    for folder in ("old", "new"):
        model = peft.PeftModel.from_pretrained(copy.deepcopy(base.module), tmp_path / folder)
        assert_close(got, torch_logits(model.eval()), 1e-5, folder)
    load_peft(base, tmp_path / "new")
