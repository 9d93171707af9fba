"""The run header's numbers."""

import dataclasses

import jax.numpy as jnp
import yaml
from tiny_runs import LLAMA

from jlora.config import (
    Config,
    DataConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    SourceConfig,
    TrainConfig,
    in_lines,
    to_yaml,
)
from jlora.distributed import sharding
from jlora.models import Model
from jlora.run import header


def test_layout_states_what_each_device_holds():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    frozen = {"q_proj": {"kernel": jnp.zeros((64, 64)), "bias": jnp.zeros(256)}}
    trainable = {"q_proj": {"lora_A": jnp.zeros((64, 8)), "lora_B": jnp.zeros((8, 64))}}
    rows = header.layout((frozen, trainable), mesh)
    assert list(map(tuple, rows.rows)) == [
        (1, "kernel", "fsdp × tensor", "16.0 KiB", "4.0 KiB"),
        (1, "lora_A", "fsdp", "2.0 KiB", "1.0 KiB"),
        (1, "lora_B", "tensor", "2.0 KiB", "1.0 KiB"),
        (1, "bias", "replicated", "1.0 KiB", "1.0 KiB"),
    ]
    assert len(rows.rows[0]) == len(rows.columns)


def test_attention_is_named_with_its_reason():
    model = Model.from_config(LLAMA | {"head_dim": 64})
    texts = [header.attention_text(model, platform, 1024, 2) for platform in ("cpu", "gpu", "tpu")]
    assert texts == [
        "chunked: 1024 tokens are more than a chunk of 64",
        "cudnn: made for cuda",
        "splash: made for tpu",
    ]
    for change in ({"attention_softcap": 5.0}, {"sinks": True}, {"head_dim": 100}):
        config = dataclasses.replace(model.config, **change)
        other = dataclasses.replace(model, config=config)
        assert header.attention_text(other, "gpu", 1024, 1).startswith("chunked: cuDNN ")
    asked = dataclasses.replace(model, dtype="float32", attention="reference")
    assert header.attention_text(asked, "gpu", 1024, 1) == "reference: asked for"


def test_what_a_resumed_run_has_in_common_is_said_for_each_platform():
    def text(platform, **changes):
        return header.resume_text(TrainConfig(output_dir="out", **changes), platform)

    exact = "the result is identical byte for byte"
    for on in (False, True):
        assert {text(platform, full_determinism=on) for platform in ("cpu", "tpu")} == {exact}
    assert text("gpu", full_determinism=True).startswith(exact)
    cached, uncached = text("gpu"), text("gpu", compilation_cache=False)
    for said in (cached, uncached):
        assert "equal up to rounding" in said and "train.full_determinism=true" in said
    assert "kept in the compilation cache" in cached and "at every start" in uncached


def test_every_setting_is_shown_as_it_was_resolved(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}")
    source = SourceConfig(path=str(rows), format="messages")
    config = Config(
        model=ModelConfig(name_or_path="base"),
        lora=LoraConfig(r=16),
        data=DataConfig(train=(source,)),
        train=TrainConfig(output_dir="out", learning_rate=1e-5),
    )
    lines = in_lines(config)
    assert lines["quantization"] == "null" and all("\n" not in line for line in lines.values())
    expected = yaml.safe_load(to_yaml(config))
    assert {name: yaml.safe_load(line) for name, line in lines.items()} == expected
