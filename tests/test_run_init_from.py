"""``lora.init_from``: settings that select what the folder's adapter has, and others."""

import pytest
from test_lora import make_params

from jlora.config import (
    Config,
    DataConfig,
    LoraConfig,
    ModelConfig,
    SourceConfig,
    TrainConfig,
)
from jlora.errors import ConfigError
from jlora.run.init_from import with_settings_of

Q_PROJ = "model.layers.{}.self_attn.q_proj"


def taken(folder, asked, tmp_path):
    """The run's ``lora`` section, given the adapter's fields and those that the run asks for."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}")
    config = Config(
        model=ModelConfig(name_or_path="base"),
        lora=LoraConfig(init_from=str(tmp_path), **asked),
        data=DataConfig(train=(SourceConfig(path=str(rows), format="messages"),)),
        train=TrainConfig(output_dir="out"),
    )
    return with_settings_of(config, LoraConfig(**folder), make_params()).lora


SAME = {
    "layers by number": (
        {"target_modules": [Q_PROJ.format(0), Q_PROJ.format(2)]},
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
    ),
    "ranks by pattern": (
        {"target_modules": ["q_proj", "v_proj"], "r": 4, "rank_pattern": {"v_proj": 16}},
        {"r": 16, "rank_pattern": {"q_proj": 4}},
    ),
    "another order": (
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["v_proj", "q_proj"]},
    ),
}


@pytest.mark.parametrize("case", SAME)
def test_settings_that_together_select_the_same_are_accepted(case, tmp_path):
    folder, asked = SAME[case]
    lora, adapter = taken(folder, asked, tmp_path), LoraConfig(**folder)
    for name in ("target_modules", "layers_to_transform", "r", "rank_pattern"):
        assert getattr(lora, name) == getattr(adapter, name)


def test_settings_that_together_select_less_are_refused(tmp_path):
    """In PEFT a module that is listed in full is adapted whatever layers_to_transform says."""
    folder = {"target_modules": [Q_PROJ.format(i) for i in range(3)]}
    asked = {"target_modules": ["q_proj"], "layers_to_transform": [0]}
    with pytest.raises(ConfigError) as caught:
        taken(folder, asked, tmp_path)
    assert caught.value.where == "lora.target_modules, lora.layers_to_transform"
