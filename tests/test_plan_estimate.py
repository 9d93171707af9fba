"""The estimate of memory against the compiler, which is there for the CPU."""

import dataclasses
import functools
import json

import jax
import pytest
from aot import LLAMA_8B

from jlora import config
from jlora.plan import estimate, target
from jlora.plan.forecast import Rows, forecast
from jlora.plan.remedies import WHOLE, find_remedies

LLAMA = {
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
QLORA = {"quantization": {"load_in_4bit": True}}
CASES = {
    "LoRA": {},
    "QLoRA": QLORA,
    "QLoRA, no checkpointing": {**QLORA, "train": {"gradient_checkpointing": False}},
    "in full": {"lora": None},
    "LoRA, long": {"data": {"max_length": 2048}},
    "QLoRA, fsdp": {**QLORA, "mesh": {"data": 1, "fsdp": 4}},
}


@pytest.mark.parametrize("case", CASES)
def test_an_estimate_is_near_the_compiler(tmp_path, case):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    settings = {
        "model": {"name_or_path": str(tmp_path), "dtype": "bfloat16"},
        "lora": {"r": 16, "target_modules": "all-linear"},
        "data": {"train": [{"path": "unused", "format": "text"}], "max_length": 512},
        "train": {"output_dir": "unused", "max_steps": 1, "gradient_accumulation_steps": 1},
    }
    for name, values in CASES[case].items():
        settings[name] = None if values is None else settings.get(name, {}) | values
    settings = {name: values for name, values in settings.items() if values is not None}
    (tmp_path / "run.json").write_text(json.dumps(settings))
    loaded = config.load(str(tmp_path / "run.json"), [])
    devices = jax.devices()[: 4 if "fsdp" in case else 1]
    rows = Rows(loaded.data.max_length)
    with jax.numpy_dtype_promotion("standard"):
        here = forecast(loaded, None, rows, target.Target(), devices, whole=False)
        aim = target.Target(target.HARDWARE["h100"], len(devices))
        absent = forecast(loaded, None, rows, aim, None, whole=False)
    assert here.compiled and not absent.compiled
    said, true = absent.memory, here.memory
    for part in ("base", "adapter", "optimizer", "batch"):
        assert getattr(said, part) == getattr(true, part)
    print(case, dataclasses.asdict(said), dataclasses.asdict(true), said.peak / true.peak)
    assert said.peak == pytest.approx(true.peak, rel=estimate.TOLERANCE)


@pytest.fixture
def remedies_at(tmp_path):
    """Remedies for QLoRA of an 8B model on an RTX 4090, by settings; and what was not enough."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))

    def at(length):
        settings = {
            "model": {"name_or_path": str(tmp_path)},
            "lora": {"r": 16, "target_modules": "all-linear"},
            **QLORA,
            "data": {"train": [{"path": "unused", "format": "text"}], "max_length": length},
            "train": {"output_dir": "unused", "max_steps": 1, "per_device_train_batch_size": 1},
        }
        (tmp_path / "run.json").write_text(json.dumps(settings))
        aim, rows = target.parse("rtx4090"), Rows(length)
        look = functools.partial(
            forecast, tokenizer=None, rows=rows, aim=aim, found=None, whole=False
        )
        with jax.numpy_dtype_promotion("standard"):
            result = look(config.load(str(tmp_path / "run.json"), []))
            return {remedy.settings: remedy for remedy in find_remedies(result, look)}

    return at


def test_a_change_that_needs_the_rest_of_a_gpu_says_so(remedies_at):
    """Of 24 GiB JAX takes 18; 64k tokens take 20 once activations are offloaded."""
    offloading = "train.activation_offloading=true"
    found = remedies_at(65_536)
    assert found[offloading, WHOLE].fits and found[offloading, WHOLE].peak > 18 * 2**30
    assert (offloading,) in remedies_at(131_072) and (WHOLE,) in remedies_at(32_768)


def test_changes_together_change_no_setting_twice(remedies_at):
    *_, together = remedies_at(131_072)
    names = [setting.partition("=")[0] for setting in together]
    assert "train.optim" in names and len(set(names)) == len(names) > 2
