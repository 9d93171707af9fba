"""Matching of module names compared with peft's functions, for many names and patterns."""

import itertools

import pytest

from jlora.config import LoraConfig
from jlora.lora import targets
from jlora.tree import matching

tuners_utils = pytest.importorskip("peft.tuners.tuners_utils")
peft = pytest.importorskip("peft")
peft_other = pytest.importorskip("peft.utils.other")

NAMES = [
    f"{stem}{module}"
    for stem, module in itertools.product(
        [
            "",
            "model.layers.0.",
            "model.layers.1.self_attn.",
            "model.layers.11.mlp.experts.2.",
            "h.1.",
        ],
        ["q_proj", "v_proj", "xq_proj", "q_proj.inner", "lm_head", "c_attn", "self_attn.q_proj"],
    )
]

CONFIGS = [
    {"target_modules": ["q_proj"]},
    {"target_modules": ["q_proj", "self_attn.q_proj", "model.layers.0.v_proj"]},
    {"target_modules": r".*layers\.(0|11)\..*_proj"},
    {"target_modules": r"q_proj|lm_head"},
    {"target_modules": ["q_proj"], "exclude_modules": ["self_attn.q_proj"]},
    {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*experts.*"},
    {"target_modules": ["q_proj"], "layers_to_transform": 1},
    {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 2, 11]},
    {"target_modules": ["q_proj"], "layers_to_transform": [2], "layers_pattern": "experts"},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
    {"target_modules": ["model.layers.0.q_proj"], "layers_to_transform": [5]},
    {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head", "self_attn"]},
]


@pytest.mark.parametrize("values", CONFIGS, ids=str)
def test_targets_match_peft(values):
    peft_config, config = peft.LoraConfig(**values), LoraConfig(**values)
    for name in NAMES:
        expected = tuners_utils.check_target_module_exists(peft_config, name)
        assert targets.is_target(config, name) == bool(expected), name


PATTERNS = [
    ["q_proj"],
    ["self_attn.q_proj", "q_proj"],
    [r"layers\.\d+\..*", "v_proj"],
    ["q_proj|v_proj", "lm_head"],
    [r"^h\.1\.q_proj", r"model.*inner"],
    [".*"],
]


@pytest.mark.parametrize("patterns", PATTERNS, ids=str)
def test_pattern_tables_match_peft(patterns):
    for name in NAMES:
        key = peft_other.get_pattern_key(patterns, name)
        expected = patterns.index(key) if key in patterns else None
        numbered = {p: i for i, p in enumerate(patterns)}
        assert matching.pattern_value(numbered, name, None) == expected


def test_ranks_and_scales_match_peft():
    values = {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 3, "q_proj": 5}}
    config = LoraConfig(target_modules=["q_proj", "v_proj"], r=16, lora_alpha=32, **values)
    for name in NAMES:
        alpha = config.alpha_pattern.get(peft_other.get_pattern_key(config.alpha_pattern, name), 32)
        rank = config.rank_pattern.get(peft_other.get_pattern_key(config.rank_pattern, name), 16)
        assert targets.scaling_of(config, name) == alpha / rank
        assert targets.rank_of(config, name) in (0, rank)
