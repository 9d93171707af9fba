"""Targets beyond single names: expressions, parts of fused layers, and duplicates."""

import jax.numpy as jnp
import pytest
from test_lora import L, make_gpt2, make_params

from jlora.config import LoraConfig
from jlora.errors import ConfigError
from jlora.lora.targets import find_targets, is_replaced, match_table

C_ATTN = ("transformer", "h", "attn", "c_attn")


def found(params, **fields):
    _, targets = find_targets(params, LoraConfig(r=4, **fields))
    return {t.path: t.ranks for t in targets}


def test_an_expression_that_matches_a_fused_layer_targets_it_once():
    assert found(make_gpt2(), target_modules=r".*_(attn|proj)") == {C_ATTN: (4,) * L}
    first = found(make_gpt2(), target_modules=r".*\.0\.attn\..*_.*")
    assert first == {C_ATTN: (4, 0, 0)}


def test_parts_and_layers_that_would_train_twice_are_refused():
    twice = [
        {"target_modules": ["c_attn", "v_proj"]},
        {"target_modules": r".*\.(0\.attn\.c_attn|1\.attn\.q_proj)"},
        {"target_modules": ["q_proj"], "modules_to_save": ["c_attn"]},
    ]
    for fields in twice:
        with pytest.raises(ConfigError, match="would both be trained"):
            found(make_gpt2(), **fields)


@pytest.mark.parametrize("pattern", [r".*self_attn.*", r".*norm|.*q_proj", r"model.*"])
def test_an_expression_must_match_linear_layers_only(pattern):
    with pytest.raises(ConfigError, match="not a linear layer"):
        found(make_params(), target_modules=pattern)
    inside = found(make_params(), target_modules=r".*self_attn\..*")
    assert [path[-1] for path in inside] == ["q_proj", "v_proj"]


def test_biases_of_adapted_layers():
    config = LoraConfig(
        target_modules=("q_proj", "c_fc"), layers_to_transform=(1,), bias="lora_only"
    )
    takes = {name: is_replaced(config, name, "bias") for name in ("t.h.1.c_fc", "t.h.0.c_fc")}
    assert takes == {"t.h.1.c_fc": True, "t.h.0.c_fc": False}
    assert is_replaced(config, "t.h.1.attn.c_attn", "bias"), "a part of the fused layer is adapted"
    assert not is_replaced(config, "t.h.1.c_fc", "kernel")


def test_the_table_has_one_row_for_a_module_in_several_runs_of_layers():
    def layers(n):
        return {"self_attn": {"q_proj": {"kernel": jnp.zeros((n, 4, 6))}}}

    tree = {"model": {"layers": {"0-0": layers(1), "1-3": layers(3)}}}
    config = LoraConfig(
        target_modules=["q_proj"], r=2, rank_pattern={"layers.2.self_attn.q_proj": 5}
    )
    (row,) = match_table(find_targets(tree, config)[1])
    assert (row["module"], row["layers"]) == ("model.layers.*.self_attn.q_proj", 4)
    assert (row["r"], row["parameters"]) == ("2–5", 11 * 10)


def test_rows_name_the_layer_by_a_star_and_the_spread_of_ranks():
    _, targets = find_targets(
        make_gpt2(),
        LoraConfig(target_modules=["v_proj"], rank_pattern={r"h\.2\.attn\.v_proj": 2}),
    )
    (row,) = match_table(targets)
    assert (row["module"], row["r"]) == ("transformer.h.*.attn.v_proj", "2–8")
    plain = {"params": {"Dense_0": {"kernel": jnp.ones((3, 5))}}}
    (row,) = match_table(find_targets(plain, LoraConfig(target_modules=["Dense_0"]))[1])
    assert (row["module"], row["parameters"]) == ("params.Dense_0", 8 * (3 + 5))


def test_only_who_trains_a_tied_head_is_told_to_untie_it():
    params = make_params()
    del params["lm_head"]
    for fields, untie in (
        ({"target_modules": ["lm_head"]}, True),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, True),
        ({"target_modules": ["q_proj"], "exclude_modules": ["lm_head"]}, False),
        ({"target_modules": ["q_proj"], "rank_pattern": {"lm_head": 4}}, False),
    ):
        with pytest.raises(ConfigError, match="lm_head") as caught:
            find_targets(params, LoraConfig(**fields))
        assert ("untie it" in str(caught.value)) == untie, fields
        assert ("matches nothing" in str(caught.value)) != untie, fields
