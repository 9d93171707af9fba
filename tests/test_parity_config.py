"""docs/adapters.md and peft's LoraConfig: every field is supported, or refused by name."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

import jlora
from jlora.errors import ConfigError
from jlora.io import peft as adapter_io

peft = pytest.importorskip("peft")

PAGE = Path(__file__).parent.parent / "docs" / "adapters.md"

REFUSED: dict[str, Any] = {
    "ensure_weight_tying": True,
    "layer_replication": [[0, 2], [1, 3]],
    "corda_config": {"cache_file": "x"},
    "lora_ga_config": {"direction": "ArB2r"},
    "kasa_config": {"beta": 1e-4},
    "velora_config": {"num_groups": 2},
    "monteclora_config": {"x": 1},
    "alora_invocation_tokens": [1, 2],
    "arrow_config": {"top_k": 2},
    "use_qalora": True,
    "use_bdlora": {"x": 1},
    "megatron_config": {"x": 1},
}
"""Refused field → a value that would have an effect in peft."""

ACCEPTED = {"auto_mapping", "inference_mode", "megatron_core", "peft_version", "runtime_config"}
ACCEPTED |= {"peft_type", "qalora_group_size"}


def described_fields():
    """Field → its description on the page."""
    table = re.findall(r"^\| (`[^|]+) \| (.+) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return {name: text for names, text in table for name in re.findall(r"`(\w+)`", names)}


def test_the_page_lists_every_field_of_peft_and_says_which_are_refused():
    peft_fields = {f.name for f in dataclasses.fields(peft.LoraConfig)}
    jlora_fields = {f.name for f in dataclasses.fields(jlora.LoraConfig)}
    page = described_fields()
    assert set(page) == peft_fields
    assert peft_fields - jlora_fields == set(REFUSED) | ACCEPTED
    for name in peft_fields:
        assert ("refused" in page[name].split(":")[0].split(";")[0]) == (
            name in REFUSED or name == "qalora_group_size"
        ), name


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_names_the_field(name, tmp_path):
    with pytest.raises((ConfigError, TypeError), match=name):
        jlora.LoraConfig(**{name: REFUSED[name]})
    raw = {"peft_type": "LORA", "target_modules": ["q_proj"], name: REFUSED[name]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=name):
        adapter_io.load_adapter(tmp_path, {})
