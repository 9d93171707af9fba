"""The page of LoraConfig's fields against peft's own: each is supported, or refused by name."""

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
"""What is refused, each with a value that would change something."""

ACCEPTED = {"auto_mapping", "inference_mode", "megatron_core", "peft_version", "runtime_config"}
ACCEPTED |= {"peft_type", "qalora_group_size"}


def rows():
    """Field → what the page says of it."""
    table = re.findall(r"^\| (`[^|]+) \| (.+) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return {name: said for names, said in table for name in re.findall(r"`(\w+)`", names)}


def test_every_field_of_pefts_is_on_the_page_and_what_it_says_is_so():
    theirs = {f.name for f in dataclasses.fields(peft.LoraConfig)}
    ours, page = {f.name for f in dataclasses.fields(jlora.LoraConfig)}, rows()
    assert set(page) == theirs
    assert theirs - ours == set(REFUSED) | ACCEPTED
    for name in theirs:
        assert ("refused" in page[name].split(":")[0].split(";")[0]) == (
            name in REFUSED or name == "qalora_group_size"
        ), name


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_named(name, tmp_path):
    with pytest.raises((ConfigError, TypeError), match=name):
        jlora.LoraConfig(**{name: REFUSED[name]})
    raw = {"peft_type": "LORA", "target_modules": ["q_proj"], name: REFUSED[name]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=name):
        adapter_io.load_adapter(tmp_path, {})
