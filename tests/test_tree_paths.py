"""Names of leaves and modules, and which leaves are stacked."""

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


def test_runs_of_layers_are_stacked_each_by_itself():
    mlp = {"mlp": {"up_proj": {"kernel": a(1, 4, 6)}}}
    experts = {"mlp": {"experts": {"down_proj": a(2, 5, 6, 4)}}}
    tree = {"model": {"layers": {"0-0": mlp, "1-2": experts, "3-3": mlp}}}
    assert paths.stacked_nodes(tree) == [
        ("model", "layers", f"{i}-{j}") for i, j in ((0, 0), (1, 2), (3, 3))
    ]
    first, middle, last = paths.leaves(tree)
    assert first.modules() == ["model.layers.0.mlp.up_proj"]
    assert middle.modules() == ["model.layers.1.mlp.experts", "model.layers.2.mlp.experts"]
    assert (middle.layers, middle.shape, middle.module()) == (
        2,
        (5, 6, 4),
        "model.layers.1-2.mlp.experts",
    )
    assert last.module(0) == "model.layers.3.mlp.up_proj"
    joined = ("model", "layers", "mlp", "up_proj", "kernel")
    assert paths.without_run(last.path, last.stack) == joined
    assert paths.without_run(joined, ("model", "layers")) == joined
    assert paths.without_run(("lm_head", "kernel"), None) == ("lm_head", "kernel")


def test_only_nodes_with_a_common_leading_axis_are_stacked(llama):
    assert paths.stacked_nodes(llama) == [("model", "layers")]
    assert paths.stacked_nodes({"transformer": {"h": {"w": a(2, 3)}}}) == [("transformer", "h")]
    assert paths.stacked_nodes({"layers": {"0": {"w": a(2, 3)}, "1": {"w": a(2, 3)}}}) == []
    assert paths.stacked_nodes({"layers": {"v": a(2, 3), "w": a(4, 3)}}) == []
    assert paths.stacked_nodes({"layers": {"v": a(2), "w": a()}}) == []
    assert paths.stacked_nodes({"layers": {}}) == []
    nested = {"layers": {"block": {"layers": {"w": a(2, 3)}}}}
    assert paths.stacked_nodes(nested) == [("layers",)]
    assert paths.stacked_nodes({"h": a(2, 3)}) == []
    square = {"layers": {"dense": {"kernel": a(4, 4), "bias": a(4)}}}
    assert paths.stacked_nodes(square) == [], "one layer's kernel has two axes of its own"


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
    weight = SimpleNamespace(shape=(L, 4, 6))
    (leaf,) = paths.leaves({"h": {"q": {"kernel": weight}}})
    assert leaf.value is weight and leaf.shape == (4, 6)
