"""Matching of module names against peft's own functions, over many names and patterns."""

import itertools

import pytest

from jlora.config import LoraConfig
from jlora.lora import targets
from jlora.tree import matching

tuners_utils = pytest.importorskip("peft.tuners.tuners_utils")
peft = pytest.importorskip("peft")
other = pytest.importorskip("peft.utils.other")

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
def test_targets_are_pefts(values):
    theirs, mine = peft.LoraConfig(**values), LoraConfig(**values)
    for name in NAMES:
        expected = tuners_utils.check_target_module_exists(theirs, name)
        assert targets.is_target(mine, name) == bool(expected), name


PATTERNS = [
    ["q_proj"],
    ["self_attn.q_proj", "q_proj"],
    [r"layers\.\d+\..*", "v_proj"],
    ["q_proj|v_proj", "lm_head"],
    [r"^h\.1\.q_proj", r"model.*inner"],
    [".*"],
]


@pytest.mark.parametrize("patterns", PATTERNS, ids=str)
def test_pattern_tables_are_pefts(patterns):
    for name in NAMES:
        key = other.get_pattern_key(patterns, name)
        expected = patterns.index(key) if key in patterns else None
        numbered = {p: i for i, p in enumerate(patterns)}
        assert matching.pattern_value(numbered, name, None) == expected


def test_ranks_and_scalings_are_pefts():
    values = {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 3, "q_proj": 5}}
    mine = LoraConfig(target_modules=["q_proj", "v_proj"], r=16, lora_alpha=32, **values)
    for name in NAMES:
        alpha = mine.alpha_pattern.get(other.get_pattern_key(mine.alpha_pattern, name), 32)
        rank = mine.rank_pattern.get(other.get_pattern_key(mine.rank_pattern, name), 16)
        assert targets.scaling_of(mine, name) == alpha / rank
        assert targets.rank_of(mine, name) in (0, rank)
