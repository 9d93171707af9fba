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
from jlora.plan.remedies import MOST_OF_GPU, find_remedies
from jlora.run.environment import MEMORY_FRACTION

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


SLOW = {"QLoRA, no checkpointing", "LoRA, long", "QLoRA, fsdp"}


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow) if c in SLOW else c for c in CASES]
)
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
        here = forecast(loaded, None, rows, target.CompileTarget(), devices, count_work=False)
        aim = target.CompileTarget(target.HARDWARE["h100"], len(devices))
        absent = forecast(loaded, None, rows, aim, None, count_work=False)
    assert here.compiled and not absent.compiled
    said, true = absent.memory, here.memory
    for part in ("base", "adapter", "optimizer", "batch"):
        assert getattr(said, part) == getattr(true, part)
    print(case, dataclasses.asdict(said), dataclasses.asdict(true), said.peak / true.peak)
    assert said.peak == pytest.approx(true.peak, rel=estimate.TOLERANCE)


@pytest.fixture
def of_8b(tmp_path):
    """The settings of QLoRA of an 8B model on rows of this length, with changes."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))

    def settings(length, *overrides):
        chosen = {
            "model": {"name_or_path": str(tmp_path)},
            "lora": {"r": 16, "target_modules": "all-linear"},
            **QLORA,
            "data": {"train": [{"path": "unused", "format": "text"}], "max_length": length},
            "train": {"output_dir": "unused", "max_steps": 1, "per_device_train_batch_size": 1},
        }
        (tmp_path / "run.json").write_text(json.dumps(chosen))
        return config.load(str(tmp_path / "run.json"), list(overrides))

    return settings


@pytest.fixture
def remedies_at(of_8b, monkeypatch):
    """Remedies where JAX takes 18 of an RTX 4090's 24 GiB, by settings; and what was not enough."""
    monkeypatch.setenv(MEMORY_FRACTION, "0.75")

    def at(length):
        look = functools.partial(
            forecast,
            tokenizer=None,
            rows=Rows(length),
            compile_target=target.parse_target("rtx4090"),
            devices=None,
            count_work=False,
        )
        with jax.numpy_dtype_promotion("standard"):
            result = look(of_8b(length))
            return {remedy.settings: remedy for remedy in find_remedies(result, look)}

    return at


def test_a_step_takes_as_long_as_its_slowest_part(of_8b):
    """An RTX 4090 sends 32 GB/s to the host and computes 165.2 TFLOPs a second."""

    def seconds(*overrides):
        chosen = of_8b(2048, "train.gradient_accumulation_steps=4", *overrides)
        with jax.numpy_dtype_promotion("standard"):
            found = forecast(chosen, None, Rows(2048), target.parse_target("rtx4090"), None)
        return found.seconds(), found.work.flops

    paging, offloading = "train.optim=paged_adamw_32bit", "train.activation_offloading=true"
    plain, flops = seconds()
    assert plain == {"compute": pytest.approx(flops / 165.2e12)}
    moments = 2 * 4 * 41_943_040  # two in float32 of each of the adapter's weights
    activations = 32 * 2048 * 4096 * 2  # of every layer, in bfloat16, for each micro-batch
    assert seconds(paging)[0]["host"] == pytest.approx(moments / 32e9, rel=1e-3)
    assert seconds(offloading)[0]["host"] == pytest.approx(4 * activations / 32e9)
    both = moments + 4 * activations
    assert seconds(paging, offloading)[0]["host"] == pytest.approx(both / 32e9, rel=1e-3)


def test_a_change_that_needs_the_rest_of_a_gpu_says_so(remedies_at):
    """64k tokens take 20 GiB once activations are offloaded, where there are 18."""
    offloading = "train.activation_offloading=true"
    found = remedies_at(65_536)
    assert found[offloading, MOST_OF_GPU].fits and found[offloading, MOST_OF_GPU].peak > 18 * 2**30
    assert (offloading,) in remedies_at(131_072) and (MOST_OF_GPU,) in remedies_at(32_768)


def test_changes_together_change_no_setting_twice(remedies_at):
    *_, together = remedies_at(131_072)
    names = [setting.partition("=")[0] for setting in together]
    assert "train.optim" in names and len(set(names)) == len(names) > 2
