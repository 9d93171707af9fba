from types import SimpleNamespace

import numpy as np
import pytest

from jlora.tree import paths

L = 3


def a(*shape):
    return np.zeros(shape)


@pytest.fixture
def llama():
    return {
        "model": {
            "embed_tokens": {"embedding": a(7, 4)},
            "layers": {
                "self_attn": {"q_proj": {"kernel": a(L, 4, 6), "bias": a(L, 6)}},
                "input_layernorm": {"scale": a(L, 4)},
            },
            "norm": {"scale": a(4)},
        },
        "lm_head": {"kernel": a(4, 7)},
    }


def test_leaves_of_stacked_layers_stand_for_their_modules(llama):
    leaves = {leaf.path: leaf for leaf in paths.leaves(llama)}
    q = leaves[("model", "layers", "self_attn", "q_proj", "kernel")]
    assert (q.kind, q.shape, q.layers, q.stack) == ("kernel", (4, 6), L, ("model", "layers"))
    assert q.module() == "model.layers.*.self_attn.q_proj"
    assert q.module(2) == "model.layers.2.self_attn.q_proj"
    assert q.modules() == [f"model.layers.{i}.self_attn.q_proj" for i in range(L)]
    bias = leaves[("model", "layers", "self_attn", "q_proj", "bias")]
    assert (bias.kind, bias.shape) == ("bias", (6,))
    head = leaves[("lm_head", "kernel")]
    assert (head.shape, head.layers, head.stack) == ((4, 7), None, None)
    assert head.modules() == ["lm_head"]
    assert leaves[("model", "norm", "scale")].modules() == ["model.norm"]


def test_only_nodes_with_a_common_leading_axis_are_stacked(llama):
    assert paths.stacks(llama) == [("model", "layers")]
    assert paths.stacks({"transformer": {"h": {"w": a(2, 3)}}}) == [("transformer", "h")]
    assert paths.stacks({"layers": {"0": {"w": a(2, 3)}, "1": {"w": a(2, 3)}}}) == []
    assert paths.stacks({"layers": {"v": a(2, 3), "w": a(4, 3)}}) == []
    assert paths.stacks({"layers": {"v": a(2), "w": a()}}) == []
    assert paths.stacks({"layers": {}}) == []
    nested = {"layers": {"block": {"layers": {"w": a(2, 3)}}}}
    assert paths.stacks(nested) == [("layers",)]
    assert paths.stacks({"h": a(2, 3)}) == []
    square = {"layers": {"dense": {"kernel": a(4, 4), "bias": a(4)}}}
    assert paths.stacks(square) == [], "one layer's kernel has two axes of its own"


def test_numbered_layers_keep_their_numbers_in_their_names():
    tree = {"layers": {"0": {"q": {"kernel": a(2, 3)}}, "1": {"q": {"kernel": a(2, 3)}}}}
    assert [leaf.modules() for leaf in paths.leaves(tree)] == [["layers.0.q"], ["layers.1.q"]]


def test_walk_and_nest_are_inverses(llama):
    flat = dict(paths.walk(llama))
    assert next(iter(flat)) == ("model", "embed_tokens", "embedding")
    again = paths.nest(flat)
    assert paths.map_leaves(lambda path, leaf: id(leaf), again) == paths.map_leaves(
        lambda path, leaf: id(leaf), llama
    )
    assert paths.get(llama, ("lm_head", "kernel")) is llama["lm_head"]["kernel"]
    with pytest.raises(KeyError):
        paths.get(llama, ("lm_head", "bias"))


def test_map_leaves_gives_path_and_leaf(llama):
    shapes = paths.map_leaves(lambda path, leaf: (path[-1], leaf.shape), llama)
    assert shapes["model"]["norm"]["scale"] == ("scale", (4,))
    assert type(shapes["model"]) is dict


def test_a_leaf_may_be_anything_with_a_shape():
    packed = SimpleNamespace(shape=(L, 4, 6))
    (leaf,) = paths.leaves({"h": {"q": {"kernel": packed}}})
    assert leaf.value is packed and leaf.shape == (4, 6)


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
    assert paths.matches(name, pattern) is expected


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("model.layers.12.q", None, 12),
        ("model.layers.1.experts.7.q", None, 1),
        ("layers.1.q", None, None),  # PEFT's expression wants something before the list
        ("layers.1.q", "layers", 1),
        ("a.0.blocks.5.q", "blocks", 5),
        ("a.0.blocks.5.q", ["h", "blocks"], 5),
        ("model.norm", None, None),
        ("a.blocks.5", "blocks", None),
    ],
)
def test_layer_number(name, pattern, expected):
    assert paths.layer_number(name, pattern) == expected


def test_the_first_pattern_that_ends_the_name_wins():
    patterns = {"q_proj": 1, r"layers\.1\..*": 2, "self_attn.q_proj": 3}
    assert paths.pattern_value(patterns, "model.layers.1.self_attn.q_proj", 8) == 1
    assert paths.pattern_value(patterns, "model.layers.1.mlp.up_proj", 8) == 2
    assert paths.pattern_value(patterns, "model.layers.2.mlp.up_proj", 8) == 8
    assert paths.pattern_value(patterns, "model.layers.2.xq_proj", 8) == 8
    assert paths.pattern_value({"q|v": 4}, "a.v", 8) == 4
    assert paths.pattern_value({}, "a.v", 8) == 8


@pytest.mark.parametrize("special", [(), (1,), (0, 1, 11)])
def test_a_table_of_patterns_gives_every_name_its_value(special):
    names = [f"model.layers.{i}.{n}" for i in range(12) for n in ("mlp.up_proj", "attn.q_proj")]
    values = {name: 4 + any(f".{i}.mlp" in name for i in special) for name in [*names, "lm_head"]}
    values["lm_head"] = 7
    table = paths.pattern_table(values, 4)
    backwards = dict(reversed(table.items()))
    for name, value in values.items():
        assert paths.pattern_value(table, name, 4) == value
        assert paths.pattern_value(backwards, name, 4) == value, "whatever the order"
    assert len(table) == len(special) + 1
