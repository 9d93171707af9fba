"""The run header's numbers."""

import jax.numpy as jnp
import yaml

from jlora import header, sharding
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


def test_layout_says_what_lies_on_each_device():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    frozen = {"q_proj": {"kernel": jnp.zeros((64, 64)), "bias": jnp.zeros(256)}}
    trainable = {"q_proj": {"lora_A": jnp.zeros((64, 8)), "lora_B": jnp.zeros((8, 64))}}
    rows = header.layout((frozen, trainable), mesh)
    assert list(map(tuple, rows.rows)) == [
        (1, "kernel", "fsdp × tensor", "16.0 KiB", "4.0 KiB"),
        (1, "lora_A", "fsdp", "2.0 KiB", "1.0 KiB"),
        (1, "lora_B", "tensor", "2.0 KiB", "1.0 KiB"),
        (1, "bias", "nothing", "1.0 KiB", "1.0 KiB"),
    ]
    assert len(rows.rows[0]) == len(rows.columns)


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
    whole = yaml.safe_load(to_yaml(config))
    assert {name: yaml.safe_load(line) for name, line in lines.items()} == whole
