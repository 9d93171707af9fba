"""PEFT's rules for patterns of module names, case by case."""

import pytest

from jlora.tree import matching


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("model.layers.0.q_proj", ["q_proj"], True),
        ("q_proj", ["q_proj"], True),
        ("model.layers.0.xq_proj", ["q_proj"], False),
        ("model.layers.0.q_proj.x", ["q_proj"], False),
        ("model.layers.0.self_attn.q_proj", ["self_attn.q_proj"], True),
        ("model.layers.0.q_proj", ["q.proj"], False),  # names are not expressions
        ("model.layers.0.q_proj", r".*\.(q|v)_proj", True),
        ("model.layers.0.q_proj", r"q_proj", False),  # the whole name
        ("model.layers.0.q_proj", [], False),
    ],
)
def test_matches(name, pattern, expected):
    assert matching.matches(name, pattern) is expected


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("model.layers.12.q", None, 12),
        ("model.layers.1.experts.7.q", None, 1),
        ("layers.1.q", None, None),  # PEFT's expression requires something before the list
        ("layers.1.q", "layers", 1),
        ("a.0.blocks.5.q", "blocks", 5),
        ("a.0.blocks.5.q", ["h", "blocks"], 5),
        ("model.norm", None, None),
        ("a.blocks.5", "blocks", None),
    ],
)
def test_layer_number(name, pattern, expected):
    assert matching.layer_number(name, pattern) == expected


def test_the_first_pattern_that_ends_the_name_wins():
    patterns = {"q_proj": 1, r"layers\.1\..*": 2, "self_attn.q_proj": 3}
    assert matching.pattern_value(patterns, "model.layers.1.self_attn.q_proj", 8) == 1
    assert matching.pattern_value(patterns, "model.layers.1.mlp.up_proj", 8) == 2
    assert matching.pattern_value(patterns, "model.layers.2.mlp.up_proj", 8) == 8
    assert matching.pattern_value(patterns, "model.layers.2.xq_proj", 8) == 8
    assert matching.pattern_value({"q|v": 4}, "a.v", 8) == 4
    assert matching.pattern_value({}, "a.v", 8) == 8


@pytest.mark.parametrize("special", [(), (1,), (0, 1, 11)])
def test_a_table_of_patterns_gives_every_name_its_value(special):
    names = [f"model.layers.{i}.{n}" for i in range(12) for n in ("mlp.up_proj", "attn.q_proj")]
    values = {name: 4 + any(f".{i}.mlp" in name for i in special) for name in [*names, "lm_head"]}
    values["lm_head"] = 7
    table = matching.pattern_table(values, 4)
    backwards = dict(reversed(table.items()))
    for name, value in values.items():
        assert matching.pattern_value(table, name, 4) == value
        assert matching.pattern_value(backwards, name, 4) == value, "in any order"
    assert len(table) == len(special) + 1
