"""The estimate of memory against the compiler, which is there for the CPU."""

import dataclasses
import json

import jax
import pytest

from jlora import config
from jlora.plan import estimate, target
from jlora.plan.forecast import Rows, forecast

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
