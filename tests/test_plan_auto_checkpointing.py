"""``gradient_checkpointing: auto``: what is tried, what the forecast and a run take."""

import pytest
from tiny_plans import load, looked

from jlora.errors import ConfigError
from jlora.plan import target
from jlora.plan.auto_checkpointing import CPU_MARGIN, candidates, leaves_margin

AUTO = {"gradient_checkpointing": "auto"}


def ways(settings, platform):
    trains = [one.train for one in candidates(settings, platform)]
    return [(train.gradient_checkpointing, train.activation_offloading) for train in trains]


@pytest.mark.parametrize(
    ("asked", "platform", "tried"),
    [
        (AUTO, "cuda", [(False, False), (True, False), (True, True)]),
        (AUTO, "tpu", [(False, False), (True, False), (True, True)]),
        (AUTO, "cpu", [(False, False), (True, False)]),
        (AUTO | {"activation_offloading": True}, "cuda", [(True, True)]),
        ({"gradient_checkpointing": False}, "cuda", [(False, False)]),
        ({"activation_offloading": True}, "cpu", [(True, True)]),
    ],
)
def test_the_fastest_way_is_tried_first(place, asked, platform, tried):
    assert ways(load(place, train=asked), platform) == tried


def test_a_gpu_needs_a_smaller_margin_than_a_machine_with_other_programs():
    assert leaves_margin(95, 100, "gpu") and not leaves_margin(96, 100, "gpu")
    assert leaves_margin(50, 100, "cpu") and not leaves_margin(51, 100, "cpu")


@pytest.fixture
def peaks(place, standard_promotion):
    """The peak of the step without and with gradient checkpointing."""
    place.settings_for_loss()
    place.defaults["train"] = {"max_steps": 1, "logging_steps": 1}
    return [
        looked(load(place, train={"gradient_checkpointing": on}), 1, count_work=False).memory.peak
        for on in (False, True)
    ]


def test_a_run_and_its_forecast_take_the_first_that_fits_with_a_margin(
    place, peaks, monkeypatch, capsys
):
    off, on = peaks
    assert on < off, "or this test could not tell them apart"
    enough = int(off / (1 - CPU_MARGIN)) + 1
    for memory, expected in ((enough, False), (enough - 2, True), (on, True)):
        monkeypatch.setattr(target, "main_memory", lambda memory=memory: memory)
        result = looked(load(place, train=AUTO), 1, count_work=False)
        assert result.config.train.gradient_checkpointing == expected and result.fits
        place.run(train=AUTO | {"resume": "never"})
        text = "gradient checkpointing: " + ("on" if expected else "off")
        assert text in capsys.readouterr().out
    assert "gradient_checkpointing: auto" in (place.output / "config.yaml").read_text()


def test_nothing_fits_if_the_last_way_does_not(place, peaks, monkeypatch):
    monkeypatch.setattr(target, "main_memory", lambda: peaks[1] - 1)
    result = looked(load(place, train=AUTO), 1, count_work=False)
    assert result.config.train.gradient_checkpointing is True and not result.fits


def test_the_setting_is_read_from_yaml_and_the_command_line(place):
    assert load(place, "train.gradient_checkpointing=auto").train.gradient_checkpointing == "auto"
    with pytest.raises(ConfigError, match="auto, true or false"):
        load(place, "train.gradient_checkpointing=sometimes")
