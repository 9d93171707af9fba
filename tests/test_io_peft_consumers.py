"""PEFT folders as programs with simpler rules than PEFT's read them."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny_models
from safetensors.numpy import load_file
from test_lora import make_params

import jlora
from jlora.config import LoraConfig
from jlora.io.peft import misreadings
from jlora.io.peft.consumers import CONSUMERS
from jlora.tree import paths


def started(params, **fields):
    adapter = jlora.init_adapter(jax.random.key(0), params, LoraConfig(**fields))
    weights = jax.tree.map(lambda a: a * 1.1, adapter.weights)
    return dataclasses.replace(adapter, weights=weights)


def deltas(params, adapter):
    """The change of every adapted weight, by the tensors' module name; [out, in] as in torch."""
    merged = dict(paths.walk(jlora.merge(params, adapter)))
    conv1d = "transformer" in params
    found = {}
    for leaf in paths.leaves(params):
        change = np.asarray(merged[leaf.path], np.float64) - np.asarray(leaf.value, np.float64)
        layers = change if leaf.stack else [change]
        for name, delta in zip(leaf.modules(), layers, strict=True):
            if np.abs(delta).max() > 1e-6:
                found[name] = delta if conv1d else delta.T
    return found


def read(folder, consumer):
    """The deltas that ``consumer`` computes from the folder, by module name."""
    raw = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for name, a in tensors.items():
        if name.endswith("lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b = tensors[name.replace("lora_A", "lora_B")]
            delta = CONSUMERS[consumer](raw, a.shape[0]) * (b.astype(np.float64) @ a)
            found[module] = delta.T if raw["fan_in_fan_out"] else delta
    return found


def is_read(folder, want, consumer):
    got = read(folder, consumer)
    assert got.keys() == want.keys()
    size = max(np.abs(delta).max() for delta in want.values())
    return all(np.abs(got[name] - want[name]).max() < 1e-4 * size for name in want)


QV = {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8}
RANDOM = {"init_lora_weights": False}
SHORT = ["q_proj", "v_proj"]


def llama(**fields):
    params = make_params()
    return params, started(params, **{**QV, **fields})


def gpt2(*targets):
    _, params = tiny_models.build("gpt2")
    return params, started(params, r=2, lora_alpha=6, target_modules=list(targets), **RANDOM)


def cat(**second):
    params, one = llama(**RANDOM)
    two = started(params, r=3, lora_alpha=5, **second, **RANDOM)
    return params, jlora.add_weighted_adapter([one, two], [0.7, -0.3], "cat")


CASES = {
    "pissa": (lambda: llama(init_lora_weights="pissa"), SHORT, ()),
    "olora, rsLoRA": (lambda: llama(init_lora_weights="olora", use_rslora=True), SHORT, ()),
    "parts": (lambda: gpt2("q_proj", "v_proj"), ["c_attn"], ()),
    "parts and wholes": (
        lambda: gpt2("q_proj", "v_proj", "mlp.c_proj"),
        ["c_attn", "mlp.c_proj"],
        ("llama.cpp",),
    ),
    "an expression": (
        lambda: llama(target_modules=r".*\.self_attn\.[qv]_proj", **RANDOM),
        ["self_attn.q_proj", "self_attn.v_proj"],
        (),
    ),
    "patterns for all": (
        lambda: llama(rank_pattern={"q_proj": 3, "v_proj": 3}, **RANDOM),
        SHORT,
        (),
    ),
    "cat": (lambda: cat(target_modules=SHORT), SHORT, ()),
    "cat of mixed ranks": (lambda: cat(target_modules=["q_proj"]), SHORT, ("llama.cpp",)),
    "two alphas": (
        lambda: llama(alpha_pattern={"q_proj": 3}, **RANDOM),
        SHORT,
        ("vLLM", "SGLang", "llama.cpp"),
    ),
    "rsLoRA": (lambda: llama(use_rslora=True, **RANDOM), SHORT, ("SGLang", "llama.cpp")),
}
"""The adapter, ``target_modules`` of its folder, and the programs that misread that."""


@pytest.mark.parametrize("case", CASES)
def test_consumers_read_the_adapters_delta_or_are_named(case, tmp_path):
    make, names, misread = CASES[case]
    params, adapter = make()
    jlora.save_adapter(tmp_path, adapter)
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    assert raw["target_modules"] == names
    assert bool(raw["rank_pattern"] or raw["alpha_pattern"] or raw["use_rslora"]) == bool(misread)
    want = deltas(params, adapter)
    for consumer in CONSUMERS:
        assert is_read(tmp_path, want, consumer) == (consumer not in misread), consumer
    said = " ".join(misreadings(adapter))
    assert {c for c in CONSUMERS if c in said} == set(misread)
    reloaded = jlora.load_adapter(tmp_path, params)
    for name, delta in deltas(params, reloaded).items():
        np.testing.assert_allclose(delta, want[name], atol=1e-5)
